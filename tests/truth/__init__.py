# SPDX-License-Identifier: GPL-3.0-or-later
"""The truth table: each kind of device against each operation, on each kernel that it was run on."""
