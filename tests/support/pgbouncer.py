"""A real PgBouncer in front of a test's PostgreSQL, by default in transaction pooling."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.databases import PostgresServer
from tests.support.programs import find

START_SECONDS = 30.0


@contextmanager
def running_pgbouncer(
    postgres: PostgresServer, *, pool_mode: str = "transaction", pool_size: int = 3
) -> Iterator[str]:
    """A pooler with few connections, so that callers share them; the address before its path."""
    program = find("pgbouncer")
    folder = Path(tempfile.mkdtemp(prefix="rsv-pgb-"))
    try:
        (folder / "pgbouncer.ini").write_text(
            "[databases]\n"
            f"* = host={postgres.home} user=postgres\n"
            "[pgbouncer]\n"
            f"unix_socket_dir = {folder}\n"
            "listen_port = 5432\n"
            "auth_type = any\n"
            f"pool_mode = {pool_mode}\n"
            f"default_pool_size = {pool_size}\n"
            "max_client_conn = 200\n"
            # By default it waits for 15 s before it connects again to a server that was away.
            "server_login_retry = 1\n"
            f"logfile = {folder}/log\n"
        )
        folder.chmod(0o755)
        as_root = os.geteuid() == 0
        if as_root:
            shutil.chown(folder, "nobody")
        # It refuses to run as root.
        user = ["-u", "nobody"] if as_root else []
        with subprocess.Popen(
            [program, *user, folder / "pgbouncer.ini"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                _wait_for(folder / ".s.PGSQL.5432", process)
                yield f"?host={folder}"
            finally:
                process.terminate()
                process.wait(START_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(socket: Path, process: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > give_up_at:
            raise AssertionError((socket.parent / "log").read_text())
        time.sleep(0.02)
