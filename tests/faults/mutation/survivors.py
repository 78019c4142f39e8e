"""Surviving mutants with their reasons: no test can observe a difference from the script."""

import re

__all__ = ["reason_to_live"]

#: The common trait of the mutants of a kind, and why no test can distinguish them.
LIVING: tuple[tuple[str, str], ...] = (
    (
        r"not_after.* -> > becomes >=$",
        "differs only in the last millisecond before a call is too late",
    ),
    (
        r"(expiry_ms|at_ms|keep_ms|caller_ms\)|opens_at|closes_at).* -> [<>]=? becomes [<>]=?$",
        "differs only in the millisecond of the deadline or the opening",
    ),
    (
        r"^lease\.lua: .*lease_end > now_ms.* -> > becomes >=$",
        "differs only in the millisecond at which the lease ends",
    ),
    (
        r"wait > 0 then .* -> 0 becomes 1$",
        "differs only in a wait of less than a millisecond",
    ),
    (
        r"^(expire|add_tombstones)\.lua: .*FIRST_ORDER_ARG \+ 1\) / 2.* -> 1 becomes 2$",
        "half an order more has no key",
    ),
    (
        r"^borrow\.lua: local WAITS, HAS_BUCKET = .* -> >= becomes >$",
        "an order that waits has six arguments, never one",
    ),
    (
        r"^restock\.lua: .*operations, operation, digest.* -> HSET becomes HSETNX$",
        "the script has just checked that the field is absent",
    ),
    (
        r"if not lines then return bug end -> never$",
        "the next step fails on the missing lines, with another message",
    ),
    (
        r"^lib/item\.lua: if not whole and .* -> (or becomes and|. becomes .|never)$",
        "a stock hash with a damaged number is refused in any case, as a missing item",
    ),
    (
        r"^(restock|audit)\.lua: if not found\[1\] then .* -> 1 becomes 2$",
        "an item has both numbers or none",
    ),
    (
        r"^put_sale\.lua: if current\[1\] then -> 1 becomes 2$",
        "a sale has both version and digest or none",
    ),
    (
        r"^put_sale\.lua: for i = 0, setting_count - 1 do -> - becomes \+$",
        "reads past the settings into the items, and no SKU has the name of a kept setting",
    ),
    (
        r"^lib/count\.lua: .* -> (<= becomes <|15 becomes 16)$",
        "no counter has fifteen digits",
    ),
    (
        r"^lib/batch\.lua: if not whole then error\(result, 0\) end -> (never|0 becomes 1)$",
        "an error of a command is an error reply already, returned or raised",
    ),
    (
        r"^lib/deadlines\.lua: batch\.new_deadlines = \{\} -> gone$",
        "writes the same deadlines again",
    ),
    (
        r"^lib/deadlines\.lua: if #new > 0 then .* -> 0 becomes 1$",
        "deadlines come in pairs, so there is never one element",
    ),
    (
        r"^lib/rate\.lua: return math\.max\(.*basket\.rate.* -> 0 becomes 1$",
        "both values are in the past",
    ),
    (
        r"^prepare\.lua: if head\.seq == first_seq then return end -> never$",
        "rewrites the unchanged head",
    ),
    (
        r"^lib/due\.lua: .* -> 200 becomes 201$",
        "returns one more order per call",
    ),
    (
        r"^lib/lines\.lua: if from == \"available\" or .*(== becomes ~=|available becomes held)$",
        "makes one more check, which passes",
    ),
)


def reason_to_live(name: str) -> str | None:
    """The reason why this mutant may survive, or None."""
    return next((reason for pattern, reason in LIVING if re.search(pattern, name)), None)
