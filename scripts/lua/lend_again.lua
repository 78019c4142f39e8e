#!lua
--[[
lend_again.lua: repeat a lend that the receiver has and that a loss removed from the donor.

Keys     all carry the partition's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S.p}:sale           settings, epoch, last seq and chain
  KEYS[2]   outbox     stream  rsv:{S.p}:outbox         one entry per change
  KEYS[3]   transfers  hash    rsv:{S.p}:transfers      number and units per direction, peer, SKU
  KEYS[4]   stock      hash    rsv:{S.p}:stock:SKU      the item
Args
  ARGV[1]   not_after  int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch      text  the rebuild's own; another one means that another rebuild has begun
  ARGV[3]   receiver   int   the partition that has received the units
  ARGV[4]   sku        text
  ARGV[5]   number     int   the last number that the receiver has of this donor and SKU
  ARGV[6]   up_to      int   the units of all lends up to this number that the receiver has
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the partition is not this rebuild's
  done        the donor has this lend or a later one
  short       {available} fewer units are available than the receiver has received
  lent        {units} the lend is repeated; it stands for every number after the donor's last one
Keeps    total = available + held + sold, each >= 0; the version moves with the total; one outbox
         entry when it writes, else none
Cost     O(1)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/version.lua
--@include lib/transfers.lua

-- The receiver cannot give the units back: it may have sold them. After a restore of the donor from
-- a backup they would exist twice until this lend.
local sale, outbox, transfers, stock = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local not_after, epoch, receiver, sku = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local number, up_to = tonumber(ARGV[5]), tonumber(ARGV[6])
local OPERATION = "rebuild"

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if not head.refills then return redis.error_reply("BUG lend_again: the sale is not a partition") end

local field = transfer_field("lent", receiver, sku)
local lot = lot_of(redis.call("HGET", transfers, field))
if not lot then
    return redis.error_reply("BUG lend_again: the lends of " .. sku .. " are damaged")
end
if number <= lot.number then return {"done"} end
local units = up_to - lot.units
if units < 1 then
    return redis.error_reply("BUG lend_again: a later lend of " .. sku .. " needs more units")
end
local found = redis.call("HMGET", stock, "total", "available")
local total, available = count_of(found[1]), count_of(found[2])
if (found[1] or found[2]) and not (total and available and available <= total) then
    return redis.error_reply("BUG lend_again: a count of " .. sku .. " is damaged")
end
if units > (available or 0) then return {"short", int(available or 0)} end
local version = next_version(sale)
if not version then return redis.error_reply("BUG lend_again: the partition has no version") end

append_event(head, "lent", "", now_ms, string.format(
    '{"peer":%s,"sku":"%s","number":%.0f,"units":%.0f,"upTo":%.0f,"total":%.0f,"version":%.0f,'
    .. '"operation":"%s"}',
    receiver, sku, number, units, up_to, total - units, version, OPERATION))
close_head(head)
write_version(sale, version)
redis.call("HSET", stock, "total", int(total - units), "available", int(available - units))
redis.call(
    "HSET", transfers, field,
    int(number) .. " " .. int(up_to) .. " " .. int(units) .. " " .. OPERATION)
return {"lent", int(units)}
