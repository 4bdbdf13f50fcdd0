// SPDX-License-Identifier: GPL-2.0-only
/*
 * The coarse map: where a record goes when its CPU's ring is full.
 *
 * It promises that a region, once noted, comes out of the channel as a record
 * with the flag WIDENED, and again if it is noted again after it came out. All
 * memory is taken at ATTACH. Noting is setting bits, in any context.
 *
 * Two bits for each region, `set` and `failed`. A producer sets failed first and
 * then set; the harvest clears set first and then failed. So the harvest that
 * takes a region also takes its error, unless a producer is in between: then set
 * follows, and the error comes out with the next harvest of the region.
 *
 * A region is cleared when it moves into a batch. A write that completes later
 * sets it anew; one that completed earlier, and found the bit still set, is on
 * the device before the reader even gets the batch. So nothing is missed, and
 * the batch, which stays until CONSUMED, is the only place that needs to
 * remember what was handed out.
 */
#include <linux/bitmap.h>
#include <linux/log2.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/vmalloc.h>

#include "reqlog/reqlog.h"

/* Where the sweep goes on: slot and region. Under reqlog_lock. */
static unsigned int cursor_slot;
static unsigned long cursor_region;

int reqlog_map_alloc(struct reqlog_attachment *att, u32 region_bytes)
{
	u64 sectors = att->end - att->start;
	u64 regions;

	if (!is_power_of_2(region_bytes) || region_bytes < REQLOG_REGION_MIN ||
	    region_bytes > REQLOG_REGION_MAX)
		return -EINVAL;
	att->region_shift = ilog2(region_bytes) - SECTOR_SHIFT;
	regions = (sectors + (1ULL << att->region_shift) - 1) >>
		  att->region_shift;
	if (regions > REQLOG_MAX_REGIONS)
		return -EINVAL;
	att->regions = regions;
	att->bits = regions + !att->partition;
	att->set = vzalloc(BITS_TO_LONGS(att->bits) * sizeof(long));
	att->failed = vzalloc(BITS_TO_LONGS(att->bits) * sizeof(long));
	return att->set && att->failed ? 0 : -ENOMEM;
}

void reqlog_map_free(struct reqlog_attachment *att)
{
	vfree(att->set);
	vfree(att->failed);
}

/*
 * The fast path, the bit being set already, must not skip the order: see above.
 * With an error the atomic operation, a full barrier, is always done.
 */
static void note_region(struct reqlog_attachment *att, unsigned long region,
			bool failed)
{
	if (failed)
		set_bit(region, att->failed);
	else if (test_bit(region, att->set))
		return;
	if (!test_and_set_bit(region, att->set))
		atomic64_inc(&att->regions_set);
}

/* Called by bufflink inside of the probe's RCU section, interrupts off. */
static void note_record(const struct bufflink_record *words)
{
	const struct reqlog_record *record = (const void *)words;
	bool failed = record->flags & REQLOG_FAILED;
	u64 sector = le64_to_cpu(record->sector);
	u64 end = sector + le32_to_cpu(record->nr_sectors);
	struct reqlog_attachment *att =
		reqlog_slot_rcu(le16_to_cpu(record->slot));
	unsigned long region, last;

	this_cpu_inc(att->counts->overflowed);
	if (end > att->end) {
		note_region(att, att->regions, failed);
		end = att->end;
	}
	if (sector >= end)
		return;
	last = (end - 1 - att->start) >> att->region_shift;
	for (region = (sector - att->start) >> att->region_shift;
	     region <= last; region++)
		note_region(att, region, failed);
}

/* Any context. The caller tells bufflink afterwards. */
void reqlog_map_mark_all(struct reqlog_attachment *att, bool failed)
{
	if (failed)
		set_bit(REQLOG_MARK_ALL_FAILED, &att->marks);
	/* A full barrier: the harvest that takes ALL sees the error. */
	test_and_set_bit(REQLOG_MARK_ALL, &att->marks);
}

/*
 * Set the first n bits. Others set bits at the same time, so whole words are
 * overwritten with ones, and the last bits are set one by one: a plain |= could
 * undo the neighbour's bit.
 */
static void fill(unsigned long *map, unsigned long n)
{
	unsigned long i;

	for (i = 0; i < n / BITS_PER_LONG; i++)
		WRITE_ONCE(map[i], ~0UL);
	for (i *= BITS_PER_LONG; i < n; i++)
		set_bit(i, map);
}

/* "Everything" becomes regions, where it can wait for room in a batch. */
static void spread_all(struct reqlog_attachment *att)
{
	unsigned long before;

	if (!test_and_clear_bit(REQLOG_MARK_ALL, &att->marks))
		return;
	if (test_and_clear_bit(REQLOG_MARK_ALL_FAILED, &att->marks))
		fill(att->failed, att->regions);
	before = bitmap_weight(att->set, att->regions);
	/* After the errors: see the top. */
	smp_wmb();
	fill(att->set, att->regions);
	atomic64_add(att->regions - before, &att->regions_set);
}

static bool take_region(struct reqlog_attachment *att, unsigned long region,
			bool *failed)
{
	if (!test_and_clear_bit(region, att->set))
		return false;
	att->regions_harvested++;
	if (test_and_clear_bit(region, att->failed))
		*failed = true;
	return true;
}

/*
 * The next run of set regions as one record, false if there is none left. An
 * error in one of them is told of the whole run: more, never less.
 */
static bool take_run(struct reqlog_attachment *att,
		     struct reqlog_record *record)
{
	unsigned long longest = (1UL << 31) >> att->region_shift;
	unsigned long first, next;
	bool failed = false;
	u64 sector, end;

	first = find_next_bit(att->set, att->bits, cursor_region);
	if (first >= att->bits)
		return false;
	/* Only the harvest clears bits: it is still set. */
	take_region(att, first, &failed);
	next = first + 1;
	if (first == att->regions) {
		sector = att->end;
		end = sector + U32_MAX;
	} else {
		while (next < att->regions && next - first < longest &&
		       take_region(att, next, &failed))
			next++;
		sector = att->start + ((u64)first << att->region_shift);
		end = min_t(u64, att->end,
			    att->start + ((u64)next << att->region_shift));
	}
	cursor_region = next;

	record->sector = cpu_to_le64(sector);
	record->nr_sectors = cpu_to_le32(end - sector);
	record->slot = cpu_to_le16(att->slot);
	record->op = REQLOG_OP_MIXED;
	record->flags = REQLOG_WIDENED | (failed ? REQLOG_FAILED : 0);
	return true;
}

/*
 * One step of a sweep over all slots. An attachment that comes while a sweep is
 * under way may be passed over: what it notes asks for a sweep of its own. One
 * that goes has been harvested before it is freed (reqlog_reap()).
 */
static unsigned int harvest(struct bufflink_record *records, unsigned int max,
			    bool *finished)
{
	struct reqlog_record *record = (void *)records;
	struct reqlog_attachment *att;
	unsigned int count = 0;

	mutex_lock(&reqlog_lock);
	while (count < max && cursor_slot < REQLOG_MAX_SLOTS) {
		att = reqlog_slot(cursor_slot);
		if (att && !cursor_region)
			spread_all(att);
		if (att && take_run(att, record + count)) {
			count++;
			continue;
		}
		cursor_slot++;
		cursor_region = 0;
		cond_resched();
	}
	*finished = cursor_slot == REQLOG_MAX_SLOTS;
	if (*finished)
		cursor_slot = 0;
	mutex_unlock(&reqlog_lock);
	return count;
}

const struct bufflink_ops reqlog_overflow_ops = {
	.overflow = note_record,
	.harvest = harvest,
};
