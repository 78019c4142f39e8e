-- Writes one reservation, its event first; its stock and its deadline follow with the batch.
-- Returns the number of the event.
local function write_hold(batch, basket, wish)
    -- %q quotes printable ASCII, the alphabet of buyer ids, as JSON does.
    local buyer = string.format("%q", basket.buyer_id)
    local seq = append_event(
        batch.head, "prepared", basket.order_id, batch.now_ms,
        wish.event_begins .. buyer .. wish.event_ends)
    redis.call("ZADD", basket.buyer_orders, batch.at, basket.order_id)
    -- Fields that all open holds share are in the sale or omitted: orders take most of the memory.
    -- The time of the hold is its deadline minus its hold seconds.
    redis.call(
        "HSET", basket.order, "status", batch.status, "buyer", basket.buyer_id,
        "items", wish.items, "amount", wish.amount_text, "name", wish.name,
        "digest", wish.digest, "hold", batch.hold_seconds, "expires_at", batch.expires_at,
        "seq", seq)
    local new = batch.new_deadlines
    new[#new + 1] = batch.expires_at
    new[#new + 1] = basket.order_id
    for _, line in ipairs(batch.holds and wish.lines or {}) do
        move_stock(line.stock, line.quantity)
        redis.call("HINCRBY", basket.buyer, line.stock.sku, int(line.quantity))
    end
    write_arrival(basket, batch.now_ms)
    return batch.head.seq
end
