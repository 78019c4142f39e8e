"""The house rules that no linter knows, as tests. CONTRIBUTING.md says what each is for."""

import ast
import re
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec
import pytest

from reservation.adapters.redis import script_results as outcomes

ROOT = Path(__file__).resolve().parent.parent

#: A module exists for a concept. One that is longer than this has two.
MODULE_LINES_MAX = 500
#: A screen. The docstring is not counted.
FUNCTION_LINES_MAX = 60

#: Written in halves, so that this file passes its own test.
REGISTRY_HOSTS = (
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".com",
    "npmjs" + ".org",
    "debian" + ".org",
)
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")

#: Says on the line of an `except Exception` why everything is caught there.
LOOP_TOP = re.compile(r"# .*\bloop('s)? top\b")

#: What pytest skips by, in a test or at its top.
SKIP = re.compile(r"pytest\.(skip|importorskip)\(|\bmark\.skip(if)?\b")

BANNER = re.compile(r"^\s*(#|--)\s*([-=*#~_])\2{3,}", re.MULTILINE)

#: Made by tools, or by the service itself; never committed.
NOT_OURS = {"var", "dist", "build", "htmlcov", "node_modules", "__pycache__"}
HIDDEN_BUT_OURS = {".ci", ".github"}
BINARY = {".png", ".ico", ".jpg", ".gif", ".webp", ".woff2", ".pdf", ".gz", ".pyc"}


def ours(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in NOT_OURS:
            continue
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name not in HIDDEN_BUT_OURS
            if not hidden and path.suffix != ".egg-info":
                yield from ours(path)
        elif path.suffix not in BINARY and not path.name.startswith(".env"):
            yield path


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


FILES = list(ours(ROOT))
MODULES = [path for path in FILES if path.suffix == ".py"]
PAGES = [path for path in FILES if path.suffix == ".md"]
PRODUCT = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "tests"]
SCRIPTS = sorted((ROOT / "scripts" / "lua").glob("*.lua"))
STEPS = sorted((ROOT / "scripts" / "lua" / "lib").glob("*.lua"))


def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text(), filename=str(module))


def where(module: Path, node: ast.stmt | ast.excepthandler) -> str:
    return f"{module.relative_to(ROOT)}:{node.lineno}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def test_each_module_says_what_it_is_for() -> None:
    silent = [path for path in MODULES if not ast.get_docstring(tree_of(path))]
    assert named(silent) == []


def test_each_function_fits_on_a_screen() -> None:
    long = [
        f"{where(module, node)} {node.name}: {body_lines(node)} lines"
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and body_lines(node) > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_each_module_can_be_read_in_one_go() -> None:
    long = [path for path in PRODUCT if len(path.read_text().splitlines()) > MODULE_LINES_MAX]
    assert named(long) == []


def test_everything_is_caught_only_at_the_top_of_a_loop() -> None:
    swallowed = [
        where(module, handler)
        for module in PRODUCT
        for handler in ast.walk(tree_of(module))
        if isinstance(handler, ast.ExceptHandler)
        and catches_everything(handler)
        and not raises_again(handler)
        and not LOOP_TOP.search(module.read_text().splitlines()[handler.lineno - 1])
    ]
    assert swallowed == [], "catch what you expect, or mark the line: # loop top: why"


def catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in caught
    )


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_nothing_is_left_for_later() -> None:
    marked = [
        path for path in FILES if path.suffix != ".txt" and UNFINISHED.search(path.read_text())
    ]
    assert named(marked) == []


def test_no_comment_is_a_banner() -> None:
    banners = [path for path in [*MODULES, *SCRIPTS, *STEPS] if BANNER.search(path.read_text())]
    assert named(banners) == []


@pytest.mark.parametrize("host", REGISTRY_HOSTS)
def test_nothing_says_where_packages_come_from(host: str) -> None:
    """Whoever installs decides that: a mirror, a proxy, a folder of wheels."""
    telling = [path for path in FILES if host in path.read_text().lower()]
    assert named(telling) == []


