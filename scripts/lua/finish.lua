#!lua flags=allow-oom
--[[
finish.lua: record the outcome of a payment, under the fence of its request.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S}:sale            settings, epoch, last seq and chain
  KEYS[2]   deadlines   zset    rsv:{S}:deadlines       order id -> deadline, Unix ms
  KEYS[3]   confirming  zset    rsv:{S}:confirming      order id -> end of the lease, Unix ms
  KEYS[4]   deposits    zset    rsv:{S}:deposits        order id -> due date of the account, Unix ms
  KEYS[5]   outbox      stream  rsv:{S}:outbox          one entry per change
  KEYS[6]   order       hash    rsv:{S}:order:ID        the reservation
  KEYS[7]   buyer       hash    rsv:{S}:buyer:BUYER     sku -> units held or bought; :paid -> orders
  KEYS[8+]  stock       hash    rsv:{S}:stock:SKU       one per line, in the order of the lines
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   caller_ms   int   Unix ms, caller's clock
  ARGV[6]   order_id    text
  ARGV[7]   fence       int   the fence under which the caller called the PG
  ARGV[8]   outcome     text  confirmed, awaiting_deposit, declined, voided, expired or refunded
  ARGV[9]   attempt     text  the outcome to store for this payment key's attempt; "" removes it, so
                              that the same key may be claimed again (no money was asked for)
  ARGV[10]  due_ms      int   Unix ms; the account's due date with awaiting_deposit, else 0
  ARGV[11]  members     text  the event's other members: JSON text with a leading comma, or ""
  ARGV[12]  seen        int   the order's seq as the caller read it before the PG call. While it
                              is CONFIRMING, its fence decides which caller may finish it, and this
                              is ignored; later all callers have the same fence, and one with a
                              stale read must not undo the order's last change
  ARGV[13]  asked_key   text  the payment key of the caller's request to the PG
  ARGV[14]  claim_id    text  the claim or take-over by which the caller got its fence; "" where
                              it read the fence from the order
  ARGV[15]  restock     int   1: units that the outcome gives up are for sale again; 0: they leave
                              the sale, as the order's refund requires
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  not_found   no such reservation
  done        {status} applied, now or by an earlier call of the same kind
  lost        {status, fence} this server has not seen the caller's claim: the order's fence is
              lower, or belongs to another claim or payment key. It has lost events
  stale       {status, fence} a later fence, a status that this outcome cannot follow, or an order
              that has changed since the caller read it
Keeps    total = available + held + sold, each >= 0; the version moves with the total; one outbox
         entry when it writes, else none
Cost     O(lines), at most 20
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/payments.lua
--@include lib/lines.lua
--@include lib/paid.lua
--@include lib/version.lua
--@include lib/withdraw.lua

local sale, deadlines, confirming, deposits, outbox = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local order, buyer = KEYS[6], KEYS[7]
local FIRST_STOCK_KEY = 8
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local order_id, fence, outcome, attempt = ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9]
local due_ms, members, seen = tonumber(ARGV[10]), ARGV[11], tonumber(ARGV[12])
local asked_key, claim_id, restock = ARGV[13], ARGV[14], ARGV[15] ~= "0"

-- The transitions of each outcome. `voided` returns to the status before the claim, or to EXPIRED
-- when that deadline has passed.
local EDGES = {
    confirmed = {CONFIRMING = "CONFIRMED", AWAITING_DEPOSIT = "CONFIRMED"},
    awaiting_deposit = {CONFIRMING = "AWAITING_DEPOSIT", CONFIRMED = "AWAITING_DEPOSIT"},
    declined = {CONFIRMING = "RELEASED", AWAITING_DEPOSIT = "RELEASED"},
    voided = {CONFIRMING = "HELD"},
    expired = {AWAITING_DEPOSIT = "EXPIRED", CONFIRMING = "EXPIRED"},
    refunded = {
        CONFIRMING = "REFUNDED", RELEASED = "REFUNDED", EXPIRED = "REFUNDED",
        AWAITING_DEPOSIT = "REFUNDED"},
}

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

