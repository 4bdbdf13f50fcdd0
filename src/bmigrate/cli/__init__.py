# SPDX-License-Identifier: GPL-3.0-or-later
"""The operator's command line: one file per sub-command, imported only when it is used."""
