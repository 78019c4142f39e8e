-- The field of a buyer's hash that counts the buyer's paid orders: CONFIRMED and REFUNDED ones. No
-- SKU has a colon.
local PAID_ORDERS = ":paid"
local IS_PAID = {CONFIRMED = true, REFUNDED = true}

-- By how much that count goes up on the way from one status to another.
local function paid_step(from, to)
    return (IS_PAID[to] and 1 or 0) - (IS_PAID[from] and 1 or 0)
end
