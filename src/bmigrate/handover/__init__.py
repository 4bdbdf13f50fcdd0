# SPDX-License-Identifier: GPL-3.0-or-later
"""Moving a workload's role between two hosts, and everything that depends on that role.

``machine`` decides (pure), ``source`` and ``target`` act in the order that saves data, ``host`` is
the thin edge to systemd, udev and the sockets, ``boot``, ``early`` and ``shutdown`` are the units'
side. Nothing here moves data, and nothing here may run a workload on two hosts.
"""
