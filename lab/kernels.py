# SPDX-License-Identifier: GPL-3.0-or-later
"""Other kernels than the image's own: to boot guests with, and to build the modules for.

Promises: a kernel's directory is complete or not there; two that need it at once make it once; a series that is there
stays the same kernel until `refresh` is asked for. Each kernel is installed by apt in a root of its own, with the
compiler of its suite, because the programs that come with headers need the C library of their suite.

`python3 -m lab kernels --help` says what a person does with them.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import aptsources, image, initramfs, kernelindex
from lab.errors import LabError
from lab.kernelindex import SERIES
from lab.paths import RECIPE, REPOSITORY, cache_directory

MODULES = ("bufflink.ko", "reqlog.ko")
# Of a compiler's or a checker's line. What the kernel's build says of the machine and not of the modules is excused.
_COMPLAINT = re.compile(r"\b(warning|error):", re.IGNORECASE)
_EXCUSED = re.compile(r"(the compiler|pahole version) differs from the one used")


@dataclass(frozen=True)
class Kernel:
    """A kernel that is there, in its directory."""

    directory: Path

    @property
    def facts(self) -> dict[str, Any]:
        """kernel.json: release, kdir (in the build root), suite, base, seconds.

        Raises:
            LabError: this is no kernel's directory.
        """
        try:
            facts: dict[str, Any] = json.loads((self.directory / "kernel.json").read_text())
        except OSError as error:
            raise LabError(f"{self.directory} is no kernel of the lab's: {error.strerror}") from error
        return facts

    @property
    def release(self) -> str:
        """As `uname -r` says it."""
        return str(self.facts["release"])

    @property
    def vmlinuz(self) -> Path:
        """The kernel itself."""
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """Archive to which each guest's own is appended."""
        return self.directory / "initramfs.cpio"

    @property
    def modules(self) -> Path:
        """An ext4 file system, read only, with what belongs to /lib/modules/RELEASE."""
        return self.directory / "modules.img"

    @property
    def root(self) -> Path:
        """Where its headers and its compiler are."""
        return self.directory / "root"

    def build(self, source: Path, target: Path, *arguments: str, modules: tuple[str, ...] = MODULES) -> str:
        """Build the modules in `source` for this kernel, and put what came out into `target`; what make said.

        Raises:
            LabError: make failed; all that it said is in the text.
        """
        inside = f"build/{uuid.uuid4().hex}"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(source, ".")
        with _entered(self.root) as run:
            try:
                run("sh", "-c", f"mkdir -p /{inside} && tar xf - -C /{inside}", stdin=buffer.getvalue())
                done = run("make", "-C", f"/{inside}", f"KDIR={self.facts['kdir']}", *arguments, check=False)
                said = done.stdout.decode(errors="replace")
                if done.returncode:
                    raise LabError(f"building for {self.release} failed:\n{said}")
                made = run("tar", "cf", "-", "-C", f"/{inside}", *modules).stdout
            finally:
                run("rm", "-rf", f"/{inside}", check=False)
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(made)) as archive:
            for name in modules:
                member = archive.extractfile(name)
                assert member
                (target / name).write_bytes(member.read())
        return said

    def complaints(self, source: Path, target: Path) -> list[str]:
        """What the compiler (W=1) and sparse (C=2) have against the sources.

        Raises:
            LabError: make failed, or sparse did not run.
        """
        said = self.build(source, target, "W=1", "C=2")
        for unit in ("bufflink", "reqlog"):
            if not re.search(rf"^\s*CHECK\s.*\b{unit}/whole\.c$", said, re.MULTILINE):
                raise LabError(f"{self.release}: sparse did not look at {unit}:\n{said}")
        return complaints_in(said)


def complaints_in(said: str) -> list[str]:
    """Warnings and errors in what a build of the modules said."""
    return [line for line in said.splitlines() if _COMPLAINT.search(line) and not _EXCUSED.search(line)]


