# SPDX-License-Identifier: GPL-3.0-or-later
"""Bindings of the kernel modules bufflink and reqlog.

`abi` has the layouts, `control` attaches volumes, `channel` reads the log, `buildid` proves which build is loaded.
Nothing here decides anything: it gives the kernel's answers as values, and its refusals as KernelError. Only `channel`
imports NumPy, and only when a batch is read.
"""
