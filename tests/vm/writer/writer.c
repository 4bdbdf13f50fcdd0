// SPDX-License-Identifier: GPL-3.0-or-later
/*
 * The random writer of the VM tests: writes, zeroes and discards all over a block device with
 * O_DIRECT, from several threads at once, until it is told to end.
 *
 * It promises: what each thread asks for, in which order and with which bytes, follows from the
 * seed alone; no sector is ever given the same content twice, so a lost write always shows; every
 * size class from 512 bytes to 1 MiB and the short tail of the device come up at once and again;
 * most writes hit a few hot spots, so that blocks are written again while they are being shipped.
 * It must never hide an error: the first failed request ends it with status 1.
 *
 * SIGUSR1 pauses it (state "paused" only when no request is in flight), SIGUSR2 resumes it,
 * SIGTERM ends it, and so does -n. The counters are in the status file, JSON, replaced ten times a second.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512ULL
#define CLASSES 12 /* 512 bytes << class: up to 1 MiB */
#define MAX_BYTES (SECTOR << (CLASSES - 1))
#define MAX_THREADS 16
#define HOT_SPOTS 40
#define HOT_BYTES 8192ULL

enum kind { WRITE, WRITE_OF_ZEROS, ZERO_RANGE, ZEROOUT, PUNCH, DISCARD, FLUSH, KINDS };
static const char *const kind_names[KINDS] = {
	"write", "write_of_zeros", "zero_range", "zeroout", "punch_hole", "discard", "flush",
};

static struct {
	const char *device, *status;
	uint64_t seed, size, window, ops_per_second, bytes_per_second, each;
	uint64_t window_start, hot[HOT_SPOTS];
	int threads, hot_percent, top_class;
} option = {.window = 4 << 20, .ops_per_second = 400, .bytes_per_second = 1536 << 10, .threads = 4,
	    .hot_percent = 75, .top_class = CLASSES - 1};

static struct {
	_Atomic uint64_t operations, bytes, hot, tail, unaligned, kinds[KINDS], classes[CLASSES];
} count;

static atomic_int stop, pause_asked, parked, running, failed;
static _Atomic uint64_t stream_digest[MAX_THREADS];
static _Atomic uint64_t spent_ops, spent_bytes;
static char failure[200];

struct worker {
	pthread_t thread;
	int number;
	uint64_t random, serial;
	unsigned char *buffer;
};

static uint64_t scramble(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static uint64_t draw(struct worker *w, uint64_t below)
{
	w->random = scramble(w->random);
	return w->random % below;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void nap(double seconds)
{
	struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};

	nanosleep(&t, NULL);
}

/* Each sector starts with who wrote it, when and where, and goes on with bytes that follow from that. */
static void fill(struct worker *w, uint64_t offset, uint64_t length)
{
	for (uint64_t at = 0; at < length; at += SECTOR) {
		uint64_t *word = (uint64_t *)(w->buffer + at);
		uint64_t x = scramble(option.seed ^ ((uint64_t)w->number << 56) ^ (w->serial << 24) ^ (offset + at));

		word[0] = option.seed;
		word[1] = ((uint64_t)w->number << 56) | w->serial;
		word[2] = offset + at;
		for (unsigned int i = 3; i < SECTOR / 8; i++) {
			x ^= x << 13;
			x ^= x >> 7;
			x ^= x << 17;
			word[i] = x;
		}
	}
}

struct request {
	enum kind kind;
	uint64_t offset, length;
	int hot, class;
};

static enum kind choose_kind(struct worker *w)
{
	uint64_t n = draw(w, 100);

	if (w->serial <= KINDS)
		return (enum kind)(w->serial - 1);
	if (n < 76)
		return WRITE;
	if (n < 81)
		return WRITE_OF_ZEROS;
	if (n < 85)
		return ZERO_RANGE;
	if (n < 89)
		return ZEROOUT;
	if (n < 93)
		return PUNCH;
	return n < 98 ? DISCARD : FLUSH;
}

/* Where and how much: any number of sectors of a class, at any sector; the tail ends with the device. */
static struct request choose(struct worker *w)
{
	static const unsigned int weight[CLASSES] = {24, 13, 11, 17, 11, 8, 6, 4, 3, 1, 1, 1};
	struct request r = {.kind = choose_kind(w)};
	uint64_t sectors, place = draw(w, 100), cold = draw(w, 100);
	unsigned int n = draw(w, 100);
	int sweep = w->number == 0 && (int)w->serial <= option.top_class + 1;

	if (sweep)
		r.class = w->serial - 1;
	else
		for (r.class = 0; n >= weight[r.class]; r.class++)
			n -= weight[r.class];
	r.hot = !sweep && (int)place < option.hot_percent;
	if (r.hot && r.class > 4)
		r.class = r.class % 5;
	if (r.class > option.top_class)
		r.class = option.top_class;
	sectors = 1ULL << r.class;
	if (r.class > 1 && draw(w, 2))
		sectors -= draw(w, sectors / 2);
	r.length = sectors * SECTOR;
	if (r.length > option.size)
		r.length = option.size;
	if (r.hot) {
		r.offset = option.hot[draw(w, HOT_SPOTS)] + draw(w, HOT_BYTES / SECTOR) * SECTOR;
	} else if (cold < 28 || (sweep && w->serial <= 2)) {
		r.offset = option.size - r.length;
	} else if (cold < 80) {
		r.offset = option.window_start + draw(w, option.window / SECTOR) * SECTOR;
	} else {
		r.offset = draw(w, option.size / SECTOR) * SECTOR;
	}
	if (r.offset + r.length > option.size)
		r.offset = option.size - r.length;
	return r;
}

static int issue(struct worker *w, int fd, const struct request *r)
{
	uint64_t range[2] = {r->offset, r->length};
	ssize_t done;

	switch (r->kind) {
	case WRITE:
	case WRITE_OF_ZEROS:
		if (r->kind == WRITE)
			fill(w, r->offset, r->length);
		else
			memset(w->buffer, 0, r->length);
		done = pwrite(fd, w->buffer, r->length, r->offset);
		if (done >= 0 && (uint64_t)done != r->length)
			errno = EIO;
		return (uint64_t)done == r->length ? 0 : -1;
	case ZERO_RANGE:
		return fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, r->offset, r->length);
	case PUNCH:
		return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r->offset, r->length);
	case ZEROOUT:
		return ioctl(fd, BLKZEROOUT, range);
	case DISCARD:
		return ioctl(fd, BLKDISCARD, range);
	default:
		return fdatasync(fd);
	}
}

