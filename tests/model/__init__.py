# SPDX-License-Identifier: GPL-3.0-or-later
"""The protocol of claims, acknowledgements, epochs and crashes as a model that is checked exhaustively."""
