# SPDX-License-Identifier: GPL-3.0-or-later
"""breceive: the forced command on the standby, started by sshd once per connection.

It promises to write nothing before hold has granted an epoch, which hold does only after every
older receiver is dead and that is durable. It names its workload on its own command line, from
authorized_keys; whatever the client asked for (SSH_ORIGINAL_COMMAND) is ignored, and no argument
but ``--workload`` is taken. stdout carries frames and nothing else; people read stderr.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import re
from collections.abc import Sequence
from typing import Any

from bmigrate import __version__
from bmigrate.common import log as logs
from bmigrate.common import paths, rpc
from bmigrate.common.config import NAME_PATTERN
from bmigrate.common.errors import BmigrateError, DefectError, RefusedError, UnreachableError, exit_code_table
from bmigrate.receive.ackfile import AckFile
from bmigrate.receive.link import Link
from bmigrate.receive.session import Member, Session, Writes
from bmigrate.receive.volumes import StandbyVolume
from bmigrate.wire import frames, hashing, packing
from bmigrate.wire import hello as greeting
from bmigrate.wire.frames import FrameError, FrameType

HANDSHAKE_SECONDS = 20.0
REGISTER_SECONDS = 45.0
log = logging.getLogger("breceive")


class _Parser(argparse.ArgumentParser):
    """Exits with the documented code for wrong usage."""

    def __init__(self) -> None:
        super().__init__(
            prog="breceive",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description="Receives one session of a workload's blocks on standard input and writes them to the\n"
            "standby's devices. Not for use by hand: sshd starts it as the forced command of the\n"
            "workload's key, and bmigrate-hold must be running and hold the devices.",
            epilog=exit_code_table(),
        )
        self.add_argument(
            "--workload",
            required=True,
            metavar="NAME",
            action=_Once,
            help="the one workload that this connection may write to",
        )
        self.add_argument("--version", action="version", version=f"breceive {__version__}")


class _Once(argparse.Action):
    """Takes an option once: a second one might be an addition by the client."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        if not re.fullmatch(NAME_PATTERN[1:-1], values):
            parser.error(f"{values!r} is not a workload's name")
        setattr(namespace, self.dest, values)


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns the exit code of the documented table."""
    workload: str = _Parser().parse_args(arguments).workload
    logs.setup("breceive")
    link = Link(0, 1, HANDSHAKE_SECONDS)
    try:
        reason = serve(link, workload)
    except FrameError as error:
        return _end(
            link,
            RefusedError(
                f"bad frame from the sender of workload {workload}: {error}",
                hint="the session has ended; what was not acknowledged is sent again",
                reason=error.reason,
            ),
        )
    except BmigrateError as error:
        return _end(link, error)
    except OSError as error:
        return _end(
            link,
            RefusedError(f"workload {workload}: {error}", hint="see the kernel log of this host", reason="os_error"),
        )
    except Exception as error:  # the last resort: the peer must hear of a defect too
        log.exception("defect")
        return _end(
            link,
            DefectError(
                f"breceive for workload {workload} failed: {error!r}",
                hint="this is a bug; the trace is in the log",
                reason="unexpected",
            ),
        )
    log.info("workload %s: session over: %s", workload, reason)
    return 0


def serve(link: Link, workload: str) -> str:
    """Handshake, then the session; returns why it ended.

    Raises:
        FrameError, BmigrateError, OSError: why it could not begin or go on.
    """
    frame = link.receive()
    if frame is None:
        raise UnreachableError("the sender closed the connection before HELLO", reason="sender_gone")
    if frame.type is not FrameType.HELLO:
        raise RefusedError(f"the first frame is {frame.type.name}, expected HELLO", reason="bad_type")
    hello = greeting.decode_hello(frame.payload)
    if hello.workload != workload:
        raise RefusedError(
            f"the sender wants workload {hello.workload!r}, its key is for {workload!r}",
            hint="each workload has its own key; run install.yml again",
            reason="wrong_workload",
        )
    with rpc.Client(paths.hold_socket(), REGISTER_SECONDS) as hold:
        # Hold kills us when the connection closes. A second descriptor keeps it open until this
        # process ends, so that the reason for the end can still be told to the sender.
        lifeline = os.dup(hold.fileno())
        grant = hold.call("register", workload=workload, hello=hello.to_dict())
        volumes: list[StandbyVolume] = []
        acks = None
        try:
            for volume in hello.volumes:
                place = grant["volumes"][volume.name]
                volumes.append(StandbyVolume(volume.name, place["device"], place["number"], volume.size_bytes))
            if hello.join is None:
                acks = AckFile(workload, grant["epoch"], grant["session_id"], hello.generation.id)
            link.start_session(grant["epoch"], lifeline, grant["silence_seconds"], hello.version)
            welcome = _welcome(hello, grant)
            link.send(FrameType.WELCOME, payload=greeting.encode(welcome))
            log.info(
                "workload %s: %s session %s of epoch %d with %s, process %d",
                workload,
                "opened" if hello.join is None else "joined",
                grant["session_id"],
                grant["epoch"],
                hello.host,
                os.getpid(),
            )

            def clear_suspect(name: str) -> None:
                hold.call("clear_suspect", workload=workload, volume=name)

            def first_write() -> None:
                hold.call("writing", workload=workload)

            unpacker = None
            if _compression(hello):
                unpacker = packing.Unpacker(memoryview(mmap.mmap(-1, frames.MAX_PAYLOAD_BYTES)))
            session: Writes
            if acks is None:
                session = Member(link, volumes, unpacker, first_write)
            else:
                session = Session(link, volumes, acks, clear_suspect, unpacker, welcome.hash, first_write)
            return session.run()
        finally:
            for item in volumes:
                item.close()
            if acks is not None:
                acks.close()


def _compression(hello: greeting.Hello) -> str:
    """What is agreed on: what the sender would like, if this host has it."""
    wanted = hello.version >= 2 and hello.compression == packing.NAME
    return packing.NAME if wanted and packing.available() else ""


def _welcome(hello: greeting.Hello, grant: dict[str, Any]) -> greeting.Welcome:
    places = grant["volumes"]
    return greeting.Welcome(
        epoch=grant["epoch"],
        session_id=grant["session_id"],
        host=grant["host"],
        boot_id=grant["boot_id"],
        silence_seconds=grant["silence_seconds"],
        v=hello.version,
        compression=_compression(hello),
        streams=hello.streams if hello.version >= 3 else 1,
        hash=hashing.agree(hello.version, hello.hash),
        volumes=[
            greeting.WelcomeVolume(
                volume.name,
                index,
                places[volume.name]["size_bytes"],
                places[volume.name]["logical_block_size"],
                places[volume.name]["suspect"],
            )
            for index, volume in enumerate(hello.volumes)
        ],
    )


def _end(link: Link, error: BmigrateError) -> int:
    """Say what went wrong: to people on stderr, to the sender in an ERROR frame as far as it still listens."""
    log.error("%s", error)
    try:
        link.send(FrameType.ERROR, payload=greeting.encode(error.to_dict()))
    except (FrameError, BmigrateError) as gone:
        log.warning("the sender could not be told: %s", gone)
    return error.exit_code
