"""Generates keys at first start and keeps them in the data directory, readable by their owner."""

import os
import secrets
import stat
from pathlib import Path

import msgspec

__all__ = ["FILE_NAME", "Secrets", "SecretsError", "load_or_create", "load_secrets"]

#: The file in the data directory.
FILE_NAME = "secrets.json"

#: Random bytes in a generated key: 256 bits, the strength of HMAC-SHA256, which most of them feed.
_KEY_BYTES = 32

#: Largest file that is read. Ours is under 1 kB; a larger one is some other file.
_FILE_BYTES_MAX = 64 * 1024


class SecretsError(Exception):
    """The file cannot be used: one sentence with the reason, never its content."""


class Secrets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Generated values of the `RESERVATION_*` settings of the same names."""

    admin_api_key: str
    signing_keys: tuple[str, ...]
    order_id_key: str
    jwt_secret: str

    def __repr__(self) -> str:
        return "Secrets(...)"


def load_or_create(data_dir: Path) -> Secrets:
    """Read the keys, generating them first if there are none.

    Safe for any number of processes at once: each writes a whole file under its own name and
    links it to the real name, which succeeds for exactly one. All of them then read that one.

    Raises:
        SecretsError: the file is unreadable, open to others or damaged. It is never overwritten,
            for with its order id key every order id of the past would be lost.
    """
    kept = load_secrets(data_dir)
    if kept is not None:
        return kept
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _publish(data_dir, _generate())
    except OSError as error:
        raise SecretsError(f"{data_dir} is not writable for the keys: {error.strerror}") from error
    generated = load_secrets(data_dir)
    if generated is None:
        raise SecretsError(f"{data_dir / FILE_NAME} disappeared right after it was created")
    return generated


def load_secrets(data_dir: Path) -> Secrets | None:
    """Read the keys, or None if none were generated yet."""
    path = data_dir / FILE_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SecretsError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise SecretsError(f"{path} is accessible to other users: chmod 600 it")
        content = file.read(_FILE_BYTES_MAX + 1)
    try:
        return msgspec.json.decode(content, type=Secrets)
    except msgspec.MsgspecError as error:
        raise SecretsError(f"{path} is damaged: restore it from a backup") from error


def _generate() -> Secrets:
    return Secrets(
        admin_api_key=secrets.token_urlsafe(_KEY_BYTES),
        signing_keys=(secrets.token_urlsafe(_KEY_BYTES),),
        order_id_key=secrets.token_urlsafe(_KEY_BYTES),
        jwt_secret=secrets.token_urlsafe(_KEY_BYTES),
    )


def _publish(data_dir: Path, generated: Secrets) -> None:
    draft = data_dir / f".{FILE_NAME}.{os.getpid()}.{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(generated), indent=2) + b"\n")
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(draft, data_dir / FILE_NAME)
        except FileExistsError:
            return  # Another process was first: its keys are used.
        _sync_directory(data_dir)
    finally:
        draft.unlink()


def _sync_directory(path: Path) -> None:
    """Make a new file name durable: the file's own fsync does not cover its directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
