#!lua
--[[
retire.lua: fence off a sale that has ended, so that it can leave this server.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale        hash    rsv:{S}:sale         settings, epoch, last seq and chain
  KEYS[2]   deadlines   zset    rsv:{S}:deadlines    order id -> deadline, Unix ms
  KEYS[3]   confirming  zset    rsv:{S}:confirming   order id -> end of the lease, Unix ms
  KEYS[4]   deposits    zset    rsv:{S}:deposits     order id -> due date of the account, Unix ms
  KEYS[5]   outbox      stream  rsv:{S}:outbox       one entry per change
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the epoch of the sale, as last read by the caller
  ARGV[3]   seq        int   the last event of the sale that SQL has
  ARGV[4]   chain      text  its chain value
  ARGV[5]   ended_ms   int   ms since the end and the last change; 0 at an operator's request,
                             for a sale that is closed or has ended
  ARGV[6]   prefix     text  prefix of the epoch that fences off the sale
Returns  the first that applies
  too_late    the server's clock is past not_after
  done        the sale is fenced off, by this or an earlier call
  recovering  the sale is missing, under another epoch, or does not match its outbox
  not_ended   the sale is open, or ended or changed too recently
  open        {orders} this many holds, payments or deposits are in progress
  behind      {seq} SQL lacks events up to this one, or has another event under its number
Keeps    the counters and the orders untouched; no outbox entry
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua

local sale, deadlines, confirming, deposits = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local outbox = KEYS[5]
local not_after, epoch, seq, chain = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local ended_ms, prefix = tonumber(ARGV[5]), ARGV[6]

-- Time of the last event, such as an operator's change, a refund, or the end of a deposit.
local function last_event_ms(stream)
    local fields = redis.call("XREVRANGE", stream, "+", "-", "COUNT", "1")[1][2]
    for i = 1, #fields, 2 do
        if fields[i] == "at" then return tonumber(fields[i + 1]) end
    end
end

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local found = redis.call("HMGET", sale, "epoch", "seq")
if found[1] == prefix .. epoch and tonumber(found[2]) == seq then return {"done"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
local is_closed = ended_ms == 0 and head.status == "closed"
local since = math.max(head.closes_at, ended_ms > 0 and last_event_ms(outbox) or 0)
if not is_closed and now_ms < since + ended_ms then return {"not_ended"} end
local open = redis.call("ZCARD", deadlines) + redis.call("ZCARD", confirming)
    + redis.call("ZCARD", deposits)
if open > 0 then return {"open", int(open)} end
if head.seq ~= seq or head.chain ~= chain then return {"behind", int(head.seq)} end

redis.call("HSET", sale, "epoch", prefix .. epoch)
return {"done"}
