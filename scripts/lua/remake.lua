#!lua
--[[
remake.lua: take the hold again of an order that Redis lost before the flush to SQL.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale          hash    rsv:{S}:sale               settings, epoch, last seq and chain
  KEYS[2]   deadlines     zset    rsv:{S}:deadlines          order id -> deadline, Unix ms
  KEYS[3]   outbox        stream  rsv:{S}:outbox             one entry per change
  KEYS[4]   order         hash    rsv:{S}:order:ID           the reservation to be
  KEYS[5]   buyer         hash    rsv:{S}:buyer:BUYER        sku -> units held or bought
  KEYS[6]   buyer_orders  zset    rsv:{S}:buyer-orders:BUYER  the buyer's orders by time
  KEYS[7]   bucket        hash    rsv:{S}:ended:BBB          the bucket of the buyer's tombstones
  KEYS[8+]  stock         hash    rsv:{S}:stock:SKU          one per line, in the order of the lines
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the rebuild's own; another one means that another rebuild has begun
  ARGV[3]   order_id    text
  ARGV[4]   buyer_id    text
  ARGV[5]   items       text  JSON array of [sku, quantity, price], at the prices of the lost order
  ARGV[6]   amount      int   minor units
  ARGV[7]   name        text  the order's name as the PG's page showed it
  ARGV[8]   name_json   text  the same as JSON text
  ARGV[9]   digest      text  of the body that the buyer sent
Returns  the first that applies
  too_late        the server's clock is past not_after
  recovering      the sale is not this rebuild's
  done            the order exists, made now or by an earlier call, or has a tombstone
  item_gone       {sku} an item has left the sale
  due             {order ids} overdue holds take the stock or the limit: expire them, retry
  limit_exceeded  {sku, limit, taken}
  sold_out        {"", then sku, available of each line}
  dry             likewise, in a partition: other partitions may have the units
Keeps    total = available + held + sold, each >= 0; one outbox entry when it writes, else none
Cost     O(lines), at most 20
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/lines.lua
--@include lib/due.lua
--@include lib/retake.lua
--@include lib/tombstones.lua

-- No check of the sale's window, its prices or the buyer's rate limit: the buyer held this before
-- the loss, and has authenticated a payment for it. Stock and limit apply as for any other hold.
-- The expiry of an overdue hold may be among the lost events, and the basket may have its stock.
local sale, deadlines, outbox = KEYS[1], KEYS[2], KEYS[3]
local order, buyer, buyer_orders, bucket = KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local FIRST_STOCK_KEY = 8
local not_after, epoch, order_id, buyer_id = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local items, amount, name, name_json, digest = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if redis.call("EXISTS", order) == 1 then return {"done"} end
if redis.call("HGET", bucket, order_field(order_id)) then return {"done"} end

local lines, bug = take_lines("remake", items, FIRST_STOCK_KEY, KEYS)
if not lines then return bug end
local holds = head.hold_policy == "prepare"
for _, line in ipairs(lines) do
    if redis.call("EXISTS", line.key) == 0 then return {"item_gone", line.sku} end
end
local refusal, for_good = retake_refusal(head, lines, buyer)
if refusal then
    local due = holds and not for_good and due_orders(deadlines, now_ms) or {}
    if #due > 0 then return {"due", unpack(due)} end
    return refusal
end
local status = holds and "HELD" or "PREPARED"
local wrong = check_lines("remake", lines, buyer, "available", COUNTER[status])
if wrong then return wrong end
redis.call("ZCARD", deadlines)
redis.call("ZCARD", buyer_orders)

local expires_at = int(now_ms + head.hold_seconds * 1000)
local seq = append_event(head, "prepared", order_id, now_ms, string.format(
    '{"from":"","to":"%s","items":%s,"amount":%s,"digest":"%s","expiresAt":%s,'
    .. '"buyer":%q,"name":%s,"remade":true}',
    status, items, amount, digest, expires_at, buyer_id, name_json))
close_head(head)
redis.call(
    "HSET", order, "status", status, "buyer", buyer_id, "items", items, "amount", amount,
    "name", name, "digest", digest, "hold", int(head.hold_seconds), "expires_at", expires_at,
    "seq", seq)
redis.call("ZADD", buyer_orders, int(now_ms), order_id)
redis.call("ZADD", deadlines, expires_at, order_id)
move_lines(lines, buyer, "available", COUNTER[status])
return {"done"}
