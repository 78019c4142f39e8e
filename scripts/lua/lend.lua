#!lua
--[[
lend.lua: lend available units of one SKU to another partition, under the next transfer number.

Keys     all carry the partition's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S.p}:sale           settings, epoch, last seq and chain
  KEYS[2]   deadlines  zset    rsv:{S.p}:deadlines      order id -> deadline, Unix ms
  KEYS[3]   outbox     stream  rsv:{S.p}:outbox         one entry per change
  KEYS[4]   transfers  hash    rsv:{S.p}:transfers      number and units per direction, peer, SKU
  KEYS[5]   stock      hash    rsv:{S.p}:stock:SKU      the item
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the partition, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the partition that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   caller_ms   int   Unix ms, caller's clock; a deadline must have passed on both clocks
  ARGV[6]   receiver    int   the partition that gets the units
  ARGV[7]   sku         text
  ARGV[8]   wanted      int   units, at least 1; fewer are lent if fewer are available
  ARGV[9]   after       int   the last number of this donor, receiver and SKU, as last read by the
                              caller under this epoch; the lend gets the next one
  ARGV[10]  operation   text  the caller's id of this lend: letters, digits, - and _; a repeat of
                              the last lend's id gets the same reply
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the partition is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events or lends that the caller has seen
  lent        {number, units, units of all lends up to it} now, or by an earlier call
  overtaken   {last number} another operation already has the number after `after`
  due         {order ids} no unit is available, but overdue holds may free some: expire them, then
              retry
  dry         no unit is available
Keeps    total = available + held + sold, each >= 0; the version moves with the total; one outbox
         entry when it writes, else none
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/due.lua
--@include lib/version.lua
--@include lib/transfers.lua

-- A lend has a number and an operation, because several collectors of one receiver lend at the same
-- time, and a collector repeats a call whose reply was lost.
--   collector 1:  after 4, operation x -> 5 (the reply is lost)
--   collector 2:  after 5, operation y -> 6
--   collector 1:  after 4, operation x -> overtaken; the row of number 5 in SQL has operation x
-- With an operation alone, the repeat of x would lend again, because only the last operation is
-- kept. With a number alone, both collectors would use the units of lend 5.
local sale, deadlines, outbox, transfers, stock = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, caller_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])
local receiver, sku, wanted = ARGV[6], ARGV[7], tonumber(ARGV[8])
local after, operation = tonumber(ARGV[9]), ARGV[10]

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end
if not head.refills then return redis.error_reply("BUG lend: the sale is not a partition") end
if not string.find(operation, "^[%w_-]+$") then
    return redis.error_reply("BUG lend: the operation is not a valid id")
end

local field = transfer_field("lent", receiver, sku)
local lot = lot_of(redis.call("HGET", transfers, field))
if not lot then return redis.error_reply("BUG lend: the lends of " .. sku .. " are damaged") end
if lot.operation == operation then
    return {"lent", int(lot.number), int(lot.last), int(lot.units)}
end
if lot.number < after then return {"went_back"} end
if lot.number > after then return {"overtaken", int(lot.number)} end

local found = redis.call("HMGET", stock, "total", "available")
local total, available = count_of(found[1]), count_of(found[2])
if (found[1] or found[2]) and not (total and available and available <= total) then
    return redis.error_reply("BUG lend: a field of " .. sku .. " is not a valid count")
end
local units = math.min(wanted, available or 0)
if units < 1 then
    local is_held = head.hold_policy == "prepare"
    local due = is_held and due_orders(deadlines, math.min(now_ms, caller_ms)) or {}
    if #due > 0 then return {"due", unpack(due)} end
    return {"dry"}
end
local version = next_version(sale)
if not version then return redis.error_reply("BUG lend: the partition has no version") end

local number, up_to = lot.number + 1, lot.units + units
append_event(head, "lent", "", now_ms, string.format(
    '{"peer":%s,"sku":"%s","number":%.0f,"units":%.0f,"upTo":%.0f,"total":%.0f,"version":%.0f,'
    .. '"operation":"%s"}',
    receiver, sku, number, units, up_to, total - units, version, operation))
local mark = close_head(head)
write_version(sale, version)
redis.call("HSET", stock, "total", int(total - units), "available", int(available - units))
redis.call(
    "HSET", transfers, field,
    int(number) .. " " .. int(up_to) .. " " .. int(units) .. " " .. operation)
return {"lent", int(number), int(units), int(up_to), mark}