def test_each_locked_package_is_pinned_with_its_hashes() -> None:
    for lock in ("bench.txt", "dev.txt", "run.txt", "traces.txt"):
        text = (ROOT / "requirements" / lock).read_text().replace("\\\n", " ")
        pins = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
        assert pins
        loose = [pin for pin in pins if "==" not in pin or "--hash=sha256:" not in pin]
        assert loose == [], lock


def test_each_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[^A-Za-z0-9_.-]", needed)[0] for group in groups for needed in group}
    rows = set(
        re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    )
    assert names == rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    near = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in near if not (page.parent / link).exists()] == []
    pages = [link.partition("#") for link in links if re.match(r"[^:#]*\.md#|#", link)]
    sections = [(page.parent / name if name else page, part) for name, _, part in pages]
    assert [part for where, part in sections if part not in headings_of(where)] == []


def headings_of(page: Path) -> set[str]:
    """What a link may name behind the `#`, as hosts of repositories make it of a heading."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_each_test_file_is_one_that_make_test_runs() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    places = [ROOT / place for place in config["tool"]["pytest"]["ini_options"]["testpaths"]]
    strays = [
        path
        for path in MODULES
        if path.name.startswith("test_")
        and not any(path == place or place in path.parents for place in places)
    ]
    assert named(strays) == []


def test_each_skip_is_a_failure_in_ci() -> None:
    """`missing` of tests/support/programs.py is the only way to skip: it fails under CI."""
    skipping = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}"
        for path in MODULES
        if path.name != "programs.py"
        for text in [path.read_text()]
        for found in SKIP.finditer(text)
    ]
    assert skipping == []


class Slot(msgspec.Struct, frozen=True):
    """One line of a header: `KEYS[7+]  stock  hash  ...`."""

    position: int
    #: The first of any number.
    rest: bool
    name: str


class Header(msgspec.Struct, frozen=True):
    """What a script says of itself, and what it does."""

    purpose: str
    keys: list[Slot]
    args: list[Slot]
    words: list[str]
    code: str


HEADER = re.compile(
    r"""\A\#!lua(?:[ ]flags=[a-z-]+(?:,[a-z-]+)*)?\n
        --\[\[\n(?P<purpose>.+?)\n
        \nKeys\b[^\n]*\n(?P<keys>.*?\n)
        Args\n(?P<args>.*?\n)
        Returns[ ]{2}(?P<returns>.*?\n)
        Keeps[ ]{4}.*?\n
        Cost[ ]{5}.*?\n
        \]\]\n(?P<code>.*)\Z""",
    re.DOTALL | re.VERBOSE,
)
SLOT = re.compile(r"^  (?:KEYS|ARGV)\[(\d+)(\+?)\] +([a-z_]+) ", re.MULTILINE)
WORD = re.compile(r"^  ([a-z]+(?:_[a-z]+)*)(?: |$)", re.MULTILINE)
COMMENT = re.compile(r"--[^\n]*")
OPENING = re.compile(r"redis\.p?call\(\s*(\"|\w+\(|)")
#: Sent at once, or put together in a table first because the caller decides how long it is.
COMMAND = re.compile(
    r"(?:redis\.p?call\(|local \w+ = \{)\s*\"(?P<command>[A-Z]+)\"(?:,\s*(?P<key>[^,)}]+))?"
)
TEXT = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'")


def header_of(script: Path) -> Header:
    found = HEADER.match(script.read_text())
    assert found, f"{script.name} opens with #!lua and a block: purpose, Keys, Args, Returns, ..."
    return Header(
        purpose=found["purpose"],
        keys=slots(found["keys"]),
        args=slots(found["args"]),
        words=WORD.findall(found["returns"]),
        code=COMMENT.sub("", found["code"]),
    )


def slots(section: str) -> list[Slot]:
    return [Slot(int(at), plus == "+", name) for at, plus, name in SLOT.findall(section)]


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.stem)
def script(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_each_script_opens_with_its_name_and_its_purpose(script: Path) -> None:
    purpose = header_of(script).purpose
    assert purpose.startswith(f"{script.name}: ")
    assert purpose.endswith(".")


@pytest.mark.parametrize("table", ["KEYS", "ARGV"])
def test_each_slot_is_declared_and_used(script: Path, table: str) -> None:
    header = header_of(script)
    declared = header.keys if table == "KEYS" else header.args
    assert [slot.position for slot in declared] == list(range(1, len(declared) + 1))
    assert not any(slot.rest for slot in declared[:-1])

    used = {int(position) for position in re.findall(rf"{table}\[(\d+)\]", header.code)}
    assert used == {slot.position for slot in declared if not slot.rest}

    reads_more = re.search(rf"#{table}\b|\b{table}\[[^\]\d]|\b{table}\)", header.code) is not None
    assert reads_more == any(slot.rest for slot in declared)
    if reads_more:
        assert declared[-1].position in first_of_many(header.code)


def first_of_many(code: str) -> set[int]:
    """What the script's FIRST_... constants say: where its repeated slots begin."""
    constants = re.findall(r"local (FIRST_[A-Z_]+(?:, FIRST_[A-Z_]+)*) = (\d+(?:, \d+)*)", code)
    return {int(value) for _, values in constants for value in values.split(", ")}