static void note(struct worker *w, const struct request *r)
{
	uint64_t digest = atomic_load(&stream_digest[w->number]);

	digest = scramble(digest ^ scramble(r->kind ^ (r->offset << 4)) ^ (r->length << 32));
	atomic_store(&stream_digest[w->number], digest);
	count.operations++;
	count.kinds[r->kind]++;
	if (r->kind == FLUSH)
		return;
	count.bytes += r->length;
	count.classes[r->class]++;
	count.hot += r->hot;
	count.tail += r->offset + r->length == option.size;
	count.unaligned += (r->offset | r->length) % 4096 != 0;
}

/* Two budgets, operations and bytes a second; a pause is not saved up for. */
static void keep_pace(double *started)
{
	double due;

	do {
		double ops = (double)spent_ops / option.ops_per_second;
		double bytes = (double)spent_bytes / option.bytes_per_second;

		due = *started + (ops > bytes ? ops : bytes) - now();
		if (due < -0.5)
			*started = now() - (ops > bytes ? ops : bytes);
		if (due > 0)
			nap(due < 0.05 ? due : 0.05);
	} while (due > 0.05 && !stop && !pause_asked);
}

static void *work(void *argument)
{
	struct worker *w = argument;
	double started = now();
	int fd = open(option.device, O_RDWR | O_DIRECT | O_CLOEXEC);

	if (fd < 0 || posix_memalign((void **)&w->buffer, 4096, MAX_BYTES)) {
		snprintf(failure, sizeof(failure), "open %s: %s", option.device, strerror(errno));
		failed = stop = 1;
	}
	while (!stop) {
		struct request r;

		if (pause_asked) {
			parked++;
			while (pause_asked && !stop)
				nap(0.005);
			parked--;
			continue;
		}
		keep_pace(&started);
		if (stop || pause_asked)
			continue;
		if (option.each && w->serial == option.each)
			break;
		w->serial++;
		r = choose(w);
		spent_ops++;
		/* The first thread's walk through the sizes is not paid for: a short round must get past it. */
		spent_bytes += w->number == 0 && w->serial <= CLASSES ? 0 : r.length;
		if (issue(w, fd, &r)) {
			snprintf(failure, sizeof(failure), "%s of %llu bytes at %llu: %s", kind_names[r.kind],
				 (unsigned long long)r.length, (unsigned long long)r.offset, strerror(errno));
			failed = stop = 1;
			break;
		}
		note(w, &r);
	}
	running--;
	return NULL;
}

