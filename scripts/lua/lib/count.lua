-- A counter's value, or nil where the text is none: HINCRBY would refuse it, after other writes.
local function count_of(text)
    if text and string.find(text, "^%d+$") and #text <= 15 then return tonumber(text) end
end
