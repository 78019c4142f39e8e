-- The stock of a batch is read once, tracked here, so that an entry sees the ones before it, and
-- written once at the end: `moved` counts units from available to held, negative on the way back.
local function move_stock(stock, units)
    stock.available, stock.held = stock.available - units, stock.held + units
    stock.moved = stock.moved + units
end

local function write_stocks(stocks)
    for _, stock in pairs(stocks) do
        if stock.moved ~= 0 then
            redis.call("HINCRBY", stock.key, "available", int(-stock.moved))
            redis.call("HINCRBY", stock.key, "held", int(stock.moved))
        end
    end
end
