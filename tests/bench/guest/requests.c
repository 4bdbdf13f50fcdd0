// SPDX-License-Identifier: GPL-3.0-or-later
/*
 * Runs in a guest: writes blocks of 4 KiB to a device, with as few instructions of its own as it can, and tells what
 * they took.
 *
 *	requests DEVICE DEPTH COUNT SEED [PID...]
 *
 * Depth 1 is pwrite(), deeper is io_submit() with DEPTH requests in flight: those that have completed are replaced in
 * one call. The offsets follow from SEED, so that two runs write the same blocks in the same order. The clock is the
 * processor's time stamp counter; in a guest with `-icount shift=0` it counts instructions, and `loop` says so: the
 * counter's advance over a loop of `loop_instructions` of them (the least of several, so without interrupts).
 *
 * Output: one JSON object: ticks (the counter over all requests), own_ns (processor time of this thread), idle_ns (what
 * the processor slept of it), loop, loop_instructions, pids_ns (processor time of each PID meanwhile), and latency
 * (50th, 99th and 99.9th percentile, in ticks; depth 1: of the call, deeper: from io_submit() until it is reaped).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define BLOCK 4096
#define DEEPEST 256
#define LOOP_INSTRUCTIONS 1000000

static int device;
static uint64_t blocks, state;
static unsigned char *data;
static uint64_t *latency;
static char *const *pids;
static int pid_count;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t next_offset(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % blocks * BLOCK;
}

/* Two instructions a turn; what is around them does not count. */
static uint64_t count_loop(void)
{
	uint64_t least = UINT64_MAX, before, took, turns;
	int i;

	for (i = 0; i < 8; i++) {
		turns = LOOP_INSTRUCTIONS / 2;
		before = __rdtsc();
		__asm__ volatile("1: dec %0\n\tjnz 1b" : "+r"(turns) : : "cc");
		took = __rdtsc() - before;
		if (took < least)
			least = took;
	}
	return least;
}

/* What the scheduler has given to a task so far; the task does not run, since we do. */
static uint64_t task_ns(const char *pid)
{
	unsigned long long ns;
	char path[64];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%s/schedstat", pid);
	file = fopen(path, "r");
	if (!file || fscanf(file, "%llu", &ns) != 1)
		fail(path);
	fclose(file);
	return ns;
}

static uint64_t own_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* How long the processor has slept, interrupts not included; one processor only. /proc/stat is a thousand times coarser. */
static uint64_t idle_ns(void)
{
	unsigned long long value, sum = 0;
	char line[256];
	int found = 0;
	FILE *file = fopen("/proc/timer_list", "r");

	if (!file)
		fail("/proc/timer_list");
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, " .idle_sleeptime : %llu", &value) == 1 ||
		    sscanf(line, " .iowait_sleeptime : %llu", &value) == 1) {
			sum += value;
			found++;
		}
	fclose(file);
	if (found < 2) {
		fprintf(stderr, "requests: /proc/timer_list does not tell how long the processor slept\n");
		exit(1);
	}
	return sum;
}

static void one_at_a_time(uint64_t count)
{
	uint64_t i, before;

	for (i = 0; i < count; i++) {
		before = __rdtsc();
		if (pwrite(device, data, BLOCK, next_offset()) != BLOCK)
			fail("pwrite");
		latency[i] = __rdtsc() - before;
	}
}

