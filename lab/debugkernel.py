# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel that watches the modules: Debian's source with KASAN, lockdep, PROVE_RCU, atomic-sleep checks and kmemleak.

Promises: lab/debug_kernel/config decides what is in it, and each of its lines holds in the finished kernel; the same
config gives the same directory, which is either complete or not there, until a newer source is asked for. The packages
that its build needs are installed by `install`, and by nothing else.

usage: python3 -m lab.debugkernel [install | ensure | refresh]
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab import image, initramfs
from lab.errors import LabError
from lab.kernels import MODULES, Kernel, kernels_directory
from lab.paths import RECIPE

CONFIG = Path(__file__).resolve().parent / "debug_kernel" / "config"
SOURCE = "linux-source-6.1"
#: What a kernel's build needs and `make setup` does not install.
PACKAGES = ("flex", "bison", "libelf-dev")
#: To be raised when what this file does with the source changes the result.
BUILDER = 1
# What a build of modules reads of a kernel's tree, besides what lies at its top.
_KEEP = ("include", "scripts", "arch/x86", "tools/objtool", "tools/include", "tools/lib", "tools/build")


class DebugKernel(Kernel):
    """The kernel in its directory, with the tree for which modules can be built on this machine."""

    @property
    def tree(self) -> Path:
        """KDIR."""
        return self.directory / "build"

    def build(self, source: Path, target: Path, *arguments: str, modules: tuple[str, ...] = MODULES) -> str:
        """Build the modules in a copy of `source`, and put what came out into `target`; what make said.

        Raises:
            LabError: make failed; all that it said is in the text.
        """
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / "source"
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.ko", "*.o", "*.mod*", "*.cmd"))
            argv = ["make", "-C", str(copy), f"KDIR={self.tree}", *arguments]
            done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise LabError(f"building for {self.release} failed:\n{done.stdout}")
            target.mkdir(parents=True, exist_ok=True)
            for module in modules:
                shutil.copyfile(copy / module, target / module)
        return done.stdout


def lost(config: str, made: str) -> list[str]:
    """Lines of the config that do not hold in the .config that was made of it."""
    have = set(made.splitlines())
    names = {line.partition("=")[0] for line in have if line.startswith("CONFIG_")}
    missing = []
    for line in config.splitlines():
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        if (off and off.group(1) in names) or (line.startswith("CONFIG_") and line not in have):
            missing.append(line)
    return missing


def _digest() -> str:
    return hashlib.sha256(f"builder {BUILDER}\n".encode() + CONFIG.read_bytes()).hexdigest()[:12]


def ensure(refresh: bool = False) -> DebugKernel:
    """The kernel of today's config, built first if it is not there. With `refresh`, of today's source too.

    Raises:
        LabError: something is missing, or the build failed; the log's last lines are in the text.
    """
    where = kernels_directory()
    where.mkdir(parents=True, exist_ok=True)
    with (where / "debug.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = sorted(where.glob(f"debug-{_digest()}-*"), key=lambda path: path.stat().st_mtime)
        made = [path for path in made if path.is_dir()]
        kernel = DebugKernel(made[-1]) if made and not refresh else _make(where)
        _name(kernel)
        return kernel


def _name(kernel: DebugKernel) -> None:
    """Under the name `debug` beside the series of stock kernels: what has none is pruned."""
    link = kernel.directory.parent / "series" / "debug"
    link.parent.mkdir(exist_ok=True)
    new = link.with_name("debug.new")
    new.unlink(missing_ok=True)
    new.symlink_to(Path("..") / kernel.directory.name)
    new.replace(link)


def _make(where: Path) -> DebugKernel:
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="debug.", suffix=".new", dir=where))
    log = work / "build.log"
    try:
        work.chmod(0o755)
        version = _unpack(work, log)
        kernel = DebugKernel(where / f"debug-{_digest()}-{version}")
        if kernel.directory.is_dir():
            return kernel
        image.say(f"building the debug kernel from {SOURCE} {version} (once per config and version; log: {log})")
        release = _build(work / "build", log)
        _pack(work, release, log)
        _prune(work / "build")
        facts = {
            "release": release,
            "kdir": str(kernel.tree),
            "suite": "bookworm",
            "source": f"{SOURCE} {version}",
            "seconds": round(time.monotonic() - began),
        }
        (work / "kernel.json").write_text(json.dumps(facts, indent=1) + "\n")
        work.rename(kernel.directory)
    except BaseException:
        if log.exists():
            shutil.copyfile(log, where / "debug.failed.log")
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    image.say(f"the debug kernel is there after {facts['seconds']} s")
    return kernel


