// SPDX-License-Identifier: GPL-2.0-only
/*
 * Points in the log: "everything that was produced up to now".
 *
 * A point is the head of each ring and the number of an overflow sweep. It is
 * passed when everything up to it has been consumed. Taking one and asking for
 * it never waits for a reader or a producer.
 *
 * Why a sweep's number says what has become of the overflow. A sweep first
 * clears overflowed and then visits the whole map; a producer first notes in the
 * map and then sets overflowed. Take a note made before the point:
 *
 *  - overflowed is 1 at the point: some sweep with a number greater than
 *    sweeps_started will clear it, and that sweep starts after the note. The
 *    point needs sweep started + 1.
 *  - overflowed is 0: the sweep that cleared it did so after the note was made,
 *    so its visit finds the note. It is sweep sweeps_started or an earlier one.
 *    The point needs sweep started, which may be done already.
 *
 * Both numbers must be read as of one moment. Were a sweep to start between the
 * two reads, "1" could be added to the new count, and the point would wait for a
 * sweep that nobody has a reason to make; or "0" to the old count, and the point
 * would be passed too early, which loses data. Hence sweep_lock; no producer
 * ever takes it.
 */
#include <linux/cpumask.h>
#include <linux/export.h>
#include <linux/percpu.h>
#include <linux/slab.h>

#include "bufflink/internal.h"

/* Under channel->lock. */
void bufflink_sweep_start(struct bufflink_channel *channel)
{
	spin_lock(&channel->sweep_lock);
	channel->sweeps_started++;
	/* Full barrier: before any look into the map. See note_overflow(). */
	xchg(&channel->overflowed, 0);
	spin_unlock(&channel->sweep_lock);
}

/* The last records of the sweep are consumed. Under channel->lock. */
void bufflink_sweep_done(struct bufflink_channel *channel)
{
	spin_lock(&channel->sweep_lock);
	channel->sweeps_done = channel->sweeps_started;
	spin_unlock(&channel->sweep_lock);
}

u64 bufflink_mark_sweep(struct bufflink_channel *channel)
{
	u64 sweep;

	spin_lock(&channel->sweep_lock);
	sweep = channel->sweeps_started + !!READ_ONCE(channel->overflowed);
	spin_unlock(&channel->sweep_lock);
	return sweep;
}

bool bufflink_sweep_passed(struct bufflink_channel *channel, u64 sweep)
{
	bool passed;

	spin_lock(&channel->sweep_lock);
	passed = channel->sweeps_done >= sweep;
	spin_unlock(&channel->sweep_lock);
	return passed;
}

unsigned long bufflink_mark_position(struct bufflink_channel *channel,
				     unsigned int cpu)
{
	if (!cpu_possible(cpu))
		return 0;
	/* Pairs with what produces: not older than what we were told of. */
	return smp_load_acquire(&per_cpu_ptr(channel->rings, cpu)->head);
}

bool bufflink_position_passed(struct bufflink_channel *channel,
			      unsigned int cpu, unsigned long position)
{
	struct bufflink_ring *ring;

	if (!cpu_possible(cpu))
		return true;
	ring = per_cpu_ptr(channel->rings, cpu);
	return (long)(READ_ONCE(ring->consumed) - position) >= 0;
}

struct bufflink_mark *bufflink_mark_alloc(void)
{
	struct bufflink_mark *mark;

	return kzalloc(struct_size(mark, positions, nr_cpu_ids), GFP_KERNEL);
}
EXPORT_SYMBOL_GPL(bufflink_mark_alloc);

void bufflink_mark(struct bufflink_channel *channel,
		   struct bufflink_mark *mark)
{
	unsigned int cpu;

	for (cpu = 0; cpu < nr_cpu_ids; cpu++)
		mark->positions[cpu] = bufflink_mark_position(channel, cpu);
	mark->sweep = bufflink_mark_sweep(channel);
}
EXPORT_SYMBOL_GPL(bufflink_mark);

bool bufflink_mark_passed(struct bufflink_channel *channel,
			  const struct bufflink_mark *mark)
{
	unsigned int cpu;

	if (!bufflink_sweep_passed(channel, mark->sweep))
		return false;
	for (cpu = 0; cpu < nr_cpu_ids; cpu++)
		if (!bufflink_position_passed(channel, cpu,
					      mark->positions[cpu]))
			return false;
	return true;
}
EXPORT_SYMBOL_GPL(bufflink_mark_passed);
