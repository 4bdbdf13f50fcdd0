/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The producing path of nearly every record, inline: it is a part of each write
 * on the host, and a call with its frame would cost as much as all that it does.
 *
 * The structures are here because the inline function looks into them. They
 * belong to bufflink; nobody else touches a field. Who may write which one is
 * said beside it; why the order of writes is right is said in ring.c.
 */
#ifndef _BUFFLINK_PRODUCE_H
#define _BUFFLINK_PRODUCE_H

#include <linux/irq_work.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "bufflink/bufflink.h"
#include "uapi/bufflink.h"

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
	struct bufflink_record *records;
	unsigned long mask;		/* of a position: its record */
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
	struct bufflink_record *records;
};

struct bufflink_channel {
	/* Never changed after creation. */
	const struct bufflink_ops *ops;
	struct module *owner;
	unsigned int ring_records;
	u64 id;
	char name[BUFFLINK_NAME_BYTES];
	char device_name[BUFFLINK_NAME_BYTES + 10];
	char node_name[BUFFLINK_NAME_BYTES + 10];
	struct miscdevice misc;
	struct bufflink_ring __percpu *rings;

	/* Records of each ring that may be used, and half of them. */
	unsigned int limit;
	unsigned long half;

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

/*
 * Is the reader to be woken? Not if that is under way already: it will run on this
 * CPU, after our interrupts-off section, so it comes after the record.
 *
 * wq_has_sleeper() has a full barrier between the producer's write of head or
 * overflowed and the look at the wait queue. The reader puts itself on the queue,
 * then a full barrier, then looks at head and overflowed. So either the reader
 * sees the record or the producer sees the reader; no wake-up is lost.
 */
static __always_inline bool bufflink_must_wake(struct bufflink_channel *channel,
					       struct bufflink_wake *wake)
{
	return !(atomic_read(&wake->work.node.a_flags) & IRQ_WORK_PENDING) &&
	       wq_has_sleeper(&channel->wait);
}

/*
 * A record, if its CPU's ring is less than half full, which it nearly always is:
 * else false, and nothing was done. Interrupts off. Has no call in it, so that a
 * caller without one needs no frame. Afterwards bufflink_must_wake() is asked.
 */
static __always_inline bool bufflink_try(struct bufflink_channel *channel,
					 struct bufflink_ring *ring,
					 u64 first, u64 second)
{
	unsigned long head = ring->head;
	struct bufflink_record *record;

	/* Before the slot is overwritten; pairs with bufflink_ring_take(). */
	if (unlikely((long)(smp_load_acquire(&ring->tail) +
			    READ_ONCE(channel->half) - head) <= 0))
		return false;
	record = &ring->records[head & ring->mask];
	record->words[0] = first;
	record->words[1] = second;
	/* After the record's bytes; pairs with bufflink_ring_take(). */
	smp_store_release(&ring->head, head + 1);
	return true;
}

#endif
