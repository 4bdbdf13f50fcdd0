# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile input for the receiver: see frames.py."""
