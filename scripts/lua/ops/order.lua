#!lua flags=no-writes
--[[
order.lua: one order as the scripts see it, and the sale's sets that contain it.

  redis-cli --eval scripts/lua/ops/order.lua 'rsv:{SALE}:order:ORDER'

Payment keys are cut to their last four characters. Writes nothing. O(fields).
]]
local order = KEYS[1]
local tag, order_id = string.match(order, "^(.*:)order:(.*)$")
if not tag then return {"not an order's key: " .. order} end
local fields = redis.call("HGETALL", order)
if #fields == 0 then return {"no such order in Redis: " .. order_id} end

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
