-- The state of a batch of baskets. `script` names the running script in error replies. `sets` are
-- the sale's deadlines, payments in progress and deposits. `holds`: whether a prepare takes stock.
local function new_batch(script, head, now_ms, caller_ms, sets)
    local batch = {
        script = script, head = head, now_ms = now_ms, at = int(now_ms),
        expiry_ms = math.min(now_ms, caller_ms),
        hold_seconds = int(head.hold_seconds), expires_at = int(now_ms + head.hold_seconds * 1000),
        holds = false, status = "PREPARED", word = "prepared", hold_sets = {sets[2], sets[3]},
        deadlines = sets[1], new_deadlines = {}, due_named = false, sold_out_count = 0,
    }
    -- Offsets of the ids in a basket's keys: all keys of a sale share their prefix.
    local tag = #head.sale - #"sale"
    batch.order_id_at, batch.buyer_id_at = tag + #"order:" + 1, tag + #"buyer:" + 1
    if head.hold_policy == "prepare" then
        batch.holds, batch.status, batch.word, batch.hold_sets = true, "HELD", "held", sets
    end
    return batch
end

-- A basket with its keys: order, buyer, buyer-orders and rate, and the bucket if it is declared.
local function read_basket(batch, keys, first, has_bucket)
    local order, buyer = keys[first], keys[first + 1]
    return {
        order = order, buyer = buyer, buyer_orders = keys[first + 2], rate = keys[first + 3],
        order_id = string.sub(order, batch.order_id_at),
        buyer_id = string.sub(buyer, batch.buyer_id_at),
        bucket = has_bucket and batch.head.has_tombstones and keys[first + 4],
    }
end

-- The first refusal that applies, or the error reply for damaged data; nil if there is none.
local function basket_refusal(batch, basket, wish)
    local standing = redis.call("HGET", basket.order, "digest")
    if standing == wish.digest then return {"replayed"} end
    basket.ended = 0
    if basket.bucket then
        local digest, count = read_ended(basket.bucket, basket.order_id, basket.buyer_id)
        if digest == nil then
            return redis.error_reply("BUG " .. batch.script .. ": a tombstone is damaged")
        end
        standing, basket.ended = standing or digest, count
        if standing == wish.digest then return {"replayed"} end
    end
    -- Reading the count checks the key's type before the first write.
    basket.orders = redis.call("ZCARD", basket.buyer_orders)
    local refusal = unpaid_refusal(batch, basket, batch.unpaid_max)
        or rate_refusal(batch.rate, basket, batch.now_ms)
    if refusal then return refusal end
    if wish.unknown then return {"sku_not_found", wish.unknown} end
    if wish.bug then return wish.bug end
    if standing then return {"key_reused"} end
    refusal = window_refusal(batch.head, wish, batch.now_ms)
    if refusal then return refusal end
    if wish.price ~= wish.amount then return {"amount_mismatch", int(wish.price)} end
    -- An overdue hold must not cause a refusal by stock or limit: if it might, the reply is `due`.
    return limit_refusal(batch, basket, wish) or stock_refusal(batch, basket, wish)
end
