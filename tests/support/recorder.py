"""Recorder of the answers to a test's clients and of the sale's head, for the history checker."""

import os
import subprocess
import sys
import threading
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import redis

from loadtests.recording import Call, Heads, operation_of, write_history
from reservation.domain.ids import sale_of
from reservation.verification.model.history_format import Head, Operation
from tests.support.service import Served, eventually

#: Often enough that a call of some milliseconds is between two polls.
OBSERVE_SECONDS = 0.02
#: A failed poll is retried: the server may be down on purpose.
AGAIN_SECONDS = 0.1


class Recorder(httpx.BaseTransport):
    """Replaces a client's transport, and keeps each call of one sale."""

    def __init__(self, served: Served, sale_id: str) -> None:
        self.sale_id = sale_id
        self.calls: list[Operation] = []
        self.heads: list[Head] = []
        #: The PG's address, known from the first hold.
        self.sandbox_url = ""
        self._served = served
        self._transport = httpx.HTTPTransport()
        self._ended = threading.Event()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass it on; an answer that never comes is recorded as an unknown outcome."""
        invoked_ns = time.monotonic_ns()
        try:
            response = self._transport.handle_request(request)
            response.read()
        except httpx.TransportError:
            self._keep(request, None, invoked_ns)
            raise
        self._keep(request, response, invoked_ns)
        return response

    def _keep(
        self, request: httpx.Request, response: httpx.Response | None, invoked_ns: int
    ) -> None:
        answered_ns = time.monotonic_ns()
        answer = members_of(response)
        if checkout := answer.get("payment", {}).get("checkoutUrl"):
            self.sandbox_url = checkout.removesuffix("/checkout")
        call = operation_of(
            Call(
                sale=self.sale_id,
                client=threading.current_thread().name,
                buyer=buyer_of(request),
                method=request.method,
                url=str(request.url),
                body=msgspec.json.decode(request.content) if request.content else None,
                invoked_ns=invoked_ns,
                answered_ns=answered_ns if response is not None else None,
                status=response.status_code if response is not None else 0,
                answer=answer,
                replayed=response is not None and "idempotent-replayed" in response.headers,
            )
        )
        if call is not None:
            self.calls.append(call)

    def watch(self) -> None:
        """Poll the head until the end."""
        skus = [row["sku"] for row in self._served.document(self.sale_id)["items"]]
        heads = Heads(self._served.settings, self.sale_id, skus)
        while not self._ended.is_set():
            try:
                self.heads.append(heads.observe())
                self._ended.wait(OBSERVE_SECONDS)
            except redis.RedisError:
                self._ended.wait(AGAIN_SECONDS)
        heads.close()

    def end(self) -> None:
        """The clients have gone."""
        self._ended.set()
        self._transport.close()

    def ledger(self) -> list[dict[str, Any]]:
        """The PG's ledger of the sale."""
        answer = httpx.get(f"{self.sandbox_url}/_ledger", timeout=30, trust_env=False)
        entries = answer.raise_for_status().json()["entries"]
        return [entry for entry in entries if sale_of(entry["orderId"]) == self.sale_id]

    def write(self, path: Path) -> None:
        """The whole history, once SQL has every event."""
        audit = f"/v1/admin/sales/{self.sale_id}/audit"
        served = self._served
        eventually(
            lambda: served.http.get(audit, headers=served.admin).json(),
            lambda found: found.get("lag") == 0,
        )
        past = subprocess.run(
            [sys.executable, "-m", "api.cli", "history", self.sale_id],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")},
                "RESERVATION_DATA_DIR": str(served.settings.data_dir),
                "RESERVATION_DATABASE_URL": served.settings.database_url,
            },
            capture_output=True,
            timeout=150,
            check=False,
        )
        assert past.returncode == 0, past.stderr
        write_history(
            path, calls=[*self.calls, *self.heads], past=past.stdout, entries=self.ledger()
        )


@contextmanager
def recording(served: Served, sale_id: str) -> Iterator[Recorder]:
    """Record every answer to this service's client about the sale."""
    recorder, before = Recorder(served, sale_id), served.http
    served.http = httpx.Client(base_url=served.url, timeout=30, trust_env=False, transport=recorder)
    watcher = threading.Thread(target=recorder.watch)
    watcher.start()
    try:
        yield recorder
    finally:
        recorder.end()
        watcher.join()
        served.http = before


def buyer_of(request: httpx.Request) -> str:
    """Whom the bearer token names."""
    _, _, token = request.headers.get("authorization", "").partition(" ")
    if token.count(".") != 2:
        return ""
    payload = token.split(".")[1]
    return msgspec.json.decode(urlsafe_b64decode(payload + "=" * (-len(payload) % 4))).get(
        "sub", ""
    )


def members_of(response: httpx.Response | None) -> dict[str, Any]:
    """The members of an answer that is an object."""
    if response is None or "json" not in response.headers.get("content-type", ""):
        return {}
    found = response.json()
    return found if isinstance(found, dict) else {}
