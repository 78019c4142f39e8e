"""Only the time of a loss goes unjudged, and only a rebuild shows that there was one."""

import msgspec

from reservation.verification.model.history_format import EventLine, Head, History, Operation
from tests.faults.chaos.losses import separated

#: The monotonic clock has the same milliseconds as Unix time, less this.
NOW = History(version=1, unix_ms=1_000_000, monotonic_ns=0)


def ns(at_ms: int) -> int:
    return (at_ms - NOW.unix_ms) * 1_000_000


def past(*events: tuple[str, str, int]) -> bytes:
    """Events as `reservation history` writes them: name, order, time."""
    lines = [
        EventLine(sale="s", seq=seq, event=name, order=order, at=at_ms, data="{}", chain="")
        for seq, (name, order, at_ms) in enumerate(events, 1)
    ]
    return b"\n".join(msgspec.json.encode(line) for line in lines)


def hold(order: str, seq: int, at_ms: int) -> Operation:
    return Operation(
        sale="s", client="c", operation="prepare", order=order, status=201, reported="HELD",
        seq=seq, invoked_ns=ns(at_ms) - 1_000_000, answered_ns=ns(at_ms) + 1_000_000,
    )  # fmt: skip


def refusal(at_ms: int) -> Operation:
    return Operation(
        sale="s", client="c", operation="prepare", status=409, code="sold_out",
        invoked_ns=ns(at_ms), answered_ns=ns(at_ms) + 1_000_000,
    )  # fmt: skip


LOST = past(("created", "", 100), ("prepared", "a", 200), ("rebuilt", "", 900))


def test_without_a_rebuild_every_answer_is_judged() -> None:
    calls = [hold("a", 2, 200), hold("b", 3, 300), refusal(400)]
    found = separated(past(("created", "", 100), ("prepared", "a", 200)), calls, NOW)
    assert (found.calls, found.lost, found.unjudged) == (calls, [], 0)


def test_a_hold_without_an_event_before_the_rebuild_is_lost() -> None:
    kept, lost = hold("a", 2, 200), hold("b", 3, 300)
    found = separated(LOST, [kept, lost], NOW)
    assert (found.calls, found.lost) == ([kept], ["b"])


def test_answers_and_heads_of_the_lost_time_are_left_out_and_counted() -> None:
    before, after = refusal(150), refusal(1000)
    head = Head(sale="s", invoked_ns=ns(400), answered_ns=ns(401), seq=3)
    found = separated(LOST, [before, refusal(500), head, after], NOW)
    assert (found.calls, found.unjudged) == ([before, after], 1)


def test_a_hold_that_is_kept_is_judged_in_the_lost_time_too() -> None:
    late = hold("a", 2, 400)
    assert separated(LOST, [late], NOW).calls == [late]


def test_the_lost_time_begins_with_the_first_lost_hold() -> None:
    # The other side of a partition went on, so events before the rebuild are late.
    split = past(("created", "", 100), ("prepared", "a", 200), ("prepared", "c", 800),
                 ("rebuilt", "", 900))  # fmt: skip
    found = separated(split, [hold("b", 3, 300), refusal(500), refusal(250)], NOW)
    assert (found.lost, found.unjudged, len(found.calls)) == (["b"], 1, 1)


def test_a_hold_without_an_event_after_the_rebuild_is_judged() -> None:
    late = hold("b", 4, 1200)
    found = separated(LOST, [late], NOW)
    assert (found.calls, found.lost) == ([late], [])


def test_only_the_undecided_payment_of_a_lost_hold_is_left_out() -> None:
    def read(order: str, status: str) -> Operation:
        return Operation(
            sale="s", client="c", operation="read", order=order, status=200, reported=status,
            invoked_ns=ns(1500), answered_ns=ns(1501),
        )  # fmt: skip

    undecided, wrong, known = read("b", "CONFIRMING"), read("b", "HELD"), read("a", "CONFIRMING")
    kept, lost = hold("a", 2, 200), hold("b", 3, 300)
    found = separated(LOST, [kept, lost, undecided, wrong, known], NOW)
    assert (found.calls, found.unjudged) == ([kept, wrong, known], 1)


def test_an_order_that_was_taken_again_is_not_lost() -> None:
    again = past(("created", "", 100), ("rebuilt", "", 900), ("prepared", "b", 1000))
    first, second = hold("b", 2, 300), hold("b", 3, 1000)
    found = separated(again, [first, second], NOW)
    assert (found.calls, found.lost) == ([second], [])
