// SPDX-License-Identifier: GPL-2.0-only
/*
 * From a completed request to records.
 *
 * It promises a record for each sector of an attached volume that the request
 * may have changed, before the request's bios end. It must never sleep, allocate
 * or take a lock: it runs in hardirq context on every completion of the host,
 * and for a disk that nobody attached it must cost next to nothing.
 *
 * The tracepoint block_rq_complete fires in blk_update_request() and in its
 * batched variant, the two places where a request's bios end: with the request
 * as it is before this completion (position, bytes and bios that are left), the
 * outcome, and the bytes that this completion is about. It may fire several
 * times for a request.
 */
#include <linux/ata.h>
#include <linux/device.h>
#include <linux/percpu.h>
#include <linux/rculist.h>
#include <linux/tracepoint.h>
#include <scsi/scsi_proto.h>
#include <trace/events/block.h>

#include "bufflink/produce.h"
#include "reqlog/reqlog.h"

static struct tracepoint *rq_complete;

u8 reqlog_op(req_op_t op)
{
	switch (op) {
	case REQ_OP_WRITE:
		return REQLOG_OP_WRITE;
	case REQ_OP_DISCARD:
		return REQLOG_OP_DISCARD;
	case REQ_OP_SECURE_ERASE:
		return REQLOG_OP_SECURE_ERASE;
	case REQ_OP_WRITE_ZEROES:
		return REQLOG_OP_WRITE_ZEROES;
	default:
		break;
	}
	if (compat_is_write_same(op))
		return REQLOG_OP_WRITE_SAME;
	return REQLOG_OP_MIXED;
}

static __always_inline u64 reqlog_word(u64 word)
{
	return (__force u64)cpu_to_le64(word);
}

static __always_inline u64 second_word(struct reqlog_attachment *att,
				       u32 nr_sectors, u8 op, u8 flags)
{
	return reqlog_word(nr_sectors | att->slot_word |
			   (u64)op << REQLOG_OP_SHIFT |
			   (u64)flags << REQLOG_FLAGS_SHIFT);
}

/*
 * One range of a request, against one attachment. What is outside of a partition
 * is not the volume's. What is behind the known end of a whole disk is: the disk
 * has grown since, and the entry's flag says so. Interrupts off.
 */
static noinline void log_range(struct reqlog_attachment *att,
			       sector_t sector, u64 nr_sectors, u8 op,
			       bool failed)
{
	struct reqlog_counts __percpu *counts = att->counts;
	sector_t end = sector + nr_sectors;

	sector = max(sector, att->start);
	if (att->partition)
		end = min(end, att->end);
	if (sector >= end)
		return;
	if (end > att->end) {
		this_cpu_inc(counts->beyond);
		set_bit(REQLOG_MARK_BEYOND, &att->marks);
	}

	this_cpu_inc(counts->ops[op]);
	this_cpu_add(counts->sectors, end - sector);
	if (failed)
		this_cpu_inc(counts->failed);
	bufflink_produce(reqlog_channel, reqlog_word(sector),
			 second_word(att, end - sector, op,
				     failed ? REQLOG_FAILED : 0));
}

/*
 * The same for a write that succeeded, lies in the volume, and finds room in the
 * ring. Else false: nothing was done.
 */
static __always_inline bool log_plain(struct reqlog_attachment *att,
				      struct bufflink_ring *ring,
				      sector_t sector, u64 nr_sectors)
{
	if (unlikely(sector < att->start || sector + nr_sectors > att->end) ||
	    unlikely(!bufflink_try(reqlog_channel, ring, reqlog_word(sector),
				   reqlog_word(att->write_word | nr_sectors))))
		return false;
	this_cpu_inc(att->counts->ops[REQLOG_OP_WRITE]);
	this_cpu_add(att->counts->sectors, nr_sectors);
	return true;
}

/* Something that no range describes: everything may have changed. */
static void log_all(struct reqlog_attachment *att, bool failed)
{
	this_cpu_inc(att->counts->passthrough);
	if (failed)
		this_cpu_inc(att->counts->failed);
	reqlog_map_mark_all(att, failed);
	bufflink_overflowed(reqlog_channel);
}

/*
 * A request of merged discards has no single range: its bios may lie anywhere
 * on the disk, and position and length of the request are those of the first bio
 * and the sum of all. So each bio is a record. Recorded again if only a part of
 * them ends here, which does no harm.
 */
static void log_bios(struct reqlog_attachment *att, struct request *rq, u8 op,
		     bool failed)
{
	struct bio *bio;

	__rq_for_each_bio(bio, rq)
		log_range(att, bio->bi_iter.bi_sector,
			  DIV_ROUND_UP(bio->bi_iter.bi_size, SECTOR_SIZE), op,
			  failed);
}

