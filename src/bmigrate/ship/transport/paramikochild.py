# SPDX-License-Identifier: GPL-3.0-or-later
"""ssh as a program on top of paramiko: one connection, one command, standard input and output as its ends.

Usage: paramikochild ADDRESS PORT KEY KNOWN_HOSTS COMMAND...; exit code as that of the command, 255 when there was
no connection. What goes wrong is said on standard error in the words of OpenSSH, which the shipper knows.

Promises: no byte leaves before the host key was found equal to the pinned one; only the one key is offered; nothing
prompts. Deadlocks that paramiko is known for cannot happen here: each of the three directions has a thread of its own,
so that none waits for another to be drained; the window is larger than what a receiver ever answers; and
every wait on the network is bounded by TCP_USER_TIMEOUT, because paramiko's own keep-alive never looks for an answer.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, Callable

import paramiko
from paramiko.packet import Packetizer

CONNECT_SECONDS = 10
SILENCE_MILLISECONDS = 15_000
KEEPALIVE_SECONDS = 5
WINDOW_BYTES = 64 << 20
PACKET_BYTES = 1 << 15
CHUNK_BYTES = 1 << 20
REKEY_BYTES = 1 << 35
"""32 GiB: below the 2^32 blocks of 16 bytes that RFC 4344 allows. after 512 MiB, as paramiko does, is too often."""
REKEY_PACKETS = 1 << 30
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
DIGESTS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")
_KEYS = ("Ed25519Key", "ECDSAKey", "RSAKey")
_TCP_USER_TIMEOUT = 18


class Ended(Exception):
    """No connection; the message is for standard error."""


def preferred(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of ``wanted`` that this paramiko knows, in that order.

    Raises:
        Ended: none.
    """
    found = [name for name in wanted if name in known]
    if not found:
        raise Ended(f"this paramiko knows none of {', '.join(wanted)}")
    return found


def load_key(path: str) -> Any:
    """The private key.

    Raises:
        Ended: it is none, or is protected.
    """
    for name in _KEYS:
        try:
            return getattr(paramiko, name).from_private_key_file(path)
        except OSError as exc:
            raise Ended(f'Load key "{path}": {exc.strerror}') from exc
        except (paramiko.SSHException, ValueError, IndexError):
            continue
    raise Ended(f'Load key "{path}": error: it is no key, or it has a passphrase')


def connect(address: str, port: int) -> socket.socket:
    """A connected socket that is neither slow nor silent for long.

    Raises:
        Ended: in the words of ssh.
    """
    try:
        sock = socket.create_connection((address, port), CONNECT_SECONDS)
    except socket.timeout as exc:
        raise Ended(f"ssh: connect to host {address} port {port}: Connection timed out") from exc
    except OSError as exc:
        raise Ended(f"ssh: connect to host {address} port {port}: {exc.strerror or exc}") from exc
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, SILENCE_MILLISECONDS)
    return sock


def log_in(address: str, port: int, key_path: str, known_hosts: str) -> paramiko.Transport:
    """An authenticated connection.

    Raises:
        Ended: in the words of ssh.
    """
    key = load_key(key_path)
    sock = connect(address, port)
    name = address if port == 22 else f"[{address}]:{port}"
    pinned = paramiko.HostKeys()
    try:
        pinned.load(known_hosts)
    except OSError as exc:
        raise Ended(f"Host key verification failed. {known_hosts}: {exc.strerror}") from exc
    entry = pinned.lookup(name)
    if entry is None:
        raise Ended("Host key verification failed.")
    Packetizer.REKEY_BYTES, Packetizer.REKEY_PACKETS = REKEY_BYTES, REKEY_PACKETS
    transport = paramiko.Transport(sock, default_window_size=WINDOW_BYTES, default_max_packet_size=PACKET_BYTES)
    transport.daemon = True
    transport.banner_timeout = transport.auth_timeout = CONNECT_SECONDS
    options = transport.get_security_options()
    options.ciphers = preferred(CIPHERS, options.ciphers)
    options.digests = preferred(DIGESTS, options.digests)
    # The server must show a key of a kind that is pinned: another kind could not be compared.
    kinds = {kind for found in entry for kind in _signatures(found)}
    options.key_types = preferred(
        [kind for kind in options.key_types if kind in kinds] or sorted(kinds), options.key_types
    )
    try:
        transport.start_client(timeout=CONNECT_SECONDS)
    except paramiko.SSHException as exc:
        raise Ended(f"kex_exchange_identification: Connection closed: {exc}") from exc
    if not pinned.check(name, transport.get_remote_server_key()):
        raise Ended("WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! Host key verification failed.")
    try:
        transport.auth_publickey("root", key)
    except paramiko.SSHException as exc:
        raise Ended(f"root@{address}: Permission denied (publickey).") from exc
    return transport


def _signatures(kind: str) -> list[str]:
    """Signature algorithms of a kind of key."""
    return ["rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"] if kind == "ssh-rsa" else [kind]


def main(arguments: Sequence[str]) -> int:
    """Run the program."""
    address, port, key_path, known_hosts, *command = arguments
    try:
        transport = log_in(address, int(port), key_path, known_hosts)
        transport.set_keepalive(KEEPALIVE_SECONDS)
        channel = transport.open_session(window_size=WINDOW_BYTES, max_packet_size=PACKET_BYTES)
        channel.exec_command(" ".join(command))
    except Ended as exc:
        print(exc, file=sys.stderr)
        return 255
    except (paramiko.SSHException, OSError, EOFError) as exc:
        print(f"Connection closed by {address} port {port}: {exc}", file=sys.stderr)
        return 255
    return carry(channel)


def carry(channel: Any) -> int:
    """Until the command has ended and all it said was passed on; its exit code."""
    threads = [
        threading.Thread(target=_pass, args=(channel.recv, 1), daemon=True),
        threading.Thread(target=_pass, args=(channel.recv_stderr, 2), daemon=True),
    ]
    for thread in threads:
        thread.start()
    # Not waited for: it may sit in a read of our standard input for ever.
    threading.Thread(target=_feed, args=(channel,), daemon=True).start()
    for thread in threads:
        thread.join()
    code: int = channel.recv_exit_status()
    return code if code >= 0 else 255


def _feed(channel: Any) -> None:
    """Standard input to the command."""
    try:
        while True:
            data = os.read(0, CHUNK_BYTES)
            if not data:
                channel.shutdown_write()
                return
            channel.sendall(data)
    except (OSError, EOFError, paramiko.SSHException):
        # Its end is seen by who reads; our own input must show it too, or a writer to us would wait for ever.
        os.close(0)


def _pass(take: Callable[[int], bytes], fd: int) -> None:
    """What the command says to a descriptor, until its end."""
    try:
        while True:
            data = memoryview(take(CHUNK_BYTES))
            if not len(data):
                return
            while len(data):
                data = data[os.write(fd, data) :]
    except (OSError, EOFError, paramiko.SSHException):
        if fd == 1:
            os._exit(255)  # nobody reads our output any more, or the connection broke: end as ssh does, at once


if __name__ == "__main__":
    # Not sys.exit: a thread that sits in a read of standard input must not hold up the end.
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
