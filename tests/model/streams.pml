/* SPDX-License-Identifier: GPL-3.0-or-later
 *
 * A session of two streams, in small scope: two blocks that may take either stream, WRITES writes, SESSIONS sessions, FAULTS
 * faults at every point. What protocol.pml shows of one stream (recording, the log, crashes of the source) is taken as
 * given: a write here is dirty when it has landed. See tests/model/__main__.py.
 *
 * dev, cache, dur: as there. A flush may fail: what the device had not made durable is gone, and the kernel says so once,
 * to whoever flushes next. A macro named after a mutant breaks one rule.
 */
#ifndef WRITES
#define WRITES 3
#endif
#ifndef SESSIONS
#define SESSIONS 3
#endif
#ifndef FAULTS
#define FAULTS 2
#endif

mtype = { DATA, MARK, SYNC };

byte dev[2], cache[2], dur[2];
bit dirty[2], claimed[2];
bit lost;		/* a flush will fail, once */
byte writes, faults, epoch;
bit shipping;
#define NOTHING 0
#define READ 1
#define SENT 2
#define COVERED 3	/* by a SYNC that has not been acknowledged */
byte stage[2], carried[2], lane[2];
bit wanted;		/* a SYNC is due and has not left */
bit elsewhere;		/* it covers what travelled on the second stream */
bit unmarked;		/* the second stream has not answered its MARK */
bit acked, acked_second;
/* The first stream's receiver of the open session: a write takes a while, and a flush goes on beside it. */
byte writing, landing;	/* which block, from 1, and what */
bit due, flushing;	/* a SYNC was taken; its flush has begun */
byte snap[2];		/* what the flush makes durable */
bit unflushed, since;	/* something counts as not flushed; something counted since the flush began */
/* Receivers and their pipes: first and second stream of the last two sessions. */
bit alive[4];
chan pipe0 = [3] of { mtype, byte, byte };
chan pipe1 = [3] of { mtype, byte, byte };
chan pipe2 = [3] of { mtype, byte, byte };
chan pipe3 = [3] of { mtype, byte, byte };

#define slot (epoch % 2)
#define of(l) (2 * slot + (l))
#define holds(b) (dev[b] == dur[b] || dirty[b] || claimed[b])
#define INVARIANT assert(holds(0) && holds(1))
#define filled(r) (r == 0 && len(pipe0) > 0 || r == 1 && len(pipe1) > 0 || r == 2 && len(pipe2) > 0 || r == 3 && len(pipe3) > 0)
#define room(r) (r == 0 && len(pipe0) < 3 || r == 1 && len(pipe1) < 3 || r == 2 && len(pipe2) < 3 || r == 3 && len(pipe3) < 3)

inline put(r, kind, b, v) {
	if
	:: r == 0 -> pipe0 ! kind, b, v
	:: r == 1 -> pipe1 ! kind, b, v
	:: r == 2 -> pipe2 ! kind, b, v
	:: r == 3 -> pipe3 ! kind, b, v
	fi
}

inline take(r, kind, b, v) {
	if
	:: r == 0 -> pipe0 ? kind, b, v
	:: r == 1 -> pipe1 ? kind, b, v
	:: r == 2 -> pipe2 ? kind, b, v
	:: r == 3 -> pipe3 ? kind, b, v
	fi
}

inline kill(r) {
	alive[r] = 0;
	if :: r == of(0) -> reset() :: else -> skip fi;
	if
	:: r == 0 -> do :: pipe0 ? _, _, _ :: empty(pipe0) -> break od
	:: r == 1 -> do :: pipe1 ? _, _, _ :: empty(pipe1) -> break od
	:: r == 2 -> do :: pipe2 ? _, _, _ :: empty(pipe2) -> break od
	:: r == 3 -> do :: pipe3 ? _, _, _ :: empty(pipe3) -> break od
	fi
}

inline reset() {
	writing = 0; landing = 0; due = 0; flushing = 0; snap[0] = 0; snap[1] = 0; unflushed = 0; since = 0;
}

inline end_session() {
	shipping = 0; wanted = 0; unmarked = 0; acked = 0; acked_second = 0;
	stage[0] = NOTHING; stage[1] = NOTHING;
}

inline clear(b) {
	claimed[b] = 0; stage[b] = NOTHING;
}

