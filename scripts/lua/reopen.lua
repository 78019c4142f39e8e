#!lua
--[[
reopen.lua: start a restored sale's outbox again, right after the last event that SQL has.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale    hash    rsv:{S}:sale      settings, epoch, last seq and chain
  KEYS[2]   outbox  stream  rsv:{S}:outbox    one entry per change; does not exist yet
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the rebuild's own; another one means that another rebuild has begun
  ARGV[3]   event      text  rebuilt, or sale_put where SQL has no event of the sale
  ARGV[4]   data       text  the event's data, JSON
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is not this rebuild's
  done        the outbox exists, now or by an earlier call
Keeps    the counters untouched; one outbox entry when it writes, else none
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua

local sale, outbox = KEYS[1], KEYS[2]
local not_after, epoch = tonumber(ARGV[1]), ARGV[2]
local event, data = ARGV[3], ARGV[4]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local found = redis.call("HMGET", sale, "epoch", "seq", "chain")
if found[1] ~= epoch then return {"recovering"} end
if redis.call("EXISTS", outbox) == 1 then return {"done"} end

local head = {sale = sale, outbox = outbox, seq = tonumber(found[2]), chain = found[3]}
append_event(head, event, "", now_ms, data)
close_head(head)
return {"done"}
