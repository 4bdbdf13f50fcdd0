// SPDX-License-Identifier: GPL-2.0-only
/*
 * The producing path, and how the reader empties a ring.
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

unsigned int bufflink_ring_limit(const struct bufflink_channel *channel)
{
	unsigned int limit = READ_ONCE(*channel->ring_limit);

	if (!limit || limit > channel->ring_records)
		return channel->ring_records;
	return limit;
}

static void *ring_slot(const struct bufflink_channel *channel,
		       const struct bufflink_ring *ring, unsigned long position)
{
	unsigned long index = position & (channel->ring_records - 1);

	return ring->records + index * channel->record_bytes;
}

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

/*
 * Under way already: it will run on this CPU, after our interrupts-off section,
 * so it comes after the record, and there is nothing more to do.
 *
 * wq_has_sleeper() has a full barrier between the producer's write of head or
 * overflowed and the look at the wait queue. The reader puts itself on the queue,
 * then a full barrier, then looks at head and overflowed. So either the reader
 * sees the record or the producer sees the reader; no wake-up is lost.
 */
static __always_inline void wake_reader(struct bufflink_channel *channel,
					struct bufflink_wake *wake)
{
	if (atomic_read(&wake->work.node.a_flags) & IRQ_WORK_PENDING)
		return;
	if (wq_has_sleeper(&channel->wait))
		irq_work_queue(&wake->work);
}

/*
 * Tell that the overflow map has something. The barrier orders the bit in the
 * map before the look at overflowed, and pairs with the one in
 * bufflink_sweep_start(): if overflowed is still read as 1 from before a sweep
 * cleared it, that sweep sees the bit. So the write can be spared, and a storm
 * of overflow does not bounce the cache line.
 */
static void note_overflow(struct bufflink_channel *channel)
{
	smp_mb(); /* the map before overflowed; bufflink_sweep_start() */
	if (!READ_ONCE(channel->overflowed))
		WRITE_ONCE(channel->overflowed, 1);
}

void bufflink_overflowed(struct bufflink_channel *channel)
{
	unsigned long flags;

	local_irq_save(flags);
	note_overflow(channel);
	wake_reader(channel, &this_cpu_ptr(channel->rings)->later);
	local_irq_restore(flags);
}
EXPORT_SYMBOL_GPL(bufflink_overflowed);

/* Records are whole words; a call of memcpy() would cost more than the copy. */
static __always_inline void put_record(u64 *to, const u64 *from,
				       unsigned int bytes)
{
	unsigned int i;

	for (i = 0; i < bytes / sizeof(*to); i++)
		to[i] = from[i];
}

void bufflink_produce(struct bufflink_channel *channel, const void *record)
{
	unsigned long flags, head, used;
	struct bufflink_ring *ring;
	struct bufflink_wake *wake;
	unsigned int limit;

	local_irq_save(flags);
	ring = this_cpu_ptr(channel->rings);
	wake = &ring->later;
	head = ring->head;
	/* Before the slot is overwritten; pairs with bufflink_ring_take(). */
	used = head - smp_load_acquire(&ring->tail);
	limit = bufflink_ring_limit(channel);
	if (likely(used < limit)) {
		put_record(ring_slot(channel, ring, head), record,
			   channel->record_bytes);
		/* After the record's bytes; pairs with bufflink_ring_take(). */
		smp_store_release(&ring->head, head + 1);
		if (unlikely(used == limit / 2))
			wake = &ring->now;
	} else {
		WRITE_ONCE(ring->overflowed, ring->overflowed + 1);
		channel->ops->overflow(record);
		note_overflow(channel);
	}
	wake_reader(channel, wake);
	local_irq_restore(flags);
}
EXPORT_SYMBOL_GPL(bufflink_produce);

/*
 * Move at most max records out of a ring. Their room is free at once: from here
 * on they live in the pending batch. Under channel->lock.
 */
unsigned int bufflink_ring_take(struct bufflink_channel *channel,
				struct bufflink_ring *ring, void *to,
				unsigned int max)
{
	unsigned long tail = ring->tail;
	/* Before the records' bytes; pairs with bufflink_produce(). */
	unsigned long head = smp_load_acquire(&ring->head);
	unsigned int index = tail & (channel->ring_records - 1);
	unsigned int count = min_t(unsigned long, head - tail, max);
	unsigned int first = min(count, channel->ring_records - index);

	memcpy(to, ring_slot(channel, ring, tail),
	       (size_t)first * channel->record_bytes);
	memcpy(to + (size_t)first * channel->record_bytes, ring->records,
	       (size_t)(count - first) * channel->record_bytes);
	/* After the copy: now the producer may overwrite them. */
	smp_store_release(&ring->tail, tail + count);
	return count;
}
