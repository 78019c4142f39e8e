"""Listening sockets of the service, and the addresses that reach them."""

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
import sys
import time
from typing import Final

import structlog

__all__ = [
    "BACKLOG",
    "CannotServe",
    "Listener",
    "address_of",
    "bind",
    "listen",
    "local",
    "loopback",
]

log = structlog.get_logger(__name__)

#: Connections that wait for accept: a sale's opening second; the kernel's own limit is 4096 too.
BACKLOG: Final = 4096

#: How long processes of a killed supervisor may still hold a port.
_BIND_SECONDS_MAX: Final = 3.0
_BIND_RETRY_SECONDS: Final = 0.05

#: The address that reaches a wildcard listener from the same machine.
_LOCAL: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not listened on

#: Before a listening socket closes: a round trip for clients in the TCP handshake, and the time
#: that busy processes may take to accept its queue.
_HANDSHAKE_SECONDS: Final = 0.1
_ACCEPT_CHECKS_MAX: Final = 100
_ACCEPT_CHECK_SECONDS: Final = 0.01

#: From <asm-generic/socket.h>; Python has no name for it.
_SO_ATTACH_FILTER: Final = 26
#: A socket filter that drops the first segment of a new connection and passes all else:
#: ldb [13]; and #(SYN|ACK); jeq #SYN; ret #0; ret #-1 (tcp(7), struct sock_filter).
_DROP_NEW: Final = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),
        (0x54, 0, 0, 0x12),
        (0x15, 0, 1, 0x02),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0xFFFFFFFF),
    )
)
#: `tcpi_unacked` in struct tcp_info: for a listening socket, the length of its accept queue.
_QUEUE_IN_TCP_INFO: Final = slice(24, 28)


class CannotServe(Exception):
    """The service cannot start: one sentence with the reason."""


class Listener:
    """A listening socket that several processes accept from, and that outlives each of them."""

    def __init__(self, listening: socket.socket) -> None:
        self.socket = listening
        self._linux = sys.platform == "linux"

    async def close(self) -> None:
        """Refuse new connections in every process at once; earlier ones are accepted first.

        A socket that closes resets the connections in its queue and those in the handshake. So the
        first segment of a new connection is dropped for a moment: its client sends it again a
        second later and is refused. Meanwhile the processes, which still serve, empty the queue.

            client    SYN ->                 ACK, request ->              SYN ->     SYN ->
            listener         <- SYN ACK              accepted, answered   dropped    <- RST
        """
        if self.socket.fileno() < 0:
            return
        self._drop_new()
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        for _ in range(_ACCEPT_CHECKS_MAX):
            if not self._queued():
                break
            await asyncio.sleep(_ACCEPT_CHECK_SECONDS)
        # close() alone would leave the socket open in the processes that inherited it; where a
        # system cannot shut a listening socket down, theirs close right after.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _drop_new(self) -> None:
        if not self._linux:
            return
        program = ctypes.create_string_buffer(_DROP_NEW, len(_DROP_NEW))
        filtering = struct.pack("HP", len(_DROP_NEW) // 8, ctypes.addressof(program))
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filtering)
        except OSError as error:
            # Some sandboxes have no filters: the queue is still accepted before the end.
            log.info("socket_filter_failed", reason=os.strerror(error.errno or 0))

    def _queued(self) -> int:
        """Length of the accept queue."""
        if not self._linux:
            return 0
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE_IN_TCP_INFO.stop)
        return int.from_bytes(info[_QUEUE_IN_TCP_INFO], sys.byteorder)


async def listen(host: str, port: int) -> socket.socket:
    """A listening socket that is not inherited (CLOEXEC)."""
    bound = await bind(host, port)
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


async def bind(host: str, port: int) -> socket.socket:
    """A bound socket that is not inherited (CLOEXEC) and refuses connections until it listens."""
    end = time.monotonic() + _BIND_SECONDS_MAX
    while True:
        try:
            bound = _bound(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise _cannot_listen(host, port, error) from error
            await asyncio.sleep(_BIND_RETRY_SECONDS)
        else:
            bound.setblocking(False)
            return bound


def _bound(host: str, port: int) -> socket.socket:
    is_ipv6 = ":" in host
    bound = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_ipv6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> CannotServe:
    return CannotServe(f"cannot listen on {host} port {port}: {_reason(error)}")


def _reason(error: OSError) -> str:
    # The text of a failed bind repeats the address; for a failed DNS query it is the only detail.
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error)
    return os.strerror(error.errno)


def address_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def loopback(host: str) -> str:
    """The loopback address of the same family as `host`."""
    return "::1" if ":" in host else "127.0.0.1"


def local(host: str) -> str:
    """The address that reaches a listener on `host` from this machine."""
    return _LOCAL.get(host, host)
