# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL in the lab's guests: the cluster on the volume, its settings on both hosts, questions to it.

The settings that matter for the evidence stay at their safe defaults and are checked, not assumed:
fsync and synchronous_commit on, the WAL on the volume. Nothing here knows of bmigrate.
"""

from __future__ import annotations

import secrets

from lab import Lab, LabError

MOUNT = "/srv/pgdata"
DATA = f"{MOUNT}/main"
SERVICE = "postgresql@15-main.service"

SETTINGS = f"""set -e
pg_conftool 15 main set data_directory {DATA}
pg_conftool 15 main set listen_addresses '*'
pg_conftool 15 main set max_connections 20
pg_conftool 15 main set shared_buffers 64MB
pg_conftool 15 main set log_min_messages warning
printf 'host ledger ledger samenet scram-sha-256\\n' >> /etc/postgresql/15/main/pg_hba.conf
mkdir -p {MOUNT}
"""

ON_THE_VOLUME = f"""set -e
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 DEVICE
mount DEVICE {MOUNT}
cp -a /var/lib/postgresql/15/main {DATA}
umount {MOUNT}
"""


class Cluster:
    """The PostgreSQL of one lab."""

    def __init__(self, box: Lab) -> None:
        self.box = box
        self.password = secrets.token_hex(16)

    def settle(self, primary: str) -> None:
        """Put the same settings on both hosts, and the cluster's files on the primary's volume."""
        for name in self.box.vms:
            self.box.ssh(name, SETTINGS, timeout=300)
        self.box.ssh(primary, ON_THE_VOLUME.replace("DEVICE", f"/dev/disk/by-id/virtio-bm-pg-{primary}"), timeout=300)

    def conninfo(self) -> str:
        """What a client is given: both hosts, and that it wants the one that takes writes."""
        ports = ",".join(str(self.box.port(name, "postgresql")) for name in self.box.vms)
        hosts = ",".join("127.0.0.1" for _ in self.box.vms)
        return (
            f"host={hosts} port={ports} user=ledger dbname=ledger password={self.password} "
            "target_session_attrs=read-write connect_timeout=5"
        )

    def sql(self, host: str, statement: str, database: str = "postgres") -> str:
        """Run SQL as the superuser on a host, over its local socket; the unaligned output."""
        done = self.box.ssh(
            host, f"runuser -u postgres -- psql -X -v ON_ERROR_STOP=1 -qAt -d {database}", input_text=statement
        )
        return done.stdout.strip()

    def create_ledger(self, host: str) -> None:
        """The role, the database and the table that the client writes to."""
        self.sql(host, f"create role ledger login password '{self.password}';\ncreate database ledger owner ledger;")
        self.sql(
            host,
            "create table ledger (id bigint primary key, at timestamptz default clock_timestamp(), note text not null);"
            "alter table ledger owner to ledger;",
            "ledger",
        )

    def check_durability_settings(self, host: str) -> dict[str, str]:
        """The settings without which an acknowledgement means nothing.

        Raises:
            LabError: one of them is off, or the WAL is not on the volume.
        """
        names = ("fsync", "synchronous_commit", "full_page_writes")
        values = {name: self.sql(host, f"show {name}") for name in names}
        where = self.box.ssh(host, f"df --output=target {DATA}/pg_wal | tail -1").stdout.strip()
        if set(values.values()) != {"on"} or where != MOUNT:
            raise LabError(f"{host}: {values}, WAL on {where}: commits would not be durable on the volume")
        return {**values, "WAL on": where}

    def rows(self, host: str) -> set[int]:
        """Numbers of all rows that the database on a host holds.

        Raises:
            LabError: the server does not answer.
        """
        return {int(line) for line in self.sql(host, "select id from ledger", "ledger").split()}

    def running(self, host: str) -> bool:
        """Whether the server on a host takes connections."""
        return self.box.ssh(host, "pg_isready -q", check=False).returncode == 0

    def crash(self, host: str) -> None:
        """End the server as a crash would: no checkpoint, so its next start needs the WAL."""
        self.box.ssh(
            host,
            f"systemctl kill -s QUIT --kill-whom=main {SERVICE}; "
            f"for i in $(seq 600); do systemctl is-active -q {SERVICE} || exit 0; sleep 0.1; done; exit 1",
        )

    def corrupt_one_wal_block(self, host: str, lsn: str) -> str:
        """Overwrite, with the server stopped, the 8 KiB WAL page that holds a position; returns where that was."""
        segment_bytes, page_bytes = 16 << 20, 8192
        high, low = (int(part, 16) for part in lsn.split("/"))
        position = (high << 32) + low
        timeline = int(
            self.box.ssh(host, f"ls {DATA}/pg_wal | grep -E '^[0-9A-F]{{24}}$' | sort | tail -1").stdout[:8], 16
        )
        per_id = (1 << 32) // segment_bytes
        number = position // segment_bytes
        name = f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"
        page = position % segment_bytes // page_bytes
        self.box.ssh(
            host,
            f"dd if=/dev/urandom of={DATA}/pg_wal/{name} bs={page_bytes} seek={page} count=1 "
            "conv=notrunc,fsync status=none",
        )
        return f"{name}, page {page}"
