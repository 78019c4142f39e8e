#!lua flags=allow-oom
--[[
expire.lua: end a batch of reservations whose deadline has passed and give their holds back.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   deadlines  zset    rsv:{S}:deadlines      order id -> deadline, Unix ms
  KEYS[3]   outbox     stream  rsv:{S}:outbox         one entry per change
  KEYS[4+]  order      hash    rsv:{S}:order:ID       for each order, in order: its order key, its
                                                      buyer key, and one stock key per line
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq   int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain text  its chain value, "" if only its number is known
  ARGV[5]   caller_ms  int   Unix ms, caller's clock; a deadline must have passed on both clocks
  ARGV[6+]  order_id   text  for each order two values: its id and its number of lines
Returns  one word per order, in order; an error for a damaged order, which is not changed while
         the others end; last the caller's next mark, where any ended; for each, the first that
         applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  settled     it has no deadline any more: paid, being paid, or ended; a repeat lands here
  not_due     its deadline has not passed on both clocks
  expired     the hold is back in available
Keeps    total = available + held + sold, each >= 0; one outbox entry per order that expires
Cost     O(orders x lines); the caller sends at most 200 orders (4 ms for one-line orders)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/lines.lua
--@include lib/batch.lua
--@include lib/stock.lua
--@include lib/give_back.lua

local sale, deadlines, outbox = KEYS[1], KEYS[2], KEYS[3]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local FIRST_ORDER_KEY, FIRST_ORDER_ARG = 4, 6

local now_ms = server_ms()
local expiry_ms = math.min(now_ms, caller_ms)
local order_count = (#ARGV - FIRST_ORDER_ARG + 1) / 2
local replies = {}

local function all_answer(word)
    for i = 1, order_count do replies[i] = word end
    return replies
end

if now_ms > not_after then return all_answer("too_late") end
local head = open_head(sale, outbox, epoch)
if not head then return all_answer("recovering") end
if went_back(head, mark_seq, mark_chain) then return all_answer("went_back") end

local stocks, by_key = {}, {}
local function stock_at(key)
    local stock = by_key[key]
    if not stock then
        local found = redis.call("HMGET", key, "held", "available")
        stock = {key = key, held = count_of(found[1]), available = count_of(found[2]), moved = 0}
        by_key[key] = stock
        stocks[#stocks + 1] = stock
    end
    return stock
end

-- One command for all: each call in a script costs the server about a microsecond.
local function read_deadlines()
    if order_count == 0 then return {} end
    local ids = {}
    for i = 1, order_count do ids[i] = ARGV[FIRST_ORDER_ARG + (i - 1) * 2] end
    return redis.call("ZMSCORE", deadlines, unpack(ids))
end

-- Reads and checks one order: the changes to make if it is due, else its word or its error reply.
local function look_at(deadline, first_key)
    if not deadline then return "settled" end
    if deadline > expiry_ms then return "not_due" end
    local order, buyer = KEYS[first_key], KEYS[first_key + 1]
    local found = redis.call("HMGET", order, "status", "items")
    if found[1] ~= "HELD" and found[1] ~= "PREPARED" then
        return redis.error_reply(
            "BUG expire: an order with a deadline is neither HELD nor PREPARED")
    end
    local lines, bug = take_lines("expire", found[2], first_key + 2, KEYS)
    if not lines then return bug end
    if found[1] == "PREPARED" then lines = {} end
    local wrong = check_back(lines, buyer, stock_at)
    if wrong then return wrong end
    return {status = found[1], lines = lines, order = order, buyer = buyer}
end

local at, ended = int(now_ms), {}
local function expire(order_id, due)
    local seq = append_event(
        head, "expired", order_id, now_ms,
        '{"from":"' .. due.status .. '","to":"EXPIRED","cause":"deadline"}')
    redis.call("HSET", due.order, "status", "EXPIRED", "updated_at", at, "seq", seq)
    ended[#ended + 1] = order_id
    if due.status == "HELD" then count_refill(head) end
    give_back(due.lines, due.buyer, stock_at)
end

local function expire_all()
    local key, named, scores = FIRST_ORDER_KEY, {}, read_deadlines()
    for i = 1, order_count do
        local arg = FIRST_ORDER_ARG + (i - 1) * 2
        local order_id, deadline = ARGV[arg], tonumber(scores[i])
        -- A repeated id in one call: its deadline is not removed yet, but the order has ended.
        local due = named[order_id] and "settled" or guarded("expire", look_at, deadline, key)
        key = key + 2 + tonumber(ARGV[arg + 1])
        if type(due) ~= "table" or due.err then
            replies[i] = due
        else
            expire(order_id, due)
            named[order_id], replies[i] = true, "expired"
        end
    end
    return replies
end

local function write_all()
    if #ended == 0 then return end
    replies[order_count + 1] = close_head(head)
    redis.call("ZREM", deadlines, unpack(ended))
    write_stocks(stocks)
end

return run_batch(expire_all, write_all)
