# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel modules as files: what they are, which installed kernels have them, and whether a kernel would load them.

Reads only. The Ansible modules use the same code through the link module_utils/bmigrate_kmod, also on hosts where the
programs are not installed: so nothing here may import anything but the standard library and its own neighbours.
"""