active proctype world() {
	byte b, v, r;
	mtype kind;

	do
	:: atomic {
		if :: b = 0 :: b = 1 fi;
		if :: r = 0 :: r = 1 :: r = 2 :: r = 3 fi;
		v = 0; kind = DATA;
		if
		:: writes < WRITES -> writes++; dev[b]++; dirty[b] = 1;
		/* --- the shipper --- */
#ifdef CLAIM_A_CLAIMED_BLOCK
		:: shipping && stage[b] != READ && dirty[b] ->
#else
		:: shipping && stage[b] == NOTHING && dirty[b] && !claimed[b] ->
#endif
			claimed[b] = 1; dirty[b] = 0; carried[b] = dev[b]; stage[b] = READ;
			if :: lane[b] = 0 :: lane[b] = 1 fi;
		:: shipping && stage[b] == READ && room(of(lane[b])) ->
			put(of(lane[b]), DATA, b, carried[b]);
			stage[b] = SENT;
		:: shipping && (stage[0] == SENT || stage[1] == SENT) && !wanted && !acked && !acked_second &&
		   stage[0] != COVERED && stage[1] != COVERED && room(of(1)) ->
			if
			:: stage[0] == SENT && lane[0] == 1 || stage[1] == SENT && lane[1] == 1 ->
				put(of(1), MARK, 0, 0);
				unmarked = 1;
			:: else -> skip
			fi;
			if :: stage[0] == SENT -> stage[0] = COVERED :: else -> skip fi;
			if :: stage[1] == SENT -> stage[1] = COVERED :: else -> skip fi;
			wanted = 1;
			elsewhere = unmarked;
#ifdef SYNC_BEFORE_MARKED
		:: shipping && wanted && room(of(0)) -> put(of(0), SYNC, 0, elsewhere); wanted = 0;
#else
#ifdef EACH_STREAM_FLUSHES
		:: shipping && wanted && room(of(0)) -> put(of(0), SYNC, 0, elsewhere); wanted = 0;
#else
		:: shipping && wanted && !unmarked && room(of(0)) -> put(of(0), SYNC, 0, elsewhere); wanted = 0;
#endif
#endif
		:: shipping && acked ->
#ifdef PROBE_BOTH_STREAMS_ACKNOWLEDGED_LATE
			assert(!(stage[0] == COVERED && stage[1] == COVERED && lane[0] != lane[1] && epoch == SESSIONS && faults == FAULTS));
#endif
			acked = 0;
#ifdef EACH_STREAM_FLUSHES
			if :: stage[0] == COVERED && lane[0] == 0 -> clear(0) :: else -> skip fi;
			if :: stage[1] == COVERED && lane[1] == 0 -> clear(1) :: else -> skip fi;
		:: shipping && acked_second ->
			acked_second = 0;
			if :: stage[0] == COVERED && lane[0] == 1 -> clear(0) :: else -> skip fi;
			if :: stage[1] == COVERED && lane[1] == 1 -> clear(1) :: else -> skip fi;
#else
			if :: stage[0] == COVERED -> clear(0) :: else -> skip fi;
			if :: stage[1] == COVERED -> clear(1) :: else -> skip fi;
#endif
		/* --- the receivers --- */
		:: alive[r] && filled(r) && !(r == of(0) && writing) ->
			take(r, kind, b, v);
			if
			:: kind == DATA && r == of(0) ->
				writing = b + 1; landing = v;
#ifdef COUNT_A_WRITE_AT_ITS_BEGIN
				unflushed = 1; since = 1;
#endif
			:: kind == DATA && r != of(0) -> cache[b] = v;
			:: kind == MARK ->
#ifdef EACH_STREAM_FLUSHES
				if
				:: lost -> lost = 0; kill(r);
				:: else ->
					dur[0] = cache[0]; dur[1] = cache[1];
					if :: r == of(1) && shipping -> acked_second = 1 :: else -> skip fi;
				fi;
#else
				if :: r == of(1) && shipping -> unmarked = 0 :: else -> skip fi;
#endif
			:: kind == SYNC && r == of(0) ->
				due = 1;
				if :: v -> unflushed = 1; since = 1 :: else -> skip fi;
			:: kind == SYNC && r != of(0) -> skip	/* nobody hears an answer of an older session */
			fi;
		:: writing ->
			cache[writing - 1] = landing; writing = 0; landing = 0;
#ifndef COUNT_A_WRITE_AT_ITS_BEGIN
			unflushed = 1; since = 1;
#endif
		:: due && !flushing ->
			due = 0;
			if
			:: unflushed -> flushing = 1; since = 0; snap[0] = cache[0]; snap[1] = cache[1];
			:: else -> if :: shipping -> acked = 1 :: else -> skip fi;
			fi;
		:: flushing ->
			flushing = 0;
			if
			:: lost -> lost = 0; kill(of(0));	/* after a failed flush it never flushes again */
			:: else ->
				dur[0] = snap[0]; dur[1] = snap[1]; snap[0] = 0; snap[1] = 0;
				unflushed = since; since = 0;
				if :: shipping -> acked = 1 :: else -> skip fi;
			fi;
		:: !lost && dur[b] != cache[b] -> dur[b] = cache[b];
		/* --- hold --- */
		/* One receiver of the session has ended: the others are killed, and the shipper learns of it. */
		:: shipping && (!alive[of(0)] || !alive[of(1)]) -> kill(of(0)); kill(of(1)); end_session();
		:: !shipping && epoch < SESSIONS ->
			/* Every receiver of an older epoch is dead before the new one is granted. */
			kill(0); kill(2);
#ifndef FENCE_THE_FIRST_STREAM_ONLY
			kill(1); kill(3);
#endif
			epoch++;
			kill(of(0)); kill(of(1));
			alive[of(0)] = 1; alive[of(1)] = 1;
			shipping = 1;
			dirty[0] = dirty[0] | claimed[0]; claimed[0] = 0;
			dirty[1] = dirty[1] | claimed[1]; claimed[1] = 0;
		/* --- faults --- */
		:: faults < FAULTS && shipping -> faults++; end_session();	/* the shipper: its receivers live on */
		:: faults < FAULTS && alive[r] -> faults++; kill(r);
		:: faults < FAULTS && !lost && (dur[0] != cache[0] || dur[1] != cache[1]) ->
			faults++; lost = 1; cache[0] = dur[0]; cache[1] = dur[1];
			if :: flushing -> snap[0] = dur[0]; snap[1] = dur[1] :: else -> skip fi;
		:: else -> skip
		fi;
		b = 0; v = 0; r = 0; kind = DATA;
		INVARIANT
	   }
	od
}
