"""Entry point of each process that the supervisor starts: the API, the worker, the sandbox.

    python -m api.server.entrypoints ROLE --parent PID [--fd LISTENING_SOCKET]
        [--internal-fd LISTENING_SOCKET] [--notice-fd PIPE] [--entry MODULE:NAME]

Settings come from the environment. `--entry` replaces the role's own entry point in tests: a
function of the settings that makes an ASGI application, or, for the worker, that runs.
"""

import argparse
import asyncio
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import structlog

from api.http.draining import Draining
from api.server.sockets import BACKLOG, address_of, listen, local
from reservation.config.settings import Settings, SettingsError
from reservation.telemetry import start_notice, tracing

if TYPE_CHECKING:
    from litestar import Litestar

__all__ = ["BAD_SETTING", "ENTRIES", "main", "run_http", "sandbox", "sandbox_alone"]

log = structlog.get_logger(__name__)

#: Exit status for an unusable setting (EX_CONFIG): a restart would not help.
BAD_SETTING: Final = 78

#: Default entry point of each role.
ENTRIES: Final = {
    "api": "api.http.app:create_app",
    "worker": "reservation.workers.runner:run",
    "sandbox": "api.server.entrypoints:sandbox",
}

#: How long open requests may continue after SIGTERM. An event stream never ends by itself, so
#: without this bound one open page would delay every deployment.
GRACE_SECONDS: Final = 3

#: Allocations minus deallocations that start a collection of the youngest generation: waiting
#: requests are many objects and no cycles, and 700, the default, is two dozen of them.
COLLECT_AFTER_OBJECTS: Final = 20_000

#: A browser must use a response only as its declared type, scripts and JSON too.
_NO_SNIFFING: Final = ("X-Content-Type-Options", "nosniff")
#: For a year browsers return only over TLS (RFC 6797), which a proxy in front of us terminates.
_TLS_ALONE: Final = ("Strict-Transport-Security", "max-age=31536000")

#: From <sys/prctl.h>.
_PR_SET_PDEATHSIG: Final = 1

#: Poll interval for the parent process where the kernel cannot signal its end.
_PARENT_POLL_SECONDS: Final = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Run one role until SIGTERM; the result is the exit status of the process."""
    parser = argparse.ArgumentParser(prog="python -m api.server.entrypoints")
    parser.add_argument("role", choices=sorted(ENTRIES))
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--internal-fd", type=int)
    parser.add_argument("--notice-fd", type=int)
    parser.add_argument("--entry")
    given = parser.parse_args(arguments)
    # Before the imports below, however long they take: no child may outlive the supervisor.
    exit_with_parent(given.parent)
    start_notice.expect(given.notice_fd)
    try:
        settings = Settings.load(os.environ)
        _configure_logs(settings)
        entry = _resolve(given.entry or ENTRIES[given.role])
        if given.role != "sandbox":
            _refuse_higher_level(settings)
            tracing.start(given.role)
        if given.role == "worker":
            return _run_worker(entry, settings)
        run_http(
            entry(settings),
            *(
                socket.socket(fileno=descriptor)
                for descriptor in (given.fd, given.internal_fd)
                if descriptor is not None
            ),
            keep_alive_seconds=settings.keep_alive_seconds,
            headers=_headers(settings),
        )
    except SettingsError as error:
        sys.stderr.write(f"reservation: {error}\n")
        return BAD_SETTING
    except Exception:  # loop top: the supervisor restarts this process
        # Logged like any other event: a bare traceback would bypass the redaction, and many errors
        # contain an address with a password.
        log.exception("process_failed", role=given.role)
        return 1
    finally:
        tracing.stop()
    return 0


def exit_with_parent(parent_pid: int) -> None:
    """End by SIGKILL when the parent ends, even if the parent is killed by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        watch = threading.Thread(target=_watch, args=(parent_pid,), daemon=True)
        watch.start()
    if os.getppid() != parent_pid:  # The parent exited before PDEATHSIG was set.
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _configure_logs(settings: Settings) -> None:
    from api.server import log_config as logs  # noqa: PLC0415 - after exit_with_parent: imports take longest

    logs.configure(production=settings.production)


