#!lua flags=no-writes
--[[
audit.lua: inconsistencies of a sale that Redis alone can show, at one instant.

  redis-cli --eval scripts/lua/ops/audit.lua 'rsv:{SALE}:sale'

The sums of the counters, the head against the outbox, and the reader's group. For everything else
(orders, buyers, SQL, the PG) run `reservation audit SALE`. Writes nothing. O(items).
]]
local sale = KEYS[1]
local head = redis.call("HMGET", sale, "seq", "chain", "epoch", "skus")
if not head[1] then
    return {"PROBLEM: no such sale: " .. sale .. "; reservation rebuild restores it"}
end
local tag = string.sub(sale, 1, -#"sale" - 1)

local reply = {}
local function problem(text) reply[#reply + 1] = "PROBLEM: " .. text end

local last = redis.call("XREVRANGE", tag .. "outbox", "+", "-", "COUNT", "1")[1]
if not last then
    problem("the outbox is empty")
elseif last[1] ~= head[1] .. "-0" then
    problem("the outbox ends at " .. last[1] .. ", the sale at " .. head[1])
elseif last[2][#last[2]] ~= head[2] then
    problem("the chain of event " .. head[1] .. " is another one in the outbox")
end
if string.find(head[3], "^restoring:") then problem("a rebuild has not finished") end
for _, sku in ipairs(cjson.decode(head[4])) do
    local stock = redis.call("HMGET", tag .. "stock:" .. sku, "total", "available", "held", "sold")
    local sum, least = 0, 0
    for field = 2, 4 do
        local number = tonumber(stock[field]) or -1
        sum, least = sum + number, math.min(least, number)
    end
    if tonumber(stock[1]) ~= sum or least < 0 then problem(sku .. " does not add up") end
end
reply[#reply + 1] = string.format(
    "seq=%s outbox=%d deadlines=%d confirming=%d deposits=%d", head[1],
    redis.call("XLEN", tag .. "outbox"), redis.call("ZCARD", tag .. "deadlines"),
    redis.call("ZCARD", tag .. "confirming"), redis.call("ZCARD", tag .. "deposits"))
return reply
