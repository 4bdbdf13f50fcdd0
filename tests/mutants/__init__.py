# SPDX-License-Identifier: GPL-3.0-or-later
"""Sabotage on purpose: each forbidden shortcut as a patch, and the test that must notice it. See docs/mutants.md."""
