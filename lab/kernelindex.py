# SPDX-License-Identifier: GPL-3.0-or-later
"""Which stock kernels Debian's suites offer, and which of them is meant by a series.

Promises to ask only the archives that this machine itself uses, with lists of its own: the machine's apt state is
neither read nor changed. What the suites offer changes from day to day; the answer is that of the moment.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lab import aptsources
from lab.errors import LabError

#: A series by its number, or one of the two newest ones after Linux 6.
SERIES = ("5.10", "6.1", "6.12", "previous", "newest")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
#: Base suite, and what belongs to it.
_SUITES = {
    "bullseye": ("bullseye", "bullseye-security"),
    "bookworm": ("bookworm", "bookworm-security", "bookworm-backports"),
    "trixie": ("trixie", "trixie-security", "trixie-backports"),
    "sid": ("sid",),
}
# No release candidates, no flavours (cloud, rt), no kernel of one release rebuilt for the one before.
_IMAGE = re.compile(
    r"^Package: linux-(image|headers)-(\d+\.\d+\.\d+(?:-\d+)?(?:\+deb\d+(?:\.\d+)?)?-amd64)(-unsigned)?$", re.MULTILINE
)


@dataclass(frozen=True)
class Offer:
    """A kernel with headers that a suite has."""

    suite: str
    release: str
    image: str

    @property
    def headers(self) -> str:
        """The package with its headers."""
        return f"linux-headers-{self.release}"

    @property
    def number(self) -> tuple[int, ...]:
        """What orders releases: all numbers of the name, the distribution's own last."""
        return tuple(int(part) for part in re.findall(r"\d+", self.release.removesuffix("-amd64")))


def parse(suite: str, text: str) -> list[Offer]:
    """The kernels in a Packages file that have both image and headers; the signed image, where there is one."""
    images: dict[str, str] = {}
    headers = set()
    for kind, release, unsigned in _IMAGE.findall(text):
        if kind == "headers":
            headers.add(release)
        elif not unsigned or release not in images:
            images[release] = f"linux-image-{release}{unsigned}"
    return [Offer(suite, release, images[release]) for release in sorted(headers & images.keys())]


def choose(offers: Iterable[Offer], series: str) -> Offer:
    """The newest kernel of a series; `newest` and `previous` are the two newest series after Linux 6.

    Raises:
        LabError: no suite has one.
    """
    found = sorted(offers, key=lambda offer: offer.number)
    if series in ("newest", "previous"):
        late = sorted({offer.number[:2] for offer in found if offer.number[0] > 6})
        wanted = late[-1:] if series == "newest" else late[-2:-1]
    else:
        wanted = [tuple(int(part) for part in series.split("."))]
    fitting = [offer for offer in found if offer.number[:2] in wanted]
    if not fitting:
        raise LabError(f"no suite of Debian offers a kernel of the series {series} with headers")
    return fitting[-1]


def base_of(offer: Offer) -> str:
    """The suite in whose root the kernel is installed and modules are built for it.

    From Linux 7 on the headers are not understood by the sparse of the stable releases (0.6.4).
    """
    if offer.number[0] > 6:
        return "sid"
    return next(base for base, suites in _SUITES.items() if offer.suite in suites)


def lines_of(suites: Iterable[str], sources: list[aptsources.Source]) -> list[str]:
    """sources.list lines for suites, from the machine's own mirrors; security suites only where it has that archive."""
    official = [source.uri.rstrip("/") for source in sources if aptsources.is_debian(source)]
    security = [uri for uri in official if uri.endswith("debian-security")]
    main = [uri for uri in official if uri not in security]
    if not main:
        raise LookupError("no Debian archive in this machine's apt sources")
    lines = []
    for suite in suites:
        uris = security if suite.endswith("-security") else main
        lines += [f"deb [signed-by={KEYRING}] {uri} {suite} main" for uri in uris[:1]]
    return lines


def offered(directory: Path) -> list[Offer]:
    """All kernels of all suites, after an update of the private lists in `directory`.

    Raises:
        LabError: apt-get failed.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "status").touch()
    suites = [suite for group in _SUITES.values() for suite in group]
    lines = lines_of(suites, aptsources.machine_sources())
    (directory / "sources.list").write_text("".join(f"{line}\n" for line in lines))
    options = {
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": directory / "lists",
        "Dir::State::status": directory / "status",
        "Dir::Cache": directory / "cache",
        "Acquire::Languages": "none",
        # Where root runs this, apt would hand the download to a user who may not read the cache directory.
        "APT::Sandbox::User": "root",
    }
    settings = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    _run(["apt-get", *settings, "-qq", "--error-on=any", "update"])
    files = _run(["apt-get", *settings, "indextargets", "--format", "$(RELEASE) $(FILENAME)", "Created-By: Packages"])
    offers = []
    for line in files.splitlines():
        suite, file = line.split(" ", 1)
        offers += parse(suite, _run(["/usr/lib/apt/apt-helper", "cat-file", file]))
    return offers


def machine_setting(name: str, default: str) -> str:
    """What this machine's apt is told under `name`."""
    found = re.search(rf'^{re.escape(name)} "(.*)";$', _run(["apt-config", "dump", name]), re.MULTILINE)
    return found.group(1) if found else default


def _run(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{argv[0]} exited with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
