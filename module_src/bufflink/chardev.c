// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/bufflink/CHANNEL: the reader's door, for one privileged reader at a time.
 *
 * It promises that a fault, a signal or a close at any moment consumes nothing:
 * the only thing that makes the channel forget is CONSUMED.
 */
#include <linux/capability.h>
#include <linux/cpumask.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/poll.h>
#include <linux/uaccess.h>

#include "bufflink/internal.h"

/*
 * misc_open() holds its mutex around this call and misc_deregister() takes the
 * same one, so the channel is there. Its owner may be on the way out already:
 * then there is no channel any more, as far as a reader is concerned.
 */
static int channel_open(struct inode *inode, struct file *file)
{
	struct bufflink_channel *channel =
		container_of(file->private_data, struct bufflink_channel, misc);

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!try_module_get(channel->owner))
		return -ENODEV;
	if (test_and_set_bit(0, &channel->opened)) {
		module_put(channel->owner);
		return -EBUSY;
	}
	mutex_lock(&channel->lock);
	channel->delivered_seq = 0;
	mutex_unlock(&channel->lock);
	file->private_data = channel;
	return stream_open(inode, file);
}

static int channel_release(struct inode *inode, struct file *file)
{
	struct bufflink_channel *channel = file->private_data;
	struct module *owner = channel->owner;

	clear_bit_unlock(0, &channel->opened);
	/* From here on the channel may go away at any time. */
	module_put(owner);
	return 0;
}

/* Copy the pending batch out. Under channel->lock. */
static ssize_t hand_out(struct bufflink_channel *channel, char __user *to,
			unsigned int room)
{
	struct bufflink_pending *pending = &channel->pending;
	size_t bytes = pending->count * sizeof(*pending->records);
	struct bufflink_batch batch = {
		.seq = pending->seq,
		.count = pending->count,
		.flags = pending->flags,
	};

	if (pending->count > room)
		return -EMSGSIZE;
	if (copy_to_user(to, &batch, sizeof(batch)) ||
	    copy_to_user(to + sizeof(batch), pending->records, bytes))
		return -EFAULT;

	channel->handed++;
	if (pending->flags & BUFFLINK_BATCH_AGAIN)
		channel->repeated++;
	pending->flags |= BUFFLINK_BATCH_AGAIN;
	channel->delivered_seq = pending->seq;
	return sizeof(batch) + bytes;
}

static ssize_t channel_read(struct file *file, char __user *to, size_t len,
			    loff_t *ppos)
{
	struct bufflink_channel *channel = file->private_data;
	unsigned int room;
	ssize_t ret;

	if (len < sizeof(struct bufflink_batch))
		return -EINVAL;
	room = min_t(size_t, BUFFLINK_BATCH_RECORDS,
		     (len - sizeof(struct bufflink_batch)) /
			     sizeof(struct bufflink_record));
	if (room < BUFFLINK_BATCH_MIN)
		return -EINVAL;

	for (;;) {
		if (mutex_lock_interruptible(&channel->lock))
			return -ERESTARTSYS;
		if (!channel->pending.count)
			bufflink_batch_build(channel, room);
		ret = channel->pending.count ? hand_out(channel, to, room) : 0;
		mutex_unlock(&channel->lock);
		if (ret)
			return ret;
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		if (wait_event_interruptible(channel->wait,
					     bufflink_readable(channel)))
			return -ERESTARTSYS;
	}
}

static __poll_t channel_poll(struct file *file, poll_table *wait)
{
	struct bufflink_channel *channel = file->private_data;

	poll_wait(file, &channel->wait, wait);
	smp_mb(); /* on the queue first, then look; pairs with bufflink_must_wake() */
	return bufflink_readable(channel) ? EPOLLIN | EPOLLRDNORM : 0;
}

static long get_info(struct bufflink_channel *channel, void __user *to)
{
	struct bufflink_info info = {
		.abi = BUFFLINK_ABI,
		.record_bytes = sizeof(struct bufflink_record),
		.batch_records = BUFFLINK_BATCH_RECORDS,
		.rings = nr_cpu_ids,
		.ring_records = channel->ring_records,
		.ring_limit = READ_ONCE(channel->limit),
		.channel_id = channel->id,
	};

	strscpy(info.name, channel->name, sizeof(info.name));
	return copy_to_user(to, &info, sizeof(info)) ? -EFAULT : 0;
}

