"""Two services on one Redis and one PostgreSQL: a released version and the working tree.

Each of the two deployments runs an API and a worker of one version, and alternates its version at
each start. The versions run side by side and alone, and the installation goes forward and back.
"""

import asyncio
import random
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from reservation.config.settings import Settings
from tests.faults.chaos.environment import HTTP_SECONDS, Stage
from tests.support.databases import running_postgres
from tests.support.programs import end
from tests.support.service import STOP_SECONDS, Served, eventually, free_port, running_service

__all__ = ["ReleaseStage", "checked_out", "commit_of"]

ROOT = Path(__file__).resolve().parents[3]
SECRET = "chaos-" * 6
SECRETS = ("ADMIN_API_KEY", "SIGNING_KEYS", "ORDER_ID_KEY", "JWT_SECRET")
GIT_SECONDS_MAX = 60
RAISE_SECONDS_MAX = 120.0
#: API and worker of the release.
ROLES_WITH_SQL = 2
_RELEASE, _TREE = "the release", "the working tree"
#: The error of Alembic in the release, whose migrations lack the number.
_NOT_FOUND = "Can't locate revision"


def commit_of(version: str) -> str:
    """The commit of a released version; `latest` is the newest release."""
    releases = tomllib.loads((ROOT / "releases.toml").read_text())["release"]
    commits = {one["version"]: one["commit"] for one in releases}
    return commits[releases[-1]["version"] if version == "latest" else version]


def checked_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in this folder.

    Raises:
        RuntimeError: the clone lacks the commit. A run without it would prove nothing.
    """
    packed = subprocess.run(
        ["git", "archive", "--format=tar", commit],
        cwd=ROOT,
        capture_output=True,
        timeout=GIT_SECONDS_MAX,
        check=False,
    )
    if packed.returncode:
        raise RuntimeError(
            f"the commit {commit} of releases.toml is not in this clone, which needs the full "
            f"history (git fetch --unshallow): {packed.stderr.decode(errors='replace').strip()}"
        )
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


class Deployment:
    """One of the two services: it keeps its port and directory, and changes its version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = str(free_port())
        self.running: AbstractContextManager[Served] | None = None
        self.served: Served | None = None
        self.version = ""