def kernels_directory() -> Path:
    """Finished kernels, one directory per release; a link in `series` for each series."""
    return cache_directory() / "kernels"


def chosen() -> Kernel | None:
    """The kernel in BMIGRATE_LAB_KERNEL, if the guests are to have another than the image's."""
    directory = os.environ.get("BMIGRATE_LAB_KERNEL")
    return Kernel(Path(directory).resolve()) if directory else None


def ensure(series: str, refresh: bool = False) -> Kernel:
    """The kernel of a series, made first if it is not there. With `refresh`, the newest that there is today.

    Raises:
        LabError: no suite has such a kernel, or apt, mmdebstrap or mke2fs failed.
    """
    if series not in SERIES:
        raise LabError(f"no series {series!r}: there are {', '.join(SERIES)}")
    where = kernels_directory()
    link = where / "series" / series
    if link.is_dir() and not refresh:
        return Kernel(link.resolve())
    link.parent.mkdir(parents=True, exist_ok=True)
    with (where / "making.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if link.is_dir() and not refresh:
            return Kernel(link.resolve())
        offer = kernelindex.choose(kernelindex.offered(where / "apt"), series)
        kernel = Kernel(where / offer.release)
        if not kernel.directory.is_dir():
            _make(kernel, offer)
        new = link.with_name(f"{series}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(Path("..") / offer.release)
        new.replace(link)
    return kernel


def _make(kernel: Kernel, offer: kernelindex.Offer) -> None:
    began = time.monotonic()
    image.say(f"installing the kernel {offer.release} of {offer.suite} (once; a minute or two)")
    parent = kernel.directory.parent
    work = Path(tempfile.mkdtemp(prefix=f"{offer.release}.", suffix=".new", dir=parent))
    try:
        work.chmod(0o755)
        log = work / "build.log"
        root = work / "root"
        base = kernelindex.base_of(offer)
        image.run(_mmdebstrap(root, offer, base), log)
        made = Kernel(work)
        shutil.copyfile(root / "boot" / f"vmlinuz-{offer.release}", made.vmlinuz)
        made.initramfs.write_bytes(initramfs.build(root, offer.release, (RECIPE / "init").read_bytes()))
        _make_modules(root / "usr/lib/modules" / offer.release, root / "lib/modules" / offer.release, made.modules, log)
        _finish_root(root, offer.release, log)
        facts = {
            "release": offer.release,
            "kdir": f"/lib/modules/{offer.release}/build",
            "root": "root",
            "suite": offer.suite,
            "base": base,
            "seconds": round(time.monotonic() - began),
        }
        (work / "kernel.json").write_text(json.dumps(facts, indent=1) + "\n")
        work.rename(kernel.directory)
    except BaseException:
        if (work / "build.log").exists():
            shutil.copyfile(work / "build.log", parent / f"{offer.release}.failed.log")
        subprocess.run([*image.in_root_namespace(), "rm", "-rf", str(work)], check=False)
        raise
    image.say(f"kernel {offer.release} is there after {facts['seconds']} s")


def _mmdebstrap(root: Path, offer: kernelindex.Offer, base: str) -> list[str]:
    packages = [offer.image, offer.headers, "make", "sparse", "kmod", "busybox-static", "initramfs-tools"]
    suites = [base, *([f"{base}-security"] if base != "sid" else [])]
    if offer.suite not in suites:
        suites.append(offer.suite)
    preferred = [f'--aptopt=APT::Default-Release "{offer.suite}"'] if offer.suite == f"{base}-backports" else []
    return [
        "mmdebstrap",
        "--mode=root" if os.geteuid() == 0 else "--mode=unshare",
        "--variant=minbase",
        "--format=directory",
        "--include=" + ",".join(packages),
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        # A mirror that stands still is good enough where the machine's own apt says so.
        f'--aptopt=Acquire::Check-Valid-Until "{kernelindex.machine_setting("Acquire::Check-Valid-Until", "true")}"',
        *preferred,
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "info", "locale", "lintian")),
        base,
        str(root),
        *kernelindex.lines_of(suites, aptsources.machine_sources()),
    ]


