# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate: moves a running service, with the block devices under it, to another host."""

__version__ = "0.1.0"
