-- The refusal of a basket that the available stock does not cover; nil if it does. Baskets of one
-- wish get the same refusal until the stock changes: the script builds it once, and each repeat is
-- its number in this reply. A partition replies `dry` and counts every overdue hold as helpful,
-- because other partitions can supply the remaining units.
local function stock_refusal(batch, basket, wish)
    local seq = batch.head.seq
    if wish.sold_out_at == seq then return -wish.sold_out_number end
    local short, for_good, is_partition = false, false, batch.head.refills
    for _, line in ipairs(wish.lines) do
        local stock = line.stock
        short = short or stock.available < line.quantity
        -- Sold units do not return at a deadline.
        for_good = for_good or stock.available + stock.held < line.quantity
    end
    for_good = for_good and not is_partition
    if not short then return nil end
    local next_deadline = ""
    local overdue = not for_good and holds_ran_out(batch)
    if overdue and not basket.waited then return name_due(batch) end
    if not for_good and batch.holds then
        write_deadlines(batch)
        local first = redis.call("ZRANGE", batch.deadlines, 0, 0, "WITHSCORES")[2]
        next_deadline = count_of(first) and first or ""
    end
    local reply = {is_partition and "dry" or "sold_out", next_deadline}
    for _, line in ipairs(wish.lines) do
        reply[#reply + 1] = line.stock.sku
        reply[#reply + 1] = int(line.stock.available)
    end
    batch.sold_out_count = batch.sold_out_count + 1
    -- With an overdue hold, a basket that has not waited gets `due`, not this refusal.
    if not overdue then wish.sold_out_at, wish.sold_out_number = seq, batch.sold_out_count end
    return reply
end
