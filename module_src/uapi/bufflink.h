/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * bufflink: a channel of fixed-size records from the kernel to one reader.
 *
 * This file promises the exact layout of everything that crosses the character
 * device /dev/bufflink/CHANNEL. It must never change a layout or a meaning
 * without raising BUFFLINK_ABI: a reader built for another number refuses the
 * module instead of misreading it.
 *
 * The reader's loop:
 *
 *	read(fd, buf)			a batch: struct bufflink_batch, then
 *					batch.count records of info.record_bytes
 *	... make the records safe ...
 *	ioctl(fd, CONSUMED, &batch.seq)	only now does the kernel forget them
 *
 * Until CONSUMED, each read() gives the same batch again, also to a reader that
 * opens the channel after the first one died. The order of the records means
 * nothing, neither inside a batch nor between batches.
 */
#ifndef _UAPI_BUFFLINK_H
#define _UAPI_BUFFLINK_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define BUFFLINK_ABI		1
#define BUFFLINK_NAME_BYTES	32

/* What read() puts before the records. All integers are in host order. */
struct bufflink_batch {
	__u64 seq;		/* number of this batch, from 1 */
	__u32 count;		/* records that follow, at least 1 */
	__u32 flags;		/* BUFFLINK_BATCH_* */
};

#define BUFFLINK_BATCH_AGAIN	1	/* was handed out before */
#define BUFFLINK_BATCH_WIDENED	2	/* has records from the overflow */

struct bufflink_info {
	__u32 abi;		/* BUFFLINK_ABI of the loaded module */
	__u32 record_bytes;
	__u32 batch_records;	/* most records that one batch ever holds */
	__u32 rings;		/* positions in a barrier: one per CPU number */
	__u32 ring_records;	/* records allocated for each CPU */
	__u32 ring_limit;	/* records of them in use */
	__u64 channel_id;	/* random, new each time a channel is made */
	__u8  name[BUFFLINK_NAME_BYTES];	/* ends with a NUL */
};

/*
 * A point in the log. BARRIER fills it and never waits; PASSED returns 1 when
 * all that was produced before the point, overflow included, has been handed
 * out and CONSUMED, else 0. A point is only good for the channel_id it is from:
 * with another one PASSED fails with ESTALE.
 */
struct bufflink_barrier {
	__u64 channel_id;	/* BARRIER: out, PASSED: in */
	__u64 sweep;		/* overflow sweep that must be consumed, same */
	__u32 rings;		/* in: room at positions, must be info.rings */
	__u32 reserved;		/* must be 0 */
	__u64 positions;	/* in: address of rings * __u64 */
};

/* Counters since the channel was made. */
struct bufflink_stats {
	__u64 produced;		/* records put into a ring */
	__u64 overflowed;	/* records given to the owner's overflow map */
	__u64 waiting;		/* records in the rings now */
	__u64 widened;		/* records that came out of the overflow map */
	__u64 batches;		/* batches made */
	__u64 handed;		/* batches copied to a reader, repeats included */
	__u64 repeated;		/* of these, copies of a batch handed out before */
	__u64 consumed;		/* batches consumed */
	__u64 consumed_records;	/* records in them */
	__u64 sweeps_started;	/* walks over the overflow map begun */
	__u64 sweeps_done;	/* walks all of whose records are consumed */
	__u64 pending_seq;	/* the batch not yet consumed, 0: none */
	__u32 pending_count;	/* records in it */
	__u32 overflow_waiting;	/* 1: the overflow map has something */
};

#define BUFFLINK_IOC		0xBF

#define BUFFLINK_IOC_ABI	_IOR(BUFFLINK_IOC, 0, __u32)
#define BUFFLINK_IOC_INFO	_IOR(BUFFLINK_IOC, 1, struct bufflink_info)
/* Fails with ESTALE unless that batch is pending and this open file got it. */
#define BUFFLINK_IOC_CONSUMED	_IOW(BUFFLINK_IOC, 2, __u64)
#define BUFFLINK_IOC_BARRIER	_IOWR(BUFFLINK_IOC, 3, struct bufflink_barrier)
#define BUFFLINK_IOC_PASSED	_IOW(BUFFLINK_IOC, 4, struct bufflink_barrier)
#define BUFFLINK_IOC_STATS	_IOR(BUFFLINK_IOC, 5, struct bufflink_stats)

/*
 * open():  EBUSY   somebody else reads this channel
 *          EPERM   not privileged (CAP_SYS_ADMIN)
 * read():  EAGAIN  O_NONBLOCK and nothing there
 *          EINVAL  room for fewer than 2 records
 *          EMSGSIZE the batch to be repeated does not fit; give more room
 *          EFAULT  bad address; nothing is consumed
 */

#endif
