/* SPDX-License-Identifier: GPL-3.0-or-later
 *
 * Claims, acknowledgements, epochs and crashes, in small scope: two blocks, WRITES writes, SESSIONS sessions, and kills of
 * every process, crashes of either host, at every point. Each step below is one that nothing can interrupt; between
 * steps anything may happen. After each step the invariant of docs/safety.md must hold; see tests/model/__main__.py.
 *
 * A block's content is the number of writes to it. dev: what the source's device holds; cache: what the standby's holds
 * while it has power; dur: what it holds after a power cut. A macro named after a mutant breaks one rule.
 */
#define BLOCKS 2
#ifndef WRITES
#define WRITES 2
#endif
#ifndef SESSIONS
#define SESSIONS 3
#endif
#ifndef FAULTS
#define FAULTS 2
#endif

mtype = { DATA, SYNC };

byte dev[BLOCKS], cache[BLOCKS], dur[BLOCKS];
bit under_way[BLOCKS];	/* a write was queued and has not landed */
bit landed[BLOCKS];	/* it has landed and is not recorded yet */
bit recorded[BLOCKS];	/* in the kernel's log, not consumed */
bit marking[BLOCKS];	/* breqd has read it from the log and not yet done with it */
bit dirty[BLOCKS], claimed[BLOCKS];
bit suspect, stopped, drained;
byte writes, faults;

/* The session: epoch 0 is none. fenced: breqd was told that no receiver of an older one lives. */
byte epoch;
bit shipping, fenced;
/* Progress of the shipper with a block: what it read is in carried. */
#define NOTHING 0
#define TAKEN 1
#define READ 2
#define SENT 3
#define SYNCED 4
#define DURABLE 5
byte stage[BLOCKS], carried[BLOCKS];
/* Receivers of the last two sessions, each with its own stream. */
bit alive[2];
chan stream0 = [4] of { mtype, byte, byte };
chan stream1 = [4] of { mtype, byte, byte };
bit answered;		/* an ACK of this session is on its way */
chan acks = [2] of { byte, byte };	/* to breqd: block, epoch of the claim */

#define marked(b) (dirty[b] || claimed[b] || recorded[b] || marking[b] || landed[b] || under_way[b] || suspect)
#define holds(b) (dev[b] == dur[b] || marked(b))
#ifdef SKIP_THE_BARRIER
#define BARRIER 1
#else
#define BARRIER (!recorded[0] && !recorded[1] && !marking[0] && !marking[1])
#endif
#define INVARIANT assert(holds(0) && holds(1))
#define slot (epoch % 2)

inline end_session() {
	shipping = 0; answered = 0;
	stage[0] = NOTHING; stage[1] = NOTHING;
}

inline claims_go_back() {
	dirty[0] = dirty[0] | claimed[0]; claimed[0] = 0;
	dirty[1] = dirty[1] | claimed[1]; claimed[1] = 0;
}

inline kill_receiver(r) {
	alive[r] = 0;
	if
	:: r == 0 -> do :: stream0 ? _, _, _ :: empty(stream0) -> break od
	:: else -> do :: stream1 ? _, _, _ :: empty(stream1) -> break od
	fi
}

inline put(kind, b, v) {
	if
	:: slot == 0 -> stream0 ! kind, b, v
	:: else -> stream1 ! kind, b, v
	fi
}

inline take(r, kind, b, v) {
	if
	:: r == 0 -> stream0 ? kind, b, v
	:: else -> stream1 ? kind, b, v
	fi
}

#define room (slot == 0 && len(stream0) < 4 || slot == 1 && len(stream1) < 4)
#define waiting(r) (r == 0 && len(stream0) > 0 || r == 1 && len(stream1) > 0)