static void log_request(struct reqlog_attachment *att, struct request *rq,
			bool failed, unsigned int nr_bytes)
{
	u8 op = reqlog_op(req_op(rq));

	/*
	 * After an error, and for a completion of "0 bytes", what has reached
	 * the medium is unknown: take all that is left of the request. A flush
	 * without data has nothing left, and makes no record.
	 */
	if (failed || !nr_bytes)
		nr_bytes = max(nr_bytes, blk_rq_bytes(rq));

	switch (op) {
	case REQLOG_OP_MIXED:
		/* Zone resets, and whatever future kernels think of. */
		log_all(att, failed);
		break;
	case REQLOG_OP_DISCARD:
	case REQLOG_OP_SECURE_ERASE:
		if (rq->bio) {
			log_bios(att, rq, op, failed);
			break;
		}
		fallthrough;
	default:
		log_range(att, blk_rq_pos(rq),
			  DIV_ROUND_UP(nr_bytes, SECTOR_SIZE), op, failed);
	}
}

/*
 * A command that somebody sent past the block layer (SG_IO, nvme-cli). Its
 * position means nothing and may be all ones. One that brings data from the
 * device, such as asking for a serial number, changes nothing. One that sends
 * data may write anywhere, and one without data may be a format or an erase.
 */
static bool passthrough_may_write(struct request *rq)
{
	return op_is_write(rq->cmd_flags) || !blk_rq_bytes(rq);
}

/* The commands of ATA for the state of the drive, which smartd asks for. */
static bool ata_changes_nothing(u8 command)
{
	switch (command) {
	case ATA_CMD_CHK_POWER:
	case ATA_CMD_FLUSH:
	case ATA_CMD_FLUSH_EXT:
	case ATA_CMD_IDLE:
	case ATA_CMD_IDLEIMMEDIATE:
	case ATA_CMD_SMART:
	case ATA_CMD_STANDBY:
	case ATA_CMD_STANDBYNOW1:
		return true;
	default:
		return false;
	}
}

/*
 * Commands that bring no data from the disk and change none. Some are sd's own,
 * whenever a writer closes the disk (udev has the partitions read again), others
 * come from a daemon every few minutes: to take them for a format would make a
 * volume dirty all over each time.
 */
static bool scsi_changes_nothing(struct request *rq)
{
	const u8 *command = compat_scsi_command(rq);

	switch (command[0]) {
	case TEST_UNIT_READY:
	case START_STOP:
	case ALLOW_MEDIUM_REMOVAL:
	case SYNCHRONIZE_CACHE:
	case SYNCHRONIZE_CACHE_16:
	case PERSISTENT_RESERVE_OUT:
		return true;
	case ATA_12:
		return ata_changes_nothing(command[9]);
	case ATA_16:
		return ata_changes_nothing(command[14]);
	default:
		return false;
	}
}

/*
 * Whom a command is for that completes on this queue: that is sure only for the
 * disk that has the queue. (Not by rq->rq_disk: for a command through sg that was
 * sg's own, before 5.17.)
 *
 * A command through a disk of the device mapper completes on one of the disks
 * below, and nothing tells whom it came through: each is for all of the device
 * mapper's. In the same way a command through an nvme multipath head completes on
 * one of its hidden paths, and is for all heads of the driver.
 */
static bool may_be_for(struct reqlog_attachment *att, struct gendisk *disk,
		       struct request_queue *queue)
{
	if (att->disk->queue == queue || att->dm)
		return true;
	return disk->flags & GENHD_FL_HIDDEN && att->bio_based &&
	       att->driver == disk->fops->owner;
}

static void log_passthrough(struct gendisk *disk, struct request *rq,
			    bool failed)
{
	struct reqlog_attachment *att;

	if (!passthrough_may_write(rq) ||
	    (reqlog_disk_is_scsi(disk) && scsi_changes_nothing(rq)))
		return;
	rcu_read_lock_sched();
	list_for_each_entry_rcu(att, &reqlog_attached, node) {
		if (may_be_for(att, disk, rq->q))
			log_all(att, failed);
	}
	rcu_read_unlock_sched();
}

/*
 * The list is walked with interrupts off, which is an RCU section too, and what a
 * record needs anyway. The attachment's reference keeps the disk's memory, so an
 * equal pointer is the same disk. DETACH waits for this section to end.
 *
 * A write that succeeded has a way of its own, because nearly all are, and each
 * of them would pay for what the others need. What is not plain about it comes
 * here: the attachments behind one that has been served, and before that, if it
 * has not, this one itself. At the end the reader is woken if he must be, because
 * one that was served may have left that to us.
 */
static noinline void log_rest(struct gendisk *disk, sector_t sector,
			      u64 nr_sectors, unsigned long flags,
			      struct reqlog_attachment *att, bool served)
{
	struct bufflink_ring *ring;

	if (!served)
		log_range(att, sector, nr_sectors, REQLOG_OP_WRITE, false);
	list_for_each_entry_continue_rcu(att, &reqlog_attached, node) {
		if (att->disk == disk)
			log_range(att, sector, nr_sectors, REQLOG_OP_WRITE,
				  false);
	}
	ring = this_cpu_ptr(reqlog_channel->rings);
	if (bufflink_must_wake(reqlog_channel, &ring->later))
		irq_work_queue(&ring->later.work);
	local_irq_restore(flags);
}

