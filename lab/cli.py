# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's command line. Output meant for programs is JSON on standard output; progress goes to standard error."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from lab import kernels
from lab.disks import DISKS, VM_NAMES
from lab.errors import LabError
from lab.image import say
from lab.instance import BOOT_LIMIT_SECONDS, Lab

DESCRIPTION = """\
Two Debian guests, alpha and beta, under QEMU: what the demo and the tests run on.

  python3 -m lab up                   make and boot both (the first time also builds an image, some minutes)
  python3 -m lab ssh alpha            a shell as root; or: ssh alpha -- uname -r
  python3 -m lab put alpha FILE /tmp/ copy into a guest; get copies out of it
  python3 -m lab kill alpha           cut its power: what it had not flushed to its data disks is lost
  python3 -m lab start alpha          power it on again; same ports, same disks
  python3 -m lab link down            cut the network between the guests, not yours to them
  python3 -m lab compare --disk 2     compare that disk of both guests, on the host
  python3 -m lab down                 end everything and throw the guests away
"""

EPILOG = """\
environment:
  BMIGRATE_LAB             name of the instance (default: default); instances do not disturb each other
  BMIGRATE_LAB_CPUS        processors of a guest (2)
  BMIGRATE_LAB_ICOUNT      1: one processor, whose clock counts the instructions that it executes
  BMIGRATE_LAB_MEMORY_MIB  memory of a guest (1024)
  BMIGRATE_LAB_APPEND      more arguments for the guests' kernel
  BMIGRATE_LAB_KERNEL      directory of another kernel for a new lab's guests: see kernels list
  BMIGRATE_LAB_BOOT_SECONDS  how long to wait for ssh (600)
  XDG_CACHE_HOME           images and instances are kept in its folder bmigrate (~/.cache)

disks of each guest (/dev/disk/by-id/virtio-SERIAL):
""" + "\n".join(
    f"  {d.number}  bm-{d.name}-NAME{'':{10 - len(d.name)}} {d.size_bytes:>11} bytes, {d.block_bytes:>4} per block:"
    f" {d.purpose}"
    for d in DISKS
)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="python3 -m lab",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, vm: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if vm:
            command.add_argument("name", choices=VM_NAMES)
        return command

    up = add("up", "make and boot the guests, and wait until ssh answers; repeat it as you like")
    up.add_argument("names", nargs="*", metavar="NAME", help="only these (both)")
    up.add_argument("--limit", type=float, default=BOOT_LIMIT_SECONDS, help="seconds to wait for ssh (%(default)s)")
    down = add("down", "end every process of this instance and throw the guests away")
    down.add_argument("--keep", action="store_true", help="shut down in good order and keep the disks for the next up")
    ssh = add("ssh", "a shell, or a command after --, as root in a guest", vm=True)
    ssh.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    status = add("status", "what runs, and how to reach it")
    status.add_argument("--json", action="store_true")
    add("kill", "cut the power of a guest", vm=True)
    add("stop", "shut a guest down in good order", vm=True)
    start = add("start", "power a guest on and wait until ssh answers", vm=True)
    start.add_argument("--limit", type=float, default=BOOT_LIMIT_SECONDS, help="seconds to wait for ssh (%(default)s)")
    add("reboot", "reboot a guest in good order and wait until ssh answers", vm=True)
    link = add("link", "plug the network between the guests out or in")
    link.add_argument("state", choices=("down", "up"))
    link.add_argument("name", nargs="?", choices=VM_NAMES, help="only at this guest")
    console = add("console", "what a guest's console said", vm=True)
    console.add_argument("-n", "--lines", type=int, default=60, help="how many lines (%(default)s)")
    console.add_argument("-f", "--follow", action="store_true", help="go on as it says more")
    compare = add("compare", "compare a data disk of both guests on the host; exits with 1 if they differ")
    compare.add_argument("--disk", type=int, choices=[d.number for d in DISKS], default=2)
    compare.add_argument("--json", action="store_true")
    compare.add_argument("--no-flush", action="store_true", help="compare what the files hold, do not ask the guests")
    for name, text in (("put", "copy into a guest"), ("get", "copy out of a guest")):
        copy = add(name, text, vm=True)
        copy.add_argument("source")
        copy.add_argument("target")
    add("prune", "remove cached images and kernels that no instance uses and none would be made from today")
    other = add("kernels", "other kernels than the image's own: for guests (BMIGRATE_LAB_KERNEL), and to build for")
    other.add_argument(
        "verb",
        choices=("make", "list", "refresh", "build"),
        help="make: install what is missing; list: what is there; refresh: install what the suites have now; "
        "build: build module_src with W=1 and sparse",
    )
    other.add_argument("series", nargs="*", metavar="SERIES", help=f"{', '.join(kernels.SERIES)} (all)")
    control = add("control", "talk to a guest's disk server: counters, delays, failures (JSON)", vm=True)
    control.add_argument("json", nargs="?", default='{"op": "stats"}')
    return top


