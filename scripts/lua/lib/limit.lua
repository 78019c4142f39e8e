-- The buyer's limit of each item, held and bought units together. Only the buyer's own overdue
-- holds can make room under it.
local function limit_refusal(batch, basket, wish)
    local taken = redis.call("HMGET", basket.buyer, unpack(wish.skus))
    for i, line in ipairs(wish.lines) do
        local has = 0
        if taken[i] then has = count_of(taken[i]) end
        if not has then
            return redis.error_reply(
                "BUG " .. batch.script .. ": the buyer's count of " .. line.stock.sku
                .. " is not valid")
        end
        if has + line.quantity > line.stock.limit then
            local may_help = line.quantity <= line.stock.limit and not basket.waited
            may_help = may_help and holds_ran_out(batch)
            local own = may_help and own_due(basket, batch.deadlines, batch.expiry_ms) or {}
            if #own > 0 then return {"due", unpack(own)} end
            return {"limit_exceeded", line.stock.sku, int(line.stock.limit), int(has)}
        end
    end
end
