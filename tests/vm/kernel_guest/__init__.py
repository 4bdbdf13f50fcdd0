# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs that the tests of the kernel modules run in a guest. Nothing here may import what only the host has."""
