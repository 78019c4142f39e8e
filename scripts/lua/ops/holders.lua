#!lua flags=no-writes
--[[
holders.lua: the buyers with the most held units of an item, bought units not counted.

  redis-cli --eval scripts/lua/ops/holders.lua 'rsv:{SALE}:sale' , SKU 10

Reads at most 1,000 orders of each kind, the nearest deadlines first, and reports where there are
more; `reservation why SALE/SKU` counts all of them in SQL. Writes nothing.
]]
local tag = string.sub(KEYS[1], 1, -#"sale" - 1)
local sku, count = ARGV[1], tonumber(ARGV[2]) or 10
local ORDERS_MAX = 1000

local held, buyers, skipped = {}, {}, 0
for _, set in ipairs({"deadlines", "confirming", "deposits"}) do
    local key = tag .. set
    skipped = skipped + math.max(0, redis.call("ZCARD", key) - ORDERS_MAX)
    for _, order_id in ipairs(redis.call("ZRANGE", key, 0, ORDERS_MAX - 1)) do
        local order = redis.call("HMGET", tag .. "order:" .. order_id, "buyer", "items", "status")
        local holds = order[2] and order[3] ~= "PREPARED"
        for _, item in ipairs(holds and cjson.decode(order[2]) or {}) do
            if item[1] == sku then
                if not held[order[1]] then buyers[#buyers + 1] = order[1] end
                held[order[1]] = (held[order[1]] or 0) + item[2]
            end
        end
    end
end
table.sort(buyers, function(one, other)
    if held[one] ~= held[other] then return held[one] > held[other] end
    return one < other
end)
local reply = {}
for i = 1, math.min(count, #buyers) do
    reply[i] = string.format("%s %.0f", buyers[i], held[buyers[i]])
end
if skipped > 0 then reply[#reply + 1] = string.format("(%.0f orders not looked at)", skipped) end
return reply
