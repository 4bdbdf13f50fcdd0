// SPDX-License-Identifier: GPL-2.0-only
/*
 * bufflink: a fast, lightweight channel from the kernel to one reader.
 *
 * A producer, which may run on every CPU at once and in interrupts, gives
 * records of a fixed size to a named channel. One program reads them, makes
 * them safe, and says so; only then are they forgotten.
 *
 * What holds:
 *
 *  - No record is lost. It is in a ring, in the pending batch, or was given to
 *    the owner's overflow map, which never fills.
 *  - Delivery is at least once. read() gives the same batch until CONSUMED,
 *    whoever reads. A reader that dies between the two costs a repetition.
 *  - Order means nothing.
 *  - Producers never wait: each CPU has its own ring and turns off nothing but
 *    its own interrupts.
 *
 * An ordering example. Wa and Wb are records, of CPU 0 and CPU 1:
 *
 *	CPU 0           CPU 1           reader
 *	produce Wa
 *	                                read: batch 1 = {Wa}
 *	                produce Wb
 *	                                killed; another reader opens
 *	                                read: batch 1 = {Wa}, flag AGAIN
 *	                                BARRIER: up to Wa and Wb
 *	                                CONSUMED(1)
 *	                                PASSED: no, Wb is still in its ring
 *	                                read: batch 2 = {Wb}
 *	                                PASSED: no, batch 2 is not consumed
 *	                                CONSUMED(2)
 *	                                PASSED: yes
 *
 * And with a ring that is full. Rc is the coarse region that Wc falls into:
 *
 *	CPU 0           reader
 *	produce Wc      overflow(Wc) sets Rc; channel->overflowed = 1
 *	                BARRIER: up to sweep 1
 *	                read: overflowed = 0, sweep 1 moves Rc into batch 3
 *	produce Wd      in the same region: Rc set again, overflowed = 1
 *	                CONSUMED(3): sweep 1 is done; PASSED: yes
 *	                read: sweep 2 moves Rc into batch 4
 *
 * Wd came out although its region was "already" handed out: the map is cleared
 * when a region moves into a batch, not when the batch is consumed, and the
 * batch itself keeps the region until then.
 *
 * Files: produce.h the producing path, ring.c the rest of a ring, batch.c what the
 * reader is given, barrier.c points in the log, chardev.c the device, channel.c
 * creation.
 */
#include <linux/module.h>
#include <linux/stringify.h>

#include "compat.h"

static int abi_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%u\n", BUFFLINK_ABI);
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
MODULE_INFO(abi, __stringify(BUFFLINK_ABI));

MODULE_AUTHOR("The bmigrate project");
MODULE_DESCRIPTION("Channel of fixed-size records from the kernel to one reader");
MODULE_VERSION("0.1.0");
MODULE_LICENSE("GPL");
