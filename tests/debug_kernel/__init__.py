# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules on a kernel that checks itself: see docs/debug-kernel.md."""
