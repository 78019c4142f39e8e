-- Up to 200 orders whose deadline has passed: as many as one expire call takes (4 ms).
local function due_orders(deadlines, at_ms)
    return redis.call("ZRANGEBYSCORE", deadlines, "-inf", int(at_ms), "LIMIT", 0, 200)
end
