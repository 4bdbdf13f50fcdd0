# SPDX-License-Identifier: GPL-3.0-or-later
"""The hash of a comparison: which one a session uses, and the digests of a HASHES frame.

Promises: a digest has 128 bits and is of a cryptographic hash, because "equal" skips a block, and who writes to a
volume may have made its content on purpose. BLAKE2b with a digest of 16 bytes (RFC 7693) is what every peer
speaks; SHA-256 cut to its first 16 bytes (FIPS 180-4; cutting as in NIST SP 800-107) is used where both ends measured
that it is faster, which it is on processors with instructions for it. Both ends of a session use the same one.
"""

from __future__ import annotations

import functools
import hashlib
import time
from typing import Callable

from bmigrate.wire.frames import HASH_DIGEST_BYTES

BLAKE2B = "blake2b"
SHA256 = "sha256"
NAMES = (BLAKE2B, SHA256)
SINCE_VERSION = 3
_TRIAL_BYTES = 64 << 10
_TRIALS = 6
_MARGIN = 0.9
"""Of BLAKE2b's time: what is hardly faster on one end is not worth what it may cost the other."""


def digests(name: str, data: memoryview | bytes, chunk_bytes: int) -> bytes:
    """The 16-byte digests of each chunk, one after the other; the last chunk may be shorter.

    Args:
        name: BLAKE2B or SHA256.
    """
    view = memoryview(data)
    chunks = (view[start : start + chunk_bytes] for start in range(0, len(view), chunk_bytes))
    if name == SHA256:
        sha256 = hashlib.sha256
        return b"".join([sha256(chunk).digest()[:HASH_DIGEST_BYTES] for chunk in chunks])
    blake2b = hashlib.blake2b
    return b"".join([blake2b(chunk, digest_size=HASH_DIGEST_BYTES).digest() for chunk in chunks])


def preferred() -> str:
    """What this host is faster with, measured once in one or two milliseconds."""
    return _measured()


@functools.lru_cache(maxsize=1)
def _measured() -> str:
    data = bytes(_TRIAL_BYTES)
    return choose(lambda name: _seconds(name, data))


def choose(seconds: Callable[[str], float]) -> str:
    """The hash to use, by what hashing takes with each: the least of a few times, others may use the processor."""
    best = {name: min(seconds(name) for _ in range(_TRIALS)) for name in NAMES}
    return SHA256 if best[SHA256] < _MARGIN * best[BLAKE2B] else BLAKE2B


def agree(version: int, wanted: str) -> str:
    """What a receiver agrees on: what the sender would like, where this host finds it faster too.

    Args:
        version: of the session. wanted: as in HELLO; may be a name of a newer release.
    """
    return SHA256 if version >= SINCE_VERSION and wanted == SHA256 == preferred() else BLAKE2B


def _seconds(name: str, data: bytes) -> float:
    began = time.perf_counter()
    digests(name, data, len(data))
    return time.perf_counter() - began
