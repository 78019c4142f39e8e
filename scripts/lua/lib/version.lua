-- A sale's version moves with every change of a field that a PUT sets, so a PUT never overwrites a
-- change that its caller has not seen. The version of the next change; nil if the sale has none.
local function next_version(sale)
    local version = tonumber(redis.call("HGET", sale, "version"))
    return version and version + 1
end

-- Writes that version. Clearing the digest keeps a PUT from before this change from counting as a
-- repeat of the last one.
local function write_version(sale, version)
    redis.call("HSET", sale, "version", int(version), "digest", "")
end
