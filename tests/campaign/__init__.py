# SPDX-License-Identifier: GPL-3.0-or-later
"""A long run of random faults against two live hosts, each judged by comparing the disks on the lab host."""
