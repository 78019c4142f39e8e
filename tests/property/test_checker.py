"""The history checker on a real history: clean, then with each violation that it must report."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from reservation.domain.events import GENESIS, chain_of
from reservation.domain.states import TRANSITIONS, Status
from reservation.verification.model.event_data import EDGES
from reservation.verification.model.history_format import (
    DECODER,
    End,
    EventLine,
    Head,
    MoneyLine,
    Operation,
    OrderLine,
    Record,
    StockLine,
)
from reservation.verification.model.violations import Broken
from reservation.verification.verify import Unreadable, verify
from tests.support.recorder import Recorder, recording
from tests.support.service import Served, item

#: Units of the contended item, and its buyers.
PIECES, CROWD = 12, 30
LIMIT = 2

T = TypeVar("T", bound=Record)
Lines = list[Any]


def shop(served: Served, recorder: Recorder) -> None:
    """Every kind of answer once, then a crowd that sells the item out."""
    sale_id = recorder.sale_id
    leaver, payer, greedy = (served.buyer() for _ in range(3))
    left = served.hold(sale_id, leaver, key="leaves")
    served.prepare(sale_id, leaver, key="leaves")
    served.get_reservation(left)
    served.release(left)
    paid = served.hold(sale_id, payer)
    key = served.pay(paid)
    for _ in range(2):
        assert served.open_success_url(paid, key).json()["status"] == "CONFIRMED"
    assert served.open_success_url(paid, key, amount="1").status_code == 400
    assert served.release(paid).status_code == 409
    declined = served.hold(sale_id, served.buyer())
    refused = served.pay(declined, decline="REJECT_CARD_COMPANY")
    assert served.open_success_url(declined, refused).status_code == 402
    assert served.prepare(sale_id, payer, amount=999).status_code == 409
    served.hold(sale_id, greedy, items=[("a", LIMIT)], amount=1000 * LIMIT)
    assert served.prepare(sale_id, greedy).json()["code"] == "buyer_limit_exceeded"
    with ThreadPoolExecutor(8) as crowd:
        list(crowd.map(lambda _: wants_one(served, sale_id), range(CROWD)))


def wants_one(served: Served, sale_id: str) -> None:
    answer = served.prepare(sale_id, served.buyer())
    if answer.status_code == 201:
        order = answer.json()
        assert served.open_success_url(order, served.pay(order)).status_code == 200
    else:
        assert answer.json()["code"] == "sold_out"


@pytest.fixture(scope="module")
def recorded(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The history of a sale without faults."""
    sale_id = served.sale(items=[item("a", total=PIECES, limitPerBuyer=LIMIT)])
    with recording(served, sale_id) as recorder:
        shop(served, recorder)
    path = tmp_path_factory.mktemp("history") / "clean.jsonl"
    recorder.write(path)
    return path


@pytest.fixture
def clean(recorded: Path) -> Lines:
    """The lines of that history, for a test to corrupt."""
    return [DECODER.decode(line) for line in recorded.read_bytes().splitlines()]


def test_a_clean_history_is_checked_completely_without_violations(recorded: Path) -> None:
    judged = verify(recorded)
    assert judged.violations == []
    assert judged.ok
    assert judged.events == last_seq(recorded)
    assert judged.answers >= CROWD + 10
    assert judged.refusals >= CROWD - PIECES
    assert judged.unknown == 0
    assert judged.heads > 1
    assert judged.orders_compared > PIECES // 2
    assert judged.money_compared == judged.orders_compared - 3


def last_seq(path: Path) -> int:
    end = DECODER.decode(path.read_bytes().splitlines()[-1])
    assert isinstance(end, End)
    return end.seq


def of_kind(lines: Lines, kind: type[T], **facts: Any) -> list[T]:
    """The lines of this type that have these members."""
    return [
        line
        for line in lines
        if isinstance(line, kind) and all(getattr(line, k) == v for k, v in facts.items())
    ]


