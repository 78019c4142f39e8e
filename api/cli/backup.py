"""`reservation backup`: a consistent copy of SQL, while the service runs or not."""

import asyncio
import hashlib
import hmac
import os
from pathlib import Path

import click
import msgspec
from rich_click import RichCommand
from sqlalchemy.exc import SQLAlchemyError

from api.cli.errors import BAD_SETTING, REFUSED, UNREACHABLE, CommandError
from reservation import __version__
from reservation.adapters.sql.backup_file import Manifest
from reservation.adapters.sql.dumps import DumpFailed, back_up
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.bootstrap import sqlite_url
from reservation.config.settings import Settings, SettingsError
from reservation.domain.clock import SystemClock, as_datetime

__all__ = ["backup", "described", "key_name", "kind_of"]


@click.command(cls=RichCommand)
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def backup(path: Path, *, as_json: bool) -> None:
    """Write a backup of SQL to a file.

    FILE must not exist. The service may run. For PostgreSQL pg_dump must be installed. Keys of the
    service, such as secrets.json in the data directory, are not part of the backup.
    """
    try:
        settings = Settings.load(os.environ)
        url = settings.database_url or sqlite_url(settings)
        manifest = Manifest(
            version=__version__,
            kind=kind_of(url),
            schema="",
            level=0,
            taken_at_ms=SystemClock().now_ms(),
            order_id_key=key_name(settings),
            sales=0,
            orders=0,
        )
        written = asyncio.run(back_up(url, path, manifest))
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except DatabaseUnfit as error:
        raise CommandError(f"RESERVATION_DATABASE_URL: {error}", BAD_SETTING) from error
    except DumpFailed as error:
        raise CommandError(error, REFUSED) from error
    except FileExistsError as error:
        raise CommandError(f"{path} exists: a backup replaces no file", REFUSED) from error
    except ConnectionError as error:
        raise CommandError(f"SQL does not answer: {error}", UNREACHABLE) from error
    except SQLAlchemyError as error:
        raise CommandError(f"SQL does not answer: {type(error).__name__}", UNREACHABLE) from error
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}", REFUSED) from error
    if as_json:
        click.echo(msgspec.json.encode(written))
    else:
        click.echo(f"{path}: {described(written)}")


def described(manifest: Manifest) -> str:
    """A manifest in one line."""
    at = as_datetime(manifest.taken_at_ms).isoformat(timespec="seconds")
    return (
        f"{manifest.sales} sales and {manifest.orders} orders, {manifest.kind}, "
        f"schema {manifest.schema}, level {manifest.level}, taken at {at}"
    )


def kind_of(url: str) -> str:
    """The kind of database, as a manifest has it."""
    return "sqlite" if url.startswith("sqlite") else "postgresql"


def key_name(settings: Settings) -> str:
    """Identifies the key of order ids without revealing it."""
    key = settings.order_id_key.encode()
    return hmac.new(key, b"backup", hashlib.sha256).hexdigest()[:16]
