"""`python -m loadtests`: Locust against a running service, or against one of its own."""

import argparse
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from api.cli.errors import BAD_SETTING, UNREACHABLE, CommandError
from api.http.auth.guests import Guests
from api.server.temporary_service import TemporaryServiceFailed, is_reachable, temporary_service
from loadtests.operator_api import CannotBegin, OperatorApi, address_of
from loadtests.spawned_service import OWN_SERVICE
from reservation.config.settings import Settings, SettingsError

__all__ = ["main"]

LOCUSTFILE: Final = Path(__file__).with_name("locustfile.py")
#: Time-out for the workers' start: after it the master exits with status 1.
WORKERS_SECONDS: Final = 60
#: After Ctrl-C: the last holds end, and then the verdict is written.
VERDICT_SECONDS: Final = 600.0


def main() -> int:
    """Start Locust; its exit status is the verdict's."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests",
        description=__doc__,
        epilog="Every other option is Locust's: --headless, --users, --run-time, --scenario ...",
        # `--help` is Locust's too, and lists the sale's options with it.
        add_help=False,
    )
    parser.add_argument("--own", action="store_true", help="Start a service for this run alone.")
    parser.add_argument(
        "--url",
        help="A running service, with its own RESERVATION_ADMIN_API_KEY and RESERVATION_JWT_SECRET"
        " in the environment; else the one at RESERVATION_PUBLIC_URL.",
    )
    parser.add_argument("-h", "--help", action="store_true", help="These options, then Locust's.")
    options, others = parser.parse_known_args()
    if options.help:
        parser.print_help()
        return _locust("http://127.0.0.1", dict(os.environ), ["--help"])
    try:
        return _run(own=options.own, url=options.url, arguments=others)
    except SettingsError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return BAD_SETTING
    except TemporaryServiceFailed as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return UNREACHABLE
    except CommandError as failure:
        print(f"loadtests: {failure}", file=sys.stderr)
        return failure.status


def _run(*, own: bool, url: str | None, arguments: list[str]) -> int:
    settings = Settings.load(os.environ)
    try:
        address = address_of(url or settings.operator_url)
    except CannotBegin as error:
        raise CommandError(error, BAD_SETTING) from error
    environ = dict(os.environ)
    with ExitStack() as stack:
        if own or (url is None and not is_reachable(address)):
            settings, address = stack.enter_context(temporary_service("loadtest"))
            environ |= {
                "RESERVATION_DATA_DIR": str(settings.data_dir),
                "RESERVATION_ADMIN_API_KEY": settings.admin_api_key,
                "RESERVATION_JWT_SECRET": settings.jwt_secret,
                OWN_SERVICE: "1",
            }
            # All of it is on this machine, so every call can be judged.
            arguments = ["--record", *arguments]
        elif not is_reachable(address):
            raise CommandError(f"no service is reachable at {address}", UNREACHABLE)
        elif "--worker" not in arguments:
            _check(address, settings)
        return _locust(address, environ, arguments)


def _check(address: str, settings: Settings) -> None:
    """Reject at once a run whose every request would be rejected."""
    guests = Guests(msgspec.structs.replace(settings, guest_rate=None))
    try:
        OperatorApi(address, settings.admin_api_key).check(guests.new("")[1])
    except CannotBegin as error:
        raise CommandError(error, BAD_SETTING) from error


def _locust(address: str, environ: dict[str, str], arguments: list[str]) -> int:
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--host", address]
    # Locust listens on all interfaces by default, and its web UI starts load for any visitor.
    command += ["--web-host", "127.0.0.1"]
    if "--worker" not in arguments:
        command += ["--master-bind-host", "127.0.0.1"]
        command += ["--expect-workers-max-wait", str(WORKERS_SECONDS)]
    process = subprocess.Popen([*command, *arguments], env=environ)

    # Ending this process ends Locust, and only then the service: the verdict needs its books.
    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        process.terminate()

    signal.signal(signal.SIGTERM, end)
    with suppress(KeyboardInterrupt):
        return process.wait()
    try:
        # Locust got the Ctrl-C too.
        return process.wait(VERDICT_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        return 1


if __name__ == "__main__":
    sys.exit(main())
