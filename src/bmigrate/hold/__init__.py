# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate-hold: the only process that holds a volume exclusively, and the giver of epochs."""
