"""Text from users: refused characters, and escaping for a terminal."""

import re
from typing import Any

import pytest

from api.cli.output import show_order
from reservation.domain.text import TEXT, printable

ORDER: dict[str, Any] = {
    "orderId": "sale-1",
    "status": "HELD",
    "updatedAt": "now",
    "items": [{"quantity": 1, "sku": "a"}],
    "amount": 1,
    "currency": "KRW",
    "buyerId": "b",
    "next": "nothing",
    "history": [
        {
            "at": "now",
            "kind": "event",
            "what": "prepared",
            "facts": {"name": "\x1b[2J\nnext: [red]all is well\u202e"},
        }
    ],
}


def test_control_characters_are_refused_and_letters_accepted() -> None:
    controls = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
    controls += [0x61C, 0x200E, 0x200F]
    for code in controls:
        assert re.search(TEXT, f"a{chr(code)}") is None, hex(code)
    for text in ("", "a", "한정판", "é\u0301", "👩\u200d🚀", "a\u3000b", "a\u00a0b"):
        assert re.search(TEXT, text) is not None, text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("한정판\u3000한", "한정판\u3000한"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x9b\u202e\u2066", r"\x9b\u202e\u2066"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_unprintable_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_table_sends_a_terminal_neither_controls_nor_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_order(ORDER)
    printed = capsys.readouterr().out
    assert r"name=\x1b[2J\nnext: [red]all is well\u202e" in printed
    assert "\x1b" not in printed
    assert [line for line in printed.splitlines() if line.startswith("next:")] == ["next: nothing"]