def _unpack(work: Path, log: Path) -> str:
    """The kernel's source in work/build, busybox in work/root; the version of the source."""
    debs = work / "debs"
    debs.mkdir()
    image.run(["sh", "-c", f"cd {debs} && apt-get -q download {SOURCE} busybox-static"], log)
    version = ""
    for deb in debs.glob("*.deb"):
        image.run(["dpkg-deb", "-x", str(deb), str(work / "root")], log)
        if deb.name.startswith(SOURCE):
            asked = subprocess.run(["dpkg-deb", "-f", str(deb), "Version"], capture_output=True, text=True, check=True)
            version = asked.stdout.strip()
    (work / "build").mkdir()
    archive = work / f"root/usr/src/{SOURCE}.tar.xz"
    image.run(["tar", "xf", str(archive), "-C", str(work / "build"), "--strip-components=1"], log)
    archive.unlink()
    shutil.rmtree(debs)
    return version


def _build(tree: Path, log: Path) -> str:
    """Configure and compile; the release."""
    make = ["nice", "-n", "5", "make", "-C", str(tree), f"-j{os.cpu_count()}"]
    image.run([*make, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"], log)
    missing = lost(CONFIG.read_text(), (tree / ".config").read_text())
    if missing:
        raise LabError(f"{SOURCE} does not take over these lines of {CONFIG}: {', '.join(missing)}")
    image.run([*make, "bzImage", "modules"], log)
    return (tree / "include/config/kernel.release").read_text().strip()


def _pack(work: Path, release: str, log: Path) -> None:
    """What a guest boots with."""
    kernel, root = DebugKernel(work), work / "root"
    shutil.copyfile(kernel.tree / "arch/x86/boot/bzImage", kernel.vmlinuz)
    image.run(["make", "-C", str(kernel.tree), f"INSTALL_MOD_PATH={root}", "modules_install"], log)
    modules = root / "lib/modules" / release
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    kernel.initramfs.write_bytes(initramfs.build(root, release, (RECIPE / "init").read_bytes()))
    used = sum(path.lstat().st_size // 4096 + 2 for path in modules.rglob("*")) * 4096
    with kernel.modules.open("wb") as file:
        file.truncate(used * 5 // 4 + (8 << 20))
    options = ["-q", "-F", "-t", "ext4", "-L", "lab-modules", "-m", "0", "-b", "4096", "-O", "^has_journal"]
    image.run(["mke2fs", *options, "-E", "root_owner=0:0", "-d", str(modules), str(kernel.modules)], log)
    shutil.rmtree(root)


def _prune(tree: Path) -> None:
    """Leave what a build of modules reads: a tenth."""
    keep = {tree / name for name in _KEEP}
    above = {parent for path in keep for parent in path.parents}
    for directory, names, files in os.walk(tree):
        here = Path(directory)
        inside = here in keep or any(parent in keep for parent in here.parents)
        for name in [name for name in names if not inside and here / name not in keep | above]:
            shutil.rmtree(here / name)
            names.remove(name)
        for name in files:
            compiled = name.endswith((".o", ".a", ".ko", ".c", ".S")) and inside and "scripts" not in here.parts
            if compiled or name.startswith(("vmlinux", ".vmlinux", ".tmp_vmlinux")):
                (here / name).unlink()


def install() -> None:
    """The packages that are missing for the build. As root, or by sudo.

    Raises:
        LabError: apt-get failed.
    """
    installed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    missing = [name for name in PACKAGES if f"{name} installed" not in installed]
    if not missing:
        return
    image.say(f"installing {' '.join(missing)}")
    prefix = [] if os.geteuid() == 0 else ["sudo"]
    for argv in (["update"], ["-y", "install", "--no-install-recommends", *missing]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(
            [*prefix, "apt-get", "-q", *argv], env=environment, stdout=sys.stderr, check=False
        ).returncode:
            raise LabError(f"could not install {' '.join(missing)}: see apt-get's messages above")


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    verb = argv[0] if argv else "ensure"
    if verb not in ("install", "ensure", "refresh") or len(argv) > 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        install()
        if verb != "install":
            print(ensure(refresh=verb == "refresh").directory)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
