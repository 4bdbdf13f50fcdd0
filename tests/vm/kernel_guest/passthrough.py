# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: commands to a disk past the block layer, as sg_dd and nvme-cli send them."""

from __future__ import annotations

import ctypes
import fcntl
import os

SG_IO = 0x2285
NO_DATA, TO_DEVICE, FROM_DEVICE = -1, -2, -3
NVME_IO_COMMAND = 0xC0484E43
NVME_WRITE = 1


class SgHeader(ctypes.Structure):
    """struct sg_io_hdr of scsi/sg.h."""

    _fields_ = [
        ("interface_id", ctypes.c_int),
        ("direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("sense_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("data_len", ctypes.c_uint),
        ("data", ctypes.c_void_p),
        ("command", ctypes.c_void_p),
        ("sense", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked", ctypes.c_ubyte),
        ("msg", ctypes.c_ubyte),
        ("sense_written", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("residual", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    ]


class NvmeCommand(ctypes.Structure):
    """struct nvme_passthru_cmd of linux/nvme_ioctl.h."""

    _fields_ = [
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    ]


def scsi_command(device: str, command: bytes, direction: int, data: bytes = b"") -> int:
    """Send a SCSI command past the block layer; its status. Raises OSError where the device takes none."""
    buffer = ctypes.create_string_buffer(data, max(1, len(data)))
    sense = ctypes.create_string_buffer(64)
    cdb = ctypes.create_string_buffer(command, len(command))
    header = SgHeader(
        interface_id=ord("S"),
        direction=direction,
        cmd_len=len(command),
        sense_len=64,
        data_len=len(data),
        data=ctypes.addressof(buffer) if data else None,
        command=ctypes.addressof(cdb),
        sense=ctypes.addressof(sense),
        timeout=20000,
    )
    fd = os.open(device, os.O_RDWR)
    try:
        fcntl.ioctl(fd, SG_IO, header, True)
    finally:
        os.close(fd)
    return int(header.status)


def scsi_write(device: str, sector: int, data: bytes) -> None:
    """WRITE(10) of whole sectors of 512 bytes, absolute on the disk that executes it."""
    cdb = bytes([0x2A, 0]) + sector.to_bytes(4, "big") + bytes([0]) + (len(data) // 512).to_bytes(2, "big") + bytes([0])
    status = scsi_command(device, cdb, TO_DEVICE, data)
    if status:
        raise RuntimeError(f"{device}: WRITE(10) ended with status {status:#x}")


def nvme_write(device: str, sector: int, data: bytes) -> None:
    """The same to the first namespace of an nvme controller. Raises OSError where the device takes none."""
    buffer = ctypes.create_string_buffer(data, len(data))
    command = NvmeCommand(
        opcode=NVME_WRITE,
        nsid=1,
        addr=ctypes.addressof(buffer),
        data_len=len(data),
        cdw10=sector,
        cdw12=len(data) // 512 - 1,
    )
    fd = os.open(device, os.O_RDWR)
    try:
        status = fcntl.ioctl(fd, NVME_IO_COMMAND, command, True)
    finally:
        os.close(fd)
    if status:
        raise RuntimeError(f"{device}: the command ended with status {status:#x}")
