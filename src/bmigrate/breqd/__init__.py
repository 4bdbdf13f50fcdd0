# SPDX-License-Identifier: GPL-3.0-or-later
"""breqd: turns the kernel's log of writes into dirty bitmaps, and lends them out as claims."""
