# SPDX-License-Identifier: GPL-3.0-or-later
"""Finds the Debian mirror that this machine itself uses, so that the image comes from the same place.

Reads one-line and deb822 sources. Only lines of the Debian archive itself count (path /debian or /debian-security, a
suite of Debian's): a third party's line never reaches the guests. Pure: text in, values out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
_DEBIAN_SUITE = re.compile(r"^(bookworm|trixie|forky|bullseye|stable|oldstable|testing|sid|unstable)(-|/|$)")


@dataclass(frozen=True)
class Source:
    """One archive: its address and the suites used from it."""

    uri: str
    suites: tuple[str, ...]


def parse_one_line(text: str) -> list[Source]:
    """The `deb` lines of a sources.list file."""
    found = []
    for line in text.splitlines():
        match = re.match(r"^\s*deb\s+(?:\[[^]]*]\s+)?(\S+)\s+(\S+)(?:\s|$)", line)
        if match:
            found.append(Source(match.group(1), (match.group(2),)))
    return found


def parse_deb822(text: str) -> list[Source]:
    """The stanzas of a .sources file that are of type deb and not disabled."""
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and key:
                fields[key] += " " + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        suites = tuple(fields.get("suites", "").split())
        found += [Source(uri, suites) for uri in fields.get("uris", "").split()]
    return found


def is_debian(source: Source) -> bool:
    """Whether this is the Debian archive itself, or its security archive."""
    path = re.sub(r"^[a-z+]+://[^/]*", "", source.uri).rstrip("/")
    if not re.search(r"(^|/)debian(-security)?$", path) or source.uri.startswith(("cdrom:", "file:")):
        return False
    return any(_DEBIAN_SUITE.match(suite) for suite in source.suites)


def mirror_lines(sources: list[Source], suite: str = SUITE) -> list[str]:
    """sources.list lines for an image of `suite`, from the archives in `sources`.

    Raises:
        LookupError: no Debian archive among them.
    """
    official = [source for source in sources if is_debian(source)]
    main = [s.uri for s in official if not s.uri.rstrip("/").endswith("debian-security")]
    security = [s.uri for s in official if s.uri.rstrip("/").endswith("debian-security")]
    if not main:
        raise LookupError("no Debian archive in this machine's apt sources")
    lines = [f"deb {main[0]} {suite} main", f"deb {main[0]} {suite}-updates main"]
    if security:
        lines.append(f"deb {security[0]} {suite}-security main")
    return lines


def machine_sources(etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """All sources of this machine."""
    found: list[Source] = []
    single = etc_apt / "sources.list"
    if single.is_file():
        found += parse_one_line(single.read_text())
    for path in sorted((etc_apt / "sources.list.d").glob("*")):
        if path.suffix == ".list":
            found += parse_one_line(path.read_text())
        elif path.suffix == ".sources":
            found += parse_deb822(path.read_text())
    return found
