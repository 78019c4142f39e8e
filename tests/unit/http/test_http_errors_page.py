"""The page of HTTP errors lists each code with its status."""

import re
from pathlib import Path

from api.http.problem_details import (
    AMOUNT_MISMATCH_AT_PREPARE,
    AMOUNT_MISMATCH_AT_SUCCESS,
    STATUSES,
)

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "http-errors.md"
ROW = re.compile(r"^\| `(?P<code>[a-z_]+)` \| (?P<status>[^|]+) \|", re.MULTILINE)


def rows() -> dict[str, set[int]]:
    """The statuses of each code on the page."""
    return {
        row["code"]: {int(status) for status in re.findall(r"\d{3}", row["status"])}
        for row in ROW.finditer(PAGE.read_text())
    }


def test_the_page_lists_each_code_with_its_status() -> None:
    page = rows()
    assert {code: page.get(code) for code in STATUSES} == {
        code: {status} for code, status in STATUSES.items()
    }


def test_the_page_lists_both_statuses_of_an_amount_mismatch() -> None:
    assert rows()["amount_mismatch"] == {AMOUNT_MISMATCH_AT_PREPARE, AMOUNT_MISMATCH_AT_SUCCESS}
