"""Rules for every command: help, JSON, completion, and no decoration outside a terminal."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from api.cli import app as cli

#: Commands that run a service, or print a script or a file: no answer to show as JSON.
WITHOUT_ANSWER = {"serve", "sandbox", "completion", "history"}
#: Start of an escape sequence: a colour, or a progress bar that redraws itself.
ESCAPE = "\x1b["
#: Enough time to draw a spinner once; it is drawn ten times a second.
AUDIT_SECONDS = 0.5


def commands(names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Each leaf command, with its words."""
    for name, (place, _) in cli._COMMANDS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, click.Group):
            for sub, one in command.commands.items():
                yield (*names, name, sub), one
        else:
            yield (*names, name), command


COMMANDS = dict(commands())
EACH = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


@EACH
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_describes_the_command_and_each_option(words: tuple[str, ...], flag: str) -> None:
    shown = CliRunner().invoke(cli.cli, [*words, flag])
    assert shown.exit_code == 0
    command = COMMANDS[words]
    assert command.help
    assert command.help.splitlines()[0] in shown.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in shown.output


@EACH
def test_each_command_with_a_response_has_json_output(words: tuple[str, ...]) -> None:
    options = {name for parameter in COMMANDS[words].params for name in parameter.opts}
    assert ("--json" in options) == (words[0] not in WITHOUT_ANSWER)


@EACH
def test_each_changing_command_takes_a_reason_and_an_operator(words: tuple[str, ...]) -> None:
    options = {name for parameter in COMMANDS[words].params for name in parameter.opts}
    changes = {
        "pause",
        "resume",
        "close",
        "archive",
        "restock",
        "refund",
        "load",
        "mark",
        "open",
        "purge",
        "release",
        "resolve",
        "revoke",
    }
    takes_reason = words[-1] in changes or words == ("key", "create")
    assert ("--reason" in options) == takes_reason
    assert ("--operator" in options) == (words[-1] in {*changes, "create", "rebuild"})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_completes_commands_and_options(shell: str) -> None:
    def completions(line: str) -> str:
        words = line.split(" ")
        environ = {
            **os.environ,
            "_RESERVATION_COMPLETE": f"{shell}_complete",
            # fish sends the unfinished word, the others its index.
            "COMP_WORDS": line,
            "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "api.cli"], env=environ, capture_output=True, check=True
        )
        return done.stdout.decode()

    assert "rebuild" in completions("reservation re")
    assert "restock" in completions("reservation sale re")
    assert "--idempotency-key" in completions("reservation sale restock --id")


class SlowAudit(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(AUDIT_SECONDS)
        report = {"ok": True, "checkedAt": "now", "lag": 0, "skus": [], "problems": []}
        content = json.dumps(report).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Log nothing."""


@contextmanager
def auditing() -> Iterator[list[str]]:
    """The CLI of an audit that takes a while."""
    with HTTPServer(("127.0.0.1", 0), SlowAudit) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            yield [sys.executable, "-m", "api.cli", "audit", "winter", "--url", url]
        finally:
            server.shutdown()
            thread.join()


def test_progress_is_shown_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with auditing() as command:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
            check=True,
        )
    os.close(theirs)
    with os.fdopen(ours, "rb") as terminal:
        shown = terminal.read1().decode()
    assert ESCAPE in shown
    assert "winter: reading every order" in shown
    assert ESCAPE not in done.stdout.decode()


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_output_without_a_terminal_has_no_decoration(flags: list[str]) -> None:
    with auditing() as command:
        done = subprocess.run([*command, *flags], capture_output=True, check=True)
    assert done.stderr == b""
    assert ESCAPE not in done.stdout.decode()
