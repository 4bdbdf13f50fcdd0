// SPDX-License-Identifier: GPL-2.0-only
/*
 * Making a batch, and forgetting it.
 *
 * It promises that a batch, once made, stays as it is until it is consumed, and
 * that no second one is made meanwhile. All here runs under channel->lock,
 * except bufflink_readable().
 */
#include <linux/cpumask.h>
#include <linux/percpu.h>

#include "bufflink/internal.h"

/*
 * Would a read find something? Without locks, for poll and for sleeping: the
 * answer may be out of date at once, but it may never be "no" when the caller
 * is on the wait queue and something was there before it looked (see
 * bufflink_must_wake()). A "yes" for a sweep that turns out empty is harmless.
 */
bool bufflink_readable(struct bufflink_channel *channel)
{
	struct bufflink_ring *ring;
	int cpu;

	if (READ_ONCE(channel->pending.count) ||
	    READ_ONCE(channel->overflowed) || READ_ONCE(channel->sweeping))
		return true;
	for_each_possible_cpu(cpu) {
		ring = per_cpu_ptr(channel->rings, cpu);
		if (READ_ONCE(ring->head) != READ_ONCE(ring->tail))
			return true;
	}
	return false;
}

/* Up to max records of the overflow map, as one more step of a sweep. */
static unsigned int take_overflow(struct bufflink_channel *channel,
				  struct bufflink_record *to, unsigned int max)
{
	bool finished = false;
	unsigned int count;

	if (!channel->sweeping) {
		if (!READ_ONCE(channel->overflowed))
			return 0;
		bufflink_sweep_start(channel);
		WRITE_ONCE(channel->sweeping, true);
	}
	count = channel->ops->harvest(to, max, &finished);
	if (finished) {
		WRITE_ONCE(channel->sweeping, false);
		channel->pending.ends_sweep = true;
	}
	channel->widened += count;
	return count;
}

/* Round robin between the CPUs, so that a busy one cannot starve another. */
static unsigned int take_rings(struct bufflink_channel *channel,
			       struct bufflink_record *to, unsigned int max)
{
	unsigned int i, cpu, taken, count = 0;

	for (i = 0; i < nr_cpu_ids && count < max; i++) {
		cpu = (channel->next_cpu + i) % nr_cpu_ids;
		if (!cpu_possible(cpu))
			continue;
		taken = bufflink_ring_take(channel,
					   per_cpu_ptr(channel->rings, cpu),
					   to + count, max - count);
		count += taken;
	}
	channel->next_cpu = (channel->next_cpu + 1) % nr_cpu_ids;
	return count;
}

/*
 * Make a batch of at most max records, if there is anything. The overflow gets
 * at most half of the room, the rings the rest: neither can keep the other from
 * ever coming out, so a barrier is always passed in the end.
 */
void bufflink_batch_build(struct bufflink_channel *channel, unsigned int max)
{
	struct bufflink_pending *pending = &channel->pending;
	unsigned int count;

	pending->flags = 0;
	pending->ends_sweep = false;
	count = take_overflow(channel, pending->records, max / 2);
	if (count)
		pending->flags |= BUFFLINK_BATCH_WIDENED;
	count += take_rings(channel, pending->records + count, max - count);
	if (!count) {
		/* A sweep that found no more leaves nothing to consume. */
		if (pending->ends_sweep)
			bufflink_sweep_done(channel);
		return;
	}
	pending->seq++;
	channel->batches++;
	WRITE_ONCE(pending->count, count);
}

/*
 * The reader has made the batch safe. Only the batch that this very open file
 * was given may be named: a reader that guesses a number, or one that comes
 * back with the number of an older batch, must not make the kernel forget
 * records that it never saw.
 */
int bufflink_batch_consume(struct bufflink_channel *channel, u64 seq)
{
	struct bufflink_pending *pending = &channel->pending;
	struct bufflink_ring *ring;
	int cpu;

	if (!pending->count || seq != pending->seq ||
	    seq != channel->delivered_seq)
		return -ESTALE;

	channel->consumed++;
	channel->consumed_records += pending->count;
	/*
	 * No batch was made since this one, so everything up to each tail was
	 * in it or before it.
	 */
	for_each_possible_cpu(cpu) {
		ring = per_cpu_ptr(channel->rings, cpu);
		WRITE_ONCE(ring->consumed, ring->tail);
	}
	if (pending->ends_sweep)
		bufflink_sweep_done(channel);
	WRITE_ONCE(pending->count, 0);
	return 0;
}
