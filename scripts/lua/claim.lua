#!lua flags=allow-oom
--[[
claim.lua: a buyer is back from the PG; take the reservation to CONFIRMING and lift its deadline.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S}:sale            settings, epoch, last seq and chain
  KEYS[2]   deadlines   zset    rsv:{S}:deadlines       order id -> deadline, Unix ms
  KEYS[3]   confirming  zset    rsv:{S}:confirming      order id -> end of the lease, Unix ms
  KEYS[4]   outbox      stream  rsv:{S}:outbox          one entry per change
  KEYS[5]   order       hash    rsv:{S}:order:ID        the reservation
  KEYS[6]   buyer       hash    rsv:{S}:buyer:BUYER     sku -> units held or bought
  KEYS[7+]  stock       hash    rsv:{S}:stock:SKU       one per line, in the order of the lines
Args
  ARGV[1]   not_after     int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch         text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq      int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain    text  its chain value, "" if only its number is known
  ARGV[5]   caller_ms     int   Unix ms, caller's clock
  ARGV[6]   order_id      text
  ARGV[7]   payment_key   text  the PG's id of this attempt
  ARGV[8]   claim_id      text  the caller's id of this call; a repeat gets the same reply
  ARGV[9]   lease_ms      int   how long only this caller may ask for the money
  ARGV[10]  attempts_max  int   payment attempts that an order may make
  ARGV[11]  known_fence   int   the highest fence that SQL has for the order: it may have an
                                intent although this server has lost the claim
Returns  the first that applies
  too_late           the server's clock is past not_after
  recovering         the sale is missing, under another epoch, or does not match its outbox
  went_back          this server has lost events that the caller has seen
  not_found          no such reservation
  claimed            {fence, lease end} the caller may ask the PG for the money, under this fence
  present            {status, outcome} nothing to claim: the payment key's own outcome, or
                     another key while a payment is in progress or done; outcome "" if none
  attempts_exhausted the order has used up its payment attempts
  expired            the hold has ended and the basket cannot be taken again
  due                {order ids} overdue holds take the stock or the limit: expire them, retry
  limit_exceeded     {sku, limit, taken}
  sold_out           {"", then sku, available of each line}
  dry                likewise, in a partition: other partitions may have the units
Keeps    total = available + held + sold, each >= 0; one outbox entry when it claims, else none
Cost     O(lines), at most 20
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/payments.lua
--@include lib/lines.lua
--@include lib/due.lua
--@include lib/retake.lua

-- Claim against expiry, the race that this script decides:
--   reaper: expire ---------------------> {settled}: the deadline is gone
--   buyer:        claim: CONFIRMING, deadline lifted
-- or
--   reaper: expire: EXPIRED, stock back
--   buyer:        claim -> takes the same basket again here, or {expired}: no payment is requested
-- Scripts run serially on the server, so one of the two timelines happens.

local sale, deadlines, confirming, outbox = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local order, buyer = KEYS[5], KEYS[6]
local FIRST_STOCK_KEY = 7
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local order_id, payment_key, claim_id = ARGV[6], ARGV[7], ARGV[8]
local lease_ms, attempts_max = tonumber(ARGV[9]), tonumber(ARGV[10])
local known_fence = tonumber(ARGV[11])

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

local found = redis.call(
    "HMGET", order, "status", "items", "fence", "attempts", "payment_key", "claim_id",
    "attempt:" .. payment_key, "claimed_at")
local status = found[1]
local fence, attempts = payment_count(found[3], found[8]), payment_count(found[4], found[8])
if not status then return {"not_found"} end
if not fence or not attempts then
    return redis.error_reply("BUG claim: a claimed order has no fence or no attempts")
end
if status == "CONFIRMING" and found[5] == payment_key and found[6] == claim_id then
    return {"claimed", int(fence), redis.call("ZSCORE", confirming, order_id)}
end
if found[7] then return {"present", status, found[7]} end
if COUNTER[status] ~= "available" and status ~= "HELD" or status == "REFUNDED" then
    return {"present", status, ""}
end
if attempts >= attempts_max then return {"attempts_exhausted"} end

local lines, bug = take_lines("claim", found[2], FIRST_STOCK_KEY, KEYS)
if not lines then return bug end
local ended = status == "RELEASED" or status == "EXPIRED"
local takes = COUNTER[status] == "available"

if ended then
    -- Taking a basket again is a new hold, so the sale must be open. A claim of an existing hold is
    -- not, and works after the sale's end.
    local open = head.status == "open" and now_ms >= head.opens_at and now_ms < head.closes_at
    if not open then return {"expired"} end
end
if takes then
    for _, line in ipairs(lines) do
        -- An item that has left the sale since cannot be taken again.
        if redis.call("EXISTS", line.key) == 0 then return {"expired"} end
    end
    local refusal, for_good = retake_refusal(head, lines, buyer)
    if refusal then
        local may_help = head.hold_policy == "prepare" and not for_good
        local due = may_help and due_orders(deadlines, math.min(now_ms, caller_ms)) or {}
        if #due > 0 then return {"due", unpack(due)} end
        return ended and refusal[1] == "sold_out" and {"expired"} or refusal
    end
end
local wrong = check_lines("claim", lines, buyer, COUNTER[status], "held")
if wrong then return wrong end
redis.call("ZCARD", deadlines)
redis.call("ZCARD", confirming)
local deadline = head.refills and status == "HELD" and redis.call("ZSCORE", deadlines, order_id)

fence = math.max(fence, known_fence) + 1
local lease_until = int(now_ms + lease_ms)
local seq = append_event(head, "claimed", order_id, now_ms, string.format(
    '{"from":"%s","to":"CONFIRMING","fence":%.0f,"paymentKey":"%s","leaseUntil":%s}',
    status, fence, payment_key, lease_until))
if deadline and tonumber(deadline) <= now_ms then count_refill(head) end
local mark = close_head(head)
redis.call(
    "HSET", order, "status", "CONFIRMING", "fence", int(fence), "payment_key", payment_key,
    "claim_id", claim_id, "claimed_at", int(now_ms), "attempts", int(attempts + 1),
    "updated_at", int(now_ms), "seq", seq)
redis.call("ZREM", deadlines, order_id)
redis.call("ZADD", confirming, lease_until, order_id)
move_lines(lines, buyer, COUNTER[status], "held")
return {"claimed", int(fence), lease_until, mark}
