// SPDX-License-Identifier: GPL-2.0-only
/*
 * Creation and end of a channel. All memory that the channel will ever use is
 * taken here, for every CPU that could come online, so that producing and
 * reading cannot run out of it.
 */
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/export.h>
#include <linux/log2.h>
#include <linux/percpu.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/topology.h>
#include <linux/vmalloc.h>

#include "bufflink/internal.h"

/* Not so many that a typing error takes all memory: 64 MiB of 16 bytes. */
#define RING_RECORDS_MAX	BIT(22)

static void free_rings(struct bufflink_channel *channel)
{
	struct bufflink_ring *ring;
	int cpu;

	for_each_possible_cpu(cpu) {
		ring = per_cpu_ptr(channel->rings, cpu);
		/* A last wake-up may still be under way. */
		if (ring->records) {
			irq_work_sync(&ring->later.work);
			irq_work_sync(&ring->now.work);
		}
		vfree(ring->records);
	}
	free_percpu(channel->rings);
}

static int alloc_rings(struct bufflink_channel *channel)
{
	size_t bytes = channel->ring_records * sizeof(struct bufflink_record);
	struct bufflink_ring *ring;
	int cpu;

	channel->rings = alloc_percpu(struct bufflink_ring);
	if (!channel->rings)
		return -ENOMEM;
	for_each_possible_cpu(cpu) {
		ring = per_cpu_ptr(channel->rings, cpu);
		ring->later.channel = channel;
		ring->now.channel = channel;
		ring->mask = channel->ring_records - 1;
		init_irq_work(&ring->later.work, bufflink_wake);
		ring->later.work.node.u_flags |= IRQ_WORK_LAZY;
		init_irq_work(&ring->now.work, bufflink_wake);
		ring->records = vzalloc_node(bytes, cpu_to_node(cpu));
		if (!ring->records) {
			free_rings(channel);
			return -ENOMEM;
		}
	}
	return 0;
}

static bool config_usable(const struct bufflink_config *config)
{
	return strlen(config->name) < BUFFLINK_NAME_BYTES &&
	       config->ring_records &&
	       config->ring_records <= RING_RECORDS_MAX;
}

void bufflink_limit(struct bufflink_channel *channel, unsigned int records)
{
	if (!records || records > channel->ring_records)
		records = channel->ring_records;
	WRITE_ONCE(channel->limit, records);
	WRITE_ONCE(channel->half, records / 2);
}
EXPORT_SYMBOL_GPL(bufflink_limit);

struct bufflink_channel *bufflink_create(const struct bufflink_config *config)
{
	struct bufflink_channel *channel;
	int err;

	if (!config_usable(config))
		return ERR_PTR(-EINVAL);
	channel = kzalloc(sizeof(*channel), GFP_KERNEL);
	if (!channel)
		return ERR_PTR(-ENOMEM);

	channel->ops = config->ops;
	channel->owner = config->owner;
	channel->ring_records = roundup_pow_of_two(config->ring_records);
	bufflink_limit(channel, 0);
	get_random_bytes(&channel->id, sizeof(channel->id));
	strscpy(channel->name, config->name, sizeof(channel->name));
	init_waitqueue_head(&channel->wait);
	spin_lock_init(&channel->sweep_lock);
	mutex_init(&channel->lock);

	err = -ENOMEM;
	channel->pending.records = vzalloc(BUFFLINK_BATCH_RECORDS *
					   sizeof(struct bufflink_record));
	if (!channel->pending.records)
		goto err_channel;
	err = alloc_rings(channel);
	if (err)
		goto err_pending;
	err = bufflink_chardev_register(channel);
	if (err)
		goto err_rings;
	return channel;

err_rings:
	free_rings(channel);
err_pending:
	vfree(channel->pending.records);
err_channel:
	kfree(channel);
	return ERR_PTR(err);
}
EXPORT_SYMBOL_GPL(bufflink_create);

/*
 * An open reader holds the owner's module, and the owner calls this when it
 * unloads: so there is no reader, and after the unregistration there will be
 * none.
 */
void bufflink_destroy(struct bufflink_channel *channel)
{
	bufflink_chardev_unregister(channel);
	free_rings(channel);
	vfree(channel->pending.records);
	kfree(channel);
}
EXPORT_SYMBOL_GPL(bufflink_destroy);
