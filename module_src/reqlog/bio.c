// SPDX-License-Identifier: GPL-2.0-only
/*
 * From a bio of a bio-based disk (dm, md, zram, brd, nvme multipath head) to
 * records.
 *
 * It promises a record for each bio that was queued for such a disk after ATTACH
 * returned and that may have changed a sector, before its submitter is told. A
 * bio that was queued earlier completes without a record: whoever attaches has to
 * make sure that there is none, or that it is over before the first copy begins.
 *
 * Why bi_end_io is wrapped. Such a disk has no request whose completion could be
 * traced, and block_bio_complete does not do: it comes with what is left of the
 * bio's range, or under the name of a lower disk, or for a chained bio never. The
 * range is only sure when the bio is queued, and its completion is only sure
 * where the submitter is told. So at block_bio_queue range, bi_end_io and
 * bi_private are put into a wrapper, and come back before bi_end_io is called.
 * Whatever a driver does to the bio in between nests in this: it saves what it
 * finds in the two fields and puts it back, as it must for any submitter.
 *
 * A bio that was split is wrapped as a whole (the pieces are its children), one
 * that is submitted again in place (raid0) stays wrapped and is wrapped once more
 * if the lower disk is attached, too, and a clone that a driver makes for a lower
 * disk is a bio of its own, traced there.
 *
 * Chains. bio_chain_endio() may not be called (newer kernels BUG() in it), and it
 * would recurse: each parent of a long zero-out is wrapped, too. What it does is
 * done here, and the parents are ended one after the other from a list for each
 * CPU and context, however long the chain is.
 *
 * Memory. A wrapper comes from a pool with a reserve; the probe may not sleep.
 * When even the reserve is used up the bio is let through without, and all
 * attachments of the disk are BLIND for ever: their owner must compare.
 *
 * The end. A wrapped bio may be in flight for long after DETACH. Its record finds
 * no attachment then, but its end is our code: so the module stays pinned until
 * none is in flight, and the unload waits for the last ones to leave the code.
 */
#include <linux/bio.h>
#include <linux/mempool.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/tracepoint.h>
#include <trace/events/block.h>

#include "reqlog/reqlog.h"

/* What is in flight at most when no memory is to be had: 64 KiB. */
#define RESERVED_WRAPPERS	1024

struct wrapper {
	struct wrapper *next;		/* in the list of ending chains */
	struct gendisk *disk;		/* only ever compared */
	bio_end_io_t *end_io;
	void *private;
	sector_t sector;
	u32 nr_sectors;
	u8 op;
};

/* Task, softirq, hardirq: what interrupts a loop has a loop of its own. */
#define CONTEXTS	3

struct ending {
	struct wrapper *first[CONTEXTS];
	bool busy[CONTEXTS];
};

static DEFINE_PER_CPU(struct ending, endings);
static DEFINE_PER_CPU(long, in_flight);
static struct tracepoint *bio_queue;
static struct tracepoint *bio_remap;
static bio_end_io_t *chain_end_io;
static mempool_t *wrappers;

/* Under reqlog_lock. */
static unsigned int users;
static bool pinned;

static unsigned int context(void)
{
	if (compat_in_hardirq())
		return 2;
	return in_serving_softirq() ? 1 : 0;
}

/*
 * A child has ended and is put; its parent may be complete by that, and is then
 * the child of another parent. bio_endio() comes back here in this case, finds
 * the loop busy, and leaves the next parent to it.
 *
 * The task stays on its CPU while it is in the loop. What it calls is what
 * drivers call from interrupts, so it does not sleep.
 */
static void end_parent(struct wrapper *wrapper)
{
	unsigned int level = context();
	struct ending *ending;
	struct bio *parent;

	preempt_disable();
	ending = this_cpu_ptr(&endings);
	wrapper->next = ending->first[level];
	ending->first[level] = wrapper;
	if (!ending->busy[level]) {
		ending->busy[level] = true;
		while (ending->first[level]) {
			wrapper = ending->first[level];
			ending->first[level] = wrapper->next;
			parent = wrapper->private;
			mempool_free(wrapper, wrappers);
			bio_endio(parent);
			this_cpu_dec(in_flight);
		}
		ending->busy[level] = false;
	}
	preempt_enable();
}

static void wrapped_end_io(struct bio *bio)
{
	struct wrapper *wrapper = bio->bi_private;
	bio_end_io_t *end_io = wrapper->end_io;
	struct bio *parent;

	reqlog_log_disk(wrapper->disk, wrapper->sector, wrapper->nr_sectors,
			wrapper->op, !!bio->bi_status);
	bio->bi_end_io = end_io;
	bio->bi_private = wrapper->private;
	if (end_io == chain_end_io) {
		parent = wrapper->private;
		if (bio->bi_status && !parent->bi_status)
			parent->bi_status = bio->bi_status;
		bio_put(bio);
		end_parent(wrapper);
		return;
	}
	mempool_free(wrapper, wrappers);
	if (end_io)
		end_io(bio);
	/* Last: end_io may sleep (newer kernels), and returns to this code. */
	this_cpu_dec(in_flight);
}

