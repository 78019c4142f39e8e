#!lua
--[[
borrow.lua: receive a transfer, and take the hold of the order that waits for it, atomically.

Keys     all carry the partition's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S.p}:sale          settings, epoch, last seq and chain
  KEYS[2]   deadlines   zset    rsv:{S.p}:deadlines     order id -> deadline, Unix ms
  KEYS[3]   outbox      stream  rsv:{S.p}:outbox        one entry per change
  KEYS[4]   confirming  zset    rsv:{S.p}:confirming    order id -> end of the lease, Unix ms
  KEYS[5]   deposits    zset    rsv:{S.p}:deposits      order id -> due date of the account, Unix ms
  KEYS[6]   transfers   hash    rsv:{S.p}:transfers     number and units per direction, peer, SKU
  KEYS[7+]  stock       hash    rsv:{S.p}:stock:SKU     the received item, then the other items of
                                                        the waiting order, if any. Its own keys
                                                        follow as for prepare.lua: order, buyer,
                                                        buyer-orders and rate, and the bucket if the
                                                        partition has tombstones
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the partition, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the partition that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   caller_ms   int   Unix ms, caller's clock; a deadline must have passed on both clocks
  ARGV[6]   interval    num   as for prepare.lua, like the next four
  ARGV[7]   burst       int
  ARGV[8]   sustained   int
  ARGV[9]   period      num
  ARGV[10]  unpaid_max  int
  ARGV[11]  donor       int   the partition that lent the units
  ARGV[12]  number      int   number of the transfer, from its row in SQL
  ARGV[13]  up_to       int   total units of all lends up to this number, from the same row
  ARGV[14]  skus        int   number of stock keys
  ARGV[15+] sku         text  one per stock key, then six values of the waiting order, if any, as
                              for prepare.lua: digest, name, the same as JSON text, amount,
                              admitted, lines
Returns  the first that applies
  too_late      the server's clock is past not_after
  recovering    the partition is missing, under another epoch, or does not match its outbox
  went_back     this server has lost events that the caller has seen
  done          this transfer or a later one was received before; no hold is taken
  tombstones    the partition has tombstones: repeat the call with the bucket
  sku_not_found {sku} the partition does not have the item: the transfer stays open
  held          {units, expires_at, created_at, seq of its event, items} the units are received,
                and the waiting order has its hold
  prepared      likewise, but no stock is held: the claim takes it
  borrowed      {units, refusal} the units are received, and no hold is taken. The waiting order
                gets a refusal of prepare.lua, {} if no order waits; after `due`, expire those
                holds and prepare again
Keeps    total = available + held + sold, each >= 0; the version moves with the total; when it
         writes, one outbox entry for the units and one for the hold, else none
Cost     O(lines), at most 20
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/paid.lua
--@include lib/stock.lua
--@include lib/item.lua
--@include lib/due.lua
--@include lib/deadlines.lua
--@include lib/buyer_orders.lua
--@include lib/wish.lua
--@include lib/tombstones.lua
--@include lib/unpaid.lua
--@include lib/rate.lua
--@include lib/window.lua
--@include lib/limit.lua
--@include lib/sold_out.lua
--@include lib/basket.lua
--@include lib/hold.lua
--@include lib/version.lua
--@include lib/transfers.lua

local sale, deadlines, outbox, confirming, deposits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local transfers = KEYS[6]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local rate = {
    interval = tonumber(ARGV[6]), burst = tonumber(ARGV[7]),
    sustained = tonumber(ARGV[8]), period = tonumber(ARGV[9]),
}
local unpaid_max = tonumber(ARGV[10])
local donor, number, up_to = ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])
local sku_count = tonumber(ARGV[14])
local FIRST_STOCK_KEY, FIRST_SKU = 7, 15
local FIRST_BASKET_KEY, FIRST_WISH = FIRST_STOCK_KEY + sku_count, FIRST_SKU + sku_count
local WAITS, HAS_BUCKET = #ARGV >= FIRST_WISH, #KEYS == FIRST_BASKET_KEY + 4

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end
if not head.refills then return redis.error_reply("BUG borrow: the sale is not a partition") end

local skus, stocks = {}, {}
for i = 1, sku_count do
    skus[i] = ARGV[FIRST_SKU + i - 1]
    stocks[i] = read_item("borrow", KEYS[FIRST_STOCK_KEY + i - 1], skus[i])
end
local sku, item = skus[1], stocks[1]
local field = transfer_field("received", donor, sku)
local lot = lot_of(redis.call("HGET", transfers, field))
if not lot then
    return redis.error_reply("BUG borrow: the received transfers of " .. sku .. " are damaged")
end
if number <= lot.number then return {"done"} end
if WAITS and head.has_tombstones and not HAS_BUCKET then return {"tombstones"} end
if not item then return {"sku_not_found", sku} end
if item.bug then return item.bug end
-- After a restore, one lend may cover several numbers, so the units are the difference of the sums.
local units = up_to - lot.units
if units < 0 then
    return redis.error_reply("BUG borrow: more units of " .. sku .. " were received than lent")
end
local total, version = count_of(redis.call("HGET", item.key, "total")), next_version(sale)
if not total then
    return redis.error_reply("BUG borrow: total of " .. sku .. " is not a valid count")
end
if not version then return redis.error_reply("BUG borrow: the partition has no version") end
if WAITS and not (head.currency and head.hold_seconds) then
    return redis.error_reply("BUG borrow: the sale has no currency or no hold time")
end

local batch, basket, wish, refusal
local function decide()
    batch = new_batch("borrow", head, now_ms, caller_ms, {deadlines, confirming, deposits})
    batch.rate, batch.unpaid_max = rate, unpaid_max
    -- The received units are available to the waiting order.
    item.available = item.available + units
    wish = read_wish(batch, ARGV, FIRST_WISH, stocks, skus)
    basket = read_basket(batch, KEYS, FIRST_BASKET_KEY, HAS_BUCKET)
    refusal = basket_refusal(batch, basket, wish)
end
if WAITS then decide() end
if refusal and refusal.err then return refusal end
redis.call("ZCARD", deadlines)

append_event(head, "borrowed", "", now_ms, string.format(
    '{"peer":%s,"sku":"%s","number":%.0f,"units":%.0f,"upTo":%.0f,"total":%.0f,"version":%.0f}',
    donor, sku, number, units, up_to, total + units, version))
count_refill(head)
local seq = WAITS and not refusal and write_hold(batch, basket, wish)
local mark = close_head(head)
write_version(sale, version)
redis.call("HINCRBY", item.key, "total", int(units))
redis.call("HINCRBY", item.key, "available", int(units))
redis.call("HSET", transfers, field, int(number) .. " " .. int(up_to))
if not seq then return {"borrowed", int(units), refusal or {}, mark} end
write_deadlines(batch)
write_stocks(stocks)
return {batch.word, int(units), batch.expires_at, batch.at, int(seq), wish.items, mark}