local found = redis.call(
    "HMGET", order, "status", "items", "fence", "payment_key", "expires_at", "finished", "attempts",
    "claimed_at", "seq", "claim_id")
local status, payment_key = found[1], found[4]
local current_fence, attempts = payment_count(found[3], found[8]), payment_count(found[7], found[8])
if not status then return {"not_found"} end
if not current_fence or not attempts then
    return redis.error_reply("BUG finish: a claimed order has no fence or no attempts")
end
-- A repeat of this fence's own write gets the same answer, so a lost reply is harmless.
local this_finish = outcome .. ":" .. int(fence)
if found[6] == this_finish and not EDGES[outcome][status] then return {"done", status} end
-- Each caller has a reply to its own claim, and no fence is issued twice.
local not_its_claim = claim_id ~= "" and (payment_key ~= asked_key or found[10] ~= claim_id)
if current_fence < fence or current_fence == fence and not_its_claim then
    return {"lost", status, int(current_fence)}
end
local to = EDGES[outcome][status]
local unseen = status ~= "CONFIRMING" and tonumber(found[9]) ~= seen
if current_fence ~= fence or not to or unseen then return {"stale", status, int(current_fence)} end

if outcome == "voided" then
    if tonumber(found[5]) <= math.min(now_ms, caller_ms) then
        to = "EXPIRED"
    elseif head.hold_policy == "success" then
        to = "PREPARED"
    end
end
local lines, bug = take_lines("finish", found[2], FIRST_STOCK_KEY, KEYS)
if not lines then return bug end
local moves = COUNTER[status] ~= COUNTER[to]
local wrong = moves and check_lines("finish", lines, buyer, COUNTER[status], COUNTER[to])
if wrong then return wrong end
local withdraws = not restock and COUNTER[status] == "held" and COUNTER[to] == "available"
wrong = withdraws and check_lines("finish", lines, buyer, "held", "total")
if wrong then return wrong end
local version = withdraws and next_version(sale)
if version == nil then return redis.error_reply("BUG finish: the sale has no version") end
local paid = paid_step(status, to)
wrong = check_paid("finish", buyer, paid)
if wrong then return wrong end
redis.call("ZCARD", deadlines)
redis.call("ZCARD", confirming)
redis.call("ZCARD", deposits)

local units = outcome == "refunded" and ',"restock":true' or ""
if withdraws then units = ',"restock":false,"version":' .. int(version) end
local seq = append_event(head, outcome, order_id, now_ms, string.format(
    '{"from":"%s","to":"%s","fence":%.0f%s%s}', status, to, fence, units, members))
if moves and COUNTER[to] == "available" and not withdraws then count_refill(head) end
local mark = close_head(head)
if version then write_version(sale, version) end
redis.call(
    "HSET", order, "status", to, "finished", this_finish, "updated_at", int(now_ms), "seq", seq)
if payment_key and attempt ~= "" then
    redis.call("HSET", order, "attempt:" .. payment_key, attempt)
elseif payment_key then
    redis.call("HDEL", order, "attempt:" .. payment_key, "payment_key", "claim_id")
    redis.call("HSET", order, "attempts", int(attempts - 1))
end
redis.call("ZREM", confirming, order_id)
redis.call("ZREM", deposits, order_id)
if to == "AWAITING_DEPOSIT" then
    redis.call("HSET", order, "due_at", int(due_ms))
    redis.call("ZADD", deposits, int(due_ms), order_id)
elseif to == "HELD" or to == "PREPARED" then
    redis.call("ZADD", deadlines, found[5], order_id)
end
move_lines(lines, buyer, COUNTER[status], COUNTER[to])
if withdraws then withdraw_lines(lines) end
if paid ~= 0 then redis.call("HINCRBY", buyer, PAID_ORDERS, paid) end
return {"done", to, mark}
