"""The CLI against a service that follows the contract: output, exit statuses, one-line errors."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from api.cli import app as cli
from api.server.demo_sale import open_demo_sale
from reservation.client import Client, NoAnswer
from reservation.client.operator import ServiceRefused
from reservation.domain.operators import name_in_header

SALE = {
    "saleId": "s-1",
    "name": "Winter [bold]sale[/bold]",
    "currency": "KRW",
    "status": "open",
    "opensAt": "2026-11-23T00:00:00.000Z",
    "closesAt": "2026-11-24T00:00:00.000Z",
    "holdSeconds": 300,
    "holdPolicy": "prepare",
    "items": [
        {
            "sku": "mug",
            "name": "Mug",
            "price": 12000,
            "total": 10,
            "available": 7,
            "held": 2,
            "sold": 1,
            "limitPerBuyer": 2,
        }
    ],
}
AUDIT = {
    "ok": True,
    "checkedAt": "2026-11-23T00:00:00.000Z",
    "lag": 3,
    "skus": [
        {
            "sku": "mug",
            "total": 10,
            "available": 7,
            "held": 2,
            "confirming": 1,
            "sold": 1,
            "ok": True,
        }
    ],
    "problems": [],
}


class Stub(ThreadingHTTPServer):
    """Returns canned answers by method and path, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def give(self, call: str, body: Any, status: int = 200) -> None:
        self.answers[call] = (
            status,
            body if isinstance(body, bytes) else json.dumps(body).encode(),
        )


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        call = f"{self.command} {self.path}"
        server.asked.append({"call": call, "headers": dict(self.headers), "body": body})
        status, content = server.answers[call]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = answer  # noqa: N815 - names that the server calls

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        del format, args


@pytest.fixture
def service() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command in this process, to start at once; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RESERVATION_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RESERVATION_ADMIN_API_KEY", "the-key")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def test_the_help_lists_each_command_with_one_line() -> None:
    for name, (place, line) in cli._COMMANDS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        assert command.name == name
        assert command.help.splitlines()[0] == line


