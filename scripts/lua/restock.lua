#!lua flags=allow-oom
--[[
restock.lua: add units of one item to a sale, or withdraw available ones.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   outbox      stream  rsv:{S}:outbox         one entry per change
  KEYS[3]   operations  hash    rsv:{S}:operations     operation -> digest of its request
  KEYS[4]   stock       hash    rsv:{S}:stock:SKU      the item
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   operation   text  the caller's id of this change, from its idempotency key
  ARGV[6]   digest      text  of the request
  ARGV[7]   sku         text
  ARGV[8]   delta       int   units to add; negative withdraws
  ARGV[9]   total_max   int   the largest total that an item may have
  ARGV[10]  members     text  the event's other members: JSON text with a leading comma
Returns  the first that applies
  too_late      the server's clock is past not_after
  recovering    the sale is missing, under another epoch, or does not match its outbox
  went_back     this server has lost events that the caller has seen
  done          applied, now or by an earlier call
  key_reused    this operation was another request
  sku_not_found no such item
  insufficient  {available} fewer units are available than to withdraw
  too_many      {total} the item's total would exceed total_max
Keeps    total = available + held + sold, each >= 0; the version moves with the total; one outbox
         entry when it writes, else none
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/version.lua

local sale, outbox, operations, stock = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, operation, digest = tonumber(ARGV[1]), ARGV[2], ARGV[5], ARGV[6]
local sku, delta, total_max, members = ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

local earlier = redis.call("HGET", operations, operation)
if earlier == digest then return {"done"} end
if earlier then return {"key_reused"} end
local found = redis.call("HMGET", stock, "total", "available")
if not found[1] then return {"sku_not_found"} end
local total, available = tonumber(found[1]) + delta, tonumber(found[2]) + delta
if available < 0 then return {"insufficient", found[2]} end
if total > total_max then return {"too_many", found[1]} end
local version = next_version(sale)
if not version then return redis.error_reply("BUG restock: the sale has no version") end

append_event(head, "restocked", "", now_ms, string.format(
    '{"sku":"%s","delta":%.0f,"total":%.0f,"version":%.0f%s}', sku, delta, total, version, members))
count_refill(head)
local mark = close_head(head)
write_version(sale, version)
redis.call("HSET", stock, "total", int(total), "available", int(available))
redis.call("HSET", operations, operation, digest)
return {"done", mark}
