// SPDX-License-Identifier: GPL-2.0-only
/*
 * The life of an attachment: attached, draining, gone.
 *
 *	ATTACH ──▶ attached ──DETACH──▶ draining ──all consumed──▶ free
 *
 * It promises that a slot number means one attachment only, as long as a record
 * with that number may still reach the reader. While attached, an attachment
 * holds the module, the disk and the disk's driver. While draining it holds
 * memory only.
 */
#include <linux/device.h>
#include <linux/file.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/random.h>
#include <linux/rculist.h>
#include <linux/slab.h>

#include "reqlog/reqlog.h"

/* Guards slots[], the changes of reqlog_attached, and the harvest's cursor. */
DEFINE_MUTEX(reqlog_lock);
LIST_HEAD(reqlog_attached);

static struct reqlog_attachment __rcu *slots[REQLOG_MAX_SLOTS];

struct reqlog_attachment *reqlog_slot(unsigned int slot)
{
	return rcu_dereference_protected(slots[slot],
					 lockdep_is_held(&reqlog_lock));
}

struct reqlog_attachment *reqlog_slot_rcu(unsigned int slot)
{
	return rcu_dereference_sched(slots[slot]);
}

/* Under reqlog_lock. */
struct reqlog_attachment *reqlog_find(unsigned int slot, u64 id)
{
	struct reqlog_attachment *att;

	if (slot >= REQLOG_MAX_SLOTS)
		return NULL;
	att = reqlog_slot(slot);
	return att && att->id == id ? att : NULL;
}

static void put_disk_and_driver(struct reqlog_attachment *att)
{
	if (!att->disk)
		return;
	/* The disk first: its release is code of the driver. */
	put_device(disk_to_dev(att->disk));
	module_put(att->adapter);
	module_put(att->driver);
	att->disk = NULL;
}

static void free_attachment(struct reqlog_attachment *att)
{
	put_disk_and_driver(att);
	reqlog_map_free(att);
	free_percpu(att->counts);
	kfree(att->mark);
	kfree(att);
}

/*
 * Free the slots of detached volumes whose records have all been consumed. The
 * probe left them at DETACH; that the mark is passed means that the harvest,
 * which could still find them in slots[], has nothing to find. Under
 * reqlog_lock, which the harvest holds too.
 */
void reqlog_reap(void)
{
	struct reqlog_attachment *att;
	unsigned int slot;

	reqlog_bio_reap();
	for (slot = 0; slot < REQLOG_MAX_SLOTS; slot++) {
		att = reqlog_slot(slot);
		if (!att || !att->draining ||
		    !bufflink_mark_passed(reqlog_channel, att->mark))
			continue;
		RCU_INIT_POINTER(slots[slot], NULL);
		free_attachment(att);
	}
}

/*
 * Slots are taken in turn, not lowest first: a number that was just given back
 * is the last to be used again, so that a mistake shows as an unknown slot and
 * not as another volume's dirty blocks.
 */
static int find_slot(void)
{
	static unsigned int next;
	unsigned int i, slot;

	for (i = 0; i < REQLOG_MAX_SLOTS; i++) {
		slot = (next + i) % REQLOG_MAX_SLOTS;
		if (!reqlog_slot(slot)) {
			next = slot + 1;
			return slot;
		}
	}
	return -ENOSPC;
}

/* The same range of the same disk, attached. Under reqlog_lock. */
static struct reqlog_attachment *find_same(struct reqlog_attachment *att)
{
	struct reqlog_attachment *other;

	list_for_each_entry(other, &reqlog_attached, node)
		if (other->disk == att->disk && other->dev == att->dev)
			return other;
	return NULL;
}

static int alloc_parts(struct reqlog_attachment *att,
		       struct reqlog_attach *request)
{
	int err;

