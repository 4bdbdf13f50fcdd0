# SPDX-License-Identifier: GPL-3.0-or-later
"""Arguments that several sub-commands share, and the reading of JSON arguments."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from bmigrate.common import errors
from bmigrate.common.errors import UsageError

NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")


def add_command(subparsers: Any, name: str, help_text: str, description: str) -> argparse.ArgumentParser:
    """A sub-command's parser with the exit codes below its help."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=description,
        epilog=errors.exit_code_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_workload(parser: argparse.ArgumentParser) -> None:
    """``--workload W``, required."""
    parser.add_argument("--workload", "-w", required=True, type=workload_name, metavar="W", help="the workload's name")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")


def workload_name(text: str) -> str:
    """A workload's name; it becomes part of paths, so its form is checked first."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: a lower-case letter, then at most 30 of a-z 0-9 _ -")
    return text


def run_id(text: str) -> str:
    """A run id: what a controller calls one handover."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a run id: letters, digits, . _ -, at most 64")
    return text


def json_value(option: str, text: str | None, kind: type) -> Any:
    """Parse a JSON argument of a given type; ``-`` reads it from stdin.

    Raises:
        UsageError: missing, not JSON, or of another type.
    """
    if text is None:
        raise UsageError(f"{option} is required for this step", hint="see --help", reason="usage")
    if text == "-":
        text = sys.stdin.read()
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise UsageError(
            f"{option}: not JSON: {exc}", hint="quote it for the shell, or pass - and use stdin", reason="usage"
        ) from exc
    if not isinstance(value, kind):
        word = "an object" if kind is dict else "a list"
        raise UsageError(f"{option}: must be {word}, is {type(value).__name__}", reason="usage")
    return value
