# SPDX-License-Identifier: GPL-3.0-or-later
"""The shipper: claims dirty blocks, reads them, sends them, and hands acknowledgements to breqd.

Data flows one way through this package: breqd's claim -> source read -> frame -> acknowledgement.
Its files: ``main`` the daemon, ``engine`` one workload's life, ``session`` one lease on the
standby, ``passes`` one walk, ``resync`` ``verify`` ``drain`` what else a session can do; the rest
is pure arithmetic (``pacing`` ``rates`` ``zeros`` ``window`` ``ledger`` ``verdict``) or a thin
edge (``transport`` ``source`` ``gentle`` ``link`` ``record``).
"""
