-- A wish of a batch: the request that its baskets share, at the prices of these stocks. `unknown`
-- is an SKU that the sale does not have, `bug` the error of a damaged one.
local function read_wish(batch, args, first, stocks, skus)
    local wish = {
        digest = args[first], name = args[first + 1], amount = tonumber(args[first + 3]),
        admitted = args[first + 4] == "1", lines = {}, skus = {}, price = 0, items = "",
        amount_text = args[first + 3],
    }
    local items = {}
    for index, quantity in string.gmatch(args[first + 5], "(%d+) (%d+)") do
        local stock = stocks[tonumber(index)]
        if not stock then
            wish.unknown = skus[tonumber(index)]
            return wish
        end
        if stock.bug then
            wish.bug = stock.bug
            return wish
        end
        local count = #wish.lines + 1
        wish.lines[count] = {stock = stock, quantity = tonumber(quantity)}
        wish.skus[count] = stock.sku
        wish.price = wish.price + stock.price * tonumber(quantity)
        items[count] = string.format('["%s",%s,%s]', stock.sku, quantity, int(stock.price))
    end
    wish.items = "[" .. table.concat(items, ",") .. "]"
    -- The parts that these baskets' events share, before the buyer and after.
    wish.event_begins = table.concat({
        '{"from":"","to":"', batch.status, '","items":', wish.items, ',"amount":',
        wish.amount_text, ',"digest":"', wish.digest, '","expiresAt":', batch.expires_at,
        ',"buyer":'})
    wish.event_ends = ',"name":' .. args[first + 2] .. "}"
    return wish
end
