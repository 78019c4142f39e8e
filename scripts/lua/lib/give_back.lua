-- The first error that giving these lines back would cause, as an error reply; nil if none.
-- `stock_at` reads a stock key once per batch.
local function check_back(lines, buyer, stock_at)
    for _, line in ipairs(lines) do
        local stock = stock_at(line.key)
        if not stock.held or stock.held < line.quantity then
            return redis.error_reply(
                "BUG expire: held of " .. line.sku .. " is less than the order")
        end
        if not stock.available then
            return redis.error_reply(
                "BUG expire: available of " .. line.sku .. " is not a valid count")
        end
        line.taken = count_of(redis.call("HGET", buyer, line.sku) or "0")
        if not line.taken then
            return redis.error_reply(
                "BUG expire: the buyer's count of " .. line.sku .. " is not valid")
        end
    end
end

-- Gives the lines back that were checked; their stock is written with the batch.
local function give_back(lines, buyer, stock_at)
    for _, line in ipairs(lines) do
        move_stock(stock_at(line.key), -line.quantity)
        if line.taken > line.quantity then
            redis.call("HINCRBY", buyer, line.sku, int(-line.quantity))
        else
            redis.call("HDEL", buyer, line.sku)
        end
    end
end
