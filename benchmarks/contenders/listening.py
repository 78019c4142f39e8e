"""Listener: serves an application of the benchmark exactly as the service serves its own."""

import os
import socket
from typing import Any

from api.server.entrypoints import run_http
from api.server.sockets import BACKLOG

__all__ = ["serve"]


def serve(application: Any) -> None:
    """Listen on the port that was given, until SIGTERM."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", int(os.environ["BENCH_PORT"])))
        listening.listen(BACKLOG)
        run_http(application, listening, keep_alive_seconds=75)