def test_the_help_imports_no_command_module() -> None:
    program = (
        "import sys\nfrom api import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'httpx', 'litestar', 'redis', 'sqlalchemy', 'uvicorn', 'msgspec', 'structlog'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stderr.decode().strip() == "[]"
    assert "serve" in ran.stdout.decode()


def test_the_version_and_the_completion_script_are_printed(run: Any) -> None:
    assert run("--version") == (0, f"reservation {import_module('reservation').__version__}\n", "")
    for shell in ("bash", "zsh", "fish"):
        status, out, _ = run("completion", shell)
        assert status == 0
        assert "_RESERVATION_COMPLETE" in out


def test_shells_complete_the_commands(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_RESERVATION_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "reservation sale re")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert "plain,restock" in run()[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["serve", "--role", "reaper"],
        ["sale", "show"],
        ["sale", "restock", "s-1", "mug", "many", "--reason", "x"],
        ["completion", "cmd"],
    ],
)
def test_wrong_usage_prints_one_line_and_exits_with_2(run: Any, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("reservation: ")


def test_a_bad_setting_prints_one_line_and_exits_with_78(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESERVATION_REDIS_URL", "redis+sentinel://h")
    status, out, err = run("serve")
    assert (status, out, err.count("\n")) == (78, "", 1)
    assert "service name" in err


@pytest.mark.parametrize("role", ["api", "worker"])
def test_a_single_role_without_its_services_exits_with_78(run: Any, role: str) -> None:
    status, _, err = run("serve", "--role", role)
    assert (status, err) == (
        78,
        "reservation: RESERVATION_REDIS_URL must be given with --role\n",
    )


def test_an_unreachable_service_prints_one_line_and_exits_with_69(run: Any) -> None:
    status, out, err = run("audit", "s-1", "--url", "http://127.0.0.1:1")
    assert (status, out, err.count("\n")) == (69, "", 1)
    assert "http://127.0.0.1:1 does not answer" in err


def test_a_command_calls_the_service_of_the_settings(
    run: Any, service: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.give("GET /v1/sales", {"sales": [SALE]})
    monkeypatch.setenv("RESERVATION_PUBLIC_URL", service.url)
    status, out, err = run("sale", "list")
    assert (status, err) == (0, "")
    assert out.split("\n")[0].split() == ["saleId", "name", "status", "opensAt", "closesAt"]
    assert "Winter [bold]sale[/bold]" in out
    assert "\x1b" not in out


def test_the_sale_list_spans_all_pages(run: Any, service: Stub) -> None:
    second = SALE | {"saleId": "s-2"}
    service.give("GET /v1/sales", {"sales": [SALE], "nextCursor": "a/b"})
    service.give("GET /v1/sales?cursor=a%2Fb", {"sales": [second], "nextCursor": None})
    status, out, err = run("sale", "list", "--url", service.url)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["s-1", "s-2"]
    _, out, _ = run("sale", "list", "--json", "--url", service.url)
    assert json.loads(out) == {"sales": [SALE, second], "nextCursor": None}


def test_sale_show_prints_the_counters(run: Any, service: Stub) -> None:
    service.give("GET /v1/admin/sales/s-1", SALE)
    status, out, _ = run("sale", "show", "s-1", "--url", service.url)
    assert status == 0
    assert out.splitlines()[-1].split() == ["mug", "Mug", "12000", "10", "7", "2", "1", "2"]
    assert service.asked[0]["headers"]["Authorization"] == "Bearer the-key"


def test_json_output_is_the_response_of_the_service(run: Any, service: Stub) -> None:
    answer = json.dumps(SALE, indent=7).encode()
    service.give("GET /v1/admin/sales/s-1", answer)
    assert run("sale", "show", "s-1", "--json", "--url", service.url)[1] == answer.decode() + "\n"


def test_sale_create_sends_the_file_without_its_id(run: Any, service: Stub, tmp_path: Path) -> None:
    service.give("PUT /v1/admin/sales/s-1", SALE, status=201)
    (tmp_path / "sale.json").write_text(json.dumps({"saleId": "s-1", "name": "Winter"}))
    status, out, _ = run("sale", "create", "sale.json", "--url", service.url, "--operator", "kim")
    assert status == 0
    assert "s-1" in out
    assert json.loads(service.asked[0]["body"]) == {"name": "Winter"}
    assert service.asked[0]["headers"]["X-Operator"] == "kim"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"name": "no id"}'])
def test_a_file_without_a_sale_is_wrong_usage(run: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "sale.json").write_text(content)
    status, _, err = run("sale", "create", "sale.json")
    assert (status, err.count("\n")) == (2, 1)


def test_a_file_with_a_byte_order_mark_is_read(run: Any, service: Stub, tmp_path: Path) -> None:
    service.give("PUT /v1/admin/sales/s-1", SALE, status=201)
    document = json.dumps({"saleId": "s-1", "name": "머그"}, ensure_ascii=False)
    (tmp_path / "sale.json").write_bytes(document.encode("utf-8-sig"))
    assert run("sale", "create", "sale.json", "--url", service.url)[0] == 0
    assert json.loads(service.asked[0]["body"]) == {"name": "머그"}


def test_a_file_in_another_encoding_is_wrong_usage(run: Any, tmp_path: Path) -> None:
    document = json.dumps({"saleId": "s-1", "name": "머그"}, ensure_ascii=False)
    (tmp_path / "sale.json").write_bytes(document.encode("cp949"))
    status, _, err = run("sale", "create", "sale.json")
    assert (status, err.count("\n")) == (2, 1)
    assert "is not UTF-8" in err


@pytest.mark.parametrize(
    "proxy", ["socks://127.0.0.1:1/", "socks5://127.0.0.1:1/", "http://127.0.0.1:1"]
)
def test_a_loopback_service_is_called_without_a_proxy(
    run: Any, service: Stub, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for name in ("ALL_PROXY", "all_proxy", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    service.give("GET /v1/sales", {"sales": [SALE]})
    assert run("sale", "list", "--url", service.url)[0] == 0
    # The client reads it, and finds it shorter than a sale of the service.
    with pytest.raises(NoAnswer, match="not a response of this service"):
        Client(service.url).sales()


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1/", "socks5://127.0.0.1:1/", "nonsense"])
def test_an_unusable_proxy_is_reported_in_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    status, out, err = run("sale", "list", "--url", "http://shop.invalid:8000")
    assert (status, out, err.count("\n")) == (69, "", 1)


def test_an_unnamed_user_id_is_used_as_the_operator(
    run: Any, service: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown_user)
    service.give("GET /v1/sales", {"sales": [SALE]})
    assert run("sale", "list", "--url", service.url)[0] == 0
    assert service.asked[0]["headers"]["X-Operator"] == f"uid-{os.getuid()}"


def unknown_user(uid: int) -> Any:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def test_a_name_in_any_language_is_sent_encoded(
    run: Any, service: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "홍길동")
    service.give("GET /v1/sales", {"sales": [SALE]})
    assert run("sale", "list", "--url", service.url)[0] == 0
    sent = service.asked[0]["headers"]["X-Operator"]
    assert sent == "UTF-8''%ED%99%8D%EA%B8%B8%EB%8F%99"
    assert name_in_header(sent) == "홍길동"


def test_a_login_name_that_is_not_text_becomes_the_user_id(
    run: Any, service: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", os.fsdecode(b"kim\xff"))
    service.give("GET /v1/sales", {"sales": [SALE]})
    assert run("sale", "list", "--url", service.url)[0] == 0
    assert service.asked[0]["headers"]["X-Operator"] == f"uid-{os.getuid()}"


@pytest.mark.parametrize("name", ["x" * 101, "", "a\nb"])
def test_an_operator_name_that_is_not_text_is_wrong_usage(run: Any, name: str) -> None:
    status, out, err = run("sale", "pause", "s-1", "--reason", "x", "--operator", name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--operator must be" in err


def test_restock_takes_a_negative_number_and_sends_a_key(run: Any, service: Stub) -> None:
    service.give("POST /v1/admin/sales/s-1/stock", SALE)
    url = ("--url", service.url)
    assert run("sale", "restock", "s-1", "mug", "-5", "--reason", "broken", *url)[0] == 0
    again = ("--idempotency-key", "k-1")
    assert run("sale", "restock", "s-1", "mug", "5", "--reason", "found", *url, *again)[0] == 0
    first, second = service.asked
    assert json.loads(first["body"]) == {"sku": "mug", "delta": -5, "reason": "broken"}
    assert len(first["headers"]["Idempotency-Key"]) == 36
    assert second["headers"]["Idempotency-Key"] == "k-1"


def test_a_restock_without_a_response_names_its_idempotency_key(run: Any) -> None:
    status, _, err = run(
        *["sale", "restock", "s-1", "mug", "5", "--reason", "x", "--url", "http://127.0.0.1:1"]
    )
    assert (status, err.count("\n")) == (69, 1)
    assert "repeat with --idempotency-key " in err


def test_a_refusal_prints_its_code_and_detail_in_one_line(run: Any, service: Stub) -> None:
    problem = {"code": "sale_not_found", "detail": "The sale\ndoes not exist.", "status": 404}
    service.give("GET /v1/admin/sales/s-1", problem, status=404)
    assert run("sale", "show", "s-1", "--url", service.url) == (
        1,
        "",
        "reservation: sale_not_found: The sale does not exist.\n",
    )


@pytest.mark.parametrize(
    ("status", "body"), [(502, b"<html>bad\ngateway"), (200, b"<html>"), (200, b"{}")]
)
def test_the_response_of_a_foreign_server_is_reported_in_one_line(
    run: Any, service: Stub, status: int, body: bytes
) -> None:
    service.give("GET /v1/admin/sales/s-1", body, status=status)
    ended, out, err = run("sale", "show", "s-1", "--url", service.url)
    assert (ended, out, err.count("\n")) == (1, "", 1)


def test_an_id_with_special_characters_stays_one_path_segment(run: Any, service: Stub) -> None:
    service.give("GET /v1/admin/sales/..%2F..%2Fhealth", SALE)
    assert run("sale", "show", "../../health", "--url", service.url)[0] == 0


def test_a_clean_audit_exits_with_0(run: Any, service: Stub) -> None:
    service.give("GET /v1/admin/sales/s-1/audit", AUDIT)
    status, out, _ = run("audit", "s-1", "--url", service.url)
    assert status == 0
    assert out.splitlines()[-1] == "consistent; events not in SQL yet: 3"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_audit_with_a_problem_exits_with_1(run: Any, service: Stub, flags: list[str]) -> None:
    report = AUDIT | {"ok": False, "problems": ["mug: held 2, reservations say 1"]}
    service.give("GET /v1/admin/sales/s-1/audit", report)
    status, out, err = run("audit", "s-1", "--url", service.url, *flags)
    assert (status, err) == (1, "")
    assert "mug: held 2, reservations say 1" in out


@pytest.mark.parametrize("there", [True, False])
def test_the_demo_sale_is_created_once(service: Stub, there: bool) -> None:
    path = "/v1/admin/sales/demo"
    missing = ({"code": "sale_not_found", "detail": ""}, 404)
    service.give(f"GET {path}", *((SALE, 200) if there else missing))
    service.give(f"PUT {path}", SALE, status=201)
    assert open_demo_sale(service.url, "the-key") is not there
    assert [asked["call"] for asked in service.asked][1:] == ([] if there else [f"PUT {path}"])
    if not there:
        sale = json.loads(service.asked[1]["body"])
        opens, closes = map(datetime.fromisoformat, (sale["opensAt"], sale["closesAt"]))
        assert closes - opens > timedelta(days=29)
        assert opens < datetime.now(UTC) < closes
        assert (len(sale["items"]), sale["currency"]) == (3, "KRW")
        assert set(sale) <= set(SALE)
        assert all(set(item) <= set(SALE["items"][0]) for item in sale["items"])
        assert service.asked[1]["headers"]["X-Operator"] == "demo"


def test_an_unreadable_demo_sale_is_not_overwritten(service: Stub) -> None:
    service.give("GET /v1/admin/sales/demo", {"code": "sale_recovering", "detail": ""}, status=503)
    with pytest.raises(ServiceRefused, match="sale_recovering"):
        open_demo_sale(service.url, "the-key")
    assert len(service.asked) == 1


@pytest.mark.slow
def test_a_closed_output_pipe_prints_no_traceback(service: Stub, tmp_path: Path) -> None:
    many = {"sales": [SALE | {"saleId": f"s-{number}"} for number in range(5_000)]}
    service.give("GET /v1/sales", many)
    command = [sys.executable, "-m", "api.cli", "sale", "list", "--url", service.url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as ran:
        assert ran.stdout is not None
        assert ran.stderr is not None
        ran.stdout.read(10)
        ran.stdout.close()
        assert ran.stderr.read() == b""
        ran.wait(30)
