/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a producer of records needs of bufflink. It promises that a record given
 * to bufflink_produce() either comes out of the channel, until the reader has
 * said that it is safe, or has been given to the owner's overflow(); it is never
 * dropped. bufflink knows nothing about what a record says.
 */
#ifndef _BUFFLINK_H
#define _BUFFLINK_H

#include <linux/types.h>

struct bufflink_channel;
struct module;

/* Two words, whatever they mean. */
struct bufflink_record {
	u64 words[2];
};

/* What the owner of a channel does when a ring is full. */
struct bufflink_ops {
	/*
	 * Note a record in a map that needs no memory. Called in any context,
	 * interrupts off, on several CPUs at once. What was noted must be seen
	 * by any harvest() that begins later.
	 */
	void (*overflow)(const struct bufflink_record *record);

	/*
	 * Move at most @max records' worth out of the map to @records and give
	 * their number. May sleep; never called twice at a time. Calls until
	 * *@finished is true make one sweep, which must visit the whole map:
	 * what was noted before the first call has come out by the end. What is
	 * noted again after it came out must come out again in a later sweep.
	 */
	unsigned int (*harvest)(struct bufflink_record *records,
				unsigned int max, bool *finished);
};

struct bufflink_config {
	const char *name;		/* the file is /dev/bufflink/NAME */
	struct module *owner;		/* stays loaded while a reader is there */
	const struct bufflink_ops *ops;
	unsigned int ring_records;	/* for each CPU, rounded up to 2^n */
};

/* A point in the log, see bufflink_mark(). */
struct bufflink_mark {
	u64 sweep;
	unsigned long positions[];	/* nr_cpu_ids */
};

struct bufflink_channel *bufflink_create(const struct bufflink_config *config);
/* The owner must have made sure that nobody produces any more. */
void bufflink_destroy(struct bufflink_channel *channel);
/* From now on use only so many records of each ring; 0: all. */
void bufflink_limit(struct bufflink_channel *channel, unsigned int records);

/* A record. From task, softirq or hardirq context. Never sleeps or allocates. */
void bufflink_produce(struct bufflink_channel *channel, u64 first, u64 second);
/* The owner noted something in its overflow map without being asked to. */
void bufflink_overflowed(struct bufflink_channel *channel);

struct bufflink_mark *bufflink_mark_alloc(void);	/* kfree() it */
/* Remember now: all that was produced or noted before is "up to the mark". */
void bufflink_mark(struct bufflink_channel *channel,
		   struct bufflink_mark *mark);
/* Has the reader consumed everything up to the mark? */
bool bufflink_mark_passed(struct bufflink_channel *channel,
			  const struct bufflink_mark *mark);

#endif
