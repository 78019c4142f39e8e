#!lua flags=allow-oom
--[[
switch.lua: an operator pauses, resumes or closes a sale.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale    hash    rsv:{S}:sale       settings, epoch, last seq and chain
  KEYS[2]   outbox  stream  rsv:{S}:outbox     one entry per change
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq   int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain text  its chain value, "" if only its number is known
  ARGV[5]   status     text  open, paused or closed
  ARGV[6]   data       text  the event's data, JSON
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  done        applied, now or before
  closed      a closed sale stays closed
Keeps    the counters untouched; one outbox entry when it writes, else none
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua

local sale, outbox = KEYS[1], KEYS[2]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, status, data = tonumber(ARGV[1]), ARGV[2], ARGV[5], ARGV[6]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end
if head.status == status then return {"done"} end
if head.status == "closed" then return {"closed"} end

append_event(head, "sale_switched", "", now_ms, data)
local mark = close_head(head)
redis.call("HSET", sale, "status", status)
return {"done", mark}
