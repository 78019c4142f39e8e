-- The maximum number of orders in one expire call (4 ms).
local DUE_MAX = 200

-- The orders with the earliest passed deadlines.
local function due_orders(deadlines, at_ms)
    return redis.call("ZRANGEBYSCORE", deadlines, "-inf", int(at_ms), "LIMIT", 0, DUE_MAX)
end