def _make_modules(merged: Path, unmerged: Path, target: Path, log: Path) -> None:
    source = merged if merged.is_dir() else unmerged
    sizes = [path.lstat().st_size for path in source.rglob("*")]
    blocks = sum(size // 4096 + 2 for size in sizes)
    with target.open("wb") as file:
        file.truncate(blocks * 4096 * 11 // 10 + (8 << 20))
    options = ["-q", "-F", "-t", "ext4", "-L", "lab-modules", "-m", "0", "-b", "4096", "-N", str(len(sizes) + 64)]
    features = ["-O", "^has_journal,^metadata_csum_seed,^orphan_file"]
    image.run([*image.in_root_namespace(), "mke2fs", *options, *features, "-d", str(source), str(target)], log)


def _finish_root(root: Path, release: str, log: Path) -> None:
    """Take away what the build root does not need, and give the headers what sparse needs."""
    script = (
        f"rm -rf /boot/* /lib/modules/{release}/kernel /lib/modules/{release}/vmlinuz /var/lib/apt/lists/* && "
        # Debian's headers come without this part of the kernel's build, and then C=2 does nothing.
        "for d in /usr/src/linux-headers-*-common/scripts; do f=$d/checker-valid.sh; "
        """test -e "$f" || { printf '#!/bin/sh\\necho 1\\n' > "$f" && chmod 755 "$f"; } || exit; done"""
    )
    image.run([*image.in_root_namespace(), "chroot", str(root), "sh", "-c", script], log)


@contextmanager
def _entered(root: Path) -> Iterator[Any]:
    """A function that runs a command in the root, with /dev and /proc (objtool reads a limit there) mounted for it."""

    def run(*argv: str, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
        # Bound and not made: that is also allowed to a user who is root in a namespace of its own only.
        mounts = " && ".join(f'mount --rbind /{name} "$0/{name}"' for name in ("dev", "proc"))
        enter = f'{mounts} && exec chroot "$0" "$@"'
        prefix = [*image.in_root_namespace(), "unshare", "--mount", "sh", "-c", enter, str(root)]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}
        done = subprocess.run(
            [*prefix, *argv],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
        if check and done.returncode:
            raise LabError(
                f"{argv[0]} in {root} exited with {done.returncode}:\n{done.stdout.decode(errors='replace')}"
            )
        return done

    yield run


def prune(used: set[Path]) -> list[Path]:
    """Remove the kernels that no series names and that are not in `used`; returns them."""
    where = kernels_directory()
    named = {link.resolve() for link in (where / "series").glob("*")} | used
    unused = [path.parent for path in where.glob("*/kernel.json") if path.parent.resolve() not in named]
    for path in unused:
        subprocess.run([*image.in_root_namespace(), "rm", "-rf", str(path)], check=True)
    return unused


def act(verb: str, series: list[str]) -> int:
    """One verb of `python3 -m lab kernels`; returns the exit code."""
    status = 0
    for name in series or SERIES:
        link = kernels_directory() / "series" / name
        if verb == "list":
            print(f"{name:9} {link.resolve() if link.is_dir() else 'not made'}")
        elif verb == "build":
            status |= _check(name, ensure(name))
        else:
            print(f"{name:9} {ensure(name, refresh=verb == 'refresh').directory}")
    return status


def _check(name: str, kernel: Kernel) -> int:
    with tempfile.TemporaryDirectory() as directory:
        found = kernel.complaints(REPOSITORY / "module_src", Path(directory))
    for line in found:
        print(line)
    print(f"{name:9} {kernel.release:26} {len(found) or 'no'} complaints with W=1 and sparse", flush=True)
    return int(bool(found))
