// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/reqlog: attach, detach, list and count, for root only.
 *
 * The door and nothing else: closing it changes nothing, and what comes from
 * user space is copied in once, checked, and copied out.
 */
#include <linux/capability.h>
#include <linux/cpumask.h>
#include <linux/device.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/uaccess.h>

#include "reqlog/reqlog.h"

static int control_open(struct inode *inode, struct file *file)
{
	return capable(CAP_SYS_ADMIN) ? 0 : -EPERM;
}

static long attach(void __user *arg)
{
	struct reqlog_attach request;
	int err;

	if (copy_from_user(&request, arg, sizeof(request)))
		return -EFAULT;
	if (request.flags & ~REQLOG_ATTACH_BIO || request.reserved2)
		return -EINVAL;
	request.reason = REQLOG_REASON_NONE;
	request.id = 0;
	request.slot = 0;
	request.start_sector = 0;
	err = reqlog_attach(&request);
	/*
	 * If the answer cannot be delivered, the caller finds the attachment by
	 * LIST. To undo it here could undo what another caller has adopted.
	 */
	if (copy_to_user(arg, &request, sizeof(request)))
		return -EFAULT;
	return err;
}

static long detach(const void __user *arg)
{
	struct reqlog_detach request;

	if (copy_from_user(&request, arg, sizeof(request)))
		return -EFAULT;
	if (request.reserved)
		return -EINVAL;
	return reqlog_detach(&request);
}

/* Under reqlog_lock. */
static void describe(struct reqlog_attachment *att, struct reqlog_entry *entry)
{
	memset(entry, 0, sizeof(*entry));
	entry->id = att->id;
	entry->start_sector = att->start;
	entry->sectors = att->end - att->start;
	entry->diskseq = att->diskseq;
	entry->major = MAJOR(att->dev);
	entry->minor = MINOR(att->dev);
	entry->slot = att->slot;
	entry->region_bytes = 1U << (att->region_shift + SECTOR_SHIFT);
	memcpy(entry->disk, att->disk_name, sizeof(entry->disk));
	if (att->partition)
		entry->flags |= REQLOG_ENTRY_PARTITION;
	if (att->bio_based)
		entry->flags |= REQLOG_ENTRY_BIO;
	/* A new table of the device mapper can bring DAX. */
	if (!att->draining && blk_queue_dax(att->disk->queue))
		set_bit(REQLOG_MARK_BLIND, &att->marks);
	if (test_bit(REQLOG_MARK_BLIND, &att->marks))
		entry->flags |= REQLOG_ENTRY_BLIND;
	if (test_bit(REQLOG_MARK_BEYOND, &att->marks))
		entry->flags |= REQLOG_ENTRY_BEYOND;
	if (att->draining)
		entry->flags |= REQLOG_ENTRY_DRAINING;
	else if (reqlog_disk_gone(att))
		entry->flags |= REQLOG_ENTRY_GONE;
	else
		entry->disk_sectors = get_capacity(att->disk);
}

static long list(void __user *arg)
{
	struct reqlog_entry __user *to;
	struct reqlog_attachment *att;
	struct reqlog_entry entry;
	struct reqlog_list request;
	unsigned int slot, room;
	long err = 0;

	if (copy_from_user(&request, arg, sizeof(request)))
		return -EFAULT;
	to = u64_to_user_ptr(request.entries);
	room = request.count;
	request.count = 0;
	request.total = 0;

	mutex_lock(&reqlog_lock);
	reqlog_reap();
	for (slot = 0; slot < REQLOG_MAX_SLOTS && !err; slot++) {
		att = reqlog_slot(slot);
		if (!att || request.total++ >= room)
			continue;
		describe(att, &entry);
		if (copy_to_user(to + request.count, &entry, sizeof(entry)))
			err = -EFAULT;
		request.count++;
	}
	mutex_unlock(&reqlog_lock);

	if (err || copy_to_user(arg, &request, sizeof(request)))
		return -EFAULT;
	return request.total > room ? -ENOSPC : 0;
}

/* Under reqlog_lock. */
static void sum_counts(struct reqlog_attachment *att, struct reqlog_stats *stats)
{
	const struct reqlog_counts *counts;
	int cpu;

	for_each_possible_cpu(cpu) {
		counts = per_cpu_ptr(att->counts, cpu);
		stats->writes += READ_ONCE(counts->ops[REQLOG_OP_WRITE]);
		stats->discards += READ_ONCE(counts->ops[REQLOG_OP_DISCARD]);
		stats->secure_erases +=
			READ_ONCE(counts->ops[REQLOG_OP_SECURE_ERASE]);
		stats->write_zeroes +=
			READ_ONCE(counts->ops[REQLOG_OP_WRITE_ZEROES]);
		stats->write_sames +=
			READ_ONCE(counts->ops[REQLOG_OP_WRITE_SAME]);
		stats->sectors += READ_ONCE(counts->sectors);
		stats->failed += READ_ONCE(counts->failed);
		stats->passthrough += READ_ONCE(counts->passthrough);
		stats->beyond += READ_ONCE(counts->beyond);
		stats->overflowed += READ_ONCE(counts->overflowed);
	}
	stats->records = stats->writes + stats->discards +
			 stats->secure_erases + stats->write_zeroes +
			 stats->write_sames;
	stats->regions_set = atomic64_read(&att->regions_set);
	stats->regions_harvested = att->regions_harvested;
	stats->regions = att->regions;
}

static long get_stats(void __user *arg)
{
	struct reqlog_stats request, stats = {};
	struct reqlog_attachment *att;

	if (copy_from_user(&request, arg, sizeof(request)))
		return -EFAULT;
	if (request.reserved)
		return -EINVAL;
	stats.id = request.id;
	stats.slot = request.slot;
	mutex_lock(&reqlog_lock);
	att = reqlog_find(request.slot, request.id);
	if (att)
		sum_counts(att, &stats);
	mutex_unlock(&reqlog_lock);
	if (!att)
		return -ENOENT;
	return copy_to_user(arg, &stats, sizeof(stats)) ? -EFAULT : 0;
}

static long control_ioctl(struct file *file, unsigned int cmd,
			  unsigned long arg)
{
	void __user *user = (void __user *)arg;

	switch (cmd) {
	case REQLOG_IOC_ABI:
		return put_user((u32)REQLOG_ABI, (u32 __user *)user);
	case REQLOG_IOC_ATTACH:
		return attach(user);
	case REQLOG_IOC_DETACH:
		return detach(user);
	case REQLOG_IOC_LIST:
		return list(user);
	case REQLOG_IOC_STATS:
		return get_stats(user);
	}
	return -ENOTTY;
}

static const struct file_operations control_fops = {
	.owner = THIS_MODULE,
	.open = control_open,
	.unlocked_ioctl = control_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "reqlog",
	.mode = 0600,
	.fops = &control_fops,
};

int reqlog_control_register(void)
{
	return misc_register(&control);
}

void reqlog_control_unregister(void)
{
	misc_deregister(&control);
}
