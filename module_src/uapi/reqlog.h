/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * reqlog: which sectors of the attached volumes were written.
 *
 * This file promises the layout of the records in /dev/bufflink/reqlog and of
 * the ioctls of /dev/reqlog. It must never change a layout or a meaning without
 * raising REQLOG_ABI.
 *
 * A volume (a whole disk or a partition) is attached by an open file of its
 * block device. The attachment stays until DETACH, whoever made it: it outlives
 * the control file, the reader and the program. Its random id tells a program
 * that comes back whether it is still the same attachment.
 */
#ifndef _UAPI_REQLOG_H
#define _UAPI_REQLOG_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define REQLOG_ABI		1
#define REQLOG_CHANNEL		"reqlog"
#define REQLOG_MAX_SLOTS	1024
#define REQLOG_DISK_BYTES	32

/* One per completed request and attachment that it touches; little-endian. */
struct reqlog_record {
	__le64 sector;		/* 512 bytes, absolute on the whole disk */
	__le32 nr_sectors;	/* ~0: up to the end of the disk, and beyond */
	__le16 slot;
	__u8   op;		/* REQLOG_OP_*: a statistic, never a reason */
	__u8   flags;		/* REQLOG_WIDENED, REQLOG_FAILED */
};

#define REQLOG_OP_MIXED		0	/* a widened record: anything */
#define REQLOG_OP_WRITE		1
#define REQLOG_OP_DISCARD	2
#define REQLOG_OP_SECURE_ERASE	3
#define REQLOG_OP_WRITE_ZEROES	4
#define REQLOG_OP_WRITE_SAME	5

#define REQLOG_WIDENED		1	/* covers more than was written */
#define REQLOG_FAILED		2	/* a request in it had an error */

/* Why ATTACH was refused; set also when the ioctl fails. */
#define REQLOG_REASON_NONE	0
#define REQLOG_REASON_NOT_BLOCK	1	/* fd is not of a block device */
#define REQLOG_REASON_DEV	2	/* another device number */
#define REQLOG_REASON_SIZE	3	/* another size */
#define REQLOG_REASON_DISKSEQ	4	/* another disk under the same number */
#define REQLOG_REASON_BIO_BASED	5	/* needs REQLOG_ATTACH_BIO; never with PREEMPT_RT */
#define REQLOG_REASON_ZONED	6	/* zoned disk: not supported */
#define REQLOG_REASON_GONE	7	/* the disk is being removed */
#define REQLOG_REASON_ATTACHED	8	/* slot and id say as what */
#define REQLOG_REASON_NO_SLOT	9	/* all slots used or not yet drained */
#define REQLOG_REASON_REGION	10	/* region_bytes not usable */
#define REQLOG_REASON_EMPTY	11	/* the device has no sectors */
#define REQLOG_REASON_DAX	12	/* can be written past the block layer */
#define REQLOG_REASON_RW_PAGE	13	/* as can zram and brd before Linux 6.3 */
#define REQLOG_REASON_DRIVER	14	/* as do DRBD (resync) and bcache */

#define REQLOG_REGION_MIN	4096U
#define REQLOG_REGION_MAX	0x40000000U
#define REQLOG_MAX_REGIONS	0x8000000U	/* per attachment: 32 MiB of map */

/*
 * Take a bio-based disk (dm, md, zram, brd, nvme multipath head) too. The caller
 * knows that bios which were queued before ATTACH returned are not recorded, and
 * makes sure that they are over before it makes a first copy.
 */
#define REQLOG_ATTACH_BIO	1

struct reqlog_attach {
	__s32 fd;		/* in: open file of the block device */
	__u32 flags;		/* in: REQLOG_ATTACH_* */
	__u32 major;		/* in: what the caller believes it opened */
	__u32 minor;
	__u64 sectors;		/* in: its size, 512-byte sectors */
	__u64 diskseq;		/* in: from BLKGETDISKSEQ, 0: kernel has none */
	__u32 region_bytes;	/* in: unit of the overflow map, power of two */
	__u32 reason;		/* out: REQLOG_REASON_* */
	__u64 id;		/* out: random, never 0 */
	__u64 start_sector;	/* out: first sector on the whole disk */
	__u32 slot;		/* out */
	__u32 reserved2;
};

struct reqlog_detach {
	__u64 id;
	__u32 slot;
	__u32 reserved;		/* 0 */
};

struct reqlog_entry {
	__u64 id;
	__u64 start_sector;
	__u64 sectors;		/* as attached */
	__u64 disk_sectors;	/* size of the whole disk now, 0 when gone */
	__u64 diskseq;
	__u32 major;
	__u32 minor;
	__u32 slot;
	__u32 flags;		/* REQLOG_ENTRY_* */
	__u32 region_bytes;
	__u32 reserved;
	__u8  disk[REQLOG_DISK_BYTES];	/* kernel's name of the disk, NUL */
};

#define REQLOG_ENTRY_PARTITION	1
#define REQLOG_ENTRY_GONE	2	/* disk removed: detach it */
#define REQLOG_ENTRY_BEYOND	4	/* written behind the known end */
#define REQLOG_ENTRY_DRAINING	8	/* detached, slot not yet free */
#define REQLOG_ENTRY_BIO	16	/* of a bio-based disk */
#define REQLOG_ENTRY_BLIND	32	/* a write was not recorded: compare */

/*
 * Draining entries are listed too. When count is too small the call fails with
 * ENOSPC and total says how many there are.
 */
struct reqlog_list {
	__u64 entries;		/* in: address of count entries */
	__u32 count;		/* in: room; out: filled */
	__u32 total;		/* out */
};

struct reqlog_stats {
	__u64 id;		/* in */
	__u32 slot;		/* in */
	__u32 reserved;		/* in: 0 */
	__u64 records;		/* produced or overflowed, for this attachment */
	__u64 sectors;		/* sum over these records */
	__u64 writes;		/* by operation, records */
	__u64 discards;
	__u64 secure_erases;
	__u64 write_zeroes;
	__u64 write_sames;
	__u64 failed;		/* records of requests that had an error */
	__u64 passthrough;	/* requests that marked the whole attachment */
	__u64 beyond;		/* records behind the known end */
	__u64 overflowed;	/* records that went to the overflow map */
	__u64 regions_set;	/* regions of the map that became set */
	__u64 regions_harvested;	/* regions handed out */
	__u64 regions;		/* regions that the map has */
};

#define REQLOG_IOC		0xBE

#define REQLOG_IOC_ABI		_IOR(REQLOG_IOC, 0, __u32)
/*
 * EOPNOTSUPP bio-based, zoned or DAX, ESTALE other device, size or diskseq, EEXIST
 * attached already, ENODEV going away, ENOTBLK, ENOSPC no slot, EINVAL region.
 */
#define REQLOG_IOC_ATTACH	_IOWR(REQLOG_IOC, 1, struct reqlog_attach)
/* ENOENT: no such attachment */
#define REQLOG_IOC_DETACH	_IOW(REQLOG_IOC, 2, struct reqlog_detach)
#define REQLOG_IOC_LIST		_IOWR(REQLOG_IOC, 3, struct reqlog_list)
#define REQLOG_IOC_STATS	_IOWR(REQLOG_IOC, 4, struct reqlog_stats)

#endif
