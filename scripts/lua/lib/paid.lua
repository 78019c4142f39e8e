-- The field of a buyer's hash that counts the buyer's paid orders: CONFIRMED and REFUNDED ones. No
-- SKU has a colon.
local PAID_ORDERS = ":paid"
local IS_PAID = {CONFIRMED = true, REFUNDED = true}

-- The change of that count between two statuses.
local function paid_step(from, to)
    return (IS_PAID[to] and 1 or 0) - (IS_PAID[from] and 1 or 0)
end

-- The error that moving a buyer's count by this step would cause, as an error reply; nil if none.
local function check_paid(script, buyer, step)
    if step == 0 then return nil end
    local paid = count_of(redis.call("HGET", buyer, PAID_ORDERS) or "0")
    if not paid or paid + step < 0 then
        return redis.error_reply(
            "BUG " .. script .. ": the buyer's count of paid orders is not valid, or too low")
    end
end