static long get_stats(struct bufflink_channel *channel, void __user *to)
{
	struct bufflink_stats stats = {};
	struct bufflink_ring *ring;
	unsigned long head;
	int cpu;

	mutex_lock(&channel->lock);
	for_each_possible_cpu(cpu) {
		ring = per_cpu_ptr(channel->rings, cpu);
		head = READ_ONCE(ring->head);
		stats.produced += head;
		stats.waiting += head - ring->tail;
		stats.overflowed += READ_ONCE(ring->overflowed);
	}
	stats.widened = channel->widened;
	stats.batches = channel->batches;
	stats.handed = channel->handed;
	stats.repeated = channel->repeated;
	stats.consumed = channel->consumed;
	stats.consumed_records = channel->consumed_records;
	stats.sweeps_started = channel->sweeps_started;
	stats.sweeps_done = channel->sweeps_done;
	stats.pending_count = channel->pending.count;
	if (stats.pending_count)
		stats.pending_seq = channel->pending.seq;
	stats.overflow_waiting = READ_ONCE(channel->overflowed) ||
				 channel->sweeping;
	mutex_unlock(&channel->lock);
	return copy_to_user(to, &stats, sizeof(stats)) ? -EFAULT : 0;
}

static long consume(struct bufflink_channel *channel, const void __user *from)
{
	long ret;
	u64 seq;

	if (copy_from_user(&seq, from, sizeof(seq)))
		return -EFAULT;
	mutex_lock(&channel->lock);
	ret = bufflink_batch_consume(channel, seq);
	mutex_unlock(&channel->lock);
	return ret;
}

/* Takes no mutex, so it does not even wait for another thread's read. */
static long take_barrier(struct bufflink_channel *channel, void __user *arg)
{
	struct bufflink_barrier barrier;
	u64 __user *positions;
	unsigned int cpu;

	if (copy_from_user(&barrier, arg, sizeof(barrier)))
		return -EFAULT;
	if (barrier.rings != nr_cpu_ids || barrier.reserved)
		return -EINVAL;
	positions = u64_to_user_ptr(barrier.positions);
	for (cpu = 0; cpu < nr_cpu_ids; cpu++)
		if (put_user((u64)bufflink_mark_position(channel, cpu),
			     positions + cpu))
			return -EFAULT;
	barrier.sweep = bufflink_mark_sweep(channel);
	barrier.channel_id = channel->id;
	return copy_to_user(arg, &barrier, sizeof(barrier)) ? -EFAULT : 0;
}

static long ask_passed(struct bufflink_channel *channel, const void __user *arg)
{
	struct bufflink_barrier barrier;
	const u64 __user *positions;
	unsigned int cpu;
	long passed;
	u64 position;

	if (copy_from_user(&barrier, arg, sizeof(barrier)))
		return -EFAULT;
	if (barrier.rings != nr_cpu_ids || barrier.reserved)
		return -EINVAL;
	if (barrier.channel_id != channel->id)
		return -ESTALE;
	passed = bufflink_sweep_passed(channel, barrier.sweep);
	positions = u64_to_user_ptr(barrier.positions);
	for (cpu = 0; cpu < nr_cpu_ids; cpu++) {
		if (get_user(position, positions + cpu))
			return -EFAULT;
		if (!bufflink_position_passed(channel, cpu, position))
			passed = 0;
	}
	return passed;
}

static long channel_ioctl(struct file *file, unsigned int cmd,
			  unsigned long arg)
{
	struct bufflink_channel *channel = file->private_data;
	void __user *user = (void __user *)arg;

	switch (cmd) {
	case BUFFLINK_IOC_ABI:
		return put_user((u32)BUFFLINK_ABI, (u32 __user *)user);
	case BUFFLINK_IOC_INFO:
		return get_info(channel, user);
	case BUFFLINK_IOC_CONSUMED:
		return consume(channel, user);
	case BUFFLINK_IOC_BARRIER:
		return take_barrier(channel, user);
	case BUFFLINK_IOC_PASSED:
		return ask_passed(channel, user);
	case BUFFLINK_IOC_STATS:
		return get_stats(channel, user);
	}
	return -ENOTTY;
}

static const struct file_operations channel_fops = {
	.owner = THIS_MODULE,
	.open = channel_open,
	.release = channel_release,
	.read = channel_read,
	.poll = channel_poll,
	.unlocked_ioctl = channel_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

int bufflink_chardev_register(struct bufflink_channel *channel)
{
	snprintf(channel->device_name, sizeof(channel->device_name),
		 "bufflink-%s", channel->name);
	snprintf(channel->node_name, sizeof(channel->node_name),
		 "bufflink/%s", channel->name);
	channel->misc.minor = MISC_DYNAMIC_MINOR;
	channel->misc.name = channel->device_name;
	channel->misc.nodename = channel->node_name;
	channel->misc.mode = 0600;
	channel->misc.fops = &channel_fops;
	return misc_register(&channel->misc);
}

void bufflink_chardev_unregister(struct bufflink_channel *channel)
{
	misc_deregister(&channel->misc);
}
