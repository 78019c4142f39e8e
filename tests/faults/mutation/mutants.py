"""Mutants of the Lua scripts: one small change each, such as a slip of the hand makes."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
from lupa.lua51 import LuaError, LuaRuntime
from pygments.lexers import LuaLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

__all__ = ["Mutant", "all_mutants"]

#: Replacements of an operator or a word.
SWAPS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "~=",
    "~=": "==",
    "+": "-",
    "-": "+",
    "and": "or",
    "or": "and",
    "true": "false",
    "false": "true",
}
#: Counters, and commands of the same shape, that an author may confuse.
CONFUSED = {
    "available": "held",
    "held": "sold",
    "sold": "held",
    "ZADD": "ZREM",
    "HSET": "HSETNX",
    "HINCRBY": "HSET",
    "min": "max",
    "max": "min",
}
_QUOTED = re.compile(r'"(\w+)"')
#: A statement alone on its line: a call, or an assignment.
_STATEMENT = re.compile(r"^ *(?:redis\.call\(.*\)|[a-z_.]+\(.*\)|[a-z_.\[\]]+ = .+)$")
_CONDITION = re.compile(r"^( *(?:if|elseif) )(.+)( then.*)$")


class Mutant(msgspec.Struct, frozen=True):
    """One changed file of scripts/lua.

    Attributes:
        file: its path below the folder.
        line: which line is changed, from 1.
        what: the change in words.
        before: the line as it was, without its indentation.
        text: the whole changed file.
    """

    file: str
    line: int
    what: str
    before: str
    text: str

    @property
    def name(self) -> str:
        """Stable while the line is unchanged, wherever in the file it moves."""
        change = f"{self.before} -> {self.what}"
        return f"{self.file}: {change}"

    @property
    def draw(self) -> str:
        """An order of mutants that is independent of their places."""
        return hashlib.sha256(self.name.encode()).hexdigest()


def all_mutants(folder: Path) -> list[Mutant]:
    """Every mutant of every script that still compiles, each change once."""
    lua = LuaRuntime(unpack_returned_tuples=True)
    found: dict[str, Mutant] = {}
    for path in sorted([*folder.glob("*.lua"), *folder.glob("lib/*.lua")]):
        text = path.read_text()
        file = str(path.relative_to(folder))
        for start, end, new, what in _changes(text):
            changed = text[:start] + new + text[end:]
            if not _compiles(lua, changed):
                continue
            line = text.count("\n", 0, start) + 1
            mutant = Mutant(file, line, what, text.splitlines()[line - 1].strip(), changed)
            found.setdefault(mutant.name, mutant)
    return list(found.values())


def _compiles(lua: LuaRuntime, text: str) -> bool:
    # The server's first line is not Lua, and the included functions are globals to the compiler.
    try:
        lua.compile(re.sub(r"\A#!.*", "", text))
    except LuaError:
        return False
    return True


def _changes(text: str) -> Iterator[tuple[int, int, str, str]]:
    """The start and end of a change, the new text, and the change in words."""
    comments: list[tuple[int, int]] = []
    for start, kind, token in LuaLexer(stripnl=False, ensurenl=False).get_tokens_unprocessed(text):
        end = start + len(token)
        if kind in Comment:
            comments.append((start, end))
        elif kind in Number and token.isdigit():
            more = str(int(token) + 1)
            yield start, end, more, f"{token} becomes {more}"
        elif kind in String:
            for quoted in _QUOTED.finditer(token if token[0] == '"' else f'"{token}"'):
                word = quoted[1]
                if word in CONFUSED:
                    at = start + token.index(word)
                    yield at, at + len(word), CONFUSED[word], f"{word} becomes {CONFUSED[word]}"
        elif token == "not":
            yield start, end, "", "without not"
        elif token in SWAPS and kind in (*_WORDS, Operator):
            yield start, end, SWAPS[token], f"{token} becomes {SWAPS[token]}"
        elif kind in Name and token in CONFUSED:
            yield start, end, CONFUSED[token], f"{token} becomes {CONFUSED[token]}"
    yield from _changes_of_lines(text, comments)


_WORDS = (Operator, Keyword, Keyword.Constant, Operator.Word)


def _changes_of_lines(
    text: str, comments: list[tuple[int, int]]
) -> Iterator[tuple[int, int, str, str]]:
    start = 0
    for line in text.splitlines(keepends=True):
        end = start + len(line.rstrip("\n"))
        bare = line.rstrip("\n")
        if not any(one <= start < other for one, other in comments):
            if _STATEMENT.match(bare):
                yield start, end, "", "gone"
            if found := _CONDITION.match(bare):
                yield start, end, f"{found[1]}not ({found[2]}){found[3]}", "the other way round"
                yield start, end, f"{found[1]}false{found[3]}", "never"
        start += len(line)
