/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The parts of a channel, shared by the files of bufflink and by nobody else.
 * Who may write which field is said beside it; the order of writes that matters
 * is explained where they are made.
 */
#ifndef _BUFFLINK_INTERNAL_H
#define _BUFFLINK_INTERNAL_H

#include "bufflink/produce.h"
#include "compat.h"

/* Most records in a batch: half a megabyte of 16-byte records. */
#define BUFFLINK_BATCH_RECORDS	32768U
/* Less makes no progress when overflow and rings share a batch. */
#define BUFFLINK_BATCH_MIN	2U

/* ring.c */
void bufflink_wake(struct irq_work *work);
unsigned int bufflink_ring_take(struct bufflink_channel *channel,
				struct bufflink_ring *ring,
				struct bufflink_record *to, unsigned int max);

/* batch.c: all but bufflink_readable() under channel->lock */
bool bufflink_readable(struct bufflink_channel *channel);
void bufflink_batch_build(struct bufflink_channel *channel, unsigned int max);
int bufflink_batch_consume(struct bufflink_channel *channel, u64 seq);

/* barrier.c */
u64 bufflink_mark_sweep(struct bufflink_channel *channel);
unsigned long bufflink_mark_position(struct bufflink_channel *channel,
				     unsigned int cpu);
bool bufflink_sweep_passed(struct bufflink_channel *channel, u64 sweep);
bool bufflink_position_passed(struct bufflink_channel *channel,
			      unsigned int cpu, unsigned long position);
void bufflink_sweep_start(struct bufflink_channel *channel);
void bufflink_sweep_done(struct bufflink_channel *channel);

/* chardev.c */
int bufflink_chardev_register(struct bufflink_channel *channel);
void bufflink_chardev_unregister(struct bufflink_channel *channel);

#endif
