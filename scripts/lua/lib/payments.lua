-- An order's fence or number of attempts, written by claims: 0 in an order that was never claimed,
-- nil if a claim must have written it but it is missing.
local function payment_count(text, claimed_at)
    if not text and not claimed_at then return 0 end
    return count_of(text)
end
