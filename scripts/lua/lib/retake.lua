-- The refusals of a claim or a rebuild that takes a basket again, each with whether it is for good:
-- then no expiry can lift it. A partition that is short is only `dry`, because the other units can
-- come from other partitions; any overdue hold may therefore help it.
local function retake_over_limit(lines, buyer)
    for _, line in ipairs(lines) do
        local taken = tonumber(redis.call("HGET", buyer, line.sku)) or 0
        local limit = tonumber(redis.call("HGET", line.key, "limit"))
        if taken + line.quantity > limit then
            local refusal = {"limit_exceeded", line.sku, int(limit), int(taken)}
            return refusal, line.quantity > limit
        end
    end
end

local function retake_short_of_stock(lines, is_partition)
    local short, for_good = false, false
    local refusal = {is_partition and "dry" or "sold_out", ""}
    for _, line in ipairs(lines) do
        local counters = redis.call("HMGET", line.key, "available", "held")
        local available, held = tonumber(counters[1]), tonumber(counters[2])
        short = short or available < line.quantity
        -- No deadline brings sold units back.
        for_good = for_good or available + held < line.quantity
        refusal[#refusal + 1] = line.sku
        refusal[#refusal + 1] = int(available)
    end
    if short then return refusal, for_good and not is_partition end
end

local function retake_refusal(head, lines, buyer)
    local refusal, for_good = retake_over_limit(lines, buyer)
    if refusal then return refusal, for_good end
    return retake_short_of_stock(lines, head.refills)
end
