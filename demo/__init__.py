# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo: a live PostgreSQL moves to another host and back while a client keeps writing, and the evidence."""