/* Without a call but in its last lines: it needs next to no frame. */
static __always_inline void log_written(struct gendisk *disk, sector_t sector,
					u64 nr_sectors)
{
	struct reqlog_attachment *att;
	struct bufflink_ring *ring;
	unsigned long flags;

	local_irq_save(flags);
	list_for_each_entry_rcu(att, &reqlog_attached, node) {
		if (att->disk != disk)
			continue;
		ring = this_cpu_ptr(reqlog_channel->rings);
		if (unlikely(!log_plain(att, ring, sector, nr_sectors))) {
			log_rest(disk, sector, nr_sectors, flags, att, false);
			return;
		}
		if (unlikely(bufflink_must_wake(reqlog_channel, &ring->later))) {
			log_rest(disk, sector, nr_sectors, flags, att, true);
			return;
		}
	}
	local_irq_restore(flags);
}

static noinline void log_other(struct gendisk *disk, struct request *rq,
			       bool failed, unsigned int nr_bytes)
{
	struct reqlog_attachment *att;
	unsigned long flags;

	if (blk_rq_is_passthrough(rq)) {
		log_passthrough(disk, rq, failed);
		return;
	}
	if (!op_is_write(rq->cmd_flags))
		return;

	local_irq_save(flags);
	list_for_each_entry_rcu(att, &reqlog_attached, node) {
		if (att->disk == disk)
			log_request(att, rq, failed, nr_bytes);
	}
	local_irq_restore(flags);
}

static void probe_rq_complete(void *unused, struct request *rq,
			      rq_complete_status_t error, unsigned int nr_bytes)
{
	struct gendisk *disk = compat_rq_disk(rq);

	if (!disk)
		return;
	if (likely(req_op(rq) == REQ_OP_WRITE && !error && nr_bytes))
		log_written(disk, blk_rq_pos(rq),
			    DIV_ROUND_UP(nr_bytes, SECTOR_SIZE));
	else if (req_op(rq) != REQ_OP_READ)
		log_other(disk, rq, !!error, nr_bytes);
}

bool reqlog_wants_bio(struct gendisk *disk, sector_t sector, u64 nr_sectors)
{
	struct reqlog_attachment *att;
	bool found = false;

	rcu_read_lock();
	list_for_each_entry_rcu(att, &reqlog_attached, node) {
		found |= att->disk == disk && att->bio_based &&
			 sector + nr_sectors > att->start &&
			 (!att->partition || sector < att->end);
	}
	rcu_read_unlock();
	return found;
}

/*
 * md raid0 splits a secure erase once, at the end of its first chunk, and hands
 * all the rest to one member (seen on 6.1): other sectors of the array are
 * erased than those that the bio says.
 */
static bool has_no_range(struct reqlog_attachment *att, u8 op)
{
	return op == REQLOG_OP_MIXED ||
	       (op == REQLOG_OP_SECURE_ERASE && att->md);
}

void reqlog_log_disk(struct gendisk *disk, sector_t sector, u64 nr_sectors,
		     u8 op, bool failed)
{
	struct reqlog_attachment *att;
	unsigned long flags;

	local_irq_save(flags);
	list_for_each_entry_rcu(att, &reqlog_attached, node) {
		if (att->disk != disk || !att->bio_based)
			continue;
		if (has_no_range(att, op))
			log_all(att, failed);
		else
			log_range(att, sector, nr_sectors, op, failed);
	}
	local_irq_restore(flags);
}

void reqlog_blind(struct gendisk *disk)
{
	struct reqlog_attachment *att;

	rcu_read_lock();
	list_for_each_entry_rcu(att, &reqlog_attached, node) {
		if (att->disk == disk && att->bio_based)
			set_bit(REQLOG_MARK_BLIND, &att->marks);
	}
	rcu_read_unlock();
}

static void match_rq_tracepoint(struct tracepoint *tp, void *unused)
{
	if (!strcmp(tp->name, "block_rq_complete"))
		rq_complete = tp;
}

/*
 * By name, because the tracepoint is not exported. The compiler checks the probe
 * against the kernel's own prototype: a kernel that changed it does not build.
 */
int reqlog_probe_find(void)
{
	check_trace_callback_type_block_rq_complete(probe_rq_complete);

	for_each_kernel_tracepoint(match_rq_tracepoint, NULL);
	if (!rq_complete) {
		pr_err("reqlog: this kernel has no tracepoint block_rq_complete\n");
		return -ENOENT;
	}
	return 0;
}

/* Under reqlog_lock, before the first attachment is in the list. */
int reqlog_probe_start(void)
{
	return tracepoint_probe_register(rq_complete, probe_rq_complete, NULL);
}

/*
 * Under reqlog_lock, after the last attachment has left the list. Calls may
 * still be under way when this returns; they find an empty list.
 */
void reqlog_probe_stop(void)
{
	tracepoint_probe_unregister(rq_complete, probe_rq_complete, NULL);
}
