# SPDX-License-Identifier: GPL-3.0-or-later
"""Just enough DER to say whose key signed a module and which key a certificate is of (RFC 5652, RFC 5280).

Promise: input that is not what it should be raises ValueError and nothing else. Nothing is verified.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass

INTEGER, OCTETS, OID, SEQUENCE, SET = 0x02, 0x04, 0x06, 0x30, 0x31
CONTEXT_0, CONTEXT_3, PRIMITIVE_0 = 0xA0, 0xA3, 0x80
COMMON_NAME, ORGANISATION = b"\x55\x04\x03", b"\x55\x04\x0a"
SUBJECT_KEY_ID = b"\x55\x1d\x0e"
PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Signature:
    """Whose signature it is: issuer and serial number of the certificate, or the id of its key, in hexadecimal."""

    signer: str | None
    serial: str | None
    key_id: str | None


@dataclass(frozen=True)
class Certificate:
    """Names and numbers of an X.509 certificate, in hexadecimal."""

    subject: str
    issuer: str
    serial: str
    key_id: str | None

    def made(self, signature: Signature) -> bool:
        """Whether a signature says that it is by this certificate's key."""
        if signature.key_id is not None:
            return signature.key_id == self.key_id
        return (signature.signer, signature.serial) == (self.issuer, self.serial)


@dataclass(frozen=True)
class _Item:
    tag: int
    body: bytes

    def items(self) -> list[_Item]:
        return list(_items(self.body))


def _items(data: bytes) -> Iterator[_Item]:
    """The elements that follow each other in some bytes."""
    at = 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("an element is cut off")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4 or at + count > len(data):
                raise ValueError("an element has no usable length")
            length = int.from_bytes(data[at : at + count], "big")
            at += count
        if at + length > len(data):
            raise ValueError("an element reaches beyond its end")
        yield _Item(tag, data[at : at + length])
        at += length


def _expect(items: list[_Item], index: int, *tags: int) -> _Item:
    if index >= len(items) or items[index].tag not in tags:
        raise ValueError("an element is missing or of another kind")
    return items[index]


def _name(item: _Item) -> str:
    """A distinguished name as the kernel calls a key: the common name, else the organisation."""
    found: dict[bytes, str] = {}
    for part in item.items():
        for pair in part.items():
            words = pair.items()
            found.setdefault(_expect(words, 0, OID).body, words[1].body.decode("utf-8", "replace") if words[1:] else "")
    return found.get(COMMON_NAME) or found.get(ORGANISATION) or "?"


def _hex(number: _Item) -> str:
    """An INTEGER as its bytes, without the zero that only keeps it positive."""
    body = number.body[1:] if len(number.body) > 1 and number.body[0] == 0 else number.body
    return body.hex()


def signature(data: bytes) -> Signature:
    """The first signer in a PKCS#7 (CMS) SignedData. Raises ValueError."""
    outer = _expect(list(_items(data)), 0, SEQUENCE).items()
    signed = _expect(_expect(outer, 1, CONTEXT_0).items(), 0, SEQUENCE).items()
    signers = [item for item in signed[3:] if item.tag == SET]
    if not signers:
        raise ValueError("nobody has signed it")
    info = _expect(signers[0].items(), 0, SEQUENCE).items()
    by = _expect(info, 1, SEQUENCE, PRIMITIVE_0)
    if by.tag == PRIMITIVE_0:
        return Signature(None, None, by.body.hex())
    pair = by.items()
    return Signature(_name(_expect(pair, 0, SEQUENCE)), _hex(_expect(pair, 1, INTEGER)), None)


def certificate(data: bytes) -> Certificate:
    """An X.509 certificate, DER or PEM. Raises ValueError."""
    pem = PEM.search(data)
    if pem:
        try:
            data = base64.b64decode(b"".join(pem.group(1).split()), validate=True)
        except binascii.Error as error:
            raise ValueError("its PEM text is damaged") from error
    fields = _expect(_expect(list(_items(data)), 0, SEQUENCE).items(), 0, SEQUENCE).items()
    if fields and fields[0].tag == CONTEXT_0:  # the version
        fields = fields[1:]
    key_id = None
    for item in fields:
        if item.tag == CONTEXT_3:
            for extension in _expect(item.items(), 0, SEQUENCE).items():
                words = extension.items()
                if _expect(words, 0, OID).body == SUBJECT_KEY_ID:
                    key_id = _expect(list(_items(words[-1].body)), 0, OCTETS).body.hex()
    return Certificate(
        subject=_name(_expect(fields, 4, SEQUENCE)),
        issuer=_name(_expect(fields, 2, SEQUENCE)),
        serial=_hex(_expect(fields, 0, INTEGER)),
        key_id=key_id,
    )
