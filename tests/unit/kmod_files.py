# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes small module files with the toolchain, and the part of a host's file system that tells of its kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

RELEASE = "6.1.0-1-amd64"
FLAGS = " SMP preempt mod_unload modversions "
CRCS = {"module_layout": 0x1111, "misc_register": 0x2222}
MODULES = ("bufflink", "reqlog")
KEYS_LINE = "377a5f6c I------     1 perm 1f030000     0     0 asymmetri {name}: {number}: X509.rsa 371a5bb8 []\n"


def make_module(
    path: Path,
    release: str = RELEASE,
    crcs: dict[str, int] | None = None,
    build_id: str = "abcdef01",
    abi: int = 1,
    flags: str = FLAGS,
) -> Path:
    """A file with the sections by which a module is judged; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = [f"vermagic={release}{flags}", "license=GPL", "version=0.1.0", f"abi={abi}"]
    text = "\\0".join(info)
    rows = ", ".join(f'{{{crc}UL, "{name}"}}' for name, crc in (CRCS if crcs is None else crcs).items())
    source = (
        f'__attribute__((section(".modinfo"), used)) static const char info[] = "{text}";\n'
        "struct version { unsigned long crc; char name[56]; };\n"
        f'__attribute__((section("__versions"), used)) static const struct version versions[] = {{ {rows} }};\n'
    )
    plain = path.with_suffix(".o")
    subprocess.run(["gcc", "-xc", "-c", "-o", str(plain), "-"], input=source.encode(), check=True)
    subprocess.run(["ld", "-r", f"--build-id=0x{build_id}", "-o", str(path), str(plain)], check=True)
    plain.unlink()
    return path


def make_kernel(root: Path, release: str = RELEASE, crcs: dict[str, int] | None = None, image: bool = True) -> Path:
    """An installed kernel with one module of its own; returns its directory below lib/modules."""
    directory = root / "lib/modules" / release
    make_module(directory / "kernel/lib/own.ko", release, crcs)
    if image:
        (root / "boot").mkdir(parents=True, exist_ok=True)
        (root / "boot" / f"vmlinuz-{release}").touch()
    return directory


def install(directory: Path, folder: str = "updates/dkms", **how: int) -> None:
    """Our two modules in a kernel's directory, as depmod lists them."""
    for name in MODULES:
        make_module(directory / folder / f"{name}.ko", directory.name, **how)  # type: ignore[arg-type]
    (directory / "modules.dep").write_text("kernel/lib/own.ko:\n" + "".join(f"{folder}/{n}.ko:\n" for n in MODULES))


def make_key(folder: Path, name: str = "test key", extra: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A private key and its certificate, as an operator makes them."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    words = ["openssl", "req", "-new", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}", "-newkey", "rsa:2048"]
    subprocess.run([*words, *extra, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    key.chmod(0o600)
    return key, cert


def sign_file() -> str:
    """The kernel's own program for signing; it comes with the headers."""
    return str(sorted(Path("/usr/lib").glob("linux-kbuild-*/scripts/sign-file"))[-1])


def insist(root: Path, *keys: tuple[str, str]) -> None:
    """Have the faked kernel take signed modules only, with these keys in its keyrings."""
    (root / "sys/module/module/parameters").mkdir(parents=True, exist_ok=True)
    (root / "sys/module/module/parameters/sig_enforce").write_text("Y\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/keys").write_text("".join(KEYS_LINE.format(name=name, number=number) for name, number in keys))
