# SPDX-License-Identifier: GPL-3.0-or-later
"""`python3 -m lab`."""

from __future__ import annotations

from lab.cli import main

raise SystemExit(main())
