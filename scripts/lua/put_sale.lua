#!lua
--[[
put_sale.lua: create a sale, or change one that the caller has read.

Keys     all carry the sale's hash tag, so the script stays in one slot
  KEYS[1]   sale    hash    rsv:{S}:sale           settings, epoch, last seq and chain
  KEYS[2]   outbox  stream  rsv:{S}:outbox         one entry per change
  KEYS[3+]  stock   hash    rsv:{S}:stock:SKU      one per item, then one per leaving item
Args
  ARGV[1]   not_after    int   Unix ms, server's clock; after it the script does nothing
  ARGV[2]   epoch        text  as last read by the caller; the first epoch of a new sale
  ARGV[3]   mark_seq     int   the last event of the sale that the caller has seen, 0 for none
  ARGV[4]   mark_chain   text  its chain value, "" if only its number is known
  ARGV[5]   version      int   the version that the caller read; 0 creates
  ARGV[6]   digest       text  of the whole change: repeated, it gets the same answer
  ARGV[7]   skus         text  JSON array of the item ids, in the order of the items
  ARGV[8]   data         text  the event's data, JSON
  ARGV[9]   settings     int   number of settings that follow
  ARGV[10]  items        int   number of items after the settings
  ARGV[11+] field        text  each setting: field, value ("" removes it); each item: sku, name,
                               price, total, limit
Returns  the first that applies
  too_late    the server's clock is past not_after
  exists      {version} the sale exists already, and version 0 only creates
  recovering  the sale is missing, under another epoch, or does not match its outbox; or keys of a
              lost sale exist
  went_back   this server has lost events that the caller has seen
  done        {version} applied, now or by an earlier call
  changed     {version} the sale has changed since it was read
  fixed       {field} currency and hold policy cannot change, nor can a sale become a partition
              (`refills`)
  total_too_low {sku, held and sold}
  item_in_use   {sku} an item with held or sold units cannot leave
Keeps    total = available + held + sold, each >= 0; one outbox entry when it writes, else none
Cost     O(items)
]]
--@include lib/now.lua
--@include lib/head.lua

local sale, outbox = KEYS[1], KEYS[2]
local FIRST_STOCK_KEY, FIRST_FIELD = 3, 11
local mark_seq, mark_chain = tonumber(ARGV[3]), ARGV[4]
local not_after, epoch, version, digest = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[5]), ARGV[6]
local skus, data = ARGV[7], ARGV[8]
local setting_count, item_count = tonumber(ARGV[9]), tonumber(ARGV[10])
local FIRST_ITEM = FIRST_FIELD + setting_count * 2

local now_ms = server_ms()
if now_ms > not_after then return {"too_late"} end

local function item_at(position)
    local arg = FIRST_ITEM + (position - 1) * 5
    local key = KEYS[FIRST_STOCK_KEY + position - 1]
    local found = redis.call("HMGET", key, "held", "sold", "total")
    return {
        key = key, sku = ARGV[arg], name = ARGV[arg + 1], price = ARGV[arg + 2],
        total = tonumber(ARGV[arg + 3]), limit = ARGV[arg + 4], total_before = found[3],
        held = tonumber(found[1]) or 0, sold = tonumber(found[2]) or 0,
    }
end

local current = redis.call(
    "HMGET", sale, "version", "digest", "currency", "hold_policy", "skus")
local head
if version == 0 then
    if current[1] then
        local same = current[1] == "1" and current[2] == digest
        return same and {"done", "1"} or {"exists", current[1]}
    end
    if redis.call("EXISTS", outbox) == 1 then return {"recovering"} end
    head = {sale = sale, outbox = outbox, seq = 0, chain = ""}
else
    head = open_head(sale, outbox, epoch)
    if not head then return {"recovering"} end
    if went_back(head, mark_seq, mark_chain) then return {"went_back"} end
    if current[1] == int(version + 1) and current[2] == digest then
        return {"done", current[1]}
    end
    if current[1] ~= int(version) then return {"changed", current[1]} end
    for i = 0, setting_count - 1 do
        local field, value = ARGV[FIRST_FIELD + i * 2], ARGV[FIRST_FIELD + i * 2 + 1]
        if field == "currency" and value ~= current[3]
            or field == "hold_policy" and value ~= current[4]
            or field == "refills" then
            return {"fixed", field}
        end
    end
end

local items, wanted, moves_total = {}, {}, false
for position = 1, item_count do
    local item = item_at(position)
    if item.total < item.held + item.sold then
        return {"total_too_low", item.sku, int(item.held + item.sold)}
    end
    items[position], wanted[item.sku] = item, true
    moves_total = moves_total or item.total_before ~= int(item.total)
end
local leaving = {}
for _, sku in ipairs(current[5] and cjson.decode(current[5]) or {}) do
    if not wanted[sku] then
        local key = KEYS[FIRST_STOCK_KEY + item_count + #leaving]
        if not key or string.sub(key, -#sku - 1) ~= ":" .. sku then
            return {"changed", current[1]}
        end
        local found = redis.call("HMGET", key, "held", "sold")
        if tonumber(found[1]) + tonumber(found[2]) > 0 then return {"item_in_use", sku} end
        leaving[#leaving + 1] = key
    end
end

append_event(head, "sale_put", "", now_ms, data)
if moves_total then count_refill(head) end
local fields = {
    "HSET", sale, "version", int(version + 1), "digest", digest, "skus", skus, "epoch", epoch}
local absent = {"HDEL", sale}
for i = FIRST_FIELD, FIRST_ITEM - 1, 2 do
    local field, value = ARGV[i], ARGV[i + 1]
    if value == "" then
        absent[#absent + 1] = field
    else
        fields[#fields + 1], fields[#fields + 2] = field, value
    end
end
redis.call(unpack(fields))
if #absent > 2 then redis.call(unpack(absent)) end
redis.call("HSETNX", sale, "status", "open")
redis.call("HSETNX", sale, "created_at", int(now_ms))
local mark = close_head(head)
for _, item in ipairs(items) do
    redis.call(
        "HSET", item.key, "total", int(item.total),
        "available", int(item.total - item.held - item.sold),
        "held", int(item.held), "sold", int(item.sold),
        "price", item.price, "limit", item.limit, "name", item.name)
end
for _, key in ipairs(leaving) do redis.call("DEL", key) end
return {"done", int(version + 1), mark}
