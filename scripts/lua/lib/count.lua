-- A counter's value, or nil for invalid text: HINCRBY would fail on it, after other writes.
local function count_of(text)
    if text and string.find(text, "^%d+$") and #text <= 15 then return tonumber(text) end
end