def event(lines: Lines, name: str, at: int = 0) -> EventLine:
    return of_kind(lines, EventLine, event=name)[at]


def call(lines: Lines, **facts: Any) -> Operation:
    return of_kind(lines, Operation, **facts)[0]


def change(line: EventLine, **facts: Any) -> None:
    """Data of another change, as a script would have written it; `origin` is the member `from`."""
    members = msgspec.json.decode(line.data)
    facts = {"from" if name == "origin" else name: value for name, value in facts.items()}
    line.data = msgspec.json.encode({**members, **facts}).decode()


def chain_anew(lines: Lines) -> None:
    """Renumber and rechain the events, as if this had been the history."""
    seq, chain = 0, GENESIS
    for line in of_kind(lines, EventLine):
        seq += 1
        chain = chain_of(
            chain,
            seq=seq,
            event=line.event,
            order_id=line.order,
            at_ms=line.at,
            data=line.data,
        )
        line.seq, line.chain = seq, chain
    for end in of_kind(lines, End):
        end.seq = seq


def amount_of_an_answer(lines: Lines) -> None:
    call(lines, operation="prepare", status=201).amount += 1


def state_of_an_answer(lines: Lines) -> None:
    call(lines, operation="success", status=200).reported = "REFUNDED"


def event_left_out(lines: Lines) -> None:
    lines.remove(event(lines, "released"))


def event_left_out_and_chained_anew(lines: Lines) -> None:
    lines.remove(event(lines, "claimed"))
    chain_anew(lines)


def last_event_left_out(lines: Lines) -> None:
    lines.remove(of_kind(lines, EventLine)[-1])


def event_twice(lines: Lines) -> None:
    lines.insert(lines.index(event(lines, "claimed")), event(lines, "claimed"))


def events_swapped(lines: Lines) -> None:
    at = lines.index(event(lines, "claimed"))
    lines[at], lines[at + 1] = lines[at + 1], lines[at]


def chain_byte(lines: Lines) -> None:
    line = event(lines, "confirmed")
    line.chain = ("0" if line.chain[0] != "0" else "1") + line.chain[1:]


def data_byte(lines: Lines) -> None:
    line = event(lines, "released")
    line.data = line.data.replace("cause", "causf")


def data_cut_off(lines: Lines) -> None:
    line = event(lines, "released")
    line.data = line.data[:-1]
    chain_anew(lines)


def counters_raised(lines: Lines) -> None:
    head = next(head for head in reversed(of_kind(lines, Head)) if head.stock)
    total, available, held, sold = head.stock["a"]
    head.stock["a"] = total, available + 1, held, sold


def false_sold_out(lines: Lines) -> None:
    wrong = call(lines, operation="prepare", status=201, replayed=False)
    wrong.status, wrong.code, wrong.available = 409, "sold_out", {"a": 0}


def false_limit(lines: Lines) -> None:
    line = call(lines, code="buyer_limit_exceeded")
    line.taken = line.limit - 1


def false_amount(lines: Lines) -> None:
    line = call(lines, code="amount_mismatch", operation="prepare")
    line.amount = line.expected_amount


def false_decline(lines: Lines) -> None:
    paid = call(lines, operation="success", reported="CONFIRMED")
    paid.status, paid.code = 402, "payment_declined"


def false_pause(lines: Lines) -> None:
    call(lines, code="sold_out").code = "sale_paused"


def sold_without_a_charge(lines: Lines) -> None:
    lines.remove(of_kind(lines, MoneyLine, entry="charge")[0])


def charge_kept_of_a_declined_order(lines: Lines) -> None:
    order = event(lines, "declined").order
    end = lines.pop()
    charge = MoneyLine(sale=end.sale, order=order, entry="charge", amount=1000)
    lines.extend([charge, end])


def over_the_limit(lines: Lines) -> None:
    change(event(lines, "prepared"), items=[["a", LIMIT + 1, 1000]], amount=1000 * (LIMIT + 1))
    chain_anew(lines)


