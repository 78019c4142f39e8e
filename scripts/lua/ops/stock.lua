#!lua flags=no-writes
--[[
stock.lua: the counters of every item of a sale, one line each.

  redis-cli --eval scripts/lua/ops/stock.lua 'rsv:{SALE}:sale'

Writes nothing. O(items); at most 200.
]]
local sale = KEYS[1]
local head = redis.call("HMGET", sale, "status", "seq", "epoch", "skus")
if not head[1] then return {"no such sale: " .. sale} end

-- A sale's keys share their slot, so a key built from another is on the same node.
local tag = string.sub(sale, 1, -#"sale" - 1)
local reply = {string.format("%s seq=%s epoch=%s", head[1], head[2], head[3])}
for _, sku in ipairs(cjson.decode(head[4])) do
    local stock = redis.call("HMGET", tag .. "stock:" .. sku, "total", "available", "held", "sold")
    for field = 1, 4 do stock[field] = tonumber(stock[field]) or -1 end
    local whole = stock[1] == stock[2] + stock[3] + stock[4]
    reply[#reply + 1] = string.format(
        "%s total=%.0f available=%.0f held=%.0f sold=%.0f%s",
        sku, stock[1], stock[2], stock[3], stock[4], whole and "" or " DOES NOT ADD UP")
end
return reply
