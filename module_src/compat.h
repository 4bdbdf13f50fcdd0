/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every difference between kernels, 5.10 to the newest, under the name that the
 * newest kernel has or would have. No other file has an #if, and nothing here
 * looks at a version number: Kbuild looked into the headers.
 */
#ifndef _BMIGRATE_COMPAT_H
#define _BMIGRATE_COMPAT_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/fs.h>
#include <linux/preempt.h>
#ifdef HAVE_GENHD_H
#include <linux/genhd.h>
#endif

#include <scsi/scsi_cmnd.h>
#ifdef HAVE_SCSI_REQUEST
#include <scsi/scsi_request.h>
#endif

#include "uapi/bufflink.h"
#include "uapi/reqlog.h"

/* A build for tests pretends to another ABI; all else stays as it is. */
#ifdef BMIGRATE_ABI
#undef BUFFLINK_ABI
#undef REQLOG_ABI
#define BUFFLINK_ABI BMIGRATE_ABI
#define REQLOG_ABI BMIGRATE_ABI
#endif

/* What the tracepoint block_rq_complete calls the outcome; 0 is success. */
#ifdef HAVE_RQ_COMPLETE_STATUS
#define rq_complete_status_t blk_status_t
#else
#define rq_complete_status_t int
#endif

/* What bio_op() and req_op() give. */
#ifdef HAVE_ENUM_REQ_OP
#define req_op_t enum req_op
#else
#define req_op_t unsigned int
#endif

/* The disk of a request. NULL for a queue without one, so test it. */
static inline struct gendisk *compat_rq_disk(struct request *rq)
{
#ifdef HAVE_RQ_DISK
	return rq->rq_disk;
#else
	return rq->q->disk;
#endif
}

/* A number that no other disk has or had since boot; 0: kernel has none. */
static inline u64 compat_diskseq(struct gendisk *disk)
{
#ifdef HAVE_DISKSEQ
	return disk->diskseq;
#else
	return 0;
#endif
}

static inline struct gendisk *compat_bio_disk(struct bio *bio)
{
#ifdef HAVE_BIO_BDEV
	return bio->bi_bdev->bd_disk;
#else
	return bio->bi_disk;
#endif
}

/* Pages may be written to the disk without a bio (swap, ext2, fat). */
static inline bool compat_has_rw_page(struct gendisk *disk)
{
#ifdef HAVE_RW_PAGE
	return disk->fops->rw_page;
#else
	return false;
#endif
}

/* What the tracepoint block_bio_queue says before the bio. */
#ifdef HAVE_BIO_QUEUE_QUEUE
#define bio_queue_args(bio)	struct request_queue *unused_queue, bio
#else
#define bio_queue_args(bio)	bio
#endif

#ifdef in_hardirq
#define compat_in_hardirq()	in_hardirq()
#else
#define compat_in_hardirq()	in_irq()
#endif

/* A command for a SCSI disk: its bytes, at least 16. */
static inline const u8 *compat_scsi_command(struct request *rq)
{
#ifdef HAVE_SCSI_REQUEST
	return scsi_req(rq)->cmd;
#else
	return ((struct scsi_cmnd *)blk_mq_rq_to_pdu(rq))->cmnd;
#endif
}

static inline bool compat_is_write_same(req_op_t op)
{
#ifdef HAVE_WRITE_SAME
	return op == REQ_OP_WRITE_SAME;
#else
	return false;
#endif
}

#endif
