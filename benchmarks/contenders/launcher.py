"""Contenders: starts and ends each server of the comparison, with its own Valkey."""

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import httpx
import msgspec
import psutil
import redis

from benchmarks.contenders import golang
from benchmarks.support import sale
from benchmarks.support.cpu import role_of
from benchmarks.support.many_sales import fill
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.scripts import load
from reservation.config.settings import Settings

__all__ = [
    "ADMIN_API_KEY",
    "BUYERS_SECRET",
    "CONTENDERS",
    "Contender",
    "Running",
    "Variant",
    "free_port",
    "own_environ",
    "running",
    "served",
]

#: Signs the buyers' tokens; the service verifies them with it.
BUYERS_SECRET: Final = "the-buyers-of-the-benchmark-are-nobody-elses"  # noqa: S105 - made-up buyers

ADMIN_API_KEY: Final = "benchmark-operator"

_HERE: Final = Path(__file__).resolve().parent
_NGINX_MODULES: Final = Path("/usr/lib/nginx/modules")
_GIN_PACKAGES: Final = ("github.com/gin-gonic/gin", "github.com/gomodule/redigo")
_NGINX_REDIS: Final = Path("/usr/share/lua/5.1/nginx/redis.lua")

#: From <sys/prctl.h>.
_PR_SET_PDEATHSIG: Final = 1

#: As the service calls its own, in its data directory.
_DATABASE: Final = "orders.sqlite3"

#: A start with migrations, on a busy machine.
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.05
#: Longer than any call waits once the load has ended.
_SETTLE_SECONDS: Final = 0.3
#: Time-out of npm's first install.
_INSTALL_SECONDS: Final = 300.0


class Variant(msgspec.Struct, frozen=True):
    """How a contender is started, where it can be started differently."""

    #: The events of its holds are written to SQL: by our own worker, or by the contenders' one.
    write_behind: bool = False
    #: API processes of ours.
    workers: int = 1
    #: Open sales besides the one of the comparison.
    others: int = 0


_PLAIN: Final = Variant()


class Running:
    """A running server, with the usage of it, of its write-behind and of its Valkey."""

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[bytes],
        valkey: EmbeddedServer,
        behind: subprocess.Popen[bytes] | None,
        database: Path,
    ) -> None:
        self.url = url
        #: The write-behind's database: our own, or the contenders'.
        self.database = database
        self._process = psutil.Process(process.pid)
        self._behind = None if behind is None else psutil.Process(behind.pid)
        if valkey.pid is None:
            raise RuntimeError("the Valkey server has ended")
        self._valkey = psutil.Process(valkey.pid)
        self.socket_path = valkey.socket_path
        self.redis = redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True)

    def held(self) -> int:
        """Units that are held, by Redis' own count, once no request is in flight."""
        count, seen = -1, self._held()
        while count != seen:
            time.sleep(_SETTLE_SECONDS)
            count, seen = seen, self._held()
        return seen

    def _held(self) -> int:
        return int(str(self.redis.hget(Keys().of(sale.SALE_ID).stock(sale.SKU), "held") or 0))

    def server_seconds(self) -> float:
        """CPU time of the server and of every process it started, without its worker."""
        return sum(
            _cpu_seconds(one)
            for one in (self._process, *self._process.children(recursive=True))
            if not _is_worker(one)
        )

    def behind_seconds(self) -> float:
        """CPU time of the write-behind: our worker's, or the other process'."""
        if self._behind is not None:
            return _cpu_seconds(self._behind)
        return sum(map(_cpu_seconds, filter(_is_worker, self._process.children(recursive=True))))

    def valkey_seconds(self) -> float:
        """CPU time of the Valkey server."""
        return _cpu_seconds(self._valkey)


class Start(msgspec.Struct, frozen=True):
    """Parameters of a server's start."""

    port: int
    home: Path
    valkey: EmbeddedServer
    stock: int
    variant: Variant


class Contender(msgspec.Struct, frozen=True):
    """One server of the comparison."""

    name: str
    label: str
    #: Why it cannot run here, or nothing.
    missing: Callable[[], str | None]
    #: The command and its environment.
    command: Callable[[Start], tuple[list[str], dict[str, str]]]
    #: Whether it takes holds at all.
    holds: bool = True
    #: Whether it serves more than the sale of the comparison.
    many_sales: bool = False


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return role_of(process.cmdline()) == "worker"
    return False


def _present() -> None:
    return None


