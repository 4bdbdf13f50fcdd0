// SPDX-License-Identifier: GPL-2.0-only
/*
 * A disk in memory for tests: what no emulated disk offers. Never for anything
 * else.
 *
 * It promises that each command it offers can be seen in what the disk holds
 * afterwards (a discarded sector gets a content of its own, a securely erased one
 * another), that a sector's new content appears no earlier than just before the
 * completion that reports it, and that the content can be read at any time.
 *
 * Parameters, in /sys/module/bmtest/parameters:
 *
 *	delay_us	how long a write takes at least (in steps of a jiffy)
 *	partial		1: of each write of more than a sector, the first half
 *			completes at once and the rest later
 *	fail_every	n: every n-th write reports an error
 *	fail_changes	1: after it has changed the disk, 0: without having done so
 *	retry_every	n: every n-th write does the first half, is queued again,
 *			and then does all of it
 *
 * and, to be read only, how often each thing was done since the module was loaded.
 */
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#ifdef HAVE_GENHD_H
#include <linux/genhd.h>
#endif
#include <linux/module.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#define DISCARDED	0xd5
#define ERASED		0x5e
#define RANGES		64

static unsigned int size_mib = 24;
module_param(size_mib, uint, 0444);
static unsigned int delay_us;
module_param(delay_us, uint, 0644);
static bool partial;
module_param(partial, bool, 0644);
static unsigned int fail_every;
module_param(fail_every, uint, 0644);
static bool fail_changes = true;
module_param(fail_changes, bool, 0644);
static unsigned int retry_every;
module_param(retry_every, uint, 0644);

/* Only the queue's one thread changes them. */
static unsigned long writes, fua_writes, zeroes, discards, erases, partials, failures, retries;
module_param(writes, ulong, 0444);
module_param(fua_writes, ulong, 0444);
module_param(zeroes, ulong, 0444);
module_param(discards, ulong, 0444);
module_param(erases, ulong, 0444);
module_param(partials, ulong, 0444);
module_param(failures, ulong, 0444);
module_param(retries, ulong, 0444);

/* What a request carries from the queue to the thread. */
struct command {
	struct delayed_work work;
	bool second;		/* the rest of a write, or its retry */
};

/* The disk and its partitions. */
#define MINORS 16

static u8 *medium;
static int major;
static struct gendisk *disk;
static struct blk_mq_tag_set tags;
static struct workqueue_struct *thread;

/* The next `bytes` of the request, between its pages and the disk. */
static void transfer(struct request *rq, size_t bytes)
{
	u8 *at = medium + (blk_rq_pos(rq) << SECTOR_SHIFT);
	struct req_iterator iter;
	struct bio_vec bvec;

	rq_for_each_segment(bvec, rq, iter) {
		size_t length = min_t(size_t, bvec.bv_len, bytes);
		u8 *memory = page_address(bvec.bv_page) + bvec.bv_offset;

		if (req_op(rq) == REQ_OP_READ)
			memcpy(memory, at, length);
		else
			memcpy(at, memory, length);
		at += length;
		bytes -= length;
	}
}

/* Merged discards have no single range. */
static void fill_bios(struct request *rq, int pattern)
{
	struct bio *bio;

	__rq_for_each_bio(bio, rq)
		memset(medium + (bio->bi_iter.bi_sector << SECTOR_SHIFT), pattern,
		       bio->bi_iter.bi_size);
}

static size_t half(struct request *rq)
{
	return (blk_rq_sectors(rq) / 2) << SECTOR_SHIFT;
}

static void later(struct request *rq)
{
	struct command *command = blk_mq_rq_to_pdu(rq);

	queue_delayed_work(thread, &command->work, usecs_to_jiffies(delay_us));
}

static void write_some(struct request *rq)
{
	struct command *command = blk_mq_rq_to_pdu(rq);

	if (!command->second) {
		writes++;
		fua_writes += !!(rq->cmd_flags & REQ_FUA);
		if (fail_every && !(writes % fail_every)) {
			failures++;
			if (fail_changes)
				transfer(rq, blk_rq_bytes(rq));
			blk_mq_end_request(rq, BLK_STS_IOERR);
			return;
		}
		if (retry_every && !(writes % retry_every)) {
			retries++;
			command->second = true;
			transfer(rq, half(rq));
			blk_mq_requeue_request(rq, true);
			return;
		}
		if (partial && half(rq)) {
			partials++;
			command->second = true;
			transfer(rq, half(rq));
			blk_update_request(rq, BLK_STS_OK, half(rq));
			later(rq);
			return;
		}
	}
	transfer(rq, blk_rq_bytes(rq));
	blk_mq_end_request(rq, BLK_STS_OK);
}

static void carry_out(struct work_struct *work)
{
	struct command *command = container_of(to_delayed_work(work), struct command, work);
	struct request *rq = blk_mq_rq_from_pdu(command);

	switch (req_op(rq)) {
	case REQ_OP_WRITE:
		write_some(rq);
		return;
	case REQ_OP_READ:
		transfer(rq, blk_rq_bytes(rq));
		break;
	case REQ_OP_WRITE_ZEROES:
		zeroes++;
		fill_bios(rq, 0);
		break;
	case REQ_OP_DISCARD:
		discards++;
		fill_bios(rq, DISCARDED);
		break;
	case REQ_OP_SECURE_ERASE:
		erases++;
		fill_bios(rq, ERASED);
		break;
	case REQ_OP_FLUSH:
		break;
	default:
		blk_mq_end_request(rq, BLK_STS_NOTSUPP);
		return;
	}
	blk_mq_end_request(rq, BLK_STS_OK);
}

