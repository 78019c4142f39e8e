"""The bill of materials of a release, as `make sbom` writes it."""

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[3]


def test_the_sbom_lists_each_locked_package_with_its_version_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    # Pretend that it is set up: the tests run in that environment already.
    command = ["make", "--old-file=setup", "sbom", f"SBOM={path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=150)
    sbom = msgspec.json.decode(path.read_bytes())
    lock = (ROOT / "requirements/run.txt").read_text()
    locked = re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)
    assert locked
    listed = {component["name"]: component for component in sbom["components"]}
    assert {(name, listed[name]["version"]) for name in listed} == set(locked)
    hashes = [
        entry["content"]
        for component in sbom["components"]
        for reference in component["externalReferences"]
        for entry in reference["hashes"]
    ]
    assert sorted(hashes) == sorted(re.findall(r"--hash=sha256:(\w+)", lock))
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == "stock-reservation"
