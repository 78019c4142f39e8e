#!lua flags=allow-oom
--[[
release.lua: release a reservation's hold before its payment is requested.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   deadlines  zset    rsv:{S}:deadlines      order id -> deadline, Unix ms
  KEYS[3]   outbox     stream  rsv:{S}:outbox         one entry per change
  KEYS[4]   order      hash    rsv:{S}:order:ID       the reservation
  KEYS[5]   buyer      hash    rsv:{S}:buyer:BUYER    sku -> units held or bought
  KEYS[6+]  stock      hash    rsv:{S}:stock:SKU      one per line, in the order of the lines
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq   int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain text  its chain value, "" if only its number is known
  ARGV[5]   order_id   text
  ARGV[6]   members    text  the event's other members: JSON text with a leading comma, or ""
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  not_found   no such reservation
  released    the hold is back in available
  present     {status} no hold to release: ended already, payment in progress, or paid
Keeps    total = available + held + sold, each >= 0; one outbox entry when it writes, else none
Cost     O(lines), at most 20
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/lines.lua

local sale, deadlines, outbox, order, buyer = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local FIRST_STOCK_KEY = 6
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, order_id, members = tonumber(ARGV[1]), ARGV[2], ARGV[5], ARGV[6]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

local found = redis.call("HMGET", order, "status", "items")
local status = found[1]
if not status then return {"not_found"} end
if status ~= "HELD" and status ~= "PREPARED" then return {"present", status} end
local lines, bug = take_lines("release", found[2], FIRST_STOCK_KEY, KEYS)
if not lines then return bug end
local wrong = status == "HELD" and check_lines("release", lines, buyer, "held", "available")
if wrong then return wrong end
redis.call("ZCARD", deadlines)

local seq = append_event(head, "released", order_id, now_ms, string.format(
    '{"from":"%s","to":"RELEASED"%s}', status, members))
if status == "HELD" then count_refill(head) end
local mark = close_head(head)
redis.call("HSET", order, "status", "RELEASED", "updated_at", int(now_ms), "seq", seq)
redis.call("ZREM", deadlines, order_id)
move_lines(lines, buyer, COUNTER[status], "available")
return {"released", mark}
