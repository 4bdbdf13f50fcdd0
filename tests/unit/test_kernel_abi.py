# SPDX-License-Identifier: GPL-3.0-or-later
"""The Python side of the kernel interface has the bytes and the numbers of the C headers, as the compiler sees them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy
import pytest

from bmigrate.kernel import abi

UAPI = Path(__file__).resolve().parents[2] / "module_src" / "uapi"
STRUCTURES = {
    "bufflink_batch": abi.BatchHeader,
    "bufflink_info": abi.BufflinkInfo,
    "bufflink_barrier": abi.BufflinkBarrier,
    "bufflink_stats": abi.BufflinkStats,
    "reqlog_attach": abi.ReqlogAttach,
    "reqlog_detach": abi.ReqlogDetach,
    "reqlog_entry": abi.ReqlogEntry,
    "reqlog_list": abi.ReqlogList,
    "reqlog_stats": abi.ReqlogStats,
}
CONSTANTS = {
    "BUFFLINK_ABI": abi.BUFFLINK_ABI,
    "REQLOG_ABI": abi.REQLOG_ABI,
    "REQLOG_MAX_SLOTS": abi.MAX_SLOTS,
    "REQLOG_REGION_MIN": abi.REGION_MIN_BYTES,
    "REQLOG_REGION_MAX": abi.REGION_MAX_BYTES,
    "BUFFLINK_BATCH_AGAIN": abi.BATCH_AGAIN,
    "BUFFLINK_BATCH_WIDENED": abi.BATCH_WIDENED,
    "REQLOG_WIDENED": abi.FLAG_WIDENED,
    "REQLOG_FAILED": abi.FLAG_FAILED,
    "REQLOG_OP_MIXED": abi.OP_MIXED,
    "REQLOG_OP_WRITE": abi.OP_WRITE,
    "REQLOG_OP_DISCARD": abi.OP_DISCARD,
    "REQLOG_OP_SECURE_ERASE": abi.OP_SECURE_ERASE,
    "REQLOG_OP_WRITE_ZEROES": abi.OP_WRITE_ZEROES,
    "REQLOG_OP_WRITE_SAME": abi.OP_WRITE_SAME,
    "REQLOG_ENTRY_PARTITION": abi.ENTRY_PARTITION,
    "REQLOG_ENTRY_GONE": abi.ENTRY_GONE,
    "REQLOG_ENTRY_BEYOND": abi.ENTRY_BEYOND,
    "REQLOG_ENTRY_DRAINING": abi.ENTRY_DRAINING,
    "REQLOG_ENTRY_BIO": abi.ENTRY_BIO,
    "REQLOG_ENTRY_BLIND": abi.ENTRY_BLIND,
    "REQLOG_ATTACH_BIO": abi.ATTACH_BIO,
    **{name: value for name, value in vars(abi).items() if "_IOC_" in name},
}
REASONS = {
    "NOT_BLOCK": "not_block",
    "DEV": "dev_mismatch",
    "SIZE": "size_mismatch",
    "DISKSEQ": "diskseq_mismatch",
    "BIO_BASED": "bio_based",
    "ZONED": "zoned",
    "GONE": "gone",
    "ATTACHED": "attached",
    "NO_SLOT": "no_slot",
    "REGION": "bad_region",
    "EMPTY": "empty",
    "DAX": "dax",
    "RW_PAGE": "rw_page",
    "DRIVER": "driver_writes",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes, offsets and constants, printed by a C program that includes the headers."""
    expressions = {f"sizeof {name}": f"sizeof(struct {name})" for name in [*STRUCTURES, "reqlog_record"]}
    for name, structure in STRUCTURES.items():
        for field, *_ in structure._fields_:
            expressions[f"{name}.{field}"] = f"__builtin_offsetof(struct {name}, {field})"
    for field, _ in abi.RECORD_FIELDS:
        expressions[f"reqlog_record.{field}"] = f"__builtin_offsetof(struct reqlog_record, {field})"
    expressions.update({name: name for name in CONSTANTS})
    expressions.update({f"reason {name}": f"REQLOG_REASON_{name}" for name in REASONS})
    lines = "".join(f'printf("%llu {name}\\n", (unsigned long long)({text}));' for name, text in expressions.items())
    source = f'#include <stdio.h>\n#include "bufflink.h"\n#include "reqlog.h"\nint main(void) {{ {lines} return 0; }}\n'
    directory = tmp_path_factory.mktemp("abi")
    (directory / "abi.c").write_text(source)
    program = directory / "abi"
    compile_it = ["gcc", "-Wall", "-Wextra", "-Werror", f"-I{UAPI}", str(directory / "abi.c"), "-o", str(program)]
    subprocess.run(compile_it, check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    pairs = (line.split(" ", 1) for line in output.splitlines())
    return {name: int(value) for value, name in pairs}


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_structures_have_the_headers_layout(compiled: dict[str, int], name: str) -> None:
    structure = STRUCTURES[name]
    assert ctypes.sizeof(structure) == compiled[f"sizeof {name}"]
    for field, *_ in structure._fields_:
        assert getattr(structure, field).offset == compiled[f"{name}.{field}"], field


def test_records_have_the_headers_layout(compiled: dict[str, int]) -> None:
    dtype = numpy.dtype(abi.RECORD_FIELDS)
    assert dtype.itemsize == abi.RECORD_BYTES == compiled["sizeof reqlog_record"] == 16
    assert dtype.fields is not None
    for field, _ in abi.RECORD_FIELDS:
        assert dtype.fields[field][1] == compiled[f"reqlog_record.{field}"], field


def test_numbers_are_the_headers(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in CONSTANTS} == CONSTANTS
    assert len([name for name in CONSTANTS if "_IOC_" in name]) == 11


def test_every_reason_has_a_code_and_a_hint(compiled: dict[str, int]) -> None:
    assert {compiled[f"reason {name}"]: code for name, code in REASONS.items()} == {
        number: code for number, (code, _, _) in abi.REASONS.items()
    }
    assert all(meaning and hint for _, meaning, hint in abi.REASONS.values())
