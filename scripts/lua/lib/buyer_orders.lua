-- A buyer's orders in a sale by their time, whose number is in the basket. The buyer's
-- limits bound it. Lua's stack limits the arguments of one call to several thousand.
local ORDERS_AT_ONCE = 1000

-- How many of them are in these sets.
local function count_in(basket, sets)
    local count = 0
    for first = 0, basket.orders - 1, ORDERS_AT_ONCE do
        local last = first + ORDERS_AT_ONCE - 1
        local ids = redis.call("ZRANGE", basket.buyer_orders, first, last)
        for _, set in ipairs(sets) do
            for _, score in ipairs(redis.call("ZMSCORE", set, unpack(ids))) do
                if score then count = count + 1 end
            end
        end
    end
    return count
end

-- Those whose deadline has passed, the newest first.
local function own_due(basket, deadlines, at_ms)
    local own = {}
    for first = 0, basket.orders - 1, ORDERS_AT_ONCE do
        local last = first + ORDERS_AT_ONCE - 1
        local ids = redis.call("ZREVRANGE", basket.buyer_orders, first, last)
        for i, deadline in ipairs(redis.call("ZMSCORE", deadlines, unpack(ids))) do
            if deadline and tonumber(deadline) <= at_ms then own[#own + 1] = ids[i] end
            if #own == DUE_MAX then return own end
        end
    end
    return own
end
