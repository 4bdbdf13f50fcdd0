// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which device is meant, and whether it can be recorded correctly.
 *
 * It promises to refuse, with a reason, every device of which reqlog could miss
 * a write, and every device that is not the one that the caller believes it has
 * open. A disk that passes is referenced, so that its memory cannot become
 * another disk's.
 */
#include <linux/device.h>
#include <linux/kdev_t.h>
#include <linux/module.h>
#include <scsi/scsi_device.h>
#include <scsi/scsi_host.h>

#include "reqlog/reqlog.h"

static int refuse(struct reqlog_attach *request, u32 reason, int err)
{
	request->reason = reason;
	return err;
}

/*
 * A disk whose requests all pass block_rq_complete has a queue of requests, and
 * no way around it. The name says nothing: nvme0n1 may be a multipath head.
 */
static bool is_bio_based(struct gendisk *disk)
{
	return disk->fops->submit_bio || !queue_is_mq(disk->queue);
}

/* Of the device mapper; also what has requests there (multipath). */
static bool is_dm(struct gendisk *disk)
{
	return !strncmp(disk->disk_name, "dm-", 3);
}

/*
 * By name, because nothing else tells. A DRBD device changes without a bio of its
 * own when the peer writes or resyncs, a bcache when its cache is lost.
 */
static bool changes_by_itself(struct gendisk *disk)
{
	return !strncmp(disk->disk_name, "drbd", 4) ||
	       !strncmp(disk->disk_name, "bcache", 6);
}

/*
 * By the bus of the device that the disk belongs to: sd is one of its drivers.
 * The device is there as long as it has a request, or somebody has it open.
 */
bool reqlog_disk_is_scsi(struct gendisk *disk)
{
	struct device *parent = disk_to_dev(disk)->parent;

	return parent && parent->bus && !strcmp(parent->bus->name, "scsi");
}

/*
 * The module of the host adapter below a SCSI disk, NULL for other disks. The
 * driver of the disk, sd, is not all that its release runs through: the last put
 * of the disk lets go of the SCSI device, and that looks into the adapter's
 * template. An open of the disk holds that module for the same reason.
 */
static struct module *adapter_of(struct gendisk *disk)
{
	if (!reqlog_disk_is_scsi(disk))
		return NULL;
	return to_scsi_device(disk_to_dev(disk)->parent)->host->hostt->module;
}

static bool is_gone(struct gendisk *disk)
{
	return !device_is_registered(disk_to_dev(disk));
}

bool reqlog_disk_gone(const struct reqlog_attachment *att)
{
	return att->draining || is_gone(att->disk);
}

static int check(struct block_device *bdev, u64 sectors,
		 struct reqlog_attach *request)
{
	struct gendisk *disk = bdev->bd_disk;

	if (request->major != MAJOR(bdev->bd_dev) ||
	    request->minor != MINOR(bdev->bd_dev))
		return refuse(request, REQLOG_REASON_DEV, -ESTALE);
	if (request->diskseq != compat_diskseq(disk))
		return refuse(request, REQLOG_REASON_DISKSEQ, -ESTALE);
	if (is_gone(disk))
		return refuse(request, REQLOG_REASON_GONE, -ENODEV);
	if (changes_by_itself(disk))
		return refuse(request, REQLOG_REASON_DRIVER, -EOPNOTSUPP);
	if ((is_bio_based(disk) || is_dm(disk)) &&
	    (!(request->flags & REQLOG_ATTACH_BIO) ||
	     IS_ENABLED(CONFIG_PREEMPT_RT)))
		return refuse(request, REQLOG_REASON_BIO_BASED, -EOPNOTSUPP);
	if (bdev_is_zoned(bdev))
		return refuse(request, REQLOG_REASON_ZONED, -EOPNOTSUPP);
	if (blk_queue_dax(disk->queue))
		return refuse(request, REQLOG_REASON_DAX, -EOPNOTSUPP);
	if (compat_has_rw_page(disk))
		return refuse(request, REQLOG_REASON_RW_PAGE, -EOPNOTSUPP);
	if (request->sectors != sectors)
		return refuse(request, REQLOG_REASON_SIZE, -ESTALE);
	if (!sectors)
		return refuse(request, REQLOG_REASON_EMPTY, -ENXIO);
	return 0;
}

/*
 * Fill in what the open file says about the device, and take the references.
 *
 * A reference to the disk's device object does not hold up its removal: the
 * driver takes the disk away, requests fail, the names go; only the memory
 * stays, until DETACH. But the last put may call into the driver, and on SCSI
 * into the adapter's, so their modules must stay too: a mount would pin them
 * just the same.
 */
int reqlog_identify(struct reqlog_attachment *att,
		    struct reqlog_attach *request, struct file *file)
{
	struct inode *inode = file->f_mapping->host;
	struct block_device *bdev;
	struct gendisk *disk;
	u64 sectors;
	int err;

	if (!S_ISBLK(file_inode(file)->i_mode) || !S_ISBLK(inode->i_mode))
		return refuse(request, REQLOG_REASON_NOT_BLOCK, -ENOTBLK);
	bdev = I_BDEV(inode);
	disk = bdev->bd_disk;
	sectors = i_size_read(inode) >> SECTOR_SHIFT;
	err = check(bdev, sectors, request);
	if (err)
		return err;

	att->partition = bdev_is_partition(bdev);
	att->bio_based = is_bio_based(disk);
	att->dm = is_dm(disk);
	att->md = !strncmp(disk->disk_name, "md", 2);
	att->start = get_start_sect(bdev);
	att->end = att->start + sectors;
	att->dev = bdev->bd_dev;
	att->diskseq = compat_diskseq(disk);
	strscpy(att->disk_name, disk->disk_name, sizeof(att->disk_name));
	att->disk = disk;
	att->driver = disk->fops->owner;
	att->adapter = adapter_of(disk);
	/* The open file holds all of them already. */
	get_device(disk_to_dev(disk));
	__module_get(att->driver);
	__module_get(att->adapter);
	return 0;
}