	do
		get_random_bytes(&att->id, sizeof(att->id));
	while (!att->id);
	att->counts = alloc_percpu(struct reqlog_counts);
	att->mark = bufflink_mark_alloc();
	if (!att->counts || !att->mark)
		return -ENOMEM;
	err = reqlog_map_alloc(att, request->region_bytes);
	if (err == -EINVAL)
		request->reason = REQLOG_REASON_REGION;
	return err;
}

/* Under reqlog_lock. */
static int publish(struct reqlog_attachment *att, struct reqlog_attach *request)
{
	struct reqlog_attachment *same = find_same(att);
	int slot, err;

	if (same) {
		request->reason = REQLOG_REASON_ATTACHED;
		request->slot = same->slot;
		request->id = same->id;
		return -EEXIST;
	}
	reqlog_reap();
	slot = find_slot();
	if (slot < 0) {
		request->reason = REQLOG_REASON_NO_SLOT;
		return slot;
	}
	if (list_empty(&reqlog_attached)) {
		err = reqlog_probe_start();
		if (err)
			return err;
	}
	if (att->bio_based) {
		err = reqlog_bio_start();
		if (err) {
			if (list_empty(&reqlog_attached))
				reqlog_probe_stop();
			return err;
		}
	}
	att->slot = slot;
	att->slot_word = (u64)slot << REQLOG_SLOT_SHIFT;
	att->write_word = att->slot_word |
			  (u64)REQLOG_OP_WRITE << REQLOG_OP_SHIFT;
	/* slots[] first: the probe's overflow looks the slot up there. */
	rcu_assign_pointer(slots[slot], att);
	list_add_tail_rcu(&att->node, &reqlog_attached);
	__module_get(THIS_MODULE);
	request->slot = slot;
	request->id = att->id;
	request->start_sector = att->start;
	return 0;
}

int reqlog_attach(struct reqlog_attach *request)
{
	struct reqlog_attachment *att;
	struct file *file;
	int err;

	att = kzalloc(sizeof(*att), GFP_KERNEL);
	if (!att)
		return -ENOMEM;
	file = fget(request->fd);
	if (!file) {
		kfree(att);
		return -EBADF;
	}
	err = reqlog_identify(att, request, file);
	if (!err)
		err = alloc_parts(att, request);
	if (!err) {
		mutex_lock(&reqlog_lock);
		err = publish(att, request);
		mutex_unlock(&reqlog_lock);
	}
	/*
	 * Only now: until the attachment is in the list, the file is what keeps
	 * the device open and the disk what was checked.
	 */
	fput(file);
	if (err)
		free_attachment(att);
	return err;
}

/*
 * After synchronize_rcu() no probe call knows the attachment any more, so the
 * log's end as of now is after its last record and its last overflow.
 */
static void retire(struct reqlog_attachment *att)
{
	list_del_rcu(&att->node);
	if (list_empty(&reqlog_attached))
		reqlog_probe_stop();
	if (att->bio_based)
		reqlog_bio_stop();
	synchronize_rcu();
	bufflink_mark(reqlog_channel, att->mark);
	att->draining = true;
	put_disk_and_driver(att);
	module_put(THIS_MODULE);
}

int reqlog_detach(const struct reqlog_detach *request)
{
	struct reqlog_attachment *att;
	int err = -ENOENT;

	mutex_lock(&reqlog_lock);
	att = reqlog_find(request->slot, request->id);
	if (att && !att->draining) {
		retire(att);
		err = 0;
	}
	reqlog_reap();
	mutex_unlock(&reqlog_lock);
	return err;
}

/* At unload: all that is left is draining, and nobody will read it. */
void reqlog_free_all(void)
{
	struct reqlog_attachment *att;
	unsigned int slot;

	mutex_lock(&reqlog_lock);
	for (slot = 0; slot < REQLOG_MAX_SLOTS; slot++) {
		att = reqlog_slot(slot);
		RCU_INIT_POINTER(slots[slot], NULL);
		if (att)
			free_attachment(att);
	}
	mutex_unlock(&reqlog_lock);
}
