# SPDX-License-Identifier: GPL-3.0-or-later
"""Benchmarks: ratios against a bare run of the same session, in alternating rounds."""
