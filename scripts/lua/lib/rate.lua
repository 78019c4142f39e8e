-- The rate limits of a buyer. `interval`: ms between two holds at the steady rate; `burst`: holds
-- at once; `sustained`: holds in a `period` of ms. An order from the future (the clock went back)
-- counts as one of now.

-- The sustained limit is a sliding window over the buyer's orders, which a rebuild restores.
local function sustained_wait(rate, basket, now_ms)
    if rate.sustained == 0 or basket.orders < rate.sustained then return 0 end
    local position = rate.sustained - 1
    local found = redis.call("ZREVRANGE", basket.buyer_orders, position, position, "WITHSCORES")
    return math.min(tonumber(found[2]), now_ms) + rate.period - now_ms
end

-- GCRA: the theoretical arrival time may run ahead of now by (burst - 1) intervals. Most buyers of
-- a sale hold once, so a first hold writes no key for it: its time comes from the order. If the
-- clock has gone back since, that hold binds for one interval, and not until its own time.
local function arrival_of(rate, basket, now_ms)
    if basket.orders == 0 then return now_ms end
    if basket.orders > 1 then
        return math.max(tonumber(redis.call("GET", basket.rate)) or 0, now_ms)
    end
    local first = redis.call("ZRANGE", basket.buyer_orders, 0, 0, "WITHSCORES")[2]
    return math.max(math.min(tonumber(first), now_ms) + rate.interval, now_ms)
end

-- Without a refusal, the basket gets the arrival time that its hold writes.
local function rate_refusal(rate, basket, now_ms)
    if rate.interval == 0 then return nil end
    local lasting = sustained_wait(rate, basket, now_ms)
    if lasting > 0 then return {"rate_limited", int(math.ceil(lasting))} end
    local arrival = arrival_of(rate, basket, now_ms)
    local wait = arrival - now_ms - (rate.burst - 1) * rate.interval
    if wait > 0 then return {"rate_limited", int(math.ceil(wait))} end
    basket.next_arrival = arrival + rate.interval
end

local function write_arrival(basket, now_ms)
    if not basket.next_arrival or basket.orders == 0 then return end
    redis.call(
        "SET", basket.rate, string.format("%.3f", basket.next_arrival),
        "PX", int(math.ceil(basket.next_arrival - now_ms)))
end
