"""Verdict on a run: reconciles the books, and checks every answer against them."""

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtests.buyer_outcomes import Answers, LastAnswer
from reservation.verification.balance_check import BalanceCheck, Orders, disagreements, unsettled
from reservation.verification.model.report import Judgement

__all__ = ["RequestLine", "Sample", "Verdict", "judge", "page_of", "problems_of_sample", "write"]

WEB: Final = Path(__file__).parent / "web"
#: Lines of one kind of problem; the total count is reported with them.
PROBLEMS_MAX: Final = 200

#: Allowed final states of an order, by the last answer to its buyer. After a word that is not here
#: (`held`, or an answer that never came) it may be in any decided state.
ALLOWED: Final = {
    "confirmed": {"CONFIRMED"},
    "released": {"RELEASED"},
    "declined": {"RELEASED", "EXPIRED"},
    "expired": {"EXPIRED", "RELEASED"},
    "sold_out": {"RELEASED", "EXPIRED"},
    "buyer_limit_exceeded": {"RELEASED", "EXPIRED"},
    "reservation_expired": {"RELEASED", "EXPIRED"},
    "sale_closed": {"RELEASED", "EXPIRED"},
}
_COUNTS: Final = ("requests", "failures")
_DECIDED: Final = {"CONFIRMED", "RELEASED", "EXPIRED"}


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one item at one second of the run."""

    seconds: float
    sku: str
    total: int
    available: int
    held: int
    sold: int


class RequestLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One line of Locust's statistics."""

    method: str
    name: str
    requests: int
    failures: int
    per_second: float
    median_ms: int
    p95_ms: int
    p99_ms: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of a run; `problems` is empty if nothing was oversold and all books agree."""

    ok: bool
    sale_id: str
    scenario: str
    started_at: str
    seconds: float
    users: int
    requests: int
    failures: int
    total: int
    sold: int
    held: int
    charged: int
    cancelled: int
    confirmed_amount: int
    orders: int
    #: Orders about which a buyer got an answer, each checked against the books.
    answers_checked: int
    lives: dict[str, int]
    #: Errors come first.
    problems: list[str]
    #: The judgement on the recorded history; its violations are among the problems.
    history: Judgement | None = None
    statistics: list[RequestLine] = []
    samples: list[Sample] = []


def judge(
    *,
    books: BalanceCheck,
    answers: Answers,
    samples: list[Sample],
    statistics: list[RequestLine],
    judgement: Judgement | None = None,
    exceptions: int = 0,
    seen: Iterable[str] = (),
    **facts: Any,
) -> Verdict:
    """Check all invariants after a run.

    Args:
        books: of the sale, after the last hold has ended.
        answers: of all the buyers.
        samples: the counters during the run.
        statistics: of the requests; a run without any has proved nothing.
        judgement: on the recorded history, if there is one.
        exceptions: of the buyers.
        seen: problems found during the run.
        facts: `sale_id`, `scenario`, `started_at`, `seconds` and `users`.
    """
    requests = sum(line.requests for line in statistics)
    problems = [*seen, *disagreements(books), *_answers_against(books.orders, answers)]
    if judgement is not None:
        problems += _violations(judgement)
    problems += unsettled(books)
    if exceptions:
        problems.append(f"{exceptions} buyers died of an exception: see Locust's own page of them")
    problems += _proved_nothing(requests, statistics, answers)
    if len(problems) > PROBLEMS_MAX:
        more = len(problems) - PROBLEMS_MAX
        problems = [*problems[:PROBLEMS_MAX], f"and {more} more of them"]
    return Verdict(
        ok=not problems,
        requests=requests,
        failures=sum(line.failures for line in statistics),
        total=books.counted("total"),
        sold=books.counted("sold"),
        held=books.counted("held"),
        charged=books.charged,
        cancelled=books.cancelled,
        confirmed_amount=books.confirmed_amount,
        orders=len(books.orders),
        answers_checked=len(answers.orders),
        lives=dict(answers.lives.most_common()),
        problems=problems,
        history=judgement,
        statistics=statistics,
        samples=samples,
        **facts,
    )


def _proved_nothing(requests: int, statistics: list[RequestLine], answers: Answers) -> list[str]:
    """A run proves only the paths it took: without an order nothing could be wrong."""
    if not requests:
        return ["no request was made: nothing was proved"]
    found: list[str] = []
    # Sold out and similar refusals have their own lines, "prepare: sold out", and are not
    # failures.
    prepares = [line for line in statistics if line.name.partition(":")[0] == "prepare"]
    made, failed = (sum(getattr(line, name) for line in prepares) for name in _COUNTS)
    if made and made == failed:
        found.append(f"all {made} prepares failed, and none by a refusal of the sale")
    if not answers.orders:
        ends = ", ".join(f"{count} x {end}" for end, count in answers.lives.most_common(3))
        found.append(
            "no buyer got an order, so no answer was checked: nothing was proved"
            + (f" ({ends})" if ends else "")
        )
    return found


def _violations(judgement: Judgement) -> list[str]:
    reported = [
        f"history, line {one.line}: {one.name}: {one.reason}" for one in judgement.violations
    ]
    more = judgement.violation_count - len(reported)
    if more:
        reported.append(f"and {more} more violations in the history")
    if not judgement.answers:
        reported.append("the history has no answer that could be judged: nothing was proved")
    return reported


def problems_of_sample(sample: Sample) -> list[str]:
    """Violations of the invariants that hold at every moment."""
    found: list[str] = []
    if sample.total != sample.available + sample.held + sample.sold:
        found.append("total is not available + held + sold")
    if min(sample.available, sample.held, sample.sold) < 0:
        found.append("negative counter")
    if sample.sold > sample.total:
        found.append("oversold")
    return [f"{what}, at {sample.seconds:.1f} s: {sample}" for what in found]


def _answers_against(orders: Orders, answers: Answers) -> list[str]:
    found = list(answers.wrong)
    if answers.wrong_count > len(answers.wrong):
        found.append(f"and {answers.wrong_count - len(answers.wrong)} more such answers")
    if answers.unchecked:
        found.append(f"{answers.unchecked} orders were too many to be checked")
    for order_id, reported in answers.orders.items():
        found += _answer_against(order_id, reported, orders.get(order_id))
    return found


def _answer_against(order_id: str, reported: LastAnswer, order: dict[str, Any] | None) -> list[str]:
    if order is None:
        return [f"{order_id}: reported as {reported.word}, missing in SQL"]
    found: list[str] = []
    if order["status"] not in ALLOWED.get(reported.word, _DECIDED):
        found.append(f"{order_id}: reported as {reported.word}, it is {order['status']}")
    if order["amount"] != reported.amount:
        found.append(f"{order_id}: reported amount {reported.amount}, expected {order['amount']}")
    return found


def write(verdict: Verdict, folder: Path) -> None:
    """`verdict.json` and `verdict.html`, which is self-contained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdict.json").write_bytes(msgspec.json.format(msgspec.json.encode(verdict)))
    (folder / "verdict.html").write_text(page_of(verdict), encoding="utf-8")


def page_of(verdict: Verdict) -> str:
    """The verdict as a page: the same board that the tab shows, drawn by the same script."""
    board = {
        "state": "done",
        "samples": verdict.samples,
        "verdict": msgspec.structs.replace(verdict, samples=[]),
    }
    # In a script element only `<` could end it.
    data = msgspec.json.encode(board).decode().replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Load test of {html.escape(verdict.sale_id)}</title>\n"
        f"<style>\n{(WEB / 'board.css').read_text()}</style>\n</head>\n<body>\n"
        f"<script>window.boardData = {data};</script>\n"
        f"<script>\n{(WEB / 'board.js').read_text()}</script>\n</body>\n</html>\n"
    )
