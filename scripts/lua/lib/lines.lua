-- The counter of a SKU that includes a reservation's units, by the reservation's status.
local COUNTER = {
    HELD = "held", CONFIRMING = "held", AWAITING_DEPOSIT = "held", CONFIRMED = "sold",
    PREPARED = "available", RELEASED = "available", EXPIRED = "available", REFUNDED = "available",
}

-- Most orders of a sale are alike: each text is decoded once per script.
local decoded = {}

-- The lines of a stored reservation, each with the stock key that the caller declared for it.
-- A key of another SKU is a bug in the caller. It is detected before the first write.
local function take_lines(script, items, first_key, keys)
    local lines = {}
    decoded[items] = decoded[items] or cjson.decode(items)
    for i, item in ipairs(decoded[items]) do
        local key = keys[first_key + i - 1]
        if not key or string.sub(key, -#item[1] - 1) ~= ":" .. item[1] then
            return nil, redis.error_reply("BUG " .. script .. ": stock keys do not fit the order")
        end
        lines[i] = {sku = item[1], quantity = item[2], key = key}
    end
    return lines
end

-- The first error that moving these lines between two counters would cause, as an error reply; nil
-- if none. HINCRBY fails on a non-integer, so every field that move_lines changes is read here.
local function check_lines(script, lines, buyer, from, to)
    for _, line in ipairs(lines) do
        local found = redis.call("HMGET", line.key, from, to)
        local have = count_of(found[1])
        if not have or have < line.quantity then
            return redis.error_reply(
                "BUG " .. script .. ": " .. from .. " of " .. line.sku .. " is less than the order")
        end
        if not count_of(found[2]) then
            return redis.error_reply(
                "BUG " .. script .. ": " .. to .. " of " .. line.sku .. " is not a valid count")
        end
        if from == "available" or to == "available" then
            local taken = redis.call("HGET", buyer, line.sku)
            if taken and not count_of(taken) then
                return redis.error_reply(
                    "BUG " .. script .. ": the buyer's count of " .. line.sku .. " is not valid")
            end
        end
    end
end

-- Moves the lines between two counters, and keeps the buyer's counts in step.
local function move_lines(lines, buyer, from, to)
    if from == to then return end
    for _, line in ipairs(lines) do
        redis.call("HINCRBY", line.key, from, -line.quantity)
        redis.call("HINCRBY", line.key, to, line.quantity)
        if from == "available" then
            redis.call("HINCRBY", buyer, line.sku, line.quantity)
        elseif to == "available" then
            if redis.call("HINCRBY", buyer, line.sku, -line.quantity) <= 0 then
                redis.call("HDEL", buyer, line.sku)
            end
        end
    end
end
