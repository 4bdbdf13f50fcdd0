# SPDX-License-Identifier: GPL-3.0-or-later
"""What every program shares: errors, output, durable files, sockets, configuration, block devices.

Nothing here knows a program; programs import from here and never the other way round.
"""
