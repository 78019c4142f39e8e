-- As many orders as one expire call takes (4 ms).
local DUE_MAX = 200

-- The first orders whose deadline has passed.
local function due_orders(deadlines, at_ms)
    return redis.call("ZRANGEBYSCORE", deadlines, "-inf", int(at_ms), "LIMIT", 0, DUE_MAX)
end
