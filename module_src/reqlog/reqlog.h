/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The parts of an attachment, shared by the files of reqlog and by nobody else.
 *
 * Two lists know an attachment: `attached` (RCU) is what the probe walks, slots[]
 * is what the rest looks into. DETACH takes it off the first at once; the second
 * keeps it until its last record has been consumed, because its overflow map may
 * still have something and its slot number is in records under way.
 */
#ifndef _REQLOG_H
#define _REQLOG_H

#include <linux/atomic.h>
#include <linux/list.h>
#include <linux/mutex.h>

#include "bufflink/bufflink.h"
#include "compat.h"

/* The second word of a record: struct reqlog_record behind its sector. */
#define REQLOG_SLOT_SHIFT	32
#define REQLOG_OP_SHIFT		48
#define REQLOG_FLAGS_SHIFT	56

struct reqlog_counts {
	u64 ops[REQLOG_OP_WRITE_SAME + 1];
	u64 sectors;
	u64 failed;
	u64 passthrough;
	u64 beyond;
	u64 overflowed;
};

/* attachment->marks: what overflowed without having a region of its own. */
#define REQLOG_MARK_ALL		0	/* every region */
#define REQLOG_MARK_ALL_FAILED	1	/* and with an error */
#define REQLOG_MARK_BEYOND	2	/* ever written behind the end; sticky */
#define REQLOG_MARK_BLIND	3	/* a bio could not be wrapped; sticky */

struct reqlog_attachment {
	struct list_head node;		/* in reqlog_attached, RCU */

	/* Never changed after ATTACH. */
	struct gendisk *disk;		/* referenced until DETACH */
	struct module *driver;		/* of the disk, same */
	sector_t start;			/* absolute on the disk */
	sector_t end;			/* first sector after it */
	bool partition;
	bool bio_based;
	bool dm;			/* hands commands down */
	bool md;			/* may erase other sectors than told */
	unsigned int slot;
	u64 slot_word;			/* its place in a record's second word */
	u64 write_word;			/* the same of a write */
	unsigned int region_shift;	/* region = sector >> region_shift */
	unsigned long regions;
	u64 id;
	u64 diskseq;
	dev_t dev;
	struct module *adapter;		/* below a SCSI disk, held like driver */
	char disk_name[REQLOG_DISK_BYTES];

	/*
	 * The overflow map: a bit for each region, and for a whole disk one
	 * more for what lies behind the known end. Set by the probe on any CPU,
	 * cleared by the harvest.
	 */
	unsigned long bits;
	unsigned long *set;
	unsigned long *failed;
	unsigned long marks;
	atomic64_t regions_set;
	u64 regions_harvested;		/* under reqlog_lock */

	struct reqlog_counts __percpu *counts;

	bool draining;			/* under reqlog_lock */
	struct bufflink_mark *mark;	/* the log's end at DETACH */
};

/* main.c */
extern struct bufflink_channel *reqlog_channel;

/* attach.c */
extern struct mutex reqlog_lock;	/* slots[], and all that may sleep */
extern struct list_head reqlog_attached;
struct reqlog_attachment *reqlog_slot(unsigned int slot);	/* reqlog_lock */
struct reqlog_attachment *reqlog_slot_rcu(unsigned int slot);
struct reqlog_attachment *reqlog_find(unsigned int slot, u64 id);
void reqlog_reap(void);
int reqlog_attach(struct reqlog_attach *request);
int reqlog_detach(const struct reqlog_detach *request);
void reqlog_free_all(void);

/* identity.c */
int reqlog_identify(struct reqlog_attachment *att, struct reqlog_attach *request,
		    struct file *file);
bool reqlog_disk_gone(const struct reqlog_attachment *att);
bool reqlog_disk_is_scsi(struct gendisk *disk);

/* probe.c */
u8 reqlog_op(req_op_t op);
/* Any context. The attachments of a bio-based disk: a range, what was not seen. */
bool reqlog_wants_bio(struct gendisk *disk, sector_t sector, u64 nr_sectors);
void reqlog_log_disk(struct gendisk *disk, sector_t sector, u64 nr_sectors,
		     u8 op, bool failed);
void reqlog_blind(struct gendisk *disk);
int reqlog_probe_find(void);
int reqlog_probe_start(void);
void reqlog_probe_stop(void);

/* bio.c; all but exit under reqlog_lock */
int reqlog_bio_start(void);
void reqlog_bio_stop(void);
void reqlog_bio_reap(void);
void reqlog_bio_exit(void);

/* overflow.c */
int reqlog_map_alloc(struct reqlog_attachment *att, u32 region_bytes);
void reqlog_map_free(struct reqlog_attachment *att);
void reqlog_map_mark_all(struct reqlog_attachment *att, bool failed);
extern const struct bufflink_ops reqlog_overflow_ops;

/* control.c */
int reqlog_control_register(void);
void reqlog_control_unregister(void);

#endif
