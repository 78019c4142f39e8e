-- An item on sale with its tracked stock (lib/stock.lua); nil if the sale does not have it. `bug`
-- is the error reply for a damaged item.
local function read_item(script, key, sku)
    local found = redis.pcall("HMGET", key, "available", "held", "price", "limit")
    local item = {
        key = key, sku = sku, available = count_of(found[1]), held = count_of(found[2]),
        price = count_of(found[3]), limit = count_of(found[4]), moved = 0,
    }
    local whole = item.available and item.held and item.price and item.limit
    if not whole and (found.err or found[1] or found[2] or found[3] or found[4]) then
        item.bug = redis.error_reply(
            "BUG " .. script .. ": a field of " .. sku .. " is not a valid count")
    end
    if whole or item.bug then return item end
end
