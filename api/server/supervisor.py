"""The supervisor: starts the processes of the service, restarts failed ones, stops all in order."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, cast

import structlog

from api.http import open_files
from api.server import log_config as logs
from api.server.child_process import AlreadyRunning, ChildProcess, Part, alone_in
from api.server.entrypoints import BAD_SETTING, ENTRIES
from api.server.sockets import CannotServe, Listener, address_of, bind, listen, local, loopback
from reservation.adapters.redis.embedded.server import EmbeddedServer, EmbeddedServerError
from reservation.config.settings import PREFIX, Settings, SettingsError, require_given_secrets

__all__ = ["AlreadyRunning", "CannotServe", "serve"]

log = structlog.get_logger(__name__)

#: Back-off of restarts: short at first, and never long, since the missing dependency (a database, a
#: disk) may be back at any moment.
_PAUSE_SECONDS_MIN: Final = 0.1
_PAUSE_SECONDS_MAX: Final = 5.0

#: A process that ran this long had started well: its next exit resets the back-off.
_STABLE_SECONDS: Final = 10.0

#: Time limit of each part after the drain, then SIGKILL. Without a drain, all limits end within the
#: 10 s that container runtimes allow. The API stops first, so that no new requests arrive. Valkey
#: stops last, so that the final writes of the other parts are kept.
_KILL_AFTER_SECONDS: Final = {"api": 4.5, "worker": 7.0, "sandbox": 8.0, "valkey": 9.5}

#: Deadline for the start of a replacement, which may take most of a minute on a busy machine.
_REPLACEMENT_SECONDS_MAX: Final = 60.0

#: The parts that SIGHUP replaces, in this order. The other two hold data of the whole service.
_REPLACED: Final = ("api", "worker")

#: Settings that all processes must share, or that the supervisor has applied. SIGHUP replaces no
#: process if `.env` has changed one of them.
_SETTINGS_OF_A_START: Final = (
    "env",
    "data_dir",
    "redis_url",
    "database_url",
    "key_prefix",
    "order_id_key",
    "host",
    "port",
    "internal_host",
    "internal_port",
    "workers",
    "metrics_port",
    "toss_api_url",
)

#: Further listeners of a role: command-line option and listener.
_MORE_SOCKETS: Final = {"api": (("--internal-fd", "internal"),)}

#: Poll interval for a Redis that did not answer at the start.
_REDIS_POLL_SECONDS: Final = 1.0

#: Poll interval, time-out and first warning of the wait for readiness.
_READY_POLL_SECONDS: Final = 0.1
_READY_ANSWER_SECONDS_MAX: Final = 2.0
_READY_WARNING_SECONDS: Final = 30.0


class Supervisor:
    """All processes of one `reservation serve`."""

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str],
        role: str | None,
        entries: Mapping[str, str],
        demo_sale: bool,
    ) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._roles = (role,) if role else ("worker", "api")
        self._alone = role is None
        self._entries = entries
        self._demo_sale = demo_sale
        self._metrics = settings.data_dir / f"metrics{f'-{role}' if role else ''}"
        self._parts: dict[str, list[Part]] = {kind: [] for kind in _KILL_AFTER_SECONDS}
        self._listeners: dict[str, Listener] = {}
        self._valkey: EmbeddedServer | None = None
        self._drain_cut_short = asyncio.Event()
        self._has_terminal = _has_terminal()
        self._hangups = asyncio.Event()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Serve until a signal; the result is the exit status of the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._stop, 0)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As `nohup` starts us.
            loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(self._start(tasks))
            try:
                await self._stopping.wait()
            finally:
                starting.cancel()
                await self._stop_parts()
        return self._status

    def _hang_up(self) -> None:
        """Replace the processes, or stop if SIGHUP was sent because the terminal is closed."""
        if self._has_terminal and not _has_terminal():
            self._stop(0)
            return
        self._hangups.set()

    def _stop(self, status: int) -> None:
        if self._stopping.is_set():
            # A second signal: the drain is cut short.
            self._drain_cut_short.set()
            return
        self._status = status
        self._stopping.set()

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        try:
            await self._start_parts(tasks)
        except (CannotServe, EmbeddedServerError) as error:
            sys.stderr.write(f"reservation: {error}\n")
            self._stop(1)
        except SettingsError as error:
            self._refuse(error)
        else:
            tasks.create_task(self._replace_at_hangups(tasks))
            await self._announce()

    def _refuse(self, error: SettingsError) -> None:
        for line in str(error).splitlines():
            sys.stderr.write(f"reservation: {line}\n")
        self._stop(BAD_SETTING)

    async def _start_parts(self, tasks: asyncio.TaskGroup) -> None:
        self._empty_metrics()
        self._environ["RESERVATION_DATA_DIR"] = str(self._settings.data_dir)
        if "api" in self._roles:
            # The first process that is ready calls `listen`. Until then connections are refused, so
            # that a load balancer uses another machine; a queued connection would wait.
            api_socket = await bind(self._settings.host, self._settings.port)
            self._listeners["api"] = Listener(api_socket)
            self._set_environment(RESERVATION_PORT=str(api_socket.getsockname()[1]))
            if self._settings.internal_port:
                internal = await bind(self._settings.internal_host, self._settings.internal_port)
                self._listeners["internal"] = Listener(internal)
        if self._alone and not self._settings.redis_url:
            self._valkey = EmbeddedServer(self._settings.data_dir, take_over=True)
            self._parts["valkey"].append(self._valkey)
            await self._valkey.start()
            self._set_environment(RESERVATION_REDIS_URL=self._valkey.url)
            tasks.create_task(self._keep_running("valkey", self._valkey, started=True))
        if not await self._is_redis_answered():
            tasks.create_task(self._wait_for_redis())
        if self._settings.database_url:
            from reservation.application.readiness.startup import refuse_unfit_sql  # noqa: PLC0415 - it imports much

            await refuse_unfit_sql(self._settings)
        if self._alone and not self._settings.toss_api_url:
            await self._listen_for_sandbox()
            self._start_child(tasks, "sandbox")
        for role in self._roles:
            count = self._settings.workers if role == "api" else 1
            for _ in range(count):
                self._start_child(tasks, role)

    async def _is_redis_answered(self) -> bool:
        """Whether Redis answered the preflight; refuses one that is unfit for sales."""
        if self._valkey is not None and not (
            self._settings.production or self._settings.redis_trust
        ):
            return True
        from reservation.application.readiness.startup import is_answered  # noqa: PLC0415 - it imports much

        return await is_answered(self._settings)

    async def _wait_for_redis(self) -> None:
        """Poll until Redis answers: no hold is taken before that, so a refusal interrupts none."""
        try:
            while not self._stopping.is_set() and not await self._is_redis_answered():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _REDIS_POLL_SECONDS)
        except SettingsError as error:
            self._refuse(error)

    def _set_environment(self, **found: str) -> None:
        """Take an address found at start-up; children get it by their environment."""
        self._environ |= found
        self._settings = Settings.load(self._environ)

    def _empty_metrics(self) -> None:
        # Metrics of an earlier run's processes would otherwise be added to this run's.
        shutil.rmtree(self._metrics, ignore_errors=True)
        self._metrics.mkdir(mode=0o700, parents=True)
        self._environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._metrics)

    async def _listen_for_sandbox(self) -> None:
        """Bind the sandbox's port here, so that it keeps its address after a restart."""
        # It takes payments without money and has no password: loopback only.
        host = loopback(self._settings.host)
        listening = await listen(host, 0)
        self._listeners["sandbox"] = Listener(listening)
        port = listening.getsockname()[1]
        address = address_of(host, port)
        found = {"RESERVATION_TOSS_API_URL": address}
        if not self._settings.toss_checkout_url:
            found["RESERVATION_TOSS_CHECKOUT_URL"] = f"{address}/checkout"
        self._set_environment(**found)

    def _start_child(self, tasks: asyncio.TaskGroup, role: str) -> None:
        child = self._new_child(role)
        self._parts[role].append(child)
        tasks.create_task(self._keep_running(role, child))

    def _new_child(self, role: str) -> ChildProcess:
        sockets = {
            option: self._listeners[name].socket
            for option, name in (("--fd", role), *_MORE_SOCKETS.get(role, ()))
            if name in self._listeners
        }
        return ChildProcess(role, entry=self._entries[role], environ=self._environ, sockets=sockets)

    async def _replace_at_hangups(self, tasks: asyncio.TaskGroup) -> None:
        """After each SIGHUP, replace the processes of the API and the worker one by one."""
        while await self._happens(self._hangups.wait(), None):
            self._hangups.clear()
            if reason := self._refused_settings():
                log.error("replacement_failed", reason=reason)
                continue
            old = [(role, part) for role in _REPLACED for part in self._parts[role]]
            for role, part in old:
                if not isinstance(part, ChildProcess) or not await self._replace(tasks, role, part):
                    break
            else:
                log.info("processes_replaced", count=len(old))

    async def _happens(self, event: Coroutine[Any, Any, bool], seconds: float | None) -> bool:
        """Whether the event is true in time, and before the service stops."""
        waits = [asyncio.ensure_future(wait) for wait in (event, self._stopping.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return not self._stopping.is_set() and waits[0].done() and waits[0].result()
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _refused_settings(self) -> str:
        """The reason not to start processes with the current settings; empty if there is none."""
        try:
            settings = Settings.load(self._environ)
        except SettingsError as error:
            return str(error)
        changed = [
            name
            for name in _SETTINGS_OF_A_START
            if getattr(settings, name) != getattr(self._settings, name)
        ]
        if changed:
            names = ", ".join(f"{PREFIX}{name.upper()}" for name in changed)
            return f"{names} cannot change without a restart of the service"
        return ""

    async def _failure_to_start(self, new: ChildProcess) -> str:
        """Start a process; return the reason if it does not become ready, otherwise empty."""
        began = time.monotonic()
        try:
            if await self._happens(new.start_until_ready(), _REPLACEMENT_SECONDS_MAX):
                return ""
        except OSError as error:
            return str(error)
        if time.monotonic() - began >= _REPLACEMENT_SECONDS_MAX:
            return f"the new process was not ready within {_REPLACEMENT_SECONDS_MAX:.0f} s"
        return "the new process ended before it was ready"

    async def _replace(self, tasks: asyncio.TaskGroup, role: str, old: ChildProcess) -> bool:
        """Start a process in place of `old`, and end `old` once the new process is ready."""
        parts = self._parts[role]
        new = self._new_child(role)
        parts.append(new)  # Before its start: a stop of the service ends it too.
        if reason := await self._failure_to_start(new):
            if not self._stopping.is_set():
                await new.stop(_KILL_AFTER_SECONDS[role])
                parts.remove(new)
                log.error("replacement_failed", role=role, reason=reason)
            return False
        tasks.create_task(self._keep_running(role, new, started=True))
        old.retired = True
        if role == "api":
            await old.retire()
            await self._happens(_never(), self._settings.drain_seconds)
        if not self._stopping.is_set():
            await old.stop(_KILL_AFTER_SECONDS[role])
            parts.remove(old)
        return True

    async def _keep_running(self, role: str, part: Part, *, started: bool = False) -> None:
        """Restart a part whenever it ends, until shutdown."""
        pause = _PAUSE_SECONDS_MIN
        while not self._stopping.is_set():
            started_at = time.monotonic()
            try:
                if not started:
                    await part.start()
                pid = part.pid
                ended: int | str = await part.wait()
                if pid is not None:
                    self._forget_metrics(pid)
            except EmbeddedServerError as error:
                ended = str(error)
            started = False
            if self._stopping.is_set() or (isinstance(part, ChildProcess) and part.retired):
                return
            if ended == BAD_SETTING:
                self._stop(BAD_SETTING)
                return
            if time.monotonic() - started_at >= _STABLE_SECONDS:
                pause = _PAUSE_SECONDS_MIN
            log.warning("process_ended", role=role, ended=ended, restart_in_seconds=pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            if isinstance(part, ChildProcess) and part.retired:
                return
            pause = min(pause * 2, _PAUSE_SECONDS_MAX)

    def _forget_metrics(self, pid: int) -> None:
        from prometheus_client import multiprocess  # noqa: PLC0415 - only once something ended

        forget = cast("Callable[[int, str], None]", multiprocess.mark_process_dead)  # pyright: ignore[reportUnknownMemberType] - the library has no types
        forget(pid, str(self._metrics))

    async def _stop_parts(self) -> None:
        if not self._stopping.is_set():
            self._stop(1)  # Without a signal, a part of the supervisor failed.
        await self._drain()
        stopped_at = time.monotonic()
        for kind, kill_after_seconds in _KILL_AFTER_SECONDS.items():
            # The ports close before the processes behind them end.
            names = (kind, *(name for _, name in _MORE_SOCKETS.get(kind, ())))
            await asyncio.gather(
                *(self._listeners[name].close() for name in names if name in self._listeners)
            )
            left = stopped_at + kill_after_seconds - time.monotonic()
            await asyncio.gather(*(part.stop(left) for part in self._parts[kind]))

    async def _drain(self) -> None:
        """Serve on, not ready, until the load balancers have noticed."""
        seconds = self._settings.drain_seconds
        children = [part for part in self._parts["api"] if isinstance(part, ChildProcess)]
        if self._status or not seconds or not children:
            return
        log.info("draining", seconds=seconds)
        await asyncio.gather(*(child.drain() for child in children))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drain_cut_short.wait(), seconds)

    async def _announce(self) -> None:
        """Once the API is ready: open the demo sale, and print the addresses."""
        if "api" in self._roles:
            await self._wait_until_ready()
            if self._demo_sale:
                await self._open_demo_sale()
        try:
            sys.stdout.write("".join(f"{line}\n" for line in self._lines()))
            sys.stdout.flush()
        except OSError as error:  # A full disk or a closed pipe: the service continues.
            log.warning("readiness_notice_failed", error=str(error))

    async def _wait_until_ready(self) -> None:
        import httpx  # noqa: PLC0415 - the processes start meanwhile

        address = self._operators_address()
        warn_at = time.monotonic() + _READY_WARNING_SECONDS
        async with httpx.AsyncClient(trust_env=False, timeout=_READY_ANSWER_SECONDS_MAX) as client:
            while True:
                answer = "no answer"
                with contextlib.suppress(httpx.HTTPError):
                    response = await client.get(f"{address}/health/ready")
                    if response.is_success:
                        return
                    answer = response.text
                if time.monotonic() > warn_at:
                    log.warning("service_not_ready", answer=answer)
                    warn_at += _READY_WARNING_SECONDS
                await asyncio.sleep(_READY_POLL_SECONDS)

    def _operators_address(self) -> str:
        """The address of the operators' endpoints, from this machine."""
        settings = self._settings
        if settings.internal_port:
            return address_of(local(settings.internal_host), settings.internal_port)
        return address_of(local(settings.host), settings.port)

    async def _open_demo_sale(self) -> None:
        from api.server.demo_sale import open_demo_sale  # noqa: PLC0415
        from reservation.client.operator import ServiceRefused, ServiceUnreachable  # noqa: PLC0415 - seldom wanted

        address = self._operators_address()
        try:
            await asyncio.to_thread(open_demo_sale, address, self._settings.admin_api_key)
        except (ServiceRefused, ServiceUnreachable) as error:
            sys.stderr.write(f"reservation: no demo sale: {error}\n")

    def _lines(self) -> list[str]:
        """The start-up summary for the terminal, on one screen."""
        settings = self._settings
        if "api" not in self._roles:
            return ["The worker is running; Ctrl-C or SIGTERM stops it."]
        variables = ("RESERVATION_ADMIN_API_KEY", "RESERVATION_ADMIN_API_KEY_FILE")
        given = next((name for name in variables if self._environ.get(name)), None)
        kept = given or f"in {settings.data_dir / 'secrets.json'}"
        lines = [
            "Ready.",
            f"  storefront  {settings.storefront_url or settings.public_url + '/'}",
            f"  API         {settings.internal_url or settings.public_url}/docs",
            f"  admin key   {kept}",
        ]
        if self._valkey is not None:
            lines.append(f"  Redis       redis-cli -s '{self._valkey.socket_path}'")
        if self._parts["sandbox"]:
            lines.append(f"  payments    the sandbox, {settings.toss_api_url}")
        return [*lines, "Ctrl-C or SIGTERM stops the service."]


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _never() -> bool:
    return await asyncio.get_running_loop().create_future()


def serve(
    settings: Settings,
    *,
    environ: Mapping[str, str],
    role: str | None = None,
    demo_sale: bool = False,
    entries: Mapping[str, str] = ENTRIES,
) -> int:
    """Run the service in the foreground until SIGTERM or SIGINT; SIGHUP replaces processes.

    Args:
        settings: parsed from `environ`.
        environ: for the child processes, which also get the addresses found at start-up.
        role: `api` or `worker` runs that alone, with given backing services; None runs all.
        demo_sale: open a demo sale once all is ready.
        entries: the entry point of each role (`api.server.entrypoints`).

    Raises:
        AlreadyRunning: another one works on the same data directory.
        SettingsError: a role alone needs settings that are not given.
    """
    if role is not None:
        _refuse_embedded(settings)
        require_given_secrets(environ)
    logs.configure(production=settings.production)
    for warning in settings.warnings:
        log.warning("setting_unsafe", reason=warning)
    open_files.raise_limit()
    with alone_in(settings.data_dir, f"lock{f'-{role}' if role else ''}"):
        supervisor = Supervisor(
            settings, environ=environ, role=role, entries=entries, demo_sale=demo_sale
        )
        return asyncio.run(supervisor.run())


def _refuse_embedded(settings: Settings) -> None:
    if not settings.redis_url:
        raise SettingsError("RESERVATION_REDIS_URL must be given with --role")
    if not settings.toss_api_url:
        raise SettingsError("RESERVATION_TOSS_API_URL must be given with --role")
