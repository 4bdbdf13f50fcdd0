# SPDX-License-Identifier: GPL-3.0-or-later
"""Does the running kernel insist on signed modules, and whose signatures does it take? From /sys and /proc.

Promise: reads only; what cannot be read is `unknown` or None and is never taken for a yes. The kernel has the last
word: a key that is listed here may still be refused, one that is not is refused for certain.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from . import der

EFI = "sys/firmware/efi"
SECURE_BOOT = EFI + "/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
#: Shim's own switch (mokutil --disable-validation), as it shows it to the kernel.
SHIM_OFF = EFI + "/efivars/MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23"
LOCKDOWN = "sys/kernel/security/lockdown"
SIG_ENFORCE = "sys/module/module/parameters/sig_enforce"
KEYS = "proc/keys"
KEY = re.compile(r" asymmetri\s+(.*): ([0-9a-f]+): X509\.")

ENROL = (
    "sign them with a key that this kernel knows: make one, run mokutil --import CERTIFICATE, reboot and confirm it "
    "in the firmware's menu, then set bmigrate_kmod_signing_key and bmigrate_kmod_signing_cert; or give prebuilt "
    "modules that are signed with such a key"
)


@dataclass(frozen=True)
class Trust:
    """What the running kernel thinks of modules."""

    secure_boot: str  # no_efi, off, on, unknown
    lockdown: str  # none, integrity, confidentiality, unknown
    sig_enforce: bool | None
    keys: tuple[tuple[str, str], ...] | None  # name and id of each key in its keyrings; None: cannot be read

    @property
    def enforced(self) -> bool:
        """Whether a module without a good signature is refused; where that cannot be read, as Secure Boot says."""
        if self.sig_enforce or self.lockdown in ("integrity", "confidentiality"):
            return True
        return self.secure_boot == "on" and self.lockdown == "unknown"

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "secure_boot": self.secure_boot,
            "lockdown": self.lockdown,
            "sig_enforce": self.sig_enforce,
            "signatures_required": self.enforced,
            "keys": None if self.keys is None else [": ".join(key) for key in self.keys],
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Trust:
        """What another process has read."""
        keys = found["keys"]
        pairs = None if keys is None else tuple((text.rpartition(": ")[0], text.rpartition(": ")[2]) for text in keys)
        return cls(found["secure_boot"], found["lockdown"], found["sig_enforce"], pairs)

    def sentence(self) -> str:
        """The state in words."""
        boot = {"no_efi": "no EFI firmware, so no Secure Boot", "unknown": "Secure Boot unknown"}.get(
            self.secure_boot, "Secure Boot " + self.secure_boot
        )
        enforce = {True: "on", False: "off", None: "unknown"}[self.sig_enforce]
        return f"{boot}, lockdown {self.lockdown}, module.sig_enforce {enforce}"

    def knows(self, certificate: der.Certificate) -> bool | None:
        """Whether the key of a certificate is in a keyring of the kernel; None when that cannot be read."""
        if self.keys is None:
            return None
        return any(number in (certificate.key_id, certificate.serial) for _name, number in self.keys)

    def knows_signer(self, signature: der.Signature) -> bool | None:
        """Whether a key of the signer's name or id is in a keyring; None when that cannot be read."""
        if self.keys is None:
            return None
        if signature.key_id is not None:
            return any(number == signature.key_id for _name, number in self.keys)
        wanted = signature.signer or ""
        return any(name == wanted or name.endswith(": " + wanted) for name, _number in self.keys)


def read(root: str = "/") -> Trust:
    """The state of the running kernel; `root` is for tests."""
    return Trust(_secure_boot(root), _lockdown(root), _sig_enforce(root), _keys(root))


def _bytes(root: str, path: str) -> bytes | None:
    try:
        with open(os.path.join(root, path), "rb") as stream:
            return stream.read()
    except OSError:
        return None


def _secure_boot(root: str) -> str:
    if not os.path.isdir(os.path.join(root, EFI)):
        return "no_efi"
    value = _bytes(root, SECURE_BOOT)
    if value is None or len(value) != 5:  # 4 bytes of attributes, then the value
        try:
            variables = os.listdir(os.path.join(root, EFI, "efivars"))
        except OSError:
            variables = []
        # Firmware without the variable has no Secure Boot; without any variable they are only not shown.
        return "off" if value is None and variables and os.path.basename(SECURE_BOOT) not in variables else "unknown"
    shim = _bytes(root, SHIM_OFF)
    if shim is not None and len(shim) == 5 and shim[4] == 1:
        return "off"
    return {0: "off", 1: "on"}.get(value[4], "unknown")


def _lockdown(root: str) -> str:
    chosen = re.search(rb"\[(none|integrity|confidentiality)\]", _bytes(root, LOCKDOWN) or b"")
    return chosen.group(1).decode() if chosen else "unknown"


def _sig_enforce(root: str) -> bool | None:
    return {b"Y": True, b"N": False}.get((_bytes(root, SIG_ENFORCE) or b"").strip())


def _keys(root: str) -> tuple[tuple[str, str], ...] | None:
    text = _bytes(root, KEYS)
    if text is None:
        return None
    return tuple(match.groups() for match in KEY.finditer(text.decode("utf-8", "replace")))  # type: ignore[misc]


def refusal(trust: Trust, signatures: dict[str, der.Signature | None]) -> str | None:
    """Why the running kernel would refuse modules, and what to do; None when it would not, or may not.

    Args:
        signatures: per module who signed it, None when nobody did.
    """
    if not trust.enforced:
        return None
    unsigned = sorted(name for name, signature in signatures.items() if signature is None)
    if unsigned:
        verb = "is" if len(unsigned) == 1 else "are"
        return f"{_only_signed(trust)}, and {' and '.join(unsigned)} {verb} not signed -- {ENROL}"
    for name, signature in sorted(signatures.items()):
        if signature is not None and trust.knows_signer(signature) is False:
            who = signature.signer or f"key {signature.key_id}"
            return f"{_only_signed(trust)}; {name} is signed by {who}, and no such key is in its keyrings -- {ENROL}"
    return None


def _only_signed(trust: Trust) -> str:
    return f"the running kernel loads signed modules only ({trust.sentence()})"


def refusal_of_key(trust: Trust, certificate: der.Certificate | None) -> str | None:
    """The same before anything is built: why modules signed with this certificate's key (None: not signed at all)
    would be refused."""
    if not trust.enforced:
        return None
    if certificate is None:
        return f"{_only_signed(trust)}, and what is built here would not be signed -- {ENROL}"
    if trust.knows(certificate) is False:
        who = f"{certificate.subject} ({certificate.key_id or certificate.serial})"
        return f"{_only_signed(trust)}; they would be signed by {who}, and no such key is in its keyrings -- {ENROL}"
    return None
