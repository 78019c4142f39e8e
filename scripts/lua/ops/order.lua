#!lua flags=no-writes
--[[
order.lua: one order as the scripts see it, and the sale's sets that contain it.

  redis-cli --eval scripts/lua/ops/order.lua 'rsv:{SALE}:order:ORDER'

Payment keys are cut to their last four characters. Writes nothing. O(fields); an order without a
hash is looked for in the 4,096 buckets of tombstones, if the sale has any (a few milliseconds).
]]
local order = KEYS[1]
local tag, order_id = string.match(order, "^(.*:)order:(.*)$")
if not tag then return {"not an order's key: " .. order} end
local fields = redis.call("HGETALL", order)

local function tombstone()
    if not redis.call("HGET", tag .. "sale", "tombstone_seq") then return nil end
    for bucket = 0, 4095 do
        local key = string.format("%sended:%03x", tag, bucket)
        local found = redis.call("HGET", key, string.sub(order_id, -24))
        if found then return found end
    end
end

if #fields == 0 then
    local found = tombstone()
    local letter, seq = string.match(found or "", "^([RE]) (%d+) ")
    if letter then
        local status = letter == "R" and "RELEASED" or "EXPIRED"
        return {"status=" .. status, "seq=" .. seq, "a tombstone; SQL has the order: " .. order_id}
    end
    if found then return {"a damaged tombstone: " .. found} end
    return {"no such order in Redis: " .. order_id}
end

local function cut(text) return "..." .. string.sub(text, -4) end

local reply = {}
for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == "payment_key" then value = cut(value) end
    name = string.gsub(name, "^attempt:(.*)$", function(key) return "attempt:" .. cut(key) end)
    reply[#reply + 1] = name .. "=" .. value
end
table.sort(reply)
for _, set in ipairs({"deadlines", "confirming", "deposits"}) do
    local score = redis.call("ZSCORE", tag .. set, order_id)
    if score then reply[#reply + 1] = "in " .. set .. " until " .. score end
end
return reply
