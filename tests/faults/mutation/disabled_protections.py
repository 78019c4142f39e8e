"""Disabled protections: without each of them, one at a time, a named test must fail.

Each is a plausible edit of the source, and words of the failure that prove that the test failed for
this cause and no other.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

__all__ = ["BREAKERS", "Breaker", "copied", "off"]

ROOT = Path(__file__).resolve().parents[3]
#: The parts of the project that runs and tests need.
PARTS = ("api", "reservation", "scripts", "loadtests", "tests", "deploy", "pyproject.toml")


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """One protection that is off.

    Attributes:
        name: the protection that is off.
        file: its path from the project's root.
        old: the original text, which occurs once.
        new: the replacement.
        test: the test that must fail.
        says: text that the failure must contain.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    says: str


BREAKERS = (
    Breaker(
        name="stock is not counted before it is held",
        file="scripts/lua/lib/sold_out.lua",
        old="short = short or stock.available < line.quantity",
        new="short = false",
        test="tests/lua/test_prepare.py::test_sold_out_is_all_or_nothing",
        says="sold_out",
    ),
    Breaker(
        name="a buyer's limit is not looked at",
        file="scripts/lua/lib/limit.lua",
        old="if has + line.quantity > line.stock.limit then",
        new="if false then",
        test="tests/lua/test_prepare.py::test_a_buyer_has_no_more_than_the_limit",
        says="limit_exceeded",
    ),
    Breaker(
        name="a repeated key takes once more",
        file="scripts/lua/prepare.lua",
        old='if standing == wish.digest then return {"replayed"} end',
        new="standing = nil",
        test="tests/integration/redis/test_prepare_queue.py::test_the_same_key_twenty_times_at_once_is_one_order",
        says="assert",
    ),
    Breaker(
        name="a late call still takes",
        file="scripts/lua/prepare.lua",
        old="if now_ms > not_after then",
        new="if false then",
        test="tests/lua/test_prepare.py::test_a_late_call_and_another_epoch_change_nothing",
        says="too_late",
    ),
    Breaker(
        name="an earlier life of the sale is sold from",
        file="scripts/lua/lib/head.lua",
        old="if found[1] ~= epoch then return nil end",
        new="",
        test="tests/lua/test_finish.py::test_a_finish_of_nothing_a_late_one_and_one_of_another_epoch",
        says="recovering",
    ),
    Breaker(
        name="an outbox that lost its end is gone on with",
        file="scripts/lua/lib/head.lua",
        old='if last.err or not last[1] or last[1][1] ~= found[2] .. "-0" then return nil end',
        new="",
        test="tests/lua/test_prepare.py::test_a_sale_that_lost_something_sells_nothing",
        says="recovering",
    ),
    Breaker(
        name="an old fence may finish",
        file="scripts/lua/finish.lua",
        old="if standing ~= fence or not to or unseen then",
        new="if not to or unseen then",
        test="tests/lua/test_finish.py::test_a_finish_whose_claim_was_taken_over_is_late_and_no_loss",
        says="stale",
    ),
    Breaker(
        name="a server that went back in time is sold from",
        file="scripts/lua/lib/head.lua",
        old="if head.seq ~= mark_seq then return head.seq < mark_seq end",
        new="do return false end",
        test="tests/lua/test_prepare.py::"
        "test_a_server_that_lost_what_its_caller_has_seen_changes_nothing",
        says="went_back",
    ),
    Breaker(
        name="a fence is given twice",
        file="scripts/lua/claim.lua",
        old="math.max(fence, known_fence) + 1",
        new="fence + 1",
        test="tests/lua/test_claim.py::test_a_claim_takes_the_next_fence_above_what_sql_knows",
        says="assert",
    ),
    Breaker(
        name="a lost claim passes for a late one",
        file="scripts/lua/finish.lua",
        old="if standing < fence or standing == fence and not_its_claim then",
        new="if false then",
        test="tests/lua/test_finish.py::"
        "test_a_finish_under_a_fence_that_nobody_got_here_finds_a_loss",
        says="lost",
    ),
    Breaker(
        name="what a process has seen is not compared",
        file="reservation/application/readiness/data_loss.py",
        old="if found.seq < mark.seq:",
        new="if False:",
        test="tests/integration/application/test_high_water_marks.py::test_what_no_process_is_left_to_tell_is_told_by_sql",
        says="KeyError",
    ),
    Breaker(
        name="what changed since may be undone",
        file="scripts/lua/finish.lua",
        old="if standing ~= fence or not to or unseen then",
        new="if standing ~= fence or not to then",
        test="tests/lua/test_finish.py::test_who_asked_before_the_last_change_does_not_undo_it",
        says="stale",
    ),
    Breaker(
        name="a refund does not decide on its units",
        file="reservation/application/payments/resolve.py",
        old='return refund is None or refund.status == "refused" or refund.restock',
        new="return True",
        test="tests/faults/payments/test_deposits.py::"
        "test_units_withdrawn_by_a_refund_stay_out_where_the_account_lapses",
        says="assert",
    ),
    Breaker(
        name="a payment under way keeps its deadline",
        file="scripts/lua/claim.lua",
        old='redis.call("ZREM", deadlines, order_id)',
        new="",
        test="tests/lua/test_claim.py::test_a_payment_that_comes_before_the_reaper_wins",
        says="assert",
    ),
    Breaker(
        name="one clock ends a hold",
        file="scripts/lua/expire.lua",
        old="math.min(now_ms, caller_ms)",
        new="math.max(now_ms, caller_ms)",
        test="tests/lua/test_expire.py::test_a_hold_never_ends_early_by_either_clock",
        says="not_due",
    ),
    Breaker(
        name="giving back needs memory",
        file="scripts/lua/release.lua",
        old="#!lua flags=allow-oom",
        new="#!lua",
        test="tests/lua/test_out_of_memory.py::"
        "test_new_holds_and_sales_are_refused_before_they_write_and_the_rest_goes_on",
        says="StoreUnavailable",
    ),
    Breaker(
        name="a server that nobody vouched for is sold from",
        file="reservation/adapters/redis/client.py",
        old="if self._guard.active and wire.life != self._guard.life and not self._exempt:",
        new="if False:",
        test="tests/integration/application/test_redis_monitor.py::"
        "test_a_server_that_nobody_vouched_for_is_sold_nothing_from",
        says="DID NOT RAISE",
    ),
    Breaker(
        name="a code that nobody listed gives back",
        file="reservation/adapters/toss/error_codes.py",
        old='return Unknown(f"{status} {code}", bound_to_key=bound)',
        new='return Declined(code, "")',
        test="tests/unit/adapters/test_error_codes.py::test_a_code_that_is_not_listed_says_nothing_about_the_money",
        says="Declined",
    ),
    Breaker(
        name="a decline gives back whatever it answers",
        file="reservation/domain/payment_rules.py",
        old="if asked is AnswerTo.FIRST_CONFIRM\n                else LookUp()",
        new="if True\n                else LookUp()",
        test="tests/unit/domain/test_payment_rules.py::test_a_decline_gives_back_only_in_answer_to_the_first_confirm",
        says="LookUp",
    ),
    Breaker(
        name="the PG's amount is believed",
        file="reservation/domain/payment_rules.py",
        old="    ours = _is_priced(payment, order)",
        new="    ours = True",
        test="tests/unit/domain/test_payment_rules.py::test_an_answer_that_is_not_ours_in_every_member_sells_nothing",
        says="confirmed",
    ),
    Breaker(
        name="a token's signature is not compared",
        file="reservation/domain/tokens.py",
        old="if not hmac.compare_digest(ours.digest(body.encode()), mac):",
        new="if False:",
        test="tests/unit/domain/test_tokens.py::test_no_character_of_a_token_can_be_changed",
        # The forged token's claims are read.
        says="claims = _claims(parts[2])",
    ),
    Breaker(
        name="a gap in the events is written over",
        file="reservation/workers/flusher.py",
        old="await self._outbox.ack(sale_id, done)",
        new="await self._outbox.ack(sale_id, [event.seq + 1 for event in events])",
        test="tests/integration/sql/test_flusher.py",
        says="assert",
    ),
)


def copied(folder: Path) -> Path:
    """A copy of the project that may be broken."""
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
    return folder


@contextmanager
def off(copy: Path, breaker: Breaker) -> Iterator[None]:
    """The protection is off in this copy during the block."""
    file = copy / breaker.file
    whole = file.read_text()
    file.write_text(whole.replace(breaker.old, breaker.new))
    try:
        yield
    finally:
        file.write_text(whole)
