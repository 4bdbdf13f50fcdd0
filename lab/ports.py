# SPDX-License-Identifier: GPL-3.0-or-later
"""Chooses the loopback ports of an instance, once: they stay the same as long as the instance lives.

They lie below the range from which the kernel takes ports for outgoing connections, so that nobody gets one of them
by chance while a guest is without power.
"""

from __future__ import annotations

import random
import socket

FIRST, LAST = 18000, 31999


def is_free(port: int, kind: socket.SocketKind) -> bool:
    """Whether 127.0.0.1:port can be bound now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose(kinds: list[socket.SocketKind], taken: set[int], seed: str) -> list[int]:
    """One free port for each kind wanted, none of them in `taken`; `seed` decides where the search begins."""
    generator = random.Random(seed)
    chosen: list[int] = []
    while len(chosen) < len(kinds):
        port = generator.randint(FIRST, LAST)
        if port not in taken and port not in chosen and is_free(port, kinds[len(chosen)]):
            chosen.append(port)
    return chosen
