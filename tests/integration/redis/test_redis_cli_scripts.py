"""The operators' scripts and users, on a real server."""

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from reservation.adapters.redis.embedded.files import find_binary
from tests.support.in_process import Bench, bench
from tests.support.service import eventually

ROOT = Path(__file__).resolve().parents[3]
OPS = ROOT / "scripts" / "lua" / "ops"
ACL = ROOT / "deploy" / "valkey-users.acl"


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[str]:
    """A server with the shipped configuration and the shipped users."""
    with tempfile.TemporaryDirectory(prefix="rsv-") as folder:
        path = f"{folder}/valkey.sock"
        config = ROOT / "deploy" / "valkey.conf"
        process = subprocess.Popen(
            [find_binary(), config, "--port", "0", "--unixsocket", path, "--aclfile", ACL],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        try:
            with user(path, "sre") as client:
                eventually(lambda: answers(client), bool, within=10)
            yield path
        finally:
            process.terminate()
            process.wait(10)


def user(path: str, name: str) -> redis.Redis:
    password = {
        "sre": "change-this-operator-password",
        "reservation": "change-this-service-password",
    }[name]
    return redis.Redis(
        unix_socket_path=path, username=name, password=password, decode_responses=True
    )


@pytest.fixture
async def here(tmp_path: Path, socket_path: str) -> AsyncIterator[Bench]:
    url = f"unix://reservation:change-this-service-password@{socket_path}"
    async with bench(tmp_path / "sql", url) as made:
        yield made


def run(path: str, script: str, key: str, *args: str) -> list[str]:
    """`redis-cli --eval` as the read-only user, or an equivalent if it is not installed."""
    program = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if program is not None:
        command = [program, "-s", path, "--user", "sre", "--no-auth-warning"]
        command += ["-a", "change-this-operator-password", "--eval", str(OPS / f"{script}.lua")]
        done = subprocess.run(
            [*command, key, ",", *args], capture_output=True, text=True, timeout=150, check=True
        )
        return done.stdout.splitlines()
    with user(path, "sre") as client:
        found = client.eval((OPS / f"{script}.lua").read_text(), 1, key, *args)
    assert isinstance(found, list)
    return found


async def test_the_service_works_with_its_acl_user(here: Bench) -> None:
    assert (await here.service.readiness.check()).missing == ()
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.finish(order, (await here.claim(order)).fence)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    command = here.service.connections.command
    await command("DEL", here.service.keys.of(sale_id).sale)
    await here.service.rebuild.run(sale_id, operator="op")
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


@pytest.mark.parametrize("name", ["reservation", "sre"])
@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "SET", "appendfsync", "no"),
        ("SHUTDOWN",),
        ("SCRIPT", "FLUSH"),
        ("MONITOR",),
        ("GET", "foreign"),
        ("ACL", "LIST"),
    ],
)
def test_unneeded_commands_are_denied_to_the_service(
    socket_path: str, name: str, command: tuple[str, ...]
) -> None:
    with user(socket_path, name) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command)


def test_the_operators_acl_user_cannot_write(socket_path: str) -> None:
    with user(socket_path, "sre") as client:
        with pytest.raises(NoPermissionError):
            client.hset("rsv:{s}:sale", "seq", "0")
        with pytest.raises(redis.ResponseError):
            client.eval("return redis.call('SET', KEYS[1], '1')", 1, "rsv:{s}:x")


@pytest.mark.slow
def test_connections_without_a_user_are_refused(socket_path: str) -> None:
    with (
        redis.Redis(unix_socket_path=socket_path) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


async def test_the_ops_scripts_show_the_state_of_a_sale(here: Bench, socket_path: str) -> None:
    sale_id = await here.sale()
    first = await here.hold(sale_id, "ann")
    await here.hold(sale_id, "ann")
    paying = await here.hold(sale_id, "bob")
    await here.claim(paying, "key-secret-9876")
    names = here.service.keys.of(sale_id)

    stock = run(socket_path, "stock", names.sale)
    assert stock[0].startswith("open seq=5 epoch=")
    assert stock[1:] == ["a total=100 available=97 held=3 sold=0"]
    assert run(socket_path, "holders", names.sale, "a", "10") == ["ann 2", "bob 1"]
    order = run(socket_path, "order", names.order(paying.order_id))
    assert "payment_key=...9876" in order
    assert "status=CONFIRMING" in order
    assert order[-1].startswith("in confirming until ")
    assert not any("secret" in line for line in order)
    await here.service.connections.command("ZADD", names.deadlines, 1, first.order_id)
    due = run(socket_path, "due", names.deadlines, "1")
    assert due[1].startswith(first.order_id)
    assert run(socket_path, "audit", names.sale) == [
        "seq=5 outbox=5 deadlines=2 confirming=1 deposits=0"
    ]


async def test_the_audit_script_lists_the_problems(here: Bench, socket_path: str) -> None:
    sale_id = await here.sale()
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("HSET", names.stock("a"), "held", 7)
    await here.service.connections.command("HSET", names.sale, "seq", 9)
    output = run(socket_path, "audit", names.sale)
    assert output[:2] == [
        "PROBLEM: the outbox ends at 1-0, the sale at 9",
        "PROBLEM: a does not add up",
    ]
    assert "no such sale" in run(socket_path, "audit", "rsv:{none}:sale")[0]


def test_each_script_has_its_line_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    for script in sorted(OPS.glob("*.lua")):
        (line,) = [
            line.strip()
            for line in script.read_text().splitlines()
            if line.startswith("  redis-cli --eval ")
        ]
        assert line in runbook
