#!lua flags=allow-oom
--[[
refund.lua: record the refund of a sold order; return its units to sale, or remove them from it.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale    hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   outbox  stream  rsv:{S}:outbox         one entry per change
  KEYS[3]   order   hash    rsv:{S}:order:ID       the reservation
  KEYS[4]   buyer   hash    rsv:{S}:buyer:BUYER    sku -> units held or bought
  KEYS[5+]  stock   hash    rsv:{S}:stock:SKU      one per line, in the order of the lines
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq   int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain text  its chain value, "" if only its number is known
  ARGV[5]   order_id   text
  ARGV[6]   restock    int   1: the units are for sale again; 0: they leave the sale
  ARGV[7]   members    text  the event's other members: JSON text with a leading comma, or ""
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  not_found   no such reservation
  refunded    done, now or by an earlier call
  present     {status} the order is not sold
Keeps    total = available + held + sold, each >= 0; the version moves with the total; one outbox
         entry when it writes, else none
Cost     O(lines), at most 20
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/lines.lua
--@include lib/version.lua
--@include lib/withdraw.lua

local sale, outbox, order, buyer = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIRST_STOCK_KEY = 5
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, order_id = tonumber(ARGV[1]), ARGV[2], ARGV[5]
local restock, members = ARGV[6] == "1", ARGV[7]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

local found = redis.call("HMGET", order, "status", "items", "fence")
local status = found[1]
if not status then return {"not_found"} end
if status == "REFUNDED" then return {"refunded"} end
if status ~= "CONFIRMED" then return {"present", status} end
local lines, bug = take_lines("refund", found[2], FIRST_STOCK_KEY, KEYS)
if not lines then return bug end
local wrong = check_lines("refund", lines, buyer, "sold", "available")
    or not restock and check_lines("refund", lines, buyer, "sold", "total")
if wrong then return wrong end
local version = not restock and next_version(sale)
if version == nil then return redis.error_reply("BUG refund: the sale has no version") end

local seq = append_event(head, "refunded", order_id, now_ms, string.format(
    '{"from":"%s","to":"REFUNDED","fence":%s,"restock":%s%s%s}', status, found[3],
    restock and "true" or "false", version and ',"version":' .. int(version) or "", members))
if restock then count_refill(head) end
local mark = close_head(head)
if version then write_version(sale, version) end
redis.call("HSET", order, "status", "REFUNDED", "updated_at", int(now_ms), "seq", seq)
move_lines(lines, buyer, "sold", "available")
if not restock then withdraw_lines(lines) end
return {"refunded", mark}