def _refuse_higher_level(settings: Settings) -> None:
    from reservation.application.readiness.level import refuse_higher_level  # noqa: PLC0415 - likewise
    from reservation.bootstrap import sqlite_url  # noqa: PLC0415 - likewise

    url = settings.database_url or sqlite_url(settings)
    asyncio.run(refuse_higher_level(settings, url))


def _resolve(entry: str) -> Callable[[Settings], Any]:
    module, _, name = entry.partition(":")
    # Imports make no garbage, and collections take a fifth of their time.
    gc.disable()
    try:
        return getattr(import_module(module), name)
    finally:
        gc.enable()


def _headers(settings: Settings) -> list[tuple[str, str]]:
    """Headers of every response, those of the HTTP server itself included."""
    if settings.public_url.startswith("https://"):
        return [_NO_SNIFFING, _TLS_ALONE]
    return [_NO_SNIFFING]


def run_http(
    application: Any,
    *listening: socket.socket,
    keep_alive_seconds: int,
    headers: list[tuple[str, str]] | None = None,
) -> None:
    """Serve an ASGI application on listening sockets until SIGTERM.

    Args:
        application: the ASGI application.
        listening: bound sockets; serving makes them listen.
        keep_alive_seconds: how long a connection may be idle.
        headers: added to every response.
    """
    import uvicorn  # noqa: PLC0415 - not needed by the worker

    from api.http.connection.protocol import HttpProtocol  # noqa: PLC0415 - likewise

    config = uvicorn.Config(
        application,
        loop="uvloop",
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        headers=headers or [],
        # Forwarding headers are trusted in one place only, by RESERVATION_TRUSTED_PROXIES.
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=keep_alive_seconds,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )

    state = getattr(application, "state", None)
    draining: Draining = getattr(state, "draining", None) or Draining()

    class Server(uvicorn.Server):
        """Ends open streams first: uvicorn waits for them, and they never end by themselves."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR1, draining.begin)
            await super().startup(sockets)
            loop.add_signal_handler(signal.SIGUSR2, self.retire)
            _freeze_startup_objects()
            start_notice.send()

        def retire(self) -> None:
            """Accept no more connections; other processes accept from the same socket."""
            draining.retire()
            for server in self.servers:
                server.close()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if not draining.active:
                draining.begin()
            stop_streams = getattr(state, "stop_streams", None)
            if stop_streams is not None:
                stop_streams()
            await super().shutdown(sockets)

    Server(config).run(sockets=list(listening))


def _freeze_startup_objects() -> None:
    """Freeze the 150,000 objects of start-up, which are never freed, out of garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, *gc.get_threshold()[1:])


def _run_worker(run: Callable[[Settings], Awaitable[None]], settings: Settings) -> int:
    import uvloop  # noqa: PLC0415 - not needed where uvicorn brings its own

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signalled(run, settings))
    return 0


async def _until_signalled(run: Callable[[Settings], Awaitable[None]], settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, which cancel `run`: it may then finish its work."""
    running = asyncio.ensure_future(run(settings))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        if not running.cancelled():
            raise


def sandbox(settings: Settings) -> "Litestar":
    """The sandbox of the PG, with its journal in the data directory and its webhooks to us."""
    from reservation.sandbox import SandboxConfig, create_sandbox  # noqa: PLC0415

    return create_sandbox(
        SandboxConfig(
            journal_dir=settings.data_dir / "sandbox",
            secret_key=settings.toss_secret_key,
            client_key=settings.toss_client_key,
            webhook_urls=(f"{settings.public_url}/v1/payments/toss/webhooks",),
        )
    )


def sandbox_alone(settings: Settings, *, host: str, port: int) -> int:
    """Run the sandbox in this process, in the foreground, until SIGTERM."""
    from api.http import open_files  # noqa: PLC0415 - only the sandbox alone raises its own limit

    _configure_logs(settings)
    open_files.raise_limit()
    listening = asyncio.run(listen(host, port))
    address = address_of(local(host), listening.getsockname()[1])
    sys.stdout.write(
        f"RESERVATION_TOSS_API_URL={address}\nRESERVATION_TOSS_CHECKOUT_URL={address}/checkout\n"
    )
    sys.stdout.flush()
    run_http(
        sandbox(settings),
        listening,
        keep_alive_seconds=settings.keep_alive_seconds,
        headers=[_NO_SNIFFING],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
