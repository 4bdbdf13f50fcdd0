/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The parts of a channel, shared by the files of bufflink and by nobody else.
 * Who may write which field is said beside it; the order of writes that matters
 * is explained where they are made.
 */
#ifndef _BUFFLINK_INTERNAL_H
#define _BUFFLINK_INTERNAL_H

#include <linux/irq_work.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "bufflink/bufflink.h"
#include "compat.h"

/* Most records in a batch: half a megabyte of 16-byte records. */
#define BUFFLINK_BATCH_RECORDS	32768U
/* Less makes no progress when overflow and rings share a batch. */
#define BUFFLINK_BATCH_MIN	2U

/* What wakes the reader, see bufflink_wake(). */
struct bufflink_wake {
	struct irq_work work;
	struct bufflink_channel *channel;
};

/*
 * One ring for each possible CPU. head, tail and consumed only grow; they wrap
 * with unsigned long and are compared by difference.
 *
 *	consumed <= tail <= head,  head - tail <= ring_records
 *
 * [tail, head) is in the ring, [consumed, tail) is in the pending batch.
 */
struct bufflink_ring {
	/* Written by the producer, on the ring's own CPU, interrupts off. */
	unsigned long head;
	unsigned long overflowed;
	void *records;
	struct bufflink_wake later;	/* at the next tick */
	struct bufflink_wake now;

	/* Written by the reader, under channel->lock. */
	unsigned long tail ____cacheline_aligned_in_smp;
	unsigned long consumed;
};

/* The batch that was made last and is not consumed yet; count 0: none. */
struct bufflink_pending {
	u64 seq;
	u32 count;
	u32 flags;
	bool ends_sweep;	/* the last records of a sweep are in it */
	void *records;
};

struct bufflink_channel {
	/* Never changed after creation. */
	const struct bufflink_ops *ops;
	struct module *owner;
	const unsigned int *ring_limit;
	unsigned int record_bytes;
	unsigned int ring_records;
	u64 id;
	char name[BUFFLINK_NAME_BYTES];
	char device_name[BUFFLINK_NAME_BYTES + 10];
	char node_name[BUFFLINK_NAME_BYTES + 10];
	struct miscdevice misc;
	struct bufflink_ring __percpu *rings;

	/* Set by producers after they noted overflow, cleared by a sweep. */
	unsigned int overflowed;
	wait_queue_head_t wait;

	/* Makes "clear overflowed, count the sweep" one step for barriers. */
	spinlock_t sweep_lock;
	u64 sweeps_started;
	u64 sweeps_done;

	/* The reader's side. */
	struct mutex lock;
	unsigned long opened;		/* bit 0: there is a reader */
	bool sweeping;
	unsigned int next_cpu;		/* whose ring is emptied first */
	u64 delivered_seq;		/* last batch this open file got */
	struct bufflink_pending pending;
	u64 widened;
	u64 batches;
	u64 handed;
	u64 repeated;
	u64 consumed;
	u64 consumed_records;
};

/* ring.c */
unsigned int bufflink_ring_limit(const struct bufflink_channel *channel);
void bufflink_wake(struct irq_work *work);
unsigned int bufflink_ring_take(struct bufflink_channel *channel,
				struct bufflink_ring *ring, void *to,
				unsigned int max);

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
