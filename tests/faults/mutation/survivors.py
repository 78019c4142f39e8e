"""Surviving mutants with their reasons: no test can observe a difference from the script."""

import re

__all__ = ["reason_to_live"]

#: The common trait of the mutants of a kind, and why no test can distinguish them.
LIVING: tuple[tuple[str, str], ...] = (
    (
        r"not_after.* -> > becomes >=$",
        "differs in the one millisecond at which a call is just not too late yet",
    ),
    (
        r"(expiry_ms|at_ms|caller_ms\)|opens_at|closes_at).* -> (<|<=|>|>=) becomes (<|<=|>|>=)$",
        "differs in the one millisecond of the deadline or the opening itself",
    ),
    (
        r"^lease\.lua: .*lease_end > now_ms.* -> > becomes >=$",
        "differs in the one millisecond at which the lease is just over",
    ),
    (
        r"wait > 0 then .* -> 0 becomes 1$",
        "differs in a wait of less than a millisecond",
    ),
    (
        r"^expire\.lua: local order_count = .* -> 1 becomes 2$",
        "half an order more is no order more",
    ),
    (
        r"^restock\.lua: .*operations, operation, digest.* -> HSET becomes HSETNX$",
        "the script has just seen that the field is not there",
    ),
    (
        r"if not lines then return bug end -> never$",
        "the next step fails on the missing lines: another sentence for the same bug",
    ),
    (
        r"^lib/item\.lua: if not whole and .* -> (or becomes and|. becomes .|never)$",
        "a stock hash with a damaged number is refused all the same, as an item that is not there",
    ),
    (
        r"^(restock|audit)\.lua: if not found\[1\] then .* -> 1 becomes 2$",
        "an item has both of its numbers or none, and so has a sale",
    ),
    (
        r"^put_sale\.lua: if current\[1\] then -> 1 becomes 2$",
        "a sale has both its version and its digest or none",
    ),
    (
        r"^put_sale\.lua: for i = 0, setting_count - 1 do -> - becomes \+$",
        "reads on into the items, and no SKU is called like a setting that stays",
    ),
    (
        r"^lib/count\.lua: .* -> (<= becomes <|15 becomes 16)$",
        "no count comes near to fifteen digits",
    ),
    (
        r"^lib/batch\.lua: if not whole then error\(result, 0\) end -> (never|0 becomes 1)$",
        "what a command throws is an error reply already: returned or thrown, it says the same",
    ),
    (
        r"^lib/deadlines\.lua: batch\.new_deadlines = \{\} -> gone$",
        "writes the same deadlines once more",
    ),
    (
        r"^lib/deadlines\.lua: if #new > 0 then .* -> 0 becomes 1$",
        "they come in pairs",
    ),
    (
        r"^lib/rate\.lua: return math\.max\(.*basket\.rate.* -> 0 becomes 1$",
        "both are long before now",
    ),
    (
        r"^prepare\.lua: if head\.seq == first_seq then return end -> never$",
        "writes the head as it stands",
    ),
    (
        r"^lib/due\.lua: .* -> 200 becomes 201$",
        "names one order more at once",
    ),
    (
        r"^lib/lines\.lua: if from == \"available\" or .*(== becomes ~=|available becomes held)$",
        "checks one number more than it must",
    ),
)


def reason_to_live(name: str) -> str | None:
    """The reason why this mutant may survive, or None."""
    return next((reason for pattern, reason in LIVING if re.search(pattern, name)), None)