class ReleaseStage(Stage):
    """The stage with two deployments, PostgreSQL and a sandbox of its own."""

    def __init__(self, folder: Path, commit: str, chance: random.Random) -> None:
        super().__init__(folder)
        self._chance = random.Random(chance.getrandbits(64))
        self._sources = {
            _RELEASE: checked_out(commit, folder / "release"),
            _TREE: ROOT,
        }
        self._stack = ExitStack()
        self._deployments = [Deployment(folder / f"service-{number}") for number in range(2)]
        self._down: Deployment | None = None
        self._database_url = ""

    @property
    def served(self) -> Served:
        served = next(each.served for each in self._deployments if each.served is not None)
        assert served is not None
        return served

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{each.port}" for each in self._deployments)

    @property
    def settings(self) -> Settings:
        return msgspec.structs.replace(self.served.settings, redis_url=self.server.url)

    @property
    def environ(self) -> dict[str, str]:
        return self._environ(self.server.url) | {
            "RESERVATION_DATA_DIR": str(self.folder / "reader"),
            "RESERVATION_PORT": self._deployments[0].port,
        }

    def _environ(self, redis_url: str) -> dict[str, str]:
        return {f"RESERVATION_{name}": SECRET for name in SECRETS} | {
            "RESERVATION_REDIS_URL": redis_url,
            "RESERVATION_DATABASE_URL": self._database_url,
            "RESERVATION_TOSS_API_URL": self.pg_url,
            "RESERVATION_TOSS_CHECKOUT_URL": f"{self.pg_url}/checkout",
        }

    async def start_service(self) -> str:
        """Start the deployment that is down with the other version; the first call starts both."""
        if self._down is None:
            await asyncio.to_thread(self._start_stores)
            for deployment, version in zip(self._deployments, self._sources, strict=True):
                await self._deploy(deployment, version)
            return "started"
        deployment, self._down = self._down, None
        before = deployment.version
        version = _TREE if before == _RELEASE else _RELEASE
        await self._deploy(deployment, version)
        return f"started: {before}, then {version}"

    def _start_stores(self) -> None:
        self._database_url = self._stack.enter_context(running_postgres()).make_database()
        self.pg_url = self._stack.enter_context(
            _sandbox(self.folder / "sandbox", self._deployments[0].port)
        )

    async def _deploy(self, deployment: Deployment, version: str) -> None:
        source = self._sources[version]
        deployment.version = version
        deployment.running = running_service(
            deployment.folder,
            source=None if source == ROOT else source,
            settings={
                **self._environ(self.link.url),
                "RESERVATION_PORT": deployment.port,
                "RESERVATION_WORKERS": "1",
            },
        )
        deployment.served = await asyncio.to_thread(deployment.running.__enter__)

    async def stop_service(self, *, kill: bool = False) -> None:
        """End one deployment, by SIGTERM or by SIGKILL of its supervisor."""
        self._down = self._chance.choice(self._deployments)
        await self._end(self._down, kill=kill)

    async def _end(self, deployment: Deployment, *, kill: bool) -> None:
        if deployment.running is None or deployment.served is None:
            return
        if kill:
            deployment.served.process.kill()
        running, deployment.running = deployment.running, None
        deployment.served = None
        await asyncio.to_thread(running.__exit__, None, None, None)

    async def raise_level(self) -> None:
        """Replace the release by the working tree, and raise the level once no heartbeat is left.

        Raises:
            AssertionError: the level was not raised, or the release starts afterwards.
        """
        for deployment in self._deployments:
            if deployment.version != _TREE:
                await self._end(deployment, kill=False)
                await self._deploy(deployment, _TREE)
        give_up_at = time.monotonic() + RAISE_SECONDS_MAX
        while (raised := await asyncio.to_thread(self._migrate)).returncode:
            # The heartbeats of the processes that have ended expire after 30 s.
            assert time.monotonic() < give_up_at, raised.stderr
            await asyncio.sleep(1)
        await asyncio.to_thread(self._refuses_the_release)

    def _migrate(self) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "api.cli", "migrate", "--level"],
            env={"PATH": "/usr/bin:/bin", **self.environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=RAISE_SECONDS_MAX,
            check=False,
        )

    def _refuses_the_release(self) -> None:
        """The release fails at the schema number in every process, and serves no request."""
        folder = self.folder / "too-old"
        folder.mkdir()
        port = free_port()
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "serve"],
                env={
                    "PATH": "/usr/bin:/bin",
                    "PYTHONPATH": str(self._sources[_RELEASE]),
                    **self._environ(self.link.url),
                    "RESERVATION_DATA_DIR": str(folder),
                    "RESERVATION_PORT": str(port),
                    "RESERVATION_WORKERS": "1",
                },
                cwd=self._sources[_RELEASE],
                stdout=log,
                stderr=log,
            )
        try:
            eventually(
                lambda: (folder / "log").read_text(errors="replace"),
                lambda text: text.count(_NOT_FOUND) >= ROLES_WITH_SQL,
                within=RAISE_SECONDS_MAX,
            )
            with suppress(httpx.HTTPError):
                answer = httpx.get(f"http://127.0.0.1:{port}/v1/sales", trust_env=False)
                raise AssertionError(f"the release answers {answer.status_code} above its level")
        finally:
            end(process, within=STOP_SECONDS)

    async def stop(self) -> None:
        for deployment in self._deployments:
            await self._end(deployment, kill=False)
        await asyncio.to_thread(self._stack.close)
        await self.link.stop()
        await self.server.stop()

    def parts(self, role: str) -> list[psutil.Process]:
        """Processes of this role in both deployments; the sandbox is not among them."""
        found: list[psutil.Process] = []
        for deployment in self._deployments:
            if deployment.served is None:
                continue
            with suppress(psutil.NoSuchProcess):
                found += [
                    child
                    for child in psutil.Process(deployment.served.process.pid).children()
                    if role in child.cmdline()
                ]
        return found

    async def operate(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A call with the operator's key, to either of the two."""
        headers = {"Authorization": f"Bearer {SECRET}", "X-Operator": "chaos"}
        async with httpx.AsyncClient(
            base_url=self._chance.choice(self.urls), timeout=HTTP_SECONDS, trust_env=False
        ) as client:
            headers |= more.pop("headers", {})
            return await client.request(method, path, headers=headers, **more)


@contextmanager
def _sandbox(folder: Path, port_of_webhooks: str) -> Iterator[str]:
    """The stand-in PG of the working tree, alone; its address."""
    folder.mkdir()
    port = free_port()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "sandbox", "--port", str(port)],
            env={
                "PATH": "/usr/bin:/bin",
                "RESERVATION_DATA_DIR": str(folder),
                "RESERVATION_PORT": port_of_webhooks,
            },
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{url}/_ledger", trust_env=False).is_success
        return False

    try:
        eventually(answers, bool)
        yield url
    finally:
        end(process, within=STOP_SECONDS)
