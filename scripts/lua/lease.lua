#!lua flags=allow-oom
--[[
lease.lua: take over a payment whose lease has expired, or move the end of the caller's own lease.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S}:sale            settings, epoch, last seq and chain
  KEYS[2]   confirming  zset    rsv:{S}:confirming      order id -> end of the lease, Unix ms
  KEYS[3]   outbox      stream  rsv:{S}:outbox          one entry per change
  KEYS[4]   order       hash    rsv:{S}:order:ID        the reservation
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the sale, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   order_id    text
  ARGV[6]   fence       int   the fence that the caller saw
  ARGV[7]   lease_ms    int   the lease from now on
  ARGV[8]   mode        text  take: only after the lease's end, with a new fence; take_now: also
                              during a pause; move: the caller's; pause: likewise, and the caller
                              has no call to the PG in progress. A pause has a fraction in
                              `confirming`
  ARGV[9]   claim_id    text  the caller's name for this take-over: repeated, the same answer
  ARGV[10]  known_fence int   the highest fence that SQL has for the order
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the sale is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  not_found   no such reservation
  taken       {fence, lease end} the caller has the payment now; every older fence is refused
  stale       {status, fence} not CONFIRMING any more, or another fence has it
  leased      {lease end} another caller still has the lease
  moved       {lease end}
Keeps    the counters untouched; one outbox entry when taken, none when moved
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/payments.lua

local sale, confirming, outbox, order = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, order_id = tonumber(ARGV[1]), ARGV[2], ARGV[5]
local fence, lease_ms, mode, claim_id = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], ARGV[9]
local known_fence = tonumber(ARGV[10])

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end

local found = redis.call("HMGET", order, "status", "fence", "claim_id", "claimed_at")
local status, current_fence = found[1], payment_count(found[2], found[4])
if not status then return {"not_found"} end
if not current_fence then return redis.error_reply("BUG lease: a claimed order has no fence") end
local lease_end = tonumber(redis.call("ZSCORE", confirming, order_id))
if status == "CONFIRMING" and found[3] == claim_id and current_fence > fence then
    return {"taken", int(current_fence), int(lease_end)}
end
if status ~= "CONFIRMING" or current_fence ~= fence then
    return {"stale", status, int(current_fence)}
end

local lease_until = int(now_ms + lease_ms)
if mode == "move" or mode == "pause" then
    -- A pause of no length is over in this millisecond.
    local score = mode == "pause" and int(now_ms + lease_ms - 1) .. ".5" or lease_until
    redis.call("ZADD", confirming, score, order_id)
    return {"moved", lease_until}
end
local paused = mode == "take_now" and lease_end and lease_end % 1 > 0
if lease_end and lease_end > now_ms and not paused then return {"leased", int(lease_end)} end

fence = math.max(fence, known_fence) + 1
local seq = append_event(head, "taken_over", order_id, now_ms, string.format(
    '{"from":"CONFIRMING","to":"CONFIRMING","fence":%.0f,"leaseUntil":%s}', fence, lease_until))
local mark = close_head(head)
redis.call(
    "HSET", order, "fence", int(fence), "claim_id", claim_id, "updated_at", int(now_ms),
    "seq", seq)
redis.call("ZADD", confirming, lease_until, order_id)
return {"taken", int(fence), lease_until, mark}