def _show(lab: Lab) -> str:
    status = lab.status()
    if not status["exists"]:
        return f"lab {lab.name}: not made; `python3 -m lab up` makes it"
    lines = [f"lab {lab.name} in {status['directory']}"]
    for name, guest in status["guests"].items():
        state = "off" if not guest["running"] else "ssh answers" if guest["ssh"] else "running, ssh does not answer"
        lines.append(
            f"  {name}: {state}; ssh 127.0.0.1:{guest['ssh_port']}, PostgreSQL 127.0.0.1:{guest['postgresql_port']}, "
            f"LAN {guest['lan_address']}"
        )
    lines.append(f"  ssh -F {status['ssh_config']} {next(iter(status['guests']))}")
    return "\n".join(lines)


def _follow(lab: Lab, args: argparse.Namespace) -> int:
    path = lab.guest(args.name).console_file
    argv = ["tail", "-n", str(args.lines), *(["-f"] if args.follow else []), str(path)]
    os.execvp(argv[0], argv)


def _up(lab: Lab, args: argparse.Namespace) -> int:
    began = time.monotonic()
    lab.up(args.names or None, args.limit)
    say(f"up after {time.monotonic() - began:.0f} s")
    print(_show(lab))
    return 0


def _ssh(lab: Lab, args: argparse.Namespace) -> int:
    lab.guest(args.name)
    command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    argv = [*lab.ssh_argv(args.name), *command]
    os.execvp(argv[0], argv)


def _compare(lab: Lab, args: argparse.Namespace) -> int:
    result = lab.compare(args.disk, flush=not args.no_flush)
    print(json.dumps(result.as_dict(), indent=1) if args.json else result)
    return 0 if result.equal else 1


def run(args: argparse.Namespace) -> int:
    """Do one command; returns the exit code."""
    if args.command == "kernels":
        return kernels.act(args.verb, args.series)
    lab = Lab()
    if args.command == "up":
        return _up(lab, args)
    if args.command == "ssh":
        return _ssh(lab, args)
    if args.command == "compare":
        return _compare(lab, args)
    if args.command == "console":
        return _follow(lab, args)
    if args.command == "status":
        print(json.dumps(lab.status(), indent=1) if args.json else _show(lab))
    elif args.command == "down":
        lab.down(args.keep)
    elif args.command == "start":
        lab.start(args.name, args.limit)
    elif args.command == "link":
        lab.link(args.state == "up", args.name)
    elif args.command == "put":
        lab.put(args.name, args.source, args.target)
    elif args.command == "get":
        lab.get(args.name, args.source, args.target)
    elif args.command == "prune":
        for path in lab.prune():
            say(f"removed {path}")
    elif args.command == "control":
        print(json.dumps(lab.control(args.name, json.loads(args.json)), indent=1))
    else:
        getattr(lab, args.command)(args.name)
    return 0


def main() -> int:
    """Entry point. Exit codes: 0 done, 1 failed (or compare: different), 2 usage."""
    args = parser().parse_args()
    try:
        return run(args)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
