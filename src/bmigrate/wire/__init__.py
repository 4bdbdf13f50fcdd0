# SPDX-License-Identifier: GPL-3.0-or-later
"""The framed protocol between the shipper and the receiver.

Pure: values in, values out. Nothing in this package may open, read or write anything.
"""
