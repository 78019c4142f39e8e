-- The limit of unpaid orders: all of a buyer's orders except the paid ones (lib/paid.lua) and those
-- with a hold. The total, which includes tombstones, is already known, so buyers with few orders
-- cost no read.
local function unpaid_refusal(batch, basket, unpaid_max)
    local all = basket.orders + basket.ended
    if unpaid_max == 0 or all < unpaid_max then return nil end
    local paid = count_of(redis.call("HGET", basket.buyer, PAID_ORDERS) or "0")
    if not paid then
        return redis.error_reply(
            "BUG " .. batch.script .. ": the buyer's count of paid orders is not valid")
    end
    local unpaid = all - paid
    if unpaid < unpaid_max then return nil end
    write_deadlines(batch)
    if unpaid - count_in(basket, batch.hold_sets) < unpaid_max then return nil end
    return {"too_many_orders", int(unpaid_max)}
end