static void many_at_a_time(aio_context_t context, uint64_t count, int depth)
{
	static struct iocb blocks_of[DEEPEST], *list[DEEPEST];
	static struct io_event events[DEEPEST];
	static uint64_t began[DEEPEST];
	uint64_t sent = 0, done = 0, now;
	int free_count = 0, want, got, put, i, slot;
	int free_slots[DEEPEST];

	for (i = 0; i < depth; i++)
		free_slots[free_count++] = i;
	while (done < count) {
		want = free_count;
		if ((uint64_t)want > count - sent)
			want = count - sent;
		now = __rdtsc();
		for (i = 0; i < want; i++) {
			slot = free_slots[--free_count];
			memset(&blocks_of[slot], 0, sizeof(blocks_of[slot]));
			blocks_of[slot].aio_fildes = device;
			blocks_of[slot].aio_lio_opcode = IOCB_CMD_PWRITE;
			blocks_of[slot].aio_buf = (uintptr_t)data;
			blocks_of[slot].aio_nbytes = BLOCK;
			blocks_of[slot].aio_offset = next_offset();
			blocks_of[slot].aio_data = slot;
			list[i] = &blocks_of[slot];
			began[slot] = now;
		}
		for (put = 0; put < want; put += got) {
			got = syscall(SYS_io_submit, context, want - put, list + put);
			if (got <= 0)
				fail("io_submit");
		}
		sent += want;
		got = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (got < 1)
			fail("io_getevents");
		now = __rdtsc();
		for (i = 0; i < got; i++) {
			if (events[i].res != BLOCK) {
				errno = -events[i].res;
				fail("a request");
			}
			slot = events[i].data;
			latency[done++] = now - began[slot];
			free_slots[free_count++] = slot;
		}
	}
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	uint64_t count, bytes, ticks, own, idle, loop, before[16];
	aio_context_t context = 0;
	int depth, i;

	if (argc < 5 || argc > 5 + 16) {
		fprintf(stderr, "usage: requests DEVICE DEPTH COUNT SEED [PID...]\n");
		return 2;
	}
	depth = atoi(argv[2]);
	count = strtoull(argv[3], NULL, 0);
	state = strtoull(argv[4], NULL, 0);
	pids = argv + 5;
	pid_count = argc - 5;
	if (depth < 1 || depth > DEEPEST || !count || !state) {
		fprintf(stderr, "requests: depth 1 to %d, COUNT and SEED not 0\n", DEEPEST);
		return 2;
	}
	device = open(argv[1], O_RDWR | O_DIRECT);
	if (device < 0 || ioctl(device, BLKGETSIZE64, &bytes))
		fail(argv[1]);
	blocks = bytes / BLOCK;
	data = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	latency = calloc(count, sizeof(*latency));
	if (data == MAP_FAILED || !latency || mlockall(MCL_CURRENT))
		fail("memory");
	memset(data, 0x5a, BLOCK);
	memset(latency, 1, count * sizeof(*latency));
	if (syscall(SYS_io_setup, depth, &context))
		fail("io_setup");
	loop = count_loop();

	/* What others may do meanwhile counts here or there: next to the counter is what matters most. */
	idle = idle_ns();
	own = own_ns();
	for (i = 0; i < pid_count; i++)
		before[i] = task_ns(pids[i]);
	ticks = __rdtsc();
	if (depth == 1)
		one_at_a_time(count);
	else
		many_at_a_time(context, count, depth);
	ticks = __rdtsc() - ticks;
	for (i = 0; i < pid_count; i++)
		before[i] = task_ns(pids[i]) - before[i];
	own = own_ns() - own;
	idle = idle_ns() - idle;

	qsort(latency, count, sizeof(*latency), compare);
	printf("{\"ticks\": %llu, \"own_ns\": %llu, \"idle_ns\": %llu, \"loop\": %llu, \"loop_instructions\": %d, ",
	       (unsigned long long)ticks, (unsigned long long)own, (unsigned long long)idle, (unsigned long long)loop,
	       LOOP_INSTRUCTIONS);
	printf("\"pids_ns\": [");
	for (i = 0; i < pid_count; i++)
		printf("%s%llu", i ? ", " : "", (unsigned long long)before[i]);
	printf("], \"latency\": [%llu, %llu, %llu]}\n", (unsigned long long)latency[count / 2],
	       (unsigned long long)latency[count * 99 / 100], (unsigned long long)latency[count * 999 / 1000]);
	return 0;
}
