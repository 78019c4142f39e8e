#!lua
--[[
restore.lua: restore a part of a sale, while only the rebuild may change it.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale  hash  rsv:{S}:sale   under the rebuild's own epoch until it is done; may be absent
  KEYS[2+]  any                        the keys to write
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the rebuild's own, or in its first call the one that it found; another
                             one means that another rebuild has begun
  ARGV[3]   writes     text  JSON array of [command, number of the key from 2 on, argument, ...];
                             the commands are HSET, HDEL, ZADD and UNLINK, so that a repeat changes
                             nothing
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is not this rebuild's
  done        all is written, now or by an earlier call
Keeps    the state that the caller read from SQL; no outbox entry
Cost     O(writes); the caller sends at most 600 (under 10 ms)
]]
--@include lib/now.lua

local sale = KEYS[1]
local FIRST_KEY = 2
local not_after, epoch, writes = tonumber(ARGV[1]), ARGV[2], cjson.decode(ARGV[3])

if server_ms() > not_after then return {"too_late"} end
if (redis.call("HGET", sale, "epoch") or "") ~= epoch then return {"recovering"} end

for _, write in ipairs(writes) do
    local key = KEYS[FIRST_KEY + write[2] - 1]
    if write[1] == "HSET" then
        redis.call("HSET", key, unpack(write, 3))
    elseif write[1] == "HDEL" then
        redis.call("HDEL", key, unpack(write, 3))
    elseif write[1] == "ZADD" then
        redis.call("ZADD", key, unpack(write, 3))
    elseif write[1] == "UNLINK" then
        redis.call("UNLINK", key)
    end
end
return {"done"}
