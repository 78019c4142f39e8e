-- A sale's version moves with all that a PUT can change, so a PUT never undoes what its caller has
-- not seen. The number that the next change gives it; nil where the sale has none.
local function next_version(sale)
    local version = tonumber(redis.call("HGET", sale, "version"))
    return version and version + 1
end

-- Writes that number. Forgetting the digest keeps a PUT that was made before this change from
-- being taken for a repeat of the last one.
local function write_version(sale, version)
    redis.call("HSET", sale, "version", int(version), "digest", "")
end
