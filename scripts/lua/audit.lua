#!lua flags=no-writes
--[[
audit.lua: read a sale's head and every counter at one instant.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S}:sale          settings, epoch, last seq and chain
  KEYS[2]   outbox      stream  rsv:{S}:outbox        one entry per change
  KEYS[3]   deadlines   zset    rsv:{S}:deadlines     order id -> deadline, Unix ms
  KEYS[4]   confirming  zset    rsv:{S}:confirming    order id -> end of the lease, Unix ms
  KEYS[5]   deposits    zset    rsv:{S}:deposits      order id -> due date, Unix ms
  KEYS[6+]  stock       hash    rsv:{S}:stock:SKU     one per item, in the order of the sale
Args
  ARGV[1]   skus        text    the sale's `skus` field as the caller read it
Returns  the first that applies
  not_found  no such sale
  changed    the items are not the ones the caller read: read them again
  counters   {seq, chain, epoch, last outbox id, orders with a deadline, confirming, awaiting
             a deposit, server's clock in Unix ms, then of each item total, available, held, sold}
Keeps    everything: it writes nothing
Cost     O(items)
]]
--@include lib/now.lua

local sale, outbox, deadlines, confirming, deposits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIRST_STOCK_KEY = 6
local skus = ARGV[1]

local found = redis.call("HMGET", sale, "seq", "chain", "epoch", "skus")
if not found[1] then return {"not_found"} end
if found[4] ~= skus then return {"changed"} end
local last = redis.call("XREVRANGE", outbox, "+", "-", "COUNT", "1")
local reply = {
    "counters", found[1], found[2], found[3], last[1] and last[1][1] or "",
    int(redis.call("ZCARD", deadlines)), int(redis.call("ZCARD", confirming)),
    int(redis.call("ZCARD", deposits)), int(server_ms()),
}
for i = FIRST_STOCK_KEY, #KEYS do
    local stock = redis.call("HMGET", KEYS[i], "total", "available", "held", "sold")
    for field = 1, 4 do reply[#reply + 1] = stock[field] or "" end
end
return reply
