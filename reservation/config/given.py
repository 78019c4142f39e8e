"""Collects the given settings: the environment, `.env`, and the files that `X_FILE` names."""

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from reservation.config.parsing import (
    PREFIX,
    SettingsError,
    is_service_link,
    read_dotenv,
    variable_of,
)

__all__ = ["given_settings", "may_be_a_file"]

#: Secrets and addresses, which may contain a password.
_FILE_SETTING: Final = re.compile(r".+_(url|key|keys|secret)")
_FILE_SUFFIX: Final = "_file"

#: Largest file of a value; a list of keys is under 2 kB.
_FILE_BYTES_MAX: Final = 64 * 1024


def may_be_a_file(name: str) -> bool:
    """Whether the setting, by field name, may also be given as the path of a file."""
    return _FILE_SETTING.fullmatch(name) is not None


def given_settings(
    environ: Mapping[str, str],
    dotenv_path: str | os.PathLike[str] | None,
    *,
    known: Collection[str],
    read: Collection[str],
) -> dict[str, str]:
    """The values that are given and not empty, by field name.

    Args:
        environ: wins over `.env`.
        dotenv_path: may be missing; None reads none.
        known: every setting; another variable with the prefix is refused.
        read: the settings whose files are read; the others' files are ignored.

    Raises:
        SettingsError: a variable is unknown, given twice, or names an unusable file.
    """
    values, paths = _values_and_paths(environ, dotenv_path, known)
    for name, path in paths.items():
        if name in values:
            variable = variable_of(name)
            raise SettingsError(f"{variable} and {variable}_FILE must not both be given")
        if name in read:
            values[name] = _content(variable_of(name + _FILE_SUFFIX), path)
    return values


def _values_and_paths(
    environ: Mapping[str, str],
    dotenv_path: str | os.PathLike[str] | None,
    known: Collection[str],
) -> tuple[dict[str, str], dict[str, str]]:
    merged = read_dotenv(Path(dotenv_path)) if dotenv_path is not None else {}
    merged.update(
        (variable, value)
        for variable, value in environ.items()
        if not is_service_link(variable, value)
    )
    values: dict[str, str] = {}
    paths: dict[str, str] = {}
    for variable, value in merged.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        of_file = name.removesuffix(_FILE_SUFFIX)
        is_path = of_file != name and of_file in known and may_be_a_file(of_file)
        if not (name in known or is_path) or variable != variable.upper():
            raise SettingsError(_unknown(variable, known))
        if value.strip():
            (paths if is_path else values)[of_file if is_path else name] = value.strip()
    return values, paths


def _unknown(variable: str, known: Collection[str]) -> str:
    names = [variable_of(name) for name in known]
    close = difflib.get_close_matches(variable.upper(), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see docs/reference/settings.md"
    return f"{variable} is not a setting{hint}"


def _content(variable: str, path: str) -> str:
    """The text of a file without one trailing newline.

    No message contains the path: it may be the secret itself, in the wrong variable.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_FILE_BYTES_MAX + 1)
        text = raw.decode()
    except OSError as error:
        raise SettingsError(f"the file of {variable} cannot be read: {error.strerror}") from None
    except ValueError:
        # Not UTF-8, or a path with a null character.
        raise SettingsError(f"the file of {variable} cannot be read as text") from None
    if len(raw) > _FILE_BYTES_MAX:
        raise SettingsError(f"the file of {variable} is longer than {_FILE_BYTES_MAX} bytes")
    value = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    if not value.strip():
        raise SettingsError(f"the file of {variable} is empty")
    return value
