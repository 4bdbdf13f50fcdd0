# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the lab keeps things: always under the user's cache directory, never in the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lab.errors import LabError

RECIPE = Path(__file__).resolve().parent / "recipe"
REPOSITORY = Path(__file__).resolve().parent.parent


def cache_directory() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/bmigrate; may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "bmigrate"


def images_directory() -> Path:
    """Finished images, one directory per recipe hash."""
    return cache_directory() / "images"


def instance_name() -> str:
    """The lab that commands act on: BMIGRATE_LAB, or `default`.

    Raises:
        LabError: the name is not made of letters, digits, dash and underscore.
    """
    name = os.environ.get("BMIGRATE_LAB") or "default"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise LabError(f"BMIGRATE_LAB={name!r}: use letters, digits, - and _, 40 at most")
    return name


def instance_directory(name: str) -> Path:
    """All that belongs to one instance; may not exist yet."""
    return cache_directory() / "lab" / name