static blk_status_t queue_rq(struct blk_mq_hw_ctx *hctx, const struct blk_mq_queue_data *data)
{
	struct request *rq = data->rq;
	struct command *command = blk_mq_rq_to_pdu(rq);

	if (!(rq->rq_flags & RQF_DONTPREP)) {
		rq->rq_flags |= RQF_DONTPREP;
		command->second = false;
	}
	INIT_DELAYED_WORK(&command->work, carry_out);
	blk_mq_start_request(rq);
	if (op_is_write(req_op(rq)))
		later(rq);
	else
		queue_delayed_work(thread, &command->work, 0);
	return BLK_STS_OK;
}

static const struct blk_mq_ops queue_ops = { .queue_rq = queue_rq };
static const struct block_device_operations disk_ops = { .owner = THIS_MODULE };

/* Every difference between kernels is in the four functions that follow. */
#ifdef HAVE_ALLOC_DISK_LIMITS
static int make_disk(void)
{
	struct queue_limits limits = {
		.logical_block_size = SECTOR_SIZE,
		.features = BLK_FEAT_WRITE_CACHE | BLK_FEAT_FUA,
		.max_hw_discard_sectors = UINT_MAX >> SECTOR_SHIFT,
		.max_secure_erase_sectors = UINT_MAX >> SECTOR_SHIFT,
		.max_write_zeroes_sectors = UINT_MAX >> SECTOR_SHIFT,
		.max_discard_segments = RANGES,
		.discard_granularity = SECTOR_SIZE,
	};

	disk = blk_mq_alloc_disk(&tags, &limits, NULL);
	return PTR_ERR_OR_ZERO(disk);
}
#else
static void set_limits(struct request_queue *queue)
{
	blk_queue_logical_block_size(queue, SECTOR_SIZE);
	blk_queue_write_cache(queue, true, true);
	blk_queue_max_discard_sectors(queue, UINT_MAX >> SECTOR_SHIFT);
	blk_queue_max_discard_segments(queue, RANGES);
	blk_queue_max_write_zeroes_sectors(queue, UINT_MAX >> SECTOR_SHIFT);
	queue->limits.discard_granularity = SECTOR_SIZE;
#ifdef HAVE_SECURE_ERASE_SECTORS
	blk_queue_max_secure_erase_sectors(queue, UINT_MAX >> SECTOR_SHIFT);
#else
	blk_queue_flag_set(QUEUE_FLAG_DISCARD, queue);
	blk_queue_flag_set(QUEUE_FLAG_SECERASE, queue);
#endif
}

static int make_disk(void)
{
#ifdef HAVE_BLK_MQ_ALLOC_DISK
	disk = blk_mq_alloc_disk(&tags, NULL);
	if (IS_ERR(disk))
		return PTR_ERR(disk);
#else
	struct request_queue *queue = blk_mq_init_queue(&tags);

	if (IS_ERR(queue))
		return PTR_ERR(queue);
	disk = alloc_disk(MINORS);
	if (!disk) {
		blk_cleanup_queue(queue);
		return -ENOMEM;
	}
	disk->queue = queue;
#endif
	set_limits(disk->queue);
	return 0;
}
#endif

static int show_disk(void)
{
#ifdef HAVE_ADD_DISK_ERROR
	return add_disk(disk);
#else
	add_disk(disk);
	return 0;
#endif
}

static void drop_disk(void)
{
#ifndef HAVE_BLK_MQ_ALLOC_DISK
	blk_cleanup_queue(disk->queue);
#endif
	put_disk(disk);
}

static int __init bmtest_init(void)
{
	u64 bytes = (u64)size_mib << 20;
	int err = -ENOMEM;

	BUILD_BUG_ON(!IS_ENABLED(CONFIG_64BIT));	/* page_address() of any page */
	medium = vzalloc(bytes);
	if (!medium)
		return err;
	/* One at a time, so that the counts are right; a reclaim may need it. */
	thread = alloc_ordered_workqueue("bmtest", WQ_MEM_RECLAIM);
	if (!thread)
		goto free;
	major = err = register_blkdev(0, "bmtest");
	if (err < 0)
		goto end_thread;
	tags.ops = &queue_ops;
	tags.nr_hw_queues = 1;
	tags.queue_depth = 64;
	tags.numa_node = NUMA_NO_NODE;
	tags.cmd_size = sizeof(struct command);
#ifdef HAVE_SHOULD_MERGE
	tags.flags = BLK_MQ_F_SHOULD_MERGE;
#endif
	err = blk_mq_alloc_tag_set(&tags);
	if (err)
		goto unregister;
	err = make_disk();
	if (err)
		goto free_tags;
	disk->major = major;
	disk->first_minor = 0;
	disk->minors = MINORS;
	disk->fops = &disk_ops;
	strscpy(disk->disk_name, "bmtest0", sizeof(disk->disk_name));
	set_capacity(disk, bytes >> SECTOR_SHIFT);
	err = show_disk();
	if (!err)
		return 0;
	drop_disk();
free_tags:
	blk_mq_free_tag_set(&tags);
unregister:
	unregister_blkdev(major, "bmtest");
end_thread:
	destroy_workqueue(thread);
free:
	vfree(medium);
	return err;
}

static void __exit bmtest_exit(void)
{
	del_gendisk(disk);
	drop_disk();
	blk_mq_free_tag_set(&tags);
	unregister_blkdev(major, "bmtest");
	destroy_workqueue(thread);
	vfree(medium);
}

module_init(bmtest_init);
module_exit(bmtest_exit);
MODULE_DESCRIPTION("A disk in memory that fails, delays and erases on request; for tests only");
MODULE_LICENSE("GPL");