def more_than_there_is(lines: Lines) -> None:
    line = event(lines, "sale_put")
    items = msgspec.json.decode(line.data)["items"]
    change(line, items=[{**items[0], "total": 2}])
    chain_anew(lines)


def another_price(lines: Lines) -> None:
    change(event(lines, "prepared"), items=[["a", 1, 999]], amount=999)
    chain_anew(lines)


def second_end(lines: Lines) -> None:
    sold = event(lines, "confirmed")
    ended = msgspec.structs.replace(
        sold, event="expired", data='{"from":"HELD","to":"EXPIRED","cause":"deadline"}'
    )
    lines.insert(lines.index(sold) + 1, ended)
    chain_anew(lines)


def no_such_edge(lines: Lines) -> None:
    change(event(lines, "released"), to="REFUNDED")
    chain_anew(lines)


def old_fence(lines: Lines) -> None:
    change(event(lines, "confirmed"), fence=7)
    chain_anew(lines)


def expired_early(lines: Lines) -> None:
    line = event(lines, "released")
    line.event = "expired"
    change(line, to="EXPIRED")
    chain_anew(lines)


def held_after_the_close(lines: Lines) -> None:
    line = event(lines, "sale_put")
    change(line, closesAt=line.at + 1)
    chain_anew(lines)


def missing_order(lines: Lines) -> None:
    order = event(lines, "prepared", -1).order
    for line in of_kind(lines, EventLine, order=order):
        lines.remove(line)
    chain_anew(lines)


def one_order_reported_twice(lines: Lines) -> None:
    first, second = of_kind(lines, Operation, operation="prepare", status=201, replayed=False)[:2]
    second.order = first.order


def answered_before_it_happened(lines: Lines) -> None:
    line = of_kind(lines, Operation, operation="prepare", status=201, replayed=False)[-1]
    early = of_kind(lines, Head)[0].invoked_ns
    line.invoked_ns, line.answered_ns = early - 2_000, early - 1_000


def other_order_in_sql(lines: Lines) -> None:
    of_kind(lines, OrderLine, status="CONFIRMED")[0].status = "RELEASED"


def order_missing_in_sql(lines: Lines) -> None:
    lines.remove(of_kind(lines, OrderLine)[0])


def counters_at_the_end(lines: Lines) -> None:
    end = lines.pop()
    stock = StockLine(sale=end.sale, sku="a", total=PIECES, available=1, held=0, sold=PIECES)
    end.stock = True
    lines.extend([stock, end])


BREAKS: dict[Callable[[Lines], None], Broken] = {
    amount_of_an_answer: Broken.ANSWER,
    state_of_an_answer: Broken.ANSWER,
    event_left_out: Broken.GAP,
    event_left_out_and_chained_anew: Broken.TRANSITION,
    last_event_left_out: Broken.GAP,
    event_twice: Broken.REPEATED,
    events_swapped: Broken.REPEATED,
    chain_byte: Broken.CHAIN,
    data_byte: Broken.CHAIN,
    data_cut_off: Broken.UNREADABLE,
    counters_raised: Broken.COUNTERS,
    false_sold_out: Broken.ANSWER,
    false_limit: Broken.ANSWER,
    false_amount: Broken.ANSWER,
    false_decline: Broken.ANSWER,
    false_pause: Broken.ANSWER,
    sold_without_a_charge: Broken.UNPAID,
    charge_kept_of_a_declined_order: Broken.MONEY,
    over_the_limit: Broken.LIMIT,
    more_than_there_is: Broken.OVERSOLD,
    another_price: Broken.PRICE,
    second_end: Broken.SECOND_END,
    no_such_edge: Broken.TRANSITION,
    old_fence: Broken.FENCE,
    expired_early: Broken.TIME,
    held_after_the_close: Broken.TIME,
    missing_order: Broken.LOST,
    one_order_reported_twice: Broken.ANSWER,
    answered_before_it_happened: Broken.REAL_TIME,
    other_order_in_sql: Broken.FINAL,
    order_missing_in_sql: Broken.FINAL,
    counters_at_the_end: Broken.COUNTERS,
}


