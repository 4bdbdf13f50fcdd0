# SPDX-License-Identifier: GPL-3.0-or-later
"""The one error that the lab raises: it says what failed, on which guest, and what to do next."""

from __future__ import annotations


class LabError(RuntimeError):
    """Something in the lab failed; the text is meant for the person who typed the command."""