def test_each_key_is_called_in_the_code_what_its_header_calls_it(script: Path) -> None:
    header = header_of(script)
    named_keys: dict[int, str] = {}
    for names, values in re.findall(
        r"^local ([a-z_, ]+) = (KEYS\[\d+\].*)$", header.code, re.MULTILINE
    ):
        positions = [int(position) for position in re.findall(r"KEYS\[(\d+)\]", values)]
        named_keys.update(zip(positions, names.split(", "), strict=True))
    assert named_keys == {slot.position: slot.name for slot in header.keys if not slot.rest}


def test_each_answer_of_a_script_is_a_member_of_its_enum(script: Path) -> None:
    name = "".join(part.capitalize() for part in script.stem.split("_")) + "Word"
    words: type[StrEnum] = getattr(outcomes, name)
    header = header_of(script)
    assert sorted(header.words) == sorted(words)
    unsaid = [word for word in header.words if f'"{word}"' not in header.code]
    assert unsaid == [], "declared, and never answered"


def test_each_answer_of_a_script_has_a_test(script: Path) -> None:
    tests = sorted((ROOT / "tests" / "lua").glob(f"test_{script.stem}*.py"))
    assert tests, f"tests/lua/test_{script.stem}.py is missing"
    text = "".join(path.read_text() for path in tests)
    untested = [
        word
        for word in header_of(script).words
        if not re.search(rf"\"{word}\"|Word\.{word.upper()}\b", text)
    ]
    assert untested == []


#: They walk the whole server, or end what other sales need.
FORBIDDEN = {"KEYS", "SCAN", "RANDOMKEY", "DBSIZE", "FLUSHALL", "FLUSHDB", "RENAME", "SWAPDB"}


@pytest.mark.parametrize("path", [*SCRIPTS, *STEPS], ids=lambda path: path.stem)
def test_each_command_of_a_script_names_itself_and_a_key_it_was_given(path: Path) -> None:
    """A cluster routes by the declared keys, so a built one would be read on the wrong node."""
    code = COMMENT.sub("", re.sub(r"--\[\[.*?\]\]", "", path.read_text(), flags=re.DOTALL))
    assert set(OPENING.findall(code)) <= {'"', "unpack("}, "a command that is computed"
    for call in COMMAND.finditer(code):
        command, key = call["command"], call["key"]
        assert command not in FORBIDDEN, call[0]
        assert command == "TIME" or re.fullmatch(r"[A-Za-z_.]+(\[[^\]]+\])?", key), call[0]
    built = [text for text in TEXT.findall(code) if re.search(r"rsv:|:\{|\}:[a-z]", text)]
    assert built == []
