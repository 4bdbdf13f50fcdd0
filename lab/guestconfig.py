# SPDX-License-Identifier: GPL-3.0-or-later
"""What makes a guest this guest: name, addresses, ssh host key, the one key that may log in.

Handed to the guest as a second initramfs archive and put in place at its first boot only (recipe/init). Pure.
"""

from __future__ import annotations

from lab import initramfs, qemu
from lab.disks import VM_NAMES

LAN_MTU = 9000
#: Home of the guest's root; everything below config goes to the same place of its root disk.
HOME = "config/root"


def lan_address(vm: str) -> str:
    """The guest's address on the network between the guests."""
    return f"10.77.0.{VM_NAMES.index(vm) + 1}"


def _network(name: str, index: int, address: str, link: str) -> list[initramfs.Entry]:
    match = f"[Match]\nMACAddress={qemu.mac(name, index)}\n"
    network = (
        f"{match}\n[Link]\n{link}\n[Network]\nAddress={address}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n"
        "ConfigureWithoutCarrier=yes\nIgnoreCarrierLoss=yes\n"
    )
    return [
        initramfs.regular(f"config/etc/systemd/network/10-{name}.link", f"{match}\n[Link]\nName={name}\n".encode()),
        initramfs.regular(f"config/etc/systemd/network/10-{name}.network", network.encode()),
    ]


def _modules(release: str) -> list[initramfs.Entry]:
    """Mounts the modules of a kernel that is not the image's own before anything can ask for one.

    By a service and not by a mount unit, which would wait for udev, which may ask for one.
    """
    unit = (
        "[Unit]\nDescription=Modules of this kernel\nDefaultDependencies=no\n"
        "Before=systemd-udevd.service systemd-modules-load.service kmod-static-nodes.service\n\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
        f"ExecStart=/bin/mount -t ext4 -o ro LABEL=lab-modules /lib/modules/{release}\n"
    )
    units = "config/etc/systemd/system"
    wanted = b"[Unit]\nRequires=lab-modules.service\nAfter=lab-modules.service\n"
    return [
        initramfs.directory(f"config/usr/lib/modules/{release}"),
        initramfs.regular(f"{units}/lab-modules.service", unit.encode()),
        initramfs.regular(f"{units}/systemd-udevd.service.d/lab-modules.conf", wanted),
    ]


def archive(
    vm: str, machine_id: str, host_key: bytes, host_key_public: bytes, authorized: bytes, other_kernel: str = ""
) -> bytes:
    """The guest's own archive.

    Args:
        machine_id: 32 hexadecimal digits, of this guest alone.
        host_key, host_key_public: the ed25519 host key that the lab pins.
        authorized: the public key that may log in as root.
        other_kernel: release of the kernel, if it is not the image's own.
    """
    hosts = "127.0.0.1 localhost\n" + "".join(f"{lan_address(name)} {name}\n" for name in VM_NAMES)
    index = VM_NAMES.index(vm) + 1
    private = 0o600
    entries = [
        initramfs.Entry(HOME, 0o040700),
        initramfs.Entry(f"{HOME}/.ssh", 0o040700),
        initramfs.regular(f"{HOME}/.ssh/authorized_keys", authorized, private),
        initramfs.regular("config/etc/hostname", f"{vm}\n".encode()),
        initramfs.regular("config/etc/hosts", hosts.encode()),
        initramfs.regular("config/etc/machine-id", f"{machine_id}\n".encode(), 0o444),
        initramfs.regular("config/etc/ssh/ssh_host_ed25519_key", host_key, private),
        initramfs.regular("config/etc/ssh/ssh_host_ed25519_key.pub", host_key_public),
        *_network("nat", index, "10.0.2.15/24", ""),
        *_network("lan", index, f"{lan_address(vm)}/24", f"MTUBytes={LAN_MTU}\n"),
        *(_modules(other_kernel) if other_kernel else []),
    ]
    return initramfs.cpio(initramfs.with_parents(entries))
