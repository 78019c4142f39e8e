-- The state of a batch of baskets. `holds`: whether the sale takes its stock now. `sets` are its
-- deadlines, its payments in progress and its deposits.
local function new_batch(head, now_ms, caller_ms, sets)
    local batch = {
        head = head, now_ms = now_ms, at = int(now_ms), expiry_ms = math.min(now_ms, caller_ms),
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

-- A basket by its keys: its order, buyer, buyer-orders and rate, and its bucket if it is declared.
local function read_basket(batch, keys, first, has_bucket)
    local order, buyer = keys[first], keys[first + 1]
    return {
        order = order, buyer = buyer, buyer_orders = keys[first + 2], rate = keys[first + 3],
        order_id = string.sub(order, batch.order_id_at),
        buyer_id = string.sub(buyer, batch.buyer_id_at),
        bucket = has_bucket and batch.head.has_tombstones and keys[first + 4],
    }
end

-- The first refusal that applies, or the error of damaged data; nil if the basket is taken.
local function basket_refusal(batch, basket, wish)
    local standing = redis.call("HGET", basket.order, "digest")
    if standing == wish.digest then return {"replayed"} end
    basket.ended = 0
    if basket.bucket then
        local digest, count = read_ended(basket.bucket, basket.order_id, basket.buyer_id)
        if digest == nil then return redis.error_reply("BUG prepare: a tombstone is damaged") end
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
    -- An overdue hold must not cause a refusal by stock or limit: where it may, `due` is returned.
    return limit_refusal(batch, basket, wish) or stock_refusal(batch, basket, wish)
end