def _ours(start: Start) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "api.cli", "serve"]
    environ = _service_environ(start)
    if start.variant.others:
        (start.home / "service").mkdir()
        _fill(start, Settings.load(environ, None))
    return command if start.variant.write_behind else [*command, "--role", "api"], environ


def _fill(start: Start, settings: Settings) -> None:
    asyncio.run(fill(settings, start.variant.others, stock=start.stock))


def _service_environ(start: Start) -> dict[str, str]:
    return own_environ(start.home / "service", start.port) | {
        "RESERVATION_REDIS_URL": start.valkey.url,
        # No payment happens here: an address that refuses.
        "RESERVATION_TOSS_API_URL": "http://127.0.0.1:9",
        "RESERVATION_WORKERS": str(start.variant.workers),
    }


def own_environ(data_dir: Path, port: int) -> dict[str, str]:
    """The service's settings, one process of it, with the benchmark's buyers."""
    return {
        "RESERVATION_DATA_DIR": str(data_dir),
        "RESERVATION_PORT": str(port),
        "RESERVATION_WORKERS": "1",
        "RESERVATION_AUTH": "jwt",
        "RESERVATION_JWT_SECRET": BUYERS_SECRET,
        "RESERVATION_ADMIN_API_KEY": ADMIN_API_KEY,
        "RESERVATION_SIGNING_KEYS": "benchmark-signing-key-of-32-bytes",
        "RESERVATION_ORDER_ID_KEY": "benchmark-order-id-key-of-32-bytes",
    }


def _python(module: str, *arguments: str) -> Callable[[Start], tuple[list[str], dict[str, str]]]:
    def command(start: Start) -> tuple[list[str], dict[str, str]]:
        return [
            sys.executable,
            "-m",
            f"benchmarks.contenders.{module}",
            *arguments,
        ], _plain_environ(start)

    return command


def _plain_environ(start: Start) -> dict[str, str]:
    """The sale's settings for a contender; the sale is made here."""
    (start.home / "service").mkdir()
    settings = Settings.load(_service_environ(start), None)
    if start.variant.others:
        _fill(start, settings)
    else:
        asyncio.run(sale.put_directly(settings, start.stock))
    socket_path = str(start.valkey.socket_path)
    with redis.Redis(unix_socket_path=socket_path, decode_responses=True) as client:
        epoch = str(client.hget(Keys().of(sale.SALE_ID).sale, "epoch"))
    script = start.home / "prepare.lua"
    script.write_text(load("prepare").source)
    return {
        "BENCH_PORT": str(start.port),
        "BENCH_SOCKET": str(start.valkey.socket_path),
        "BENCH_EPOCH": epoch,
        "BENCH_SCRIPT": str(script),
    }


