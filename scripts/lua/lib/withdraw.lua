-- Removes the units of these lines from the sale, once move_lines has made them available.
local function withdraw_lines(lines)
    for _, line in ipairs(lines) do
        redis.call("HINCRBY", line.key, "available", -line.quantity)
        redis.call("HINCRBY", line.key, "total", -line.quantity)
    end
end
