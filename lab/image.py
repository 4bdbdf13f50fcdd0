# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds the guests' image once, and finds it again by a hash of its recipe.

Promises: the same recipe (lab/recipe and BUILDER below) gives the same directory, which is either complete or not
there; two labs that need it at once build it once. Must never need a loop device, a boot loader, or a network other
than the Debian mirror that this machine itself uses.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lab import aptsources, initramfs
from lab.errors import LabError
from lab.paths import RECIPE, images_directory

ROOT_BYTES = 8 << 30
# To be raised when what this file does with the recipe changes what is in the image.
BUILDER = 1
_LEAVE_OUT = tuple(f"/usr/share/{name}/*" for name in ("man", "doc", "info", "locale", "lintian"))


@dataclass(frozen=True)
class Image:
    """A finished image: a root file system, a kernel and an initramfs."""

    directory: Path

    @property
    def root(self) -> Path:
        """Raw ext4, to be used as the backing file of overlays only."""
        return self.directory / "root.img"

    @property
    def kernel(self) -> Path:
        """The stock kernel of the distribution."""
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """Archive to which each guest's own is appended."""
        return self.directory / "initramfs.cpio"


def recipe_hash() -> str:
    """Names the image: a digest of everything that decides what is in it, but for the archive's state."""
    digest = hashlib.sha256(f"builder {BUILDER} modules {' '.join(initramfs.MODULES)}\n".encode())
    for path in sorted(p for p in RECIPE.rglob("*") if p.is_file()):
        content = path.read_bytes()
        name = path.relative_to(RECIPE)
        digest.update(f"{name}\0{path.stat().st_mode & 0o111:o}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def say(text: str) -> None:
    """Progress goes to standard error."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def ensure() -> Image:
    """The image of today's recipe, built first if it is not there (2 to 4 minutes).

    Raises:
        LabError: mmdebstrap or mke2fs is missing or failed; the log's last lines are in the text.
    """
    name = recipe_hash()
    where = images_directory()
    where.mkdir(parents=True, exist_ok=True)
    image = Image(where / name)
    if image.directory.is_dir():
        return image
    with (where / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.directory.is_dir():
            _build(image)
    return image


def _packages() -> list[str]:
    lines = (RECIPE / "packages").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def in_root_namespace() -> list[str]:
    """What to put before a command that must see the image's real owners."""
    return [] if os.geteuid() == 0 else ["mmdebstrap", "--unshare-helper"]


def run(argv: list[str], log: Path) -> None:
    """Run a command that makes a part of an image; what it says goes to the log.

    Raises:
        LabError: it is missing or failed; the log's last lines are in the text.
    """
    with log.open("ab") as out:
        out.write(("$ " + " ".join(argv) + "\n").encode())
        out.flush()
        environment = {**os.environ, "INITRD": "No", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, check=False)
        except FileNotFoundError as error:
            raise LabError(f"{argv[0]} is not installed: run `make setup`") from error
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise LabError(f"making an image failed: {argv[0]} exited with {done.returncode}; its last lines:\n{tail}")


def _build(image: Image) -> None:
    began = time.monotonic()
    say(f"building the guests' image {image.directory.name} (once per recipe; a few minutes)")
    lines = aptsources.mirror_lines(aptsources.machine_sources())
    work = Path(tempfile.mkdtemp(prefix=f"{image.directory.name}.", suffix=".new", dir=image.directory.parent))
    try:
        work.chmod(0o755)
        log = work / "build.log"
        root = work / "root"
        run(_mmdebstrap(root, lines), log)
        releases = sorted(path.name for path in (root / "lib/modules").iterdir())
        if len(releases) != 1 or "cloud" in releases[0]:
            raise LabError(f"the image must have exactly one stock kernel, found: {', '.join(releases) or 'none'}")
        shutil.copyfile(root / "boot" / f"vmlinuz-{releases[0]}", work / "vmlinuz")
        (work / "initramfs.cpio").write_bytes(initramfs.build(root, releases[0], (RECIPE / "init").read_bytes()))
        _make_file_system(root, work / "root.img", log)
        run([*in_root_namespace(), "rm", "-rf", str(root)], log)
        facts = {
            "kernel": releases[0],
            "seconds": round(time.monotonic() - began),
            "used_bytes": (work / "root.img").stat().st_blocks * 512,
        }
        (work / "image.json").write_text(json.dumps(facts, indent=1) + "\n")
        work.rename(image.directory)
    except BaseException:
        # What could be useful is the log; the half image is not.
        keep = image.directory.parent / f"{image.directory.name}.failed.log"
        if (work / "build.log").exists():
            shutil.copyfile(work / "build.log", keep)
        subprocess.run([*in_root_namespace(), "rm", "-rf", str(work)], check=False)
        raise
    say(f"image ready in {facts['seconds']} s, kernel {facts['kernel']}")


def _mmdebstrap(root: Path, lines: list[str]) -> list[str]:
    argv = [
        "mmdebstrap",
        "--mode=root" if os.geteuid() == 0 else "--mode=unshare",
        "--variant=minbase",
        "--format=directory",
        "--include=" + ",".join(_packages()),
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEAVE_OUT),
        f'--customize-hook=cp -a --no-preserve=ownership "{RECIPE}/files/." "$1/"',
        f'--customize-hook="{RECIPE}/customize" "$1"',
        aptsources.SUITE,
        str(root),
    ]
    return argv + lines


def _make_file_system(root: Path, target: Path, log: Path) -> None:
    with target.open("wb") as file:
        file.truncate(ROOT_BYTES)
    options = ["-q", "-F", "-t", "ext4", "-L", "lab-root", "-m", "0", "-O", "^metadata_csum_seed,^orphan_file"]
    extended = ["-E", "lazy_itable_init=0,lazy_journal_init=1", "-J", "size=32", "-N", "262144"]
    run([*in_root_namespace(), "mke2fs", *options, *extended, "-d", str(root), str(target)], log)
