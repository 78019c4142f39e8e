"""Human-written text: its allowed characters, and its safe form on a terminal."""

import unicodedata
from typing import Final

__all__ = ["LINES", "TEXT", "printable"]

#: Names, titles and reasons: no C0 or C1 control (PostgreSQL stores no NUL, an escape controls a
#: terminal), no line or paragraph separator, and no bidirectional control.
#: Python's `$` also matches before a last newline: hence `(?!\n)`.
TEXT: Final = r"^[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]*$(?!\n)"
#: Descriptions: as `TEXT`, with line feeds.
LINES: Final = TEXT.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f", 1)
#: Zero width joiner and non-joiner: emoji and several scripts need them.
_JOINERS: Final = frozenset("\u200c\u200d")
#: Controls, formats, surrogates, private and unassigned characters, and separators of lines.
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str) -> str:
    """The text with an escape in the place of each character that no terminal prints."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _UNPRINTABLE:
        return character
    return character.encode("unicode_escape").decode("ascii")
