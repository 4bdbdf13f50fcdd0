# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs that run in a guest while the cost is measured."""
