#!lua flags=allow-oom
--[[
expire.lua: end a batch of reservations whose deadline has passed and give their holds back.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   deadlines  zset    rsv:{S}:deadlines      order id -> deadline, Unix ms
  KEYS[3]   outbox     stream  rsv:{S}:outbox         one entry per change
  KEYS[4+]  order      hash    rsv:{S}:order:ID       of each order, in order: its order key, its
                                                      buyer key, and one stock key per line
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; later than this nothing is done
  ARGV[2]   epoch      text  the epoch of the sale that the caller knows
  ARGV[3]   caller_ms  int   Unix ms, caller's clock; a deadline counts when both clocks say so
  ARGV[4+]  order_id   text  of each order two values: its id and how many lines it has
Returns  one word per order, in order; of each, the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is not the one the caller knows
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

local sale, deadlines, outbox = KEYS[1], KEYS[2], KEYS[3]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local FIRST_ORDER_KEY, FIRST_ORDER_ARG = 4, 4

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

-- Reads and checks one order; a table where it is due, else the word (or the bug) that answers it.
local function look_at(order_id, first_key)
    local deadline = tonumber(redis.call("ZSCORE", deadlines, order_id))
    if not deadline then return "settled" end
    if deadline > expiry_ms then return "not_due" end
    local found = redis.call("HMGET", KEYS[first_key], "status", "items")
    if found[1] ~= "HELD" and found[1] ~= "PREPARED" then
        return redis.error_reply("BUG expire: an order with a deadline is not held or prepared")
    end
    local lines, bug = take_lines("expire", found[2], first_key + 2, KEYS)
    if not lines then return bug end
    local order, buyer = KEYS[first_key], KEYS[first_key + 1]
    local wrong = found[1] == "HELD" and check_lines("expire", lines, buyer, "held", "available")
    if wrong then return wrong end
    return {status = found[1], lines = lines, order = order, buyer = buyer}
end

local function expire(order_id, due)
    local seq = append_event(head, "expired", order_id, now_ms, string.format(
        '{"from":"%s","to":"EXPIRED","cause":"deadline"}', due.status))
    close_head(head)
    redis.call("HSET", due.order, "status", "EXPIRED", "updated_at", int(now_ms), "seq", seq)
    redis.call("ZREM", deadlines, order_id)
    move_lines(due.lines, due.buyer, COUNTER[due.status], "available")
end

local key = FIRST_ORDER_KEY
for i = 1, order_count do
    local arg = FIRST_ORDER_ARG + (i - 1) * 2
    local due = look_at(ARGV[arg], key)
    key = key + 2 + tonumber(ARGV[arg + 1])
    if type(due) ~= "table" then
        replies[i] = due
    elseif due.err then
        return due
    else
        expire(ARGV[arg], due)
        replies[i] = "expired"
    end
end
return replies