active proctype world() {
	byte b, v, r, e;
	mtype kind;

	do
	:: atomic {
		/* Any block, any receiver. */
		if :: b = 0 :: b = 1 fi;
		if :: r = 0 :: r = 1 fi;
		v = 0; e = 0; kind = DATA;
		if
		/* --- the workload and the kernel --- */
		:: !stopped && writes < WRITES && !under_way[b] && !landed[b] ->
			writes++; under_way[b] = 1;
#ifdef MARK_AT_QUEUE_TIME
			recorded[b] = 1;
#endif
		:: under_way[b] -> under_way[b] = 0; dev[b]++; landed[b] = 1;
#ifdef MARK_AT_QUEUE_TIME
			landed[b] = 0;
#endif
		:: landed[b] -> landed[b] = 0; recorded[b] = 1;
#ifdef DROP_THE_OVERFLOW
			if :: skip :: recorded[b] = 0 fi;
#endif
		/* --- breqd --- */
		:: recorded[b] && !marking[b] ->
			/* read from the log; it stays there until CONSUMED, and marking says that a batch is in hand */
			marking[b] = 1;
#ifdef CONSUME_BEFORE_MARK
			recorded[b] = 0;
#endif
		:: marking[b] ->
#ifdef IGNORE_REDIRTY_WHILE_CLAIMED
			if :: claimed[b] -> skip :: else -> dirty[b] = 1 fi;
#else
			dirty[b] = 1;
#endif
			marking[b] = 0; recorded[b] = 0;
		:: nempty(acks) ->
			acks ? b, e;
#ifdef TAKE_ANY_ACKNOWLEDGEMENT
			claimed[b] = 0;
#else
			if :: e == epoch && fenced -> claimed[b] = 0 :: else -> skip fi;
#endif
			if :: e == epoch && stage[b] == DURABLE -> stage[b] = NOTHING :: else -> skip fi;
		/* --- the shipper --- */
		:: shipping && fenced && stage[b] == NOTHING && dirty[b] && !claimed[b] ->
#ifdef READ_BEFORE_THE_CLAIM
			carried[b] = dev[b];
			stage[b] = TAKEN;
#else
			claimed[b] = 1; dirty[b] = 0; stage[b] = TAKEN;
#endif
		:: shipping && stage[b] == TAKEN ->
#ifdef READ_BEFORE_THE_CLAIM
			claimed[b] = 1; dirty[b] = 0; stage[b] = READ;
#else
			carried[b] = dev[b]; stage[b] = READ;
#endif
		:: shipping && stage[b] == READ && room ->
			put(DATA, b, carried[b]); stage[b] = SENT;
#ifdef CLEAR_ON_SEND
			claimed[b] = 0;
#endif
		:: shipping && (stage[0] == SENT || stage[1] == SENT) && room && !answered &&
		   stage[0] != SYNCED && stage[1] != SYNCED ->
			put(SYNC, 0, 0);
			if :: stage[0] == SENT -> stage[0] = SYNCED :: else -> skip fi;
			if :: stage[1] == SENT -> stage[1] = SYNCED :: else -> skip fi;
		:: shipping && answered ->
#ifdef PROBE_AN_ACKNOWLEDGEMENT_AFTER_A_WRITE
			assert(!(stage[0] == SYNCED && dirty[0] && claimed[0] && epoch == SESSIONS));
#endif
			answered = 0;
			if :: stage[0] == SYNCED -> stage[0] = DURABLE :: else -> skip fi;
			if :: stage[1] == SYNCED -> stage[1] = DURABLE :: else -> skip fi;
		:: shipping && stage[b] == DURABLE && len(acks) < 2 && claimed[b] && !(acks ?? [eval(b), eval(epoch)]) ->
			acks ! b, epoch;
		/* --- the receivers and hold --- */
		:: alive[r] && waiting(r) ->
			take(r, kind, b, v);
			if
			:: kind == DATA -> cache[b] = v;
			:: else ->
#ifdef ACKNOWLEDGE_BEFORE_FSYNC
				skip;
#else
				dur[0] = cache[0]; dur[1] = cache[1];
#endif
				if :: r == slot && shipping -> answered = 1 :: else -> skip fi;
			fi;
		/* The standby's device may write its cache out whenever it likes. */
		:: dur[b] != cache[b] -> dur[b] = cache[b];
		:: !shipping && epoch < SESSIONS && !drained ->
			/* hold: every receiver of an older epoch is dead before the new one is granted. */
			epoch++; shipping = 1; fenced = 0;
#ifdef LET_AN_OLD_RECEIVER_LIVE
			kill_receiver(slot);
#else
			kill_receiver(0); kill_receiver(1);
#endif
			alive[slot] = 1;
		:: shipping && !fenced ->
			/* WELCOME was seen: breqd may be told. Claims of older sessions go back. */
			fenced = 1; claims_go_back();
#ifndef NO_RESYNC
			/* A resync compares everything that is suspect: here it marks it. */
			if :: suspect && !under_way[0] && !under_way[1] -> dirty[0] = 1; dirty[1] = 1; suspect = 0 :: else -> skip fi;
#endif
		/* --- faults --- */
		:: faults < FAULTS && shipping -> faults++; end_session();
		:: faults < FAULTS && alive[r] ->
			faults++; kill_receiver(r);
			if :: r == slot && shipping -> end_session() :: else -> skip fi;
		:: faults < FAULTS ->	/* breqd: the maps are files, both in one; what it had in hand is in the log still */
			faults++; fenced = 0; claims_go_back();
			marking[0] = 0; marking[1] = 0;
			do :: acks ? _, _ :: empty(acks) -> break od;
			if :: shipping -> end_session() :: else -> skip fi;
			kill_receiver(0); kill_receiver(1);
		:: faults < FAULTS ->	/* power cut of the standby */
			faults++; kill_receiver(0); kill_receiver(1);
			cache[0] = dur[0]; cache[1] = dur[1];
			if :: shipping -> end_session() :: else -> skip fi;
		:: faults < FAULTS && !stopped ->	/* crash of the source: no bit had to reach its disk */
			faults++;
#ifndef BELIEVE_THE_MAP_AFTER_A_CRASH
			suspect = 1;
#endif
			recorded[0] = 0; recorded[1] = 0; marking[0] = 0; marking[1] = 0;
			landed[0] = 0; landed[1] = 0; under_way[0] = 0; under_way[1] = 0;
			if :: dirty[0] = 0 :: skip fi; if :: dirty[1] = 0 :: skip fi;
			claimed[0] = 0; claimed[1] = 0; fenced = 0;
			do :: acks ? _, _ :: empty(acks) -> break od;
			if :: shipping -> end_session() :: else -> skip fi;
			kill_receiver(0); kill_receiver(1);
		/* --- the handover --- */
		:: !stopped -> stopped = 1;	/* quiesced: nothing is queued any more */
		:: stopped && !drained && shipping && fenced && !suspect && BARRIER &&
		   !under_way[0] && !under_way[1] && !landed[0] && !landed[1] &&
		   !dirty[0] && !dirty[1] && !claimed[0] && !claimed[1] ->
			drained = 1;
#ifdef PROBE_A_DRAIN_AFTER_ALL_FAULTS
			assert(!(faults == FAULTS && writes == WRITES && epoch == SESSIONS));
#endif
			assert(dev[0] == dur[0] && dev[1] == dur[1]);
		:: else -> skip
		fi;
		b = 0; v = 0; r = 0; e = 0; kind = DATA;
		INVARIANT
	   }
	od
}
