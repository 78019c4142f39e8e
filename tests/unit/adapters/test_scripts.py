"""The loader of the Lua scripts: includes, digests, and the flags that each script declares."""

import hashlib
import re
from pathlib import Path

import pytest

from reservation.adapters.redis import scripts
from reservation.adapters.redis.scripts import load, script_folder

NAMES = sorted(path.stem for path in script_folder().glob("*.lua"))

#: Scripts that run without memory: giving stock back, and following money that may have moved.
GOES_ON_WITHOUT_MEMORY = {
    "add_tombstones",
    "claim",
    "expire",
    "finish",
    "lease",
    "refund",
    "release",
    "restock",
    "restore_order",
    "switch",
    "touch",
}
#: Scripts that only read.
READ_ONLY = {"audit", "reading"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_each_script_of_the_design_exists() -> None:
    wanted = {"prepare", "claim", "finish", "release", "expire", "refund", "put_sale", "restock"}
    assert wanted | {"audit"} <= set(NAMES)


def test_includes_are_expanded_in_place(name: str) -> None:
    file = (script_folder() / f"{name}.lua").read_text()
    source = load(name).source
    assert "--@include" not in source
    for include in re.findall(r"--@include (lib/[a-z_]+\.lua)", file):
        assert (script_folder() / include).read_text() in source


def test_a_lib_file_is_included_once_where_it_is_used(name: str) -> None:
    file = (script_folder() / f"{name}.lua").read_text()
    includes = re.findall(r"--@include (lib/[a-z_]+\.lua)", file)
    assert len(set(includes)) == len(includes)
    for include in includes:
        step = (script_folder() / include).read_text()
        made = re.findall(r"^local (?:function )?([A-Za-z_]+)", step, re.MULTILINE)
        # Once in its definition, and again in a call.
        uses = [len(re.findall(rf"\b{word}\b", load(name).source)) for word in made]
        assert max(uses) > 1, include


def test_the_digest_equals_the_servers_sha1_of_the_script(name: str) -> None:
    script = load(name)
    digest = hashlib.sha1(script.source.encode(), usedforsecurity=False).hexdigest()
    assert (script.name, script.sha) == (name, digest)


def test_the_first_line_declares_the_flags_of_the_script(name: str) -> None:
    """Without `#!lua` a script may be refused after its first write."""
    first = load(name).source.splitlines()[0]
    expected = "#!lua flags=no-writes" if name in READ_ONLY else "#!lua"
    if name in GOES_ON_WITHOUT_MEMORY:
        expected = "#!lua flags=allow-oom"
    assert first == expected


def test_each_script_file_is_read_once() -> None:
    assert load("audit") is load("audit")


def test_an_unknown_script_name_fails_at_load() -> None:
    with pytest.raises(FileNotFoundError):
        load("no_such_script")


def test_a_missing_include_fails_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.lua").write_text("#!lua\n--@include lib/gone.lua\nreturn 1\n")
    monkeypatch.setattr(scripts, "script_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError):
        load("broken")
