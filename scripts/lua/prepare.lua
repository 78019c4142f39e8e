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
                                                      buyer-orders and rate; the keys end with the
                                                      ids of its order and its buyer
Args
  ARGV[1]   not_after   int    Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text   the epoch of the sale that the caller knows
  ARGV[3]   mark_seq    int    the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text   its chain value, "" where only its number is known
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
  ARGV[16]  waited      text   positions of the baskets that have waited for enough rounds,
                               "3 7 ...": overdue holds no longer make them `due`
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
  replayed        the order exists, made from the same body
  too_many_orders {unpaid_max} that many orders of the buyer hold nothing and are unpaid
  rate_limited    {ms until one more is allowed}
  sku_not_found   {sku}
  key_reused      the order exists, made from another body
  not_admitted    the sale requires an admission and the caller saw no valid one
  closed          the sale is over
  not_open        {opens_at}
  paused          an operator stopped the sale
  amount_mismatch {amount of the basket at today's prices}
  due             {order ids} overdue holds that may make room for this basket: expire them, then
                  retry; without ids: those of an earlier `due` in this reply
  again           a basket before this one is `due`, and in_turn is 1: retry after it
  limit_exceeded  {sku, limit, taken}
  sold_out        {next deadline or "", then sku, available of each line}; a repeat of the n-th
                  sold_out of this reply is the number -n
  held            whole batch: {expires_at, created_at, the caller's next mark or {} where nothing
                  is written, items of each wish}; a positive number as the reply to a basket is the
                  seq of its event: its stock is held until expires_at
  prepared        likewise, but nothing is held: the sale takes stock later
Keeps    total = available + held + sold, each >= 0; one outbox entry for each basket that is held
         or prepared, none for any other
Cost     O(lines), at most 20 a basket and as many baskets as the caller batches
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/due.lua
--@include lib/count.lua
--@include lib/paid.lua

local sale, deadlines, outbox, confirming, deposits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local interval, burst = tonumber(ARGV[6]), tonumber(ARGV[7])
local sustained, period, unpaid_max = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local sku_count, wish_count, basket_count =
    tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local asked, in_turn, waited = ARGV[14], ARGV[15] == "1", ARGV[16]
local FIRST_STOCK_KEY, FIRST_SKU = 6, 17
local KEYS_PER_BASKET, ARGS_PER_WISH = 4, 6
-- Lua's stack limits the arguments of one call to several thousand.
local ORDERS_AT_ONCE = 1000
-- Offsets of the ids in a basket's keys: all keys of a sale share their prefix.
local TAG = #sale - #"sale"
local ORDER_ID_AT, BUYER_ID_AT = TAG + #"order:" + 1, TAG + #"buyer:" + 1

local now_ms = server_ms()
local expiry_ms = math.min(now_ms, caller_ms)

if now_ms > not_after then return {{"too_late"}} end
local head = open_head(sale, outbox, epoch)
if not head then return {{"recovering"}} end
if went_back(head, mark_seq, mark_chain) then return {{"went_back"}} end
if not head.currency or not head.hold_seconds then
    return redis.error_reply("BUG prepare: the sale has no currency or no time to hold")
end

-- Stock is read once per batch, tracked here, so that a basket sees the ones before it, and written
-- once at the end.
local stocks = {}
for index = 1, sku_count do
    local key, sku = KEYS[FIRST_STOCK_KEY + index - 1], ARGV[FIRST_SKU + index - 1]
    local found = redis.pcall("HMGET", key, "available", "held", "price", "limit")
    local stock = {
        key = key, sku = sku, available = count_of(found[1]), held = count_of(found[2]),
        price = count_of(found[3]), limit = count_of(found[4]), taken = 0,
    }
    local whole = stock.available and stock.held and stock.price and stock.limit
    if not whole and (found.err or found[1] or found[2] or found[3] or found[4]) then
        stock.bug = redis.error_reply("BUG prepare: a number of " .. sku .. " is no count")
    end
    stocks[index] = (whole or stock.bug) and stock or false
end

local at, hold_seconds = int(now_ms), int(head.hold_seconds)
local expires_at = int(now_ms + head.hold_seconds * 1000)
local holds = head.hold_policy == "prepare"
local word, status = "prepared", "PREPARED"
if holds then word, status = "held", "HELD" end

-- Deadlines of this batch that are not written yet: one command writes many.
local new_deadlines = {}
local function write_deadlines()
    if #new_deadlines > 0 then redis.call("ZADD", deadlines, unpack(new_deadlines)) end
    new_deadlines = {}
end

-- The common fields of the replies.
local common = {word, expires_at, at, {}}

-- Writes the batch's changes once. It also runs after an error at a later basket: the decisions
-- before it are kept.
local first_seq = head.seq
local function write_batch()
    if head.seq == first_seq then return end
    common[4] = close_head(head)
    write_deadlines()
    for _, stock in ipairs(stocks) do
        if stock and stock.taken > 0 then
            redis.call("HINCRBY", stock.key, "available", int(-stock.taken))
            redis.call("HINCRBY", stock.key, "held", int(stock.taken))
        end
    end
end

local due
local function holds_ran_out()
    if not holds then return false end
    due = due or due_orders(deadlines, expiry_ms)
    return #due > 0
end

-- All baskets of a call have the same ones, so only the first `due` has their ids.
local due_named = false
local function name_due()
    if due_named then return {"due"} end
    due_named = true
    return {"due", unpack(due)}
end

-- The buyer's own overdue holds: no others can make room under the buyer's limits.
local function own_due(basket)
    local own = {}
    if not holds_ran_out() then return own end
    for first = 0, basket.orders - 1, ORDERS_AT_ONCE do
        local last = first + ORDERS_AT_ONCE - 1
        local ids = redis.call("ZREVRANGE", basket.buyer_orders, first, last)
        for i, deadline in ipairs(redis.call("ZMSCORE", deadlines, unpack(ids))) do
            if deadline and tonumber(deadline) <= expiry_ms then own[#own + 1] = ids[i] end
            if #own == DUE_MAX then return own end
        end
    end
    return own
end

local has_waited = {}
for position in string.gmatch(waited, "%d+") do has_waited[tonumber(position)] = true end

local function basket_at(position, wish)
    local key = FIRST_STOCK_KEY + sku_count + (position - 1) * KEYS_PER_BASKET
    local order, buyer = KEYS[key], KEYS[key + 1]
    return {
        order = order, buyer = buyer, buyer_orders = KEYS[key + 2], rate = KEYS[key + 3],
        order_id = string.sub(order, ORDER_ID_AT), buyer_id = string.sub(buyer, BUYER_ID_AT),
        wish = wish, waited = has_waited[position],
    }
end

-- GCRA: the theoretical arrival time may run ahead of now by (burst - 1) intervals. Most buyers of
-- a sale hold once, so a first hold writes no key for it: its time comes from the order. If the
-- clock has gone back since, that hold binds for one interval, and not until its own time.
local function arrival_of(basket)
    if basket.orders == 0 then return now_ms end
    if basket.orders > 1 then
        return math.max(tonumber(redis.call("GET", basket.rate)) or 0, now_ms)
    end
    local first = redis.call("ZRANGE", basket.buyer_orders, 0, 0, "WITHSCORES")[2]
    return math.max(math.min(tonumber(first), now_ms) + interval, now_ms)
end

-- The number of the buyer's orders with a hold; the buyer's limits bound it.
local function holding_count(basket)
    write_deadlines()
    local sets = holds and {deadlines, confirming, deposits} or {confirming, deposits}
    local count = 0
    for first = 0, basket.orders - 1, ORDERS_AT_ONCE do
        local last = first + ORDERS_AT_ONCE - 1
        local ids = redis.call("ZRANGE", basket.buyer_orders, first, last)
        for _, set in ipairs(sets) do
            for _, score in ipairs(redis.call("ZMSCORE", set, unpack(ids))) do
                if score then count = count + 1 end
            end
        end
    end
    return count
end

-- A buyer's unpaid orders are all orders except the paid ones (lib/paid.lua) and those with a hold.
-- The total is already known, so buyers with few orders cost no read, and nothing is written.
local function unpaid_refusal(basket)
    if unpaid_max == 0 or basket.orders < unpaid_max then return nil end
    local paid = count_of(redis.call("HGET", basket.buyer, PAID_ORDERS) or "0")
    if not paid then
        return redis.error_reply("BUG prepare: what the buyer has paid for is no count")
    end
    local unpaid = basket.orders - paid
    if unpaid < unpaid_max or unpaid - holding_count(basket) < unpaid_max then return nil end
    return {"too_many_orders", int(unpaid_max)}
end

-- The sustained rate limit is a sliding window over the buyer's list of orders, which a rebuild
-- restores. An order from the future (the clock went back) counts as one of now.
local function sustained_wait(basket)
    if sustained == 0 or basket.orders < sustained then return 0 end
    local position = sustained - 1
    local found = redis.call("ZREVRANGE", basket.buyer_orders, position, position, "WITHSCORES")
    return math.min(tonumber(found[2]), now_ms) + period - now_ms
end

local function rate_refusal(basket)
    -- Reading the count checks the key's type before the first write.
    basket.orders = redis.call("ZCARD", basket.buyer_orders)
    local refusal = unpaid_refusal(basket)
    if refusal then return refusal end
    if interval == 0 then return nil end
    local lasting = sustained_wait(basket)
    if lasting > 0 then return {"rate_limited", int(math.ceil(lasting))} end
    local arrival = arrival_of(basket)
    local wait = arrival - now_ms - (burst - 1) * interval
    if wait > 0 then return {"rate_limited", int(math.ceil(wait))} end
    basket.next_arrival = arrival + interval
end

local function wish_at(number)
    local arg = FIRST_SKU + sku_count + (number - 1) * ARGS_PER_WISH
    local wish = {
        digest = ARGV[arg], name = ARGV[arg + 1], name_json = ARGV[arg + 2],
        amount = tonumber(ARGV[arg + 3]), admitted = ARGV[arg + 4] == "1",
        lines = {}, skus = {}, price = 0, items = "", amount_text = ARGV[arg + 3],
    }
    local items = {}
    for index, quantity in string.gmatch(ARGV[arg + 5], "(%d+) (%d+)") do
        local stock = stocks[tonumber(index)]
        if not stock then
            wish.unknown = ARGV[FIRST_SKU + tonumber(index) - 1]
            return wish
        end
        if stock.bug then
            wish.bug = stock.bug
            return wish
        end
        local count = #wish.lines + 1
        wish.lines[count] = {stock = stock, quantity = tonumber(quantity)}
        wish.skus[count] = stock.sku
        wish.price = wish.price + stock.price * tonumber(quantity)
        items[count] = string.format('["%s",%s,%s]', stock.sku, quantity, int(stock.price))
    end
    wish.items = "[" .. table.concat(items, ",") .. "]"
    -- The parts that these baskets' events share, before the buyer and after.
    wish.event_begins = table.concat({
        '{"from":"","to":"', status, '","items":', wish.items, ',"amount":', wish.amount_text,
        ',"digest":"', wish.digest, '","expiresAt":', expires_at, ',"buyer":'})
    wish.event_ends = ',"name":' .. wish.name_json .. "}"
    return wish
end

local function window_refusal(wish)
    if head.require_admission and not wish.admitted then return {"not_admitted"} end
    if head.status == "closed" or now_ms >= head.closes_at then return {"closed"} end
    if now_ms < head.opens_at then return {"not_open", int(head.opens_at)} end
    if head.status == "paused" then return {"paused"} end
end

local function limit_refusal(basket, wish)
    local taken = redis.call("HMGET", basket.buyer, unpack(wish.skus))
    for i, line in ipairs(wish.lines) do
        local has = 0
        if taken[i] then has = count_of(taken[i]) end
        if not has then
            return redis.error_reply(
                "BUG prepare: what the buyer has of " .. line.stock.sku .. " is no count")
        end
        if has + line.quantity > line.stock.limit then
            local may_help = line.quantity <= line.stock.limit and not basket.waited
            local own = may_help and own_due(basket) or {}
            if #own > 0 then return {"due", unpack(own)} end
            return {"limit_exceeded", line.stock.sku, int(line.stock.limit), int(has)}
        end
    end
end

-- After a sell-out, identical requests get the same refusal until stock moves: it is built once.
local sold_out_count = 0
local function stock_refusal(basket, wish)
    if wish.sold_out_at == head.seq then return -wish.sold_out_number end
    local short, for_good = false, false
    for _, line in ipairs(wish.lines) do
        local stock = line.stock
        short = short or stock.available < line.quantity
        -- No deadline brings sold units back.
        for_good = for_good or stock.available + stock.held < line.quantity
    end
    if not short then return nil end
    local next_deadline = ""
    local overdue = not for_good and holds_ran_out()
    if overdue and not basket.waited then return name_due() end
    if not for_good and holds then
        write_deadlines()
        local first = redis.call("ZRANGE", deadlines, 0, 0, "WITHSCORES")[2]
        next_deadline = count_of(first) and first or ""
    end
    local reply = {"sold_out", next_deadline}
    for _, line in ipairs(wish.lines) do
        reply[#reply + 1] = line.stock.sku
        reply[#reply + 1] = int(line.stock.available)
    end
    sold_out_count = sold_out_count + 1
    -- Baskets that have not waited yet would be `due`.
    if not overdue then wish.sold_out_at, wish.sold_out_number = head.seq, sold_out_count end
    return reply
end

local function write(basket, wish)
    -- %q quotes printable ASCII, the alphabet of buyer ids, as JSON does.
    local buyer = string.format("%q", basket.buyer_id)
    local seq = append_event(
        head, "prepared", basket.order_id, now_ms, wish.event_begins .. buyer .. wish.event_ends)
    redis.call("ZADD", basket.buyer_orders, at, basket.order_id)
    -- Fields that all open holds share are in the sale or omitted: orders take most of the memory.
    -- The time of the hold is its deadline minus its hold seconds.
    redis.call(
        "HSET", basket.order, "status", status, "buyer", basket.buyer_id, "items", wish.items,
        "amount", wish.amount_text, "name", wish.name, "digest", wish.digest,
        "hold", hold_seconds, "expires_at", expires_at, "seq", seq)
    new_deadlines[#new_deadlines + 1] = expires_at
    new_deadlines[#new_deadlines + 1] = basket.order_id
    for _, line in ipairs(holds and wish.lines or {}) do
        local stock = line.stock
        stock.available = stock.available - line.quantity
        stock.held = stock.held + line.quantity
        stock.taken = stock.taken + line.quantity
        redis.call("HINCRBY", basket.buyer, stock.sku, int(line.quantity))
    end
    if basket.next_arrival and basket.orders > 0 then
        redis.call(
            "SET", basket.rate, string.format("%.3f", basket.next_arrival),
            "PX", int(math.ceil(basket.next_arrival - now_ms)))
    end
    return head.seq
end

-- Reads and checks one basket: its refusal or bug; nil where it can be taken.
local function look_at(basket)
    local wish = basket.wish
    local standing = redis.call("HGET", basket.order, "digest")
    if standing == wish.digest then return {"replayed"} end
    local refusal = rate_refusal(basket)
    if refusal then return refusal end
    if wish.unknown then return {"sku_not_found", wish.unknown} end
    if wish.bug then return wish.bug end
    if standing then return {"key_reused"} end
    refusal = window_refusal(wish)
    if refusal then return refusal end
    if wish.price ~= wish.amount then return {"amount_mismatch", int(wish.price)} end
    -- An overdue hold must not cause a refusal by stock or limit: where it may, `due` is returned.
    return limit_refusal(basket, wish) or stock_refusal(basket, wish)
end

-- A key of the wrong type raises an error in its reader: it is this basket's own reply, because
-- nothing of the basket was written yet.
local function decide(basket)
    local whole, refusal = pcall(look_at, basket)
    if not whole and type(refusal) ~= "table" then
        refusal = redis.error_reply("BUG prepare: " .. refusal)
    end
    return refusal or write(basket, basket.wish)
end

local wishes = {}
for number = 1, wish_count do
    wishes[number] = wish_at(number)
    common[#common + 1] = wishes[number].items
end

local replies = {common}
local function decide_all()
    local number_of_next, behind_due = string.gmatch(asked, "%d+"), false
    for position = 1, basket_count do
        local wish = wishes[tonumber(number_of_next())]
        local reply = behind_due and {"again"} or decide(basket_at(position, wish))
        behind_due = behind_due or in_turn and type(reply) == "table" and reply[1] == "due"
        replies[position + 1] = reply
    end
    return replies
end

redis.call("ZCARD", deadlines)
local whole, result = pcall(decide_all)
write_batch()
if not whole then error(result, 0) end
return result
