-- What payments have left in an order, its fence or its attempts: an order that was never claimed
-- has neither, and both are 0. nil where a claim must have left one and none is there.
local function payment_count(text, claimed_at)
    if not text and not claimed_at then return 0 end
    return count_of(text)
end
