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

#: Histories of the model, replayed by the scripts.
REPLAY = (
    "tests/property/test_partition_replay.py::"
    "test_the_scripts_follow_the_model_in_each_small_scenario"
)


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
        name="a lease is ended while its holder may call the PG",
        file="scripts/lua/lease.lua",
        old="lease_end % 1 > 0",
        new="true",
        test="tests/lua/test_lease.py::test_a_lease_without_a_pause_is_never_ended_early",
        says="taken",
    ),
    Breaker(
        name="the rights of a role are not checked",
        file="api/http/auth/operators.py",
        old="if right not in RIGHTS[operator.role]:",
        new="if False:",
        test="tests/http/test_operator_keys.py::test_the_refusal_of_a_role_names_the_right",
        says="assert",
    ),
    Breaker(
        name="a revoked key stays valid",
        file="reservation/adapters/sql/operator_keys.py",
        old="select(*_COLUMNS).where(operator_keys.c.revoked_at_ms.is_(None)).limit(KEYS_MAX)",
        new="select(*_COLUMNS)",
        test="tests/http/test_operator_keys.py::"
        "test_each_process_accepts_a_new_key_and_refuses_a_revoked_one",
        says="assert",
    ),
    Breaker(
        name="the addresses of a webhook's host are not checked",
        file="reservation/adapters/webhooks/addresses.py",
        old="if not is_allowed(ip_address(text), allow_private=self._allow_private):",
        new="if False:",
        test="tests/unit/adapters/test_webhook_addresses.py::"
        "test_one_refused_address_of_a_name_refuses_the_name",
        says="DID NOT RAISE",
    ),
    Breaker(
        name="the signature of a webhook is not compared",
        file="reservation/client/webhooks.py",
        old="return hmac.compare_digest(given, expected)",
        new="return True",
        test="tests/unit/client/test_verify_webhook.py::test_a_changed_body_is_refused",
        says="DID NOT RAISE",
    ),
    Breaker(
        name="a webhook does not wait for the one of its order before it",
        file="reservation/application/events/delivery.py",
        old='if result.status == "pending":',
        new="if False:",
        test="tests/integration/events/test_webhooks.py::"
        "test_a_failed_delivery_is_repeated_under_its_id",
        says="evt_3",
    ),
    Breaker(
        name="the stock check of a hold is off",
        file="scripts/lua/lib/sold_out.lua",
        old="short = short or stock.available < line.quantity",
        new="short = false",
        test="tests/lua/test_prepare.py::test_a_basket_is_held_completely_or_not_at_all",
        says="sold_out",
    ),
    Breaker(
        name="the limit per buyer is not checked",
        file="scripts/lua/lib/limit.lua",
        old="if has + line.quantity > line.stock.limit then",
        new="if false then",
        test="tests/lua/test_prepare.py::test_a_buyer_cannot_exceed_the_limit",
        says="limit_exceeded",
    ),
    Breaker(
        name="a repeated key takes a second hold",
        file="scripts/lua/lib/basket.lua",
        old='"digest")\n    if standing == wish.digest then return {"replayed"} end',
        new='"digest")\n    standing = nil',
        test="tests/integration/redis/test_prepare_queue.py::test_twenty_concurrent_uses_of_a_key_make_one_order",
        says="assert",
    ),
    Breaker(
        name="a repeated key of an order with a tombstone takes a second hold",
        file="scripts/lua/lib/basket.lua",
        old="standing, basket.ended = standing or digest, count",
        new="basket.ended = count",
        test="tests/lua/test_prepare_tombstones.py::test_a_replayed_key_finds_its_tombstone",
        says="assert",
    ),
    Breaker(
        name="orders with a tombstone are beyond the limit of unpaid orders",
        file="scripts/lua/lib/unpaid.lua",
        old="local all = basket.orders + basket.ended",
        new="local all = basket.orders",
        test="tests/lua/test_prepare_tombstones.py::test_tombstones_count_against_the_limit_on_unpaid_orders",
        says="assert",
    ),
    Breaker(
        name="a call after its deadline still takes a hold",
        file="scripts/lua/prepare.lua",
        old="if now_ms > not_after then",
        new="if false then",
        test="tests/lua/test_prepare.py::test_a_late_or_outdated_call_changes_nothing",
        says="too_late",
    ),
    Breaker(
        name="the sale's epoch is not checked",
        file="scripts/lua/lib/head.lua",
        old="if found[1] ~= epoch then return nil end",
        new="",
        test="tests/lua/test_finish.py::test_an_unknown_late_or_outdated_finish_changes_nothing",
        says="recovering",
    ),
    Breaker(
        name="a truncated outbox is not detected",
        file="scripts/lua/lib/head.lua",
        old='if last.err or not last[1] or last[1][1] ~= found[2] .. "-0" then return nil end',
        new="",
        test="tests/lua/test_prepare.py::test_an_incomplete_sale_accepts_no_prepare",
        says="recovering",
    ),
    Breaker(
        name="a stale fence may finish",
        file="scripts/lua/finish.lua",
        old="if current_fence ~= fence or not to or unseen then",
        new="if not to or unseen then",
        test="tests/lua/test_finish.py::test_a_finish_after_a_take_over_is_stale_and_not_a_loss",
        says="stale",
    ),
    Breaker(
        name="a server behind the caller's mark is not detected",
        file="scripts/lua/lib/head.lua",
        old="if head.seq ~= mark_seq then return head.seq < mark_seq end",
        new="do return false end",
        test="tests/lua/test_prepare.py::"
        "test_a_server_with_lost_events_refuses_and_changes_nothing",
        says="went_back",
    ),
    Breaker(
        name="a fence is issued twice",
        file="scripts/lua/claim.lua",
        old="math.max(fence, known_fence) + 1",
        new="fence + 1",
        test="tests/lua/test_claim.py::test_a_claim_gets_a_fence_above_the_known_one_in_sql",
        says="assert",
    ),
    Breaker(
        name="a lost claim is treated as a stale one",
        file="scripts/lua/finish.lua",
        old="if current_fence < fence or current_fence == fence and not_its_claim then",
        new="if false then",
        test="tests/lua/test_finish.py::test_a_finish_under_an_unissued_fence_detects_a_loss",
        says="lost",
    ),
    Breaker(
        name="the marks of processes are not compared",
        file="reservation/application/readiness/head_comparison.py",
        old="if found.seq < mark.seq:",
        new="if False:",
        test="tests/integration/application/test_high_water_marks.py::test_marks_in_sql_show_a_loss_after_all_processes_ended",
        says="KeyError",
    ),
    Breaker(
        name="a finish may undo a later change",
        file="scripts/lua/finish.lua",
        old="if current_fence ~= fence or not to or unseen then",
        new="if current_fence ~= fence or not to then",
        test="tests/lua/test_finish.py::test_a_finish_read_before_the_last_change_is_stale",
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
        name="a claimed order keeps its deadline",
        file="scripts/lua/claim.lua",
        old='redis.call("ZREM", deadlines, order_id)',
        new="",
        test="tests/lua/test_claim.py::test_a_claim_before_the_reaper_keeps_the_hold",
        says="assert",
    ),
    Breaker(
        name="a single clock may expire a hold",
        file="scripts/lua/expire.lua",
        old="math.min(now_ms, caller_ms)",
        new="math.max(now_ms, caller_ms)",
        test="tests/lua/test_expire.py::test_a_hold_never_ends_early_by_either_clock",
        says="not_due",
    ),
    Breaker(
        name="releases and expiries need memory",
        file="scripts/lua/release.lua",
        old="#!lua flags=allow-oom",
        new="#!lua",
        test="tests/lua/test_out_of_memory.py::"
        "test_out_of_memory_refuses_holds_and_sales_before_any_write",
        says="StoreUnavailable",
    ),
    Breaker(
        name="an unvouched server is used for sales",
        file="reservation/adapters/redis/client.py",
        old="if self._guard.active and wire.life != self._guard.life and not self._exempt:",
        new="if False:",
        test="tests/integration/application/test_redis_monitor.py::"
        "test_holds_are_refused_on_an_unvouched_server",
        says="DID NOT RAISE",
    ),
    Breaker(
        name="an unlisted code releases the stock",
        file="reservation/adapters/toss/error_codes.py",
        old='return Unknown(f"{status} {code}", bound_to_key=bound)',
        new='return Declined(code, "")',
        test="tests/unit/adapters/test_error_codes.py::test_an_unlisted_code_leaves_the_payment_undecided",
        says="Declined",
    ),
    Breaker(
        name="a decline of any call releases the stock",
        file="reservation/domain/payment_rules.py",
        old="if asked is AnswerTo.FIRST_CONFIRM\n                else LookUp()",
        new="if True\n                else LookUp()",
        test="tests/unit/domain/test_payment_rules.py::test_a_decline_releases_only_after_the_first_confirm",
        says="LookUp",
    ),
    Breaker(
        name="the PG's amount is not checked",
        file="reservation/domain/payment_rules.py",
        old="    is_valid = _is_priced(payment, order)",
        new="    is_valid = True",
        test="tests/unit/domain/test_payment_rules.py::test_an_answer_with_a_mismatched_member_sells_nothing",
        says="confirmed",
    ),
    Breaker(
        name="a token's signature is not compared",
        file="reservation/domain/tokens.py",
        old="if not hmac.compare_digest(known_mac.digest(body.encode()), mac):",
        new="if False:",
        test="tests/unit/domain/test_tokens.py::test_a_token_with_any_changed_character_is_invalid",
        # The forged token's claims are read.
        says="claims = _claims(parts[2])",
    ),
    Breaker(
        name="a gap in the events is not detected",
        file="reservation/workers/flusher.py",
        old="await self._outbox.ack(sale_id, done)",
        new="await self._outbox.ack(sale_id, [event.seq + 1 for event in events])",
        test="tests/integration/sql/test_flusher.py",
        says="assert",
    ),
    Breaker(
        name="a transfer is received twice",
        file="scripts/lua/borrow.lua",
        old='if number <= lot.number then return {"done"} end',
        new="",
        test=REPLAY,
        says="assert",
    ),
    Breaker(
        name="a borrow takes more than the difference to the units received",
        file="scripts/lua/borrow.lua",
        old="local units = up_to - lot.units",
        new="local units = up_to",
        test=REPLAY,
        says="assert",
    ),
    Breaker(
        name="a borrow leaves the hold that waits to another call",
        file="scripts/lua/borrow.lua",
        old="refusal = basket_refusal(batch, basket, wish)",
        new='refusal = {"dry", ""}',
        test=REPLAY,
        says="assert",
    ),
    Breaker(
        name="a repeated lend lends again",
        file="scripts/lua/lend.lua",
        old='if lot.number > after then return {"overtaken", int(lot.number)} end',
        new="",
        test=REPLAY,
        says="assert",
    ),
    Breaker(
        name="an expiry is not counted as a refill",
        file="scripts/lua/expire.lua",
        old='if due.status == "HELD" then count_refill(head) end',
        new="",
        test=REPLAY,
        says="assert",
    ),
    Breaker(
        name="a claim after the deadline is not counted as a refill",
        file="scripts/lua/claim.lua",
        old="if deadline and tonumber(deadline) <= now_ms then count_refill(head) end",
        new="",
        test=REPLAY,
        says="assert",
    ),
    Breaker(
        name="a partition says sold out for the whole sale",
        file="scripts/lua/lib/sold_out.lua",
        old='is_partition and "dry" or "sold_out"',
        new='"sold_out"',
        test="tests/lua/test_prepare_partitions.py::test_a_partition_that_is_short_is_dry",
        says="sold_out",
    ),
    Breaker(
        name="units in transit do not prevent a certificate",
        file="reservation/domain/certificate.py",
        old="return available < units and not _is_in_transit(readings, sku)",
        new="return available < units",
        test="tests/unit/domain/test_certificate.py::test_units_in_transit_prevent_it",
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
