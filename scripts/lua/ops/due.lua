#!lua flags=no-writes
--[[
due.lua: holds whose deadline has passed but which the reaper has not expired yet, oldest first.

  redis-cli --eval scripts/lua/ops/due.lua 'rsv:{SALE}:deadlines' , 20

More than a second late means that the reaper does not run. Writes nothing. O(count).
]]
local deadlines, count = KEYS[1], tonumber(ARGV[1]) or 20
local time = redis.call("TIME")
local now_ms = string.format(
    "%.0f", tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))

local reply = {string.format(
    "%d due of %d", redis.call("ZCOUNT", deadlines, "-inf", now_ms),
    redis.call("ZCARD", deadlines))}
local due = redis.call(
    "ZRANGEBYSCORE", deadlines, "-inf", now_ms, "WITHSCORES", "LIMIT", 0, count)
for i = 1, #due, 2 do
    reply[#reply + 1] = string.format("%s %.0f ms late", due[i], now_ms - due[i + 1])
end
return reply
