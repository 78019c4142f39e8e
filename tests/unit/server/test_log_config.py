"""Logging: both formats, and the values that are never logged."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from api.server import log_config as logs

SECRET = "s3cr3t-0123456789abcdef"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def written(stream: io.StringIO, **fields: object) -> dict[str, object]:
    logs.configure(production=True, stream=stream)
    structlog.get_logger("test").info("something_happened", **fields)
    return json.loads(stream.getvalue())


def test_production_logs_one_json_object_per_line(stream: io.StringIO) -> None:
    line = written(stream, order_id="s-1", count=3, when=None)
    assert line.pop("timestamp").endswith("Z")  # type: ignore[attr-defined]
    assert line == {
        "event": "something_happened",
        "level": "info",
        "order_id": "s-1",
        "count": 3,
        "when": None,
    }
    assert stream.getvalue().count("\n") == 1


def test_development_logs_plain_text_without_a_terminal(stream: io.StringIO) -> None:
    logs.configure(production=False, stream=stream)
    structlog.get_logger("test").info("something_happened", order_id="s-1")
    assert "something_happened" in stream.getvalue()
    assert "order_id=s-1" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "Authorization",
        "X-Reservation-Token",
        "reservation_token",
        "secret",
        "jwt_secret",
        "toss_secret_key",
        "admin_api_key",
        "signingKeys",
        "Idempotency-Key",
        "password",
        "Set-Cookie",
        "X-Sale-Admission",
    ],
)
def test_a_secret_field_is_redacted_by_its_name(stream: io.StringIO, name: str) -> None:
    written(stream, **{name: SECRET, "nested": [{name: SECRET}, {"in": {name: (SECRET,)}}]})
    assert SECRET not in stream.getvalue()
    assert "0123456789" not in stream.getvalue()


@pytest.mark.parametrize("name", ["payment_key", "paymentKey", "toss_payment_key"])
def test_a_payment_key_shows_its_last_four_characters(stream: io.StringIO, name: str) -> None:
    assert written(stream, **{name: "tgen_20261123abcdWXYZ"})[name] == "...WXYZ"


def test_a_short_payment_key_is_redacted_completely(stream: io.StringIO) -> None:
    assert written(stream, payment_key="abcd")["payment_key"] == "[hidden]"


@pytest.mark.parametrize(
    "text",
    [
        f"GET /v1/payments/toss/success?token={SECRET}&orderId=s-1",
        f"http://h/x?a=1&returnToken={SECRET}#f",
        f"Authorization: Bearer {SECRET}",
        f"authorization=basic {SECRET}",
        f"redis://user:{SECRET}@h:6379/0",
        f"postgresql://:{SECRET}@h/db",
        "key live_gsk_s3cr3t0123456789abcdef refused",
    ],
)
def test_a_secret_inside_text_is_redacted(stream: io.StringIO, text: str) -> None:
    written(stream, url=text, nested={"detail": text.encode()})
    assert "0123456789" not in stream.getvalue()


def test_a_payment_key_in_a_url_shows_its_last_four_characters(stream: io.StringIO) -> None:
    line = written(stream, url="/success?paymentKey=tgen_20261123abcdWXYZ&amount=1000")
    assert line["url"] == "/success?paymentKey=...WXYZ&amount=1000"


def test_a_traceback_is_logged_without_secrets(stream: io.StringIO) -> None:
    logs.configure(production=True, stream=stream)
    try:
        raise ConnectionError(f"redis://user:{SECRET}@h")
    except ConnectionError:
        structlog.get_logger("test").exception("broke")
    assert "ConnectionError" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_library_logs_have_the_same_format(stream: io.StringIO) -> None:
    logs.configure(production=True, stream=stream)
    logging.getLogger("some.library").warning("went to %s", f"http://h?token={SECRET}")
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"]) == ("warning", "some.library")
    assert SECRET not in line["event"]


def test_urls_requested_by_the_http_client_are_not_logged(stream: io.StringIO) -> None:
    logs.configure(production=True, stream=stream)
    logging.getLogger("httpx").info("HTTP Request: GET /v1/payments/KEY")
    assert stream.getvalue() == ""


def test_values_of_any_kind_can_be_logged(stream: io.StringIO) -> None:
    deep: list[object] = []
    for _ in range(50):
        deep = [deep]
    line = written(stream, error=ValueError("x"), many={1, 2}, deep=deep, raw=b"\xff")
    assert line["error"] == "ValueError('x')"
    assert sorted(line["many"]) == [1, 2]  # type: ignore[arg-type]


def test_logs_go_to_stderr_and_not_to_stdout() -> None:
    program = (
        "import structlog; from api.server import log_config;"
        "log_config.configure(production=True);"
        "structlog.get_logger().info('told')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stdout == b""
    assert b'"told"' in ran.stderr


class Disk(io.StringIO):
    """A file on a disk that may be full."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


@pytest.mark.parametrize("production", [True, False])
def test_a_full_disk_is_survived_and_reported_later(stream: io.StringIO, production: bool) -> None:
    disk = Disk()
    logs.configure(production=production, stream=disk)
    ours, library = structlog.get_logger("test"), logging.getLogger("library")
    disk.full = True
    ours.info("lost")
    library.warning("lost too")
    disk.full = False
    ours.info("first_again")
    ours.info("second_again")
    first, second = disk.getvalue().splitlines()
    assert "first_again" in first
    assert re.search(r'log_write_failures"?[:=]2\b', first)
    assert "second_again" in second
    assert "log_write_failures" not in second
