-- The result of reading one entry of a batch. A key of the wrong type, or invalid JSON, raises an
-- error: it is this entry's own reply, because nothing of the entry was written yet.
local function guarded(script, read, ...)
    local whole, result = pcall(read, ...)
    if whole or type(result) == "table" then return result end
    return redis.error_reply("BUG " .. script .. ": " .. result)
end

-- Decides a batch, then writes its changes once, also after an error at a later entry: the
-- decisions before it are kept.
local function run_batch(decide, write)
    local whole, result = pcall(decide)
    write()
    if not whole then error(result, 0) end
    return result
end