/*
 * The sector is absolute: a bio for a partition has been moved already. The probe
 * runs with preemption disabled.
 */
static void wrap(struct bio *bio)
{
	struct gendisk *disk = compat_bio_disk(bio);
	u32 nr_sectors = DIV_ROUND_UP(bio->bi_iter.bi_size, SECTOR_SIZE);
	struct wrapper *wrapper;

	if (!op_is_write(bio->bi_opf) || !nr_sectors ||
	    !reqlog_wants_bio(disk, bio->bi_iter.bi_sector, nr_sectors))
		return;
	wrapper = mempool_alloc(wrappers, GFP_NOWAIT | __GFP_NOWARN);
	if (!wrapper) {
		reqlog_blind(disk);
		return;
	}
	this_cpu_inc(in_flight);
	wrapper->disk = disk;
	wrapper->sector = bio->bi_iter.bi_sector;
	wrapper->nr_sectors = nr_sectors;
	wrapper->op = reqlog_op(bio_op(bio));
	wrapper->end_io = bio->bi_end_io;
	wrapper->private = bio->bi_private;
	bio->bi_private = wrapper;
	bio->bi_end_io = wrapped_end_io;
}

static void probe_bio_queue(void *unused, bio_queue_args(struct bio *bio))
{
	wrap(bio);
}

/*
 * A driver that submits a bio again in place, for a lower disk (md raid0 and
 * linear): block_bio_queue does not come a second time, and the lower disk may be
 * the one that is attached. A bio that has not been queued before is left to the
 * other probe. For a lower partition this comes twice, first with the sector in
 * the partition: one record too many.
 */
static void probe_bio_remap(void *unused, bio_queue_args(struct bio *bio),
			    dev_t dev, sector_t from)
{
	if (bio_flagged(bio, BIO_TRACE_COMPLETION))
		wrap(bio);
}

static void match_bio_tracepoint(struct tracepoint *tp, void *unused)
{
	if (!strcmp(tp->name, "block_bio_queue"))
		bio_queue = tp;
	if (!strcmp(tp->name, "block_bio_remap"))
		bio_remap = tp;
}

/*
 * Once. The function that ends a chained bio is not exported, but bio_chain()
 * writes its address into a bio.
 */
static int prepare(void)
{
	struct bio *pair;

	check_trace_callback_type_block_bio_queue(probe_bio_queue);
	check_trace_callback_type_block_bio_remap(probe_bio_remap);
	if (wrappers)
		return 0;
	for_each_kernel_tracepoint(match_bio_tracepoint, NULL);
	if (!bio_queue || !bio_remap)
		return -EOPNOTSUPP;
	pair = kcalloc(2, sizeof(*pair), GFP_KERNEL);
	if (!pair)
		return -ENOMEM;
	bio_chain(&pair[0], &pair[1]);
	chain_end_io = pair[0].bi_end_io;
	kfree(pair);
	wrappers = mempool_create_kmalloc_pool(RESERVED_WRAPPERS,
					       sizeof(struct wrapper));
	return wrappers ? 0 : -ENOMEM;
}

/* Sum of all CPUs. Once nobody wraps any more it only falls: 0 is for good. */
static bool none_in_flight(void)
{
	long sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(*per_cpu_ptr(&in_flight, cpu));
	return !sum;
}

/* Under reqlog_lock. Attachments of bio-based disks come and go. */
int reqlog_bio_start(void)
{
	int err;

	if (users) {
		users++;
		return 0;
	}
	err = prepare();
	if (err)
		return err;
	err = tracepoint_probe_register(bio_queue, probe_bio_queue, NULL);
	if (err)
		return err;
	err = tracepoint_probe_register(bio_remap, probe_bio_remap, NULL);
	if (err) {
		tracepoint_probe_unregister(bio_queue, probe_bio_queue, NULL);
		tracepoint_synchronize_unregister();
		return err;
	}
	users = 1;
	if (!pinned)
		__module_get(THIS_MODULE);
	pinned = true;
	return 0;
}

void reqlog_bio_stop(void)
{
	if (--users)
		return;
	tracepoint_probe_unregister(bio_remap, probe_bio_remap, NULL);
	tracepoint_probe_unregister(bio_queue, probe_bio_queue, NULL);
	tracepoint_synchronize_unregister();
}

/* Under reqlog_lock. Let the module go when nothing needs its code any more. */
void reqlog_bio_reap(void)
{
	if (!pinned || users || !none_in_flight())
		return;
	pinned = false;
	module_put(THIS_MODULE);
}

/*
 * At unload, with nothing in flight: the last ones may still be between their
 * decrement and their return. They are in no interrupt after the first grace
 * period, and in no task after the second, because nothing there sleeps.
 */
void reqlog_bio_exit(void)
{
	if (!wrappers)
		return;
	synchronize_rcu();
	synchronize_rcu_tasks();
	mempool_destroy(wrappers);
}
