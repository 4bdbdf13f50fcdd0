# SPDX-License-Identifier: GPL-3.0-or-later
"""breceive: writes what the shipper sends to the standby's devices, for one session."""
