// SPDX-License-Identifier: GPL-2.0-only
/*
 * reqlog: which sectors of the attached volumes were written.
 *
 * Not the data: 16 bytes for each request that completed. A program that reads
 * the log can copy a live volume: it forgets that a block is dirty, reads the
 * block, and sends it; a write that the read missed is in the log again.
 *
 * What holds, for a volume from the moment that ATTACH returns:
 *
 *  - Each request that may have changed a sector of it is in the log, whatever
 *    its kind and its outcome. In doubt more is marked, never less.
 *  - The record is made at completion: after the data reached the device, and
 *    before the writer is told.
 *  - A full ring widens the record to a coarse region. Nothing is dropped.
 *  - The attachment needs no program: it outlives every file that was open.
 *
 * Why at completion. Let Wa be a write, and the program's steps be clear (forget
 * the dirty bit) and read (of the block from the device):
 *
 *	recorded when queued              recorded when completed
 *	--------------------              -----------------------
 *	Wa queued: record                 Wa queued
 *	program: dirty                    program: (dirty for another reason)
 *	program: clear                    program: clear
 *	program: read: old data           program: read: old data
 *	Wa reaches the device             Wa reaches the device
 *	lost: clean, and differs          Wa completes: record
 *	                                  program: dirty again
 *
 * The record is made before bio_endio, so a writer that was told "done", and a
 * program that then asks for a barrier, find the record before the barrier.
 *
 * A write that was under way when ATTACH returned is recorded if it completes
 * later; if it completed earlier its data is on the device, and a first copy
 * that begins after ATTACH reads it.
 *
 * Files: probe.c from a request to records, overflow.c the coarse map,
 * identity.c which device is meant, attach.c the life of an attachment,
 * control.c the device /dev/reqlog.
 */
#include <linux/err.h>
#include <linux/module.h>
#include <linux/stringify.h>
#include <linux/tracepoint.h>

#include "reqlog/reqlog.h"

static int abi_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%u\n", REQLOG_ABI);
}

static int abi_set(const char *val, const struct kernel_param *kp)
{
	return -EPERM;
}

static const struct kernel_param_ops abi_ops = {
	.get = abi_get,
	.set = abi_set,
};

module_param_cb(abi, &abi_ops, NULL, 0444);
MODULE_PARM_DESC(abi, "Number of the user space interface, read only");
MODULE_INFO(abi, __stringify(REQLOG_ABI));

struct bufflink_channel *reqlog_channel;

static unsigned int ring_records = 16384;
module_param(ring_records, uint, 0444);
MODULE_PARM_DESC(ring_records, "Records that each CPU's ring can hold");

static unsigned int ring_limit;

/* Under reqlog_lock, because the channel may not be there yet, or any more. */
static int set_ring_limit(const char *val, const struct kernel_param *kp)
{
	int err = param_set_uint(val, kp);

	if (err)
		return err;
	mutex_lock(&reqlog_lock);
	if (reqlog_channel)
		bufflink_limit(reqlog_channel, ring_limit);
	mutex_unlock(&reqlog_lock);
	return 0;
}

static const struct kernel_param_ops ring_limit_ops = {
	.set = set_ring_limit,
	.get = param_get_uint,
};

module_param_cb(ring_limit, &ring_limit_ops, &ring_limit, 0644);
MODULE_PARM_DESC(ring_limit, "Use only so many of ring_records, 0: all of them");

static void set_channel(struct bufflink_channel *channel)
{
	mutex_lock(&reqlog_lock);
	reqlog_channel = channel;
	if (channel)
		bufflink_limit(channel, ring_limit);
	mutex_unlock(&reqlog_lock);
}

static int __init reqlog_init(void)
{
	const struct bufflink_config config = {
		.name = REQLOG_CHANNEL,
		.owner = THIS_MODULE,
		.ops = &reqlog_overflow_ops,
		.ring_records = ring_records,
	};
	struct bufflink_channel *channel;
	int err;

	BUILD_BUG_ON(sizeof(struct reqlog_record) !=
		     sizeof(struct bufflink_record));

	err = reqlog_probe_find();
	if (err)
		return err;
	channel = bufflink_create(&config);
	if (IS_ERR(channel))
		return PTR_ERR(channel);
	set_channel(channel);
	/* Last: from now on somebody may attach. */
	err = reqlog_control_register();
	if (err) {
		set_channel(NULL);
		bufflink_destroy(channel);
	}
	return err;
}

/*
 * Each attached volume and each open file holds the module, so there are none.
 * What may be left: probe calls that began before the last DETACH took the
 * probe away, and attachments whose last records nobody has read.
 */
static void __exit reqlog_exit(void)
{
	struct bufflink_channel *channel = reqlog_channel;

	reqlog_control_unregister();
	tracepoint_synchronize_unregister();
	reqlog_bio_exit();
	set_channel(NULL);
	bufflink_destroy(channel);
	reqlog_free_all();
}

module_init(reqlog_init);
module_exit(reqlog_exit);

MODULE_AUTHOR("The bmigrate project");
MODULE_DESCRIPTION("Log of which sectors of attached volumes were written");
MODULE_VERSION("0.1.0");
MODULE_LICENSE("GPL");
