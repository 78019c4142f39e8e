-- Transfers of stock between the partitions of a sale. The hash `transfers` has one field for each
-- direction, peer and SKU: "lent:PEER:SKU" or "received:PEER:SKU" -> the last number and the total
-- units of its transfers. lend.lua appends the units and the operation of the last lend.
local function transfer_field(direction, peer, sku)
    return direction .. ":" .. peer .. ":" .. sku
end

-- Parses the value of such a field; nil if it is damaged.
local function lot_of(text)
    if not text then return {number = 0, units = 0} end
    local number, units, rest = string.match(text, "^(%d+) (%d+)(.*)$")
    number, units = count_of(number), count_of(units)
    if not number or not units then return nil end
    local last, operation = string.match(rest, "^ (%d+) ([%w_-]+)$")
    last = count_of(last)
    if rest ~= "" and not last then return nil end
    return {number = number, units = units, last = last, operation = operation}
end
