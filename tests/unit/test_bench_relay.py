# SPDX-License-Identifier: GPL-3.0-or-later
"""The link with delay of tests.bench.streams: late, in order, whole, bounded."""

from __future__ import annotations

import os
import socket
import threading
import time

from tests.bench import relay


def test_parts_come_late_and_in_order() -> None:
    way = relay.Direction(0.05)
    began = time.monotonic()
    for part in (b"one", b"two", b""):
        assert way.put(part)
    assert way.on_its_way == 6
    assert [way.get() for _ in range(3)] == [b"one", b"two", b""]
    assert time.monotonic() - began >= 0.05 and way.on_its_way == 0


def test_what_is_on_its_way_is_bounded() -> None:
    way = relay.Direction(0.0, limit_bytes=4)
    way.put(b"1234")
    late: list[bool] = []
    thread = threading.Thread(target=lambda: late.append(way.put(b"5")))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "more than the limit was taken in"
    assert way.get() == b"1234"
    thread.join(10)
    assert late == [True]
    way.put(b"678")
    gone: list[bool] = []
    waiting = threading.Thread(target=lambda: gone.append(way.put(b"9")))
    waiting.start()
    way.give_up()
    waiting.join(10)
    assert gone == [False], "a broken direction went on taking in"


def test_a_connection_is_carried_whole_with_its_end() -> None:
    sent = os.urandom(3 << 20)
    with socket.create_server(("127.0.0.1", 0)) as echo, socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = echo.accept()
            with peer:
                while part := peer.recv(65536):
                    peer.sendall(part)

        ports = [item.getsockname()[1] for item in (echo, listener)]
        threading.Thread(target=answer, daemon=True).start()
        threading.Thread(target=relay.serve, args=(listener, ports[0], 0.02), daemon=True).start()
        with socket.create_connection(("127.0.0.1", ports[1]), 10.0) as client:
            client.settimeout(30.0)
            began = time.monotonic()
            client.sendall(sent[:1])
            assert client.recv(1) == sent[:1]
            assert time.monotonic() - began >= 0.04, "a round trip was shorter than both delays"

            def rest() -> None:
                client.sendall(sent[1:])
                client.shutdown(socket.SHUT_WR)

            writer = threading.Thread(target=rest)
            writer.start()
            back = sent[:1]
            while part := client.recv(1 << 20):
                back += part
            writer.join(10)
    assert back == sent