def _node_missing() -> str | None:
    absent = [program for program in ("node", "npm") if shutil.which(program) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def _fastify(start: Start) -> tuple[list[str], dict[str, str]]:
    folder = _install_node_packages(start.home.parent / "node")
    return ["node", str(folder / "server.js")], _plain_environ(start)


def _install_node_packages(folder: Path) -> Path:
    """Install next to the run's own files, so that the tree stays clean; once for each lock."""
    folder.mkdir(parents=True, exist_ok=True)
    source = _HERE / "fastify"
    installed = folder / "installed.json"
    lock = (source / "package-lock.json").read_bytes()
    for name in ("package.json", "package-lock.json", "server.js"):
        shutil.copy(source / name, folder)
    if not installed.exists() or installed.read_bytes() != lock:
        command = ["npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, timeout=_INSTALL_SECONDS
        )
        installed.write_bytes(lock)
    return folder


def _nginx_missing() -> str | None:
    needed = {
        "nginx-light": shutil.which("nginx") is not None,
        "libnginx-mod-http-lua": (_NGINX_MODULES / "ngx_http_lua_module.so").exists(),
        "lua-nginx-redis": _NGINX_REDIS.exists(),
        "lua-cjson": any(Path("/usr/lib").glob("*/lua/5.1/cjson.so")),
    }
    absent = [name for name, there in needed.items() if not there]
    return f"Debian's {', '.join(absent)} not installed" if absent else None


def _nginx(start: Start) -> tuple[list[str], dict[str, str]]:
    text = (_HERE / "nginx" / "nginx.conf").read_text()
    names = {
        "MODULES": _NGINX_MODULES,
        "HOME": start.home,
        "HERE": _HERE / "nginx",
        "PORT": start.port,
    }
    for name, value in names.items():
        text = text.replace(f"@{name}@", str(value))
    configuration = start.home / "nginx.conf"
    configuration.write_text(text)
    command = ["nginx", "-p", str(start.home), "-c", str(configuration)]
    return [*command, "-e", str(start.home / "nginx.log")], _plain_environ(start)


def _gin_missing() -> str | None:
    absent = golang.missing(_GIN_PACKAGES)
    return f"Debian's {', '.join(absent)} not installed" if absent else None


def _gin(start: Start) -> tuple[list[str], dict[str, str]]:
    program = golang.build(_HERE / "gin", start.home.parent / "go" / "gin")
    return [str(program)], _plain_environ(start) | {"GIN_MODE": "release"}


CONTENDERS: Final = (
    Contender("ours", "this service", _present, _ours, many_sales=True),
    Contender("usual", "(a) Litestar + redis-py", _present, _python("usual")),
    Contender("fastify", "(b) fastify + ioredis", _node_missing, _fastify),
    Contender("nginx", "(c) nginx + LuaJIT", _nginx_missing, _nginx),
    Contender("gin", "(e) gin + redigo", _gin_missing, _gin, many_sales=True),
    Contender("asgi", "(d) our server, no work", _present, _python("floor", "--asgi"), holds=False),
    Contender("floor", "    the same, by the short way", _present, _python("floor"), holds=False),
)


@contextmanager
def running(
    contender: Contender, home: Path, *, stock: int, variant: Variant = _PLAIN
) -> Generator[Running]:
    """The server with an open sale of that many units, and a Valkey that keeps every write.

    Args:
        contender: which one.
        home: its own folder; it is emptied first.
        stock: units of the one item.
        variant: with a write-behind, or with more processes or sales.
    """
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    valkey = EmbeddedServer(home / "redis")
    asyncio.run(valkey.start())
    try:
        start = Start(free_port(), home, valkey, stock, variant)
        command, environ = contender.command(start)
        with (
            served(command, environ, home, start.port) as process,
            _written_behind(contender, start) as behind,
        ):
            database = home / "service" if contender.name == "ours" else home
            running = Running(
                f"http://127.0.0.1:{start.port}", process, valkey, behind, database / _DATABASE
            )
            if contender.name == "ours" and not variant.others:
                sale.put_over_http(running.url, ADMIN_API_KEY, stock)
            yield running
            running.redis.close()
    finally:
        asyncio.run(valkey.stop())
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _written_behind(
    contender: Contender, start: Start
) -> Generator[subprocess.Popen[bytes] | None]:
    """The contenders' write-behind; ours is a part of the service."""
    if not start.variant.write_behind or contender.name == "ours":
        yield None
        return
    environ = {
        "BENCH_SOCKET": str(start.valkey.socket_path),
        "BENCH_DATABASE": str(start.home / _DATABASE),
    }
    command = [sys.executable, "-m", "benchmarks.contenders.write_behind"]
    log = start.home / "behind.log"
    with _process(command, environ, log, _HERE.parents[1]) as process:
        try:
            yield process
        finally:
            if process.poll() is not None:
                raise RuntimeError(
                    f"the write-behind has ended: {log.read_text(errors='replace')[-2000:]}"
                )


@contextmanager
def served(
    command: list[str],
    environ: dict[str, str],
    home: Path,
    port: int,
    *,
    folder: Path = _HERE.parents[1],
) -> Generator[subprocess.Popen[bytes]]:
    """A server's process once it answers on the port; ended by its own handle.

    Args:
        command: starts it.
        environ: its settings, added to the environment without any of the service's.
        home: where its log goes.
        port: where it answers.
        folder: its working directory.
    """
    with _process(command, environ, home / "server.log", folder) as process:
        _wait_until_it_answers(process, port, home / "server.log")
        yield process


@contextmanager
def _process(
    command: list[str], environ: dict[str, str], log_path: Path, folder: Path
) -> Generator[subprocess.Popen[bytes]]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith("RESERVATION_")}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=kept | environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C in the terminal is for the benchmark, which ends its servers itself.
            process_group=0,
            preexec_fn=_end_with_benchmark,  # noqa: PLW1509 - one call into the kernel
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_benchmark() -> None:
    """A benchmark that is killed leaves no server behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_at = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        # The port may not be open yet: retry after the pause.
        with suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health/live", trust_env=False)
            return
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