@pytest.mark.parametrize("harm", BREAKS, ids=lambda one: one.__name__)
def test_each_violation_is_detected_by_name(
    clean: Lines, tmp_path: Path, harm: Callable[[Lines], None]
) -> None:
    harm(clean)
    judged = verify(written(clean, tmp_path))
    assert not judged.ok
    assert BREAKS[harm] in {found.name for found in judged.violations}
    assert all(0 < found.line <= len(clean) and found.reason for found in judged.violations)


def written(lines: Lines, folder: Path) -> Path:
    path = folder / "history.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines) + b"\n")
    return path


def test_a_violation_reports_the_line_that_proves_it(clean: Lines, tmp_path: Path) -> None:
    wrong = call(clean, operation="prepare", status=201)
    wrong.amount += 1
    (found,) = verify(written(clean, tmp_path)).violations
    assert clean[found.line - 1] is wrong


def test_a_truncated_file_or_other_format_is_unreadable(clean: Lines, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="truncated"):
        verify(written(clean[:-1], tmp_path))
    with pytest.raises(Unreadable, match="first line"):
        verify(written(clean[1:], tmp_path))
    with pytest.raises(Unreadable, match="follows the events"):
        verify(written([*clean, call(clean, status=201)], tmp_path))
    path = written(clean, tmp_path)
    path.write_bytes(path.read_bytes() + b"{]\n")
    with pytest.raises(Unreadable, match=f"line {len(clean) + 1}"):
        verify(path)
    with pytest.raises(Unreadable, match="No such file"):
        verify(tmp_path / "nothing")


def test_the_exit_status_follows_the_verdict(recorded: Path, clean: Lines, tmp_path: Path) -> None:
    def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "api.cli", "verify", str(path), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)

    good = run(recorded)
    assert (good.returncode, good.stderr) == (0, "")
    assert "no violation" in good.stdout
    assert json.loads(run(recorded, "--json").stdout)["ok"] is True
    chain_byte(clean)
    bad = run(written(clean, tmp_path))
    assert bad.returncode == 1
    assert ": chain: " in bad.stdout
    nothing = run(tmp_path / "nothing")
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("reservation: ")


def test_each_transition_of_an_event_is_in_the_contract() -> None:
    walked = {(Status(origin), Status(to)) for _, origin, to in EDGES if origin != to}
    assert walked == {(origin, to) for origin, ends in TRANSITIONS.items() for to in ends}


def test_a_refusal_true_at_any_time_during_its_call_is_accepted(
    clean: Lines, tmp_path: Path
) -> None:
    """A call that spans a whole sale may be refused for a condition that holds only at the end."""
    line = call(clean, code="sold_out")
    line.invoked_ns = of_kind(clean, Head)[0].invoked_ns - 1
    assert verify(written(clean, tmp_path)).ok


def test_a_call_with_an_unknown_outcome_is_accepted(clean: Lines, tmp_path: Path) -> None:
    line = call(clean, operation="prepare", status=201, replayed=False)
    line.status, line.answered_ns = 0, None
    judged = verify(written(clean, tmp_path))
    assert (judged.ok, judged.unknown) == (True, 1)


@pytest.mark.parametrize(("seconds_late", "ok"), [(301, True), (200, False)])
def test_a_new_order_may_be_reported_as_expired_after_its_deadline(
    clean: Lines, tmp_path: Path, seconds_late: int, ok: bool
) -> None:
    """The answer was in transit for longer than the hold lasts, which is 300 s here."""
    line = call(clean, operation="prepare", status=201, replayed=False)
    assert line.answered_ns is not None
    line.reported, line.answered_ns = "EXPIRED", line.answered_ns + seconds_late * 1_000_000_000
    judged = verify(written(clean, tmp_path))
    assert judged.ok is ok, judged.violations
