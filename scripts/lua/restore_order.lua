#!lua flags=allow-oom
--[[
restore_order.lua: replace a tombstone by its order as SQL has it, before a script changes it.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale          hash    rsv:{S}:sale                settings, epoch, last seq and chain
  KEYS[2]   outbox        stream  rsv:{S}:outbox              one entry per change
  KEYS[3]   order         hash    rsv:{S}:order:ID            the reservation
  KEYS[4]   buyer_orders  zset    rsv:{S}:buyer-orders:BUYER  the buyer's orders by time
  KEYS[5]   bucket        hash    rsv:{S}:ended:BBB           the bucket of the buyer's tombstones
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   order_id    text
  ARGV[6]   buyer_id    text
  ARGV[7]   created_at  int   Unix ms, its score in the buyer's list
  ARGV[8]   tombstone   text  as SQL has it
  ARGV[9+]  fields      text  the fields of the order's hash, each a name and a value
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  present     the order exists
  not_found   there is neither the order nor its tombstone
  differs     the tombstone is damaged, or SQL has another state of the order
  done        the order exists instead of its tombstone
Keeps    the counters; no outbox entry, because SQL has the last event of the order
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/tombstones.lua

local sale, outbox, order, buyer_orders, bucket = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, order_id, buyer_id = tonumber(ARGV[1]), ARGV[2], ARGV[5], ARGV[6]
local created_at, tombstone = ARGV[7], ARGV[8]
local FIRST_FIELD = 9

if server_ms() > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

if redis.call("EXISTS", order) == 1 then return {"present"} end
local found = redis.call("HGET", bucket, order_field(order_id))
if not found then return {"not_found"} end
local digest, count = read_ended(bucket, order_id, buyer_id)
if found ~= tombstone or not digest then return {"differs"} end
redis.call("ZCARD", buyer_orders)

redis.call("HSET", order, unpack(ARGV, FIRST_FIELD, #ARGV))
redis.call("ZADD", buyer_orders, created_at, order_id)
redis.call("HDEL", bucket, order_field(order_id))
if count > 1 then
    redis.call("HSET", bucket, buyer_field(buyer_id), int(count - 1))
else
    redis.call("HDEL", bucket, buyer_field(buyer_id))
end
return {"done"}
