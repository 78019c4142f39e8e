#!lua flags=no-writes
--[[
reading.lua: read one partition at one instant, for a certificate that the sale is short of units.

Keys     all carry the partition's hash tag, so the script stays in one slot
  KEYS[1]   sale       hash    rsv:{S.p}:sale           settings, epoch, last seq and chain
  KEYS[2]   deadlines  zset    rsv:{S.p}:deadlines      order id -> deadline, Unix ms
  KEYS[3]   outbox     stream  rsv:{S.p}:outbox         one entry per change
  KEYS[4]   transfers  hash    rsv:{S.p}:transfers      number and units per direction, peer, SKU
  KEYS[5+]  stock      hash    rsv:{S.p}:stock:SKU      one per SKU
Args
  ARGV[1]   not_after   int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch       text  the epoch of the partition, as last read by the caller
  ARGV[3]   mark_seq    int   the last event of the partition that the caller has seen, 0 for none
  ARGV[4]   mark_chain  text  its chain value, "" if only its number is known
  ARGV[5]   partitions  int   number of partitions of the sale
  ARGV[6+]  sku         text  one per stock key
Returns  the first that applies
  too_late    the server's clock is past not_after
  recovering  the partition is missing, under another epoch, or does not match its outbox
  went_back   this server has lost events that the caller has seen
  reading     {epoch, refills, {overdue orders by the server's clock}, {available of each SKU},
              {of each transfer "lent" or "received", peer, sku, number, units}, the caller's next
              mark} an item that the partition does not have is not available
Keeps    everything: it writes nothing
Cost     O(SKUs x partitions), at most 20 x 64 (1 ms)
]]
--@include lib/now.lua
--@include lib/head.lua
--@include lib/count.lua
--@include lib/due.lua
--@include lib/transfers.lua

local sale, deadlines, outbox, transfers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIRST_STOCK_KEY, FIRST_SKU = 5, 6
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, partitions = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5])

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end
local head = open_head(sale, outbox, epoch)
if not head then return {"recovering"} end
if went_back(head, mark_seq, mark_chain) then return {"went_back"} end
if not head.refills then return redis.error_reply("BUG reading: the sale is not a partition") end

-- A prepared order holds nothing, so its deadline frees no stock.
local due = head.hold_policy == "prepare" and due_orders(deadlines, now_ms) or {}
local available, fields, parts = {}, {}, {}
for i = FIRST_SKU, #ARGV do
    local sku, key = ARGV[i], KEYS[FIRST_STOCK_KEY + i - FIRST_SKU]
    local found = redis.call("HGET", key, "available")
    if not found and redis.call("EXISTS", key) == 0 then found = "0" end
    if not count_of(found) then
        return redis.error_reply("BUG reading: available of " .. sku .. " is not a valid count")
    end
    available[#available + 1] = found
    for peer = 0, partitions - 1 do
        for _, direction in ipairs({"lent", "received"}) do
            fields[#fields + 1] = transfer_field(direction, int(peer), sku)
            parts[#parts + 1] = {direction, int(peer), sku}
        end
    end
end

local found = {}
for i, text in ipairs(redis.call("HMGET", transfers, unpack(fields))) do
    local lot = lot_of(text)
    if not lot then
        return redis.error_reply("BUG reading: the transfers of " .. parts[i][3] .. " are damaged")
    end
    if text then
        for _, part in ipairs(parts[i]) do found[#found + 1] = part end
        found[#found + 1], found[#found + 2] = int(lot.number), int(lot.units)
    end
end
return {
    "reading", epoch, int(head.refills), due, available, found, {int(head.seq), head.chain}}