static void report(const char *state)
{
	char temporary[300];
	FILE *out;

	snprintf(temporary, sizeof(temporary), "%s.new", option.status);
	out = fopen(temporary, "we");
	if (!out)
		exit(3);
	fprintf(out, "{\"state\": \"%s\", \"seed\": %llu, \"size_bytes\": %llu, \"failure\": \"%s\", ", state,
		(unsigned long long)option.seed, (unsigned long long)option.size, failure);
	fprintf(out, "\"operations\": %llu, \"bytes\": %llu, \"hot\": %llu, \"tail\": %llu, \"unaligned\": %llu",
		(unsigned long long)count.operations, (unsigned long long)count.bytes,
		(unsigned long long)count.hot, (unsigned long long)count.tail,
		(unsigned long long)count.unaligned);
	fprintf(out, ", \"kinds\": {");
	for (int i = 0; i < KINDS; i++)
		fprintf(out, "%s\"%s\": %llu", i ? ", " : "", kind_names[i], (unsigned long long)count.kinds[i]);
	fprintf(out, "}, \"sizes\": {");
	for (int i = 0; i < CLASSES; i++)
		fprintf(out, "%s\"%llu\": %llu", i ? ", " : "", SECTOR << i, (unsigned long long)count.classes[i]);
	fprintf(out, "}, \"streams\": [");
	for (int i = 0; i < option.threads; i++)
		fprintf(out, "%s\"%016llx\"", i ? ", " : "", (unsigned long long)stream_digest[i]);
	fprintf(out, "]}\n");
	if (fclose(out) || rename(temporary, option.status))
		exit(3);
}

static void on_signal(int number)
{
	if (number == SIGUSR1)
		pause_asked = 1;
	else if (number == SIGUSR2)
		pause_asked = 0;
	else
		stop = 1;
}

static void prepare(int argc, char **argv)
{
	struct worker chooser = {0};
	int c, fd;

	while ((c = getopt(argc, argv, "d:s:o:w:t:i:b:n:p:m:")) != -1) {
		switch (c) {
		case 'd': option.device = optarg; break;
		case 's': option.seed = strtoull(optarg, NULL, 0); break;
		case 'o': option.status = optarg; break;
		case 'w': option.window = strtoull(optarg, NULL, 0); break;
		case 't': option.threads = atoi(optarg); break;
		case 'i': option.ops_per_second = strtoull(optarg, NULL, 0); break;
		case 'b': option.bytes_per_second = strtoull(optarg, NULL, 0); break;
		case 'n': option.each = strtoull(optarg, NULL, 0); break;
		case 'p': option.hot_percent = atoi(optarg); break;
		case 'm': option.top_class = atoi(optarg); break;
		default: exit(2);
		}
	}
	if (!option.device || !option.status || option.threads < 1 || option.threads > MAX_THREADS ||
	    !option.ops_per_second || !option.bytes_per_second || option.window < SECTOR ||
	    option.top_class < 0 || option.top_class >= CLASSES) {
		fprintf(stderr, "usage: writer -d DEVICE -s SEED -o STATUS [-w WINDOW_BYTES] [-t THREADS] "
				"[-i OPERATIONS_PER_SECOND] [-b BYTES_PER_SECOND] [-n OPERATIONS_OF_EACH_THREAD] "
				"[-p PERCENT_ON_HOT_SPOTS] [-m LARGEST_SIZE_CLASS]\n");
		exit(2);
	}
	fd = open(option.device, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &option.size) || option.size < MAX_BYTES) {
		fprintf(stderr, "writer: %s: %s\n", option.device, strerror(errno));
		exit(3);
	}
	close(fd);
	if (option.window > option.size)
		option.window = option.size;
	chooser.random = scramble(option.seed);
	option.window_start = draw(&chooser, (option.size - option.window) / SECTOR + 1) * SECTOR;
	for (int i = 0; i < HOT_SPOTS; i++)
		option.hot[i] = draw(&chooser, (option.size - HOT_BYTES) / SECTOR) * SECTOR;
}

int main(int argc, char **argv)
{
	static struct worker workers[MAX_THREADS];
	struct sigaction action = {.sa_handler = on_signal};

	prepare(argc, argv);
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGUSR2, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	report("starting");
	for (int i = 0; i < option.threads; i++) {
		workers[i].number = i;
		workers[i].random = scramble(option.seed ^ (uint64_t)(i + 1) << 40);
		running++;
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			exit(3);
	}
	while (!stop && running) {
		nap(0.1);
		report(parked == running && pause_asked ? "paused" : "running");
	}
	for (int i = 0; i < option.threads; i++)
		pthread_join(workers[i].thread, NULL);
	report(failed ? "failed" : "ended");
	if (failed)
		fprintf(stderr, "writer: %s\n", failure);
	return failed;
}
