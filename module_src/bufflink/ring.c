// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the producing path (produce.h) needs only now and then, and how the reader
 * empties a ring.
 *
 * It promises to the producer: no lock that another CPU could hold, no
 * allocation, no sleep, from task, softirq and hardirq context. Each ring has
 * one producer (its CPU with interrupts off) and one consumer (the reader, under
 * channel->lock), so two pairs of release and acquire are all the order needed:
 *
 *	producer                          reader
 *	write record                      load_acquire(head)
 *	store_release(head)               read record
 *	                                  store_release(tail)
 *	load_acquire(tail)
 *	overwrite the record
 *
 * The first pair prevents the reader from seeing a position before the bytes of
 * its record (a garbage record would hide a real one). The second prevents the
 * producer from overwriting a record that is still being copied out.
 */
#include <linux/export.h>
#include <linux/hardirq.h>
#include <linux/irqflags.h>
#include <linux/percpu.h>
#include <linux/poll.h>
#include <linux/string.h>

#include "bufflink/internal.h"

/*
 * Runs from an interrupt of its own, outside of whatever the producer was in the
 * middle of: waking a task takes scheduler locks that the producer (a completion
 * under such a lock) might already hold.
 *
 * The wake-up of a ring that fills is lazy, which means at the next tick of this
 * CPU, or at once if the CPU is idle and its tick stopped. A reader that was
 * woken for each record would cost an interrupt for each request, also while it
 * is awake and waits for a CPU, because it leaves the wait queue only when it
 * runs. Only a ring that is half full asks for the reader at once, and once.
 */
void bufflink_wake(struct irq_work *work)
{
	struct bufflink_wake *wake =
		container_of(work, struct bufflink_wake, work);

	wake_up_interruptible_poll(&wake->channel->wait, EPOLLIN | EPOLLRDNORM);
}

/* Interrupts off. */
static void wake_reader(struct bufflink_channel *channel,
			struct bufflink_wake *wake)
{
	if (bufflink_must_wake(channel, wake))
		irq_work_queue(&wake->work);
}

/*
 * Tell that the overflow map has something. The barrier orders the bit in the
 * map before the look at overflowed, and pairs with the one in
 * bufflink_sweep_start(): if overflowed is still read as 1 from before a sweep
 * cleared it, that sweep sees the bit. So the write can be spared, and a storm
 * of overflow does not bounce the cache line.
 */
static void note_overflow(struct bufflink_channel *channel,
			  struct bufflink_ring *ring)
{
	smp_mb(); /* the map before overflowed; bufflink_sweep_start() */
	if (!READ_ONCE(channel->overflowed))
		WRITE_ONCE(channel->overflowed, 1);
	wake_reader(channel, &ring->later);
}

void bufflink_overflowed(struct bufflink_channel *channel)
{
	unsigned long flags;

	local_irq_save(flags);
	note_overflow(channel, this_cpu_ptr(channel->rings));
	local_irq_restore(flags);
}
EXPORT_SYMBOL_GPL(bufflink_overflowed);

void bufflink_produce(struct bufflink_channel *channel, u64 first, u64 second)
{
	const struct bufflink_record record = { { first, second } };
	unsigned int limit = READ_ONCE(channel->limit);
	struct bufflink_ring *ring;
	unsigned long flags, used;

	local_irq_save(flags);
	ring = this_cpu_ptr(channel->rings);
	/* Before the slot is overwritten; pairs with bufflink_ring_take(). */
	used = ring->head - smp_load_acquire(&ring->tail);
	if (used < limit) {
		ring->records[ring->head & ring->mask] = record;
		/* After the record's bytes; pairs with bufflink_ring_take(). */
		smp_store_release(&ring->head, ring->head + 1);
		wake_reader(channel, used == limit / 2 ? &ring->now :
							 &ring->later);
	} else {
		WRITE_ONCE(ring->overflowed, ring->overflowed + 1);
		channel->ops->overflow(&record);
		note_overflow(channel, ring);
	}
	local_irq_restore(flags);
}
EXPORT_SYMBOL_GPL(bufflink_produce);

/*
 * Move at most max records out of a ring. Their room is free at once: from here
 * on they live in the pending batch. Under channel->lock.
 */
unsigned int bufflink_ring_take(struct bufflink_channel *channel,
				struct bufflink_ring *ring,
				struct bufflink_record *to, unsigned int max)
{
	unsigned long tail = ring->tail;
	/* Before the records' bytes; pairs with bufflink_try(), bufflink_produce(). */
	unsigned long head = smp_load_acquire(&ring->head);
	unsigned int index = tail & (channel->ring_records - 1);
	unsigned int count = min_t(unsigned long, head - tail, max);
	unsigned int first = min(count, channel->ring_records - index);

	memcpy(to, ring->records + index, first * sizeof(*to));
	memcpy(to + first, ring->records, (count - first) * sizeof(*to));
	/* After the copy: now the producer may overwrite them. */
	smp_store_release(&ring->tail, tail + count);
	return count;
}
