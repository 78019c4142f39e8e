#!lua flags=allow-oom
--[[
add_tombstones.lua: replace orders that ended without a claim by tombstones.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale    hash    rsv:{S}:sale    settings, epoch, last seq and chain; its `tombstone_seq`
                                            is the event up to which ended orders were replaced
  KEYS[2]   outbox  stream  rsv:{S}:outbox  one entry per change
  KEYS[3+]  order   hash    rsv:{S}:order:ID  for each order, in order: its order key, its buyer's
                                            list of orders, and its bucket of tombstones
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   keep_ms     int   ms from an order's deadline to its tombstone
  ARGV[6]   up_to       int   the new `tombstone_seq`; 0 leaves it
  ARGV[7+]  order_id    text  for each order two values: its id, and its tombstone as SQL has it
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  done        {orders replaced, orders or buckets that are damaged} the other orders are not what
              SQL has, were claimed once, or are too recent, and stay; so does a replaced one
Keeps    the counters; no outbox entry, because SQL has the last event of each replaced order
Cost     O(orders); the caller sends at most 100 (2 ms)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/tombstones.lua

local sale, outbox = KEYS[1], KEYS[2]
local FIRST_ORDER_KEY, FIRST_ORDER_ARG = 3, 7
local KEYS_PER_ORDER = 3
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch = tonumber(ARGV[1]), ARGV[2]
local keep_ms, up_to = tonumber(ARGV[5]), tonumber(ARGV[6])
local TAG = #sale - #"sale"
-- The fields of an ended order that was never claimed. A claim adds others.
local FIELDS = 10

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

-- The change of one order, nil if it stays. A key of the wrong type raises an error.
local function look_at(order, buyer_orders, bucket, order_id, tombstone)
    local flat, found = redis.call("HGETALL", order), {}
    for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
    if #flat ~= FIELDS * 2 or found.fence or found.claimed_at or found.payment_key then
        return nil
    end
    if tombstone_of(found.status, found.seq, found.digest) ~= tombstone then return nil end
    local expires_at, buyer = count_of(found.expires_at), found.buyer
    if not expires_at or now_ms < expires_at + keep_ms then return nil end
    if string.sub(order, TAG + #"order:" + 1) ~= order_id or not is_bucket_of(bucket, buyer)
        or string.sub(buyer_orders, TAG + #"buyer-orders:" + 1) ~= buyer then
        error("the keys do not fit the order")
    end
    if not redis.call("ZSCORE", buyer_orders, order_id) then return nil end
    local standing, count = read_ended(bucket, order_id, buyer)
    if standing == nil then error("a tombstone is damaged") end
    if standing then error("the order has a tombstone") end
    return {buyer_field = buyer_field(buyer), count = count}
end

local made, damaged = 0, 0
for i = 0, (#ARGV - FIRST_ORDER_ARG + 1) / 2 - 1 do
    local key, arg = FIRST_ORDER_KEY + i * KEYS_PER_ORDER, FIRST_ORDER_ARG + i * 2
    local order, buyer_orders, bucket = KEYS[key], KEYS[key + 1], KEYS[key + 2]
    local order_id, tombstone = ARGV[arg], ARGV[arg + 1]
    local whole, change = pcall(look_at, order, buyer_orders, bucket, order_id, tombstone)
    if not whole then
        damaged = damaged + 1
    elseif change then
        redis.call(
            "HSET", bucket, order_field(order_id), tombstone,
            change.buyer_field, int(change.count + 1))
        redis.call("UNLINK", order)
        redis.call("ZREM", buyer_orders, order_id)
        made = made + 1
    end
end

-- A sale without the field has no tombstones: prepare.lua reads no bucket then.
local known = count_of(redis.call("HGET", sale, "tombstone_seq"))
if made > 0 or known then
    redis.call("HSET", sale, "tombstone_seq", int(math.max(known or 0, up_to)))
end
return {"done", int(made), int(damaged)}
