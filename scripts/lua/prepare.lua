#!lua
--[[
prepare.lua: decide a batch of baskets in order, each independently, and take their holds.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   deadlines  zset    rsv:{S}:deadlines      order id -> deadline, Unix ms
  KEYS[3]   outbox     stream  rsv:{S}:outbox         one entry per change
  KEYS[4]   confirming zset    rsv:{S}:confirming     order id -> end of the lease, Unix ms
  KEYS[5]   deposits   zset    rsv:{S}:deposits       order id -> due date of the account, Unix ms
  KEYS[6+]  stock      hash    rsv:{S}:stock:SKU      one per SKU of the batch, then for each
                                                      basket, in order, four keys: its order, buyer,
                                                      buyer-orders and rate; the first two end with
                                                      the ids of the order and of the buyer. A fifth
                                                      key, its bucket, if the sale has tombstones
Args
  ARGV[1]   not_after   int    Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text   the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq    int    the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text   its chain value, "" if only its number is known
  ARGV[5]   caller_ms   int    Unix ms, caller's clock; a deadline must have passed on both clocks
  ARGV[6]   interval    num    ms between two holds of one buyer at the steady rate; 0 = no limit
  ARGV[7]   burst       int    holds that a buyer may take at once
  ARGV[8]   sustained   int    holds that a buyer may take in a period; 0 = no limit
  ARGV[9]   period      num    ms, the period of `sustained`
  ARGV[10]  unpaid_max  int    orders of a buyer that may end unpaid, including PREPARED ones,
                               because they hold nothing either; 0 = no limit
  ARGV[11]  skus        int    number of stock keys
  ARGV[12]  wishes      int    number of wishes: most baskets of a sale are alike, so each distinct
                               request is sent once for all of its baskets
  ARGV[13]  baskets     int    number of baskets
  ARGV[14]  asked       text   the number of each basket's wish, in order: "1 1 2 1 ..."
  ARGV[15]  in_turn     int    1: baskets behind a `due` one are not decided; 0: all are
  ARGV[16]  waited      text   positions of the baskets that have waited, and that no overdue hold
                               can help, "3 7 ...": overdue holds no longer make them `due`
  ARGV[17+] sku         text   one per stock key, then for each wish six values: digest of the body,
                               order name, the same as JSON text, amount, admitted (1 or 0), and
                               its lines "index quantity index quantity ..."
Returns  {the common fields}, and one reply per basket, in order; an error for a basket with damaged
         data, of which nothing is written, while the others are decided; for each basket, the first
         that applies. A word for the whole batch is alone in its array, without replies to baskets.
  too_late        whole batch: the server's clock is past not_after
  recovering      whole batch: the sale is missing, under another epoch, or does not match its
                  outbox; nothing is sold before a rebuild
  went_back       whole batch: this server has lost events that the caller has seen
  tombstones      whole batch: the sale has tombstones: repeat the call with the buckets
  replayed        the order exists, made from the same body
  too_many_orders {unpaid_max} that many orders of the buyer hold nothing and are unpaid
  rate_limited    {ms until the next hold is allowed}
  sku_not_found   {sku}
  key_reused      the order exists, made from another body
  not_admitted    the sale requires an admission, and the request had no valid one
  closed          the sale is over
  not_open        {opens_at}
  paused          an operator paused the sale
  amount_mismatch {amount of the basket at today's prices}
  due             {order ids} overdue holds that may make room for this basket: expire them, then
                  retry; without ids: those of an earlier `due` in this reply
  again           a basket before this one is `due`, and in_turn is 1: retry after it
  limit_exceeded  {sku, limit, taken}
  sold_out        {next deadline or "", then sku, available of each line}; a repeat of the n-th
                  sold_out of this reply is the number -n
  dry             likewise, from a partition: its own stock does not cover a line, but other
                  partitions may have the units
  held            whole batch: {expires_at, created_at, the caller's next mark or {} if nothing
                  is written, items of each wish}; a positive number as the reply to a basket is the
                  seq of its event: its stock is held until expires_at
  prepared        likewise, but no stock is held: the claim takes it
Keeps    total = available + held + sold, each >= 0; one outbox entry for each basket that is held
         or prepared, none for any other
Cost     O(lines), at most 20 a basket and as many baskets as the caller batches
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/paid.lua
--@include lib/batch.lua
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

local sale, deadlines, outbox, confirming, deposits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local rate = {
    interval = tonumber(ARGV[6]), burst = tonumber(ARGV[7]),
    sustained = tonumber(ARGV[8]), period = tonumber(ARGV[9]),
}
local unpaid_max = tonumber(ARGV[10])
local sku_count, wish_count, basket_count =
    tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local asked, in_turn, waited = ARGV[14], ARGV[15] == "1", {}
for position in string.gmatch(ARGV[16], "%d+") do waited[tonumber(position)] = true end
local FIRST_STOCK_KEY, FIRST_SKU = 6, 17
local ARGS_PER_WISH = 6
local KEYS_PER_BASKET = (#KEYS - FIRST_STOCK_KEY + 1 - sku_count) / basket_count
local HAS_BUCKETS = KEYS_PER_BASKET == 5

local now_ms = server_ms()
if now_ms > not_after then return {{"too_late"}} end
local head = open_head(sale, outbox, epoch)
if not head then return {{"recovering"}} end
if went_back(head, mark_seq, mark_chain) then return {{"went_back"}} end
if head.has_tombstones and not HAS_BUCKETS then return {{"tombstones"}} end
if not head.currency or not head.hold_seconds then
    return redis.error_reply("BUG prepare: the sale has no currency or no hold time")
end

local batch = new_batch("prepare", head, now_ms, caller_ms, {deadlines, confirming, deposits})
batch.rate, batch.unpaid_max = rate, unpaid_max
local common = {batch.word, batch.expires_at, batch.at, {}}
local skus, stocks, wishes = {}, {}, {}
for i = 1, sku_count do
    skus[i] = ARGV[FIRST_SKU + i - 1]
    stocks[i] = read_item("prepare", KEYS[FIRST_STOCK_KEY + i - 1], skus[i])
end
for i = 1, wish_count do
    local first = FIRST_SKU + sku_count + (i - 1) * ARGS_PER_WISH
    wishes[i] = read_wish(batch, ARGV, first, stocks, skus)
    common[#common + 1] = wishes[i].items
end

local function basket_at(position)
    local first = FIRST_STOCK_KEY + sku_count + (position - 1) * KEYS_PER_BASKET
    local basket = read_basket(batch, KEYS, first, HAS_BUCKETS)
    basket.waited = waited[position]
    return basket
end

local replies = {common}
local function decide_all()
    local number_of_next, behind_due = string.gmatch(asked, "%d+"), false
    for position = 1, basket_count do
        local basket, wish = basket_at(position), wishes[tonumber(number_of_next())]
        local reply = behind_due and {"again"}
            or guarded("prepare", basket_refusal, batch, basket, wish)
        behind_due = behind_due or in_turn and type(reply) == "table" and reply[1] == "due"
        replies[position + 1] = reply or write_hold(batch, basket, wish)
    end
    return replies
end

local first_seq = head.seq
local function write_all()
    if head.seq == first_seq then return end
    common[4] = close_head(head)
    write_deadlines(batch)
    write_stocks(stocks)
end

redis.call("ZCARD", deadlines)
return run_batch(decide_all, write_all)
