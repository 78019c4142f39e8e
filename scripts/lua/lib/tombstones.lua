-- Tombstones of a sale: its orders that ended long ago without a claim. Each keeps the status, the
-- number of its last event and the digest, "R 1234 DIGEST"; SQL has the rest. A buyer's tombstones
-- share a bucket, where the buyer's own field counts them.
local ENDED_LETTER = {RELEASED = "R", EXPIRED = "E"}
local ORDER_FIELD_CHARS, BUCKET_CHARS, BUYER_FIELD_CHARS = 24, 3, 16

local function order_field(order_id)
    return string.sub(order_id, -ORDER_FIELD_CHARS)
end

local function buyer_field(buyer_id)
    local first = BUCKET_CHARS + 1
    return string.sub(redis.sha1hex(buyer_id), first, first + BUYER_FIELD_CHARS - 1)
end

local function is_bucket_of(bucket, buyer_id)
    local name = string.sub(redis.sha1hex(buyer_id), 1, BUCKET_CHARS)
    return string.sub(bucket, -BUCKET_CHARS - 1) == ":" .. name
end

-- nil for a status that no tombstone has.
local function tombstone_of(status, seq, digest)
    local letter = ENDED_LETTER[status]
    if letter then return letter .. " " .. seq .. " " .. digest end
end

-- The digest of an order's tombstone, false if it has none, and the number of the buyer's
-- tombstones; nil if one of the two is damaged.
local function read_ended(bucket, order_id, buyer_id)
    local found = redis.call("HMGET", bucket, order_field(order_id), buyer_field(buyer_id))
    local count = count_of(found[2] or "0")
    local digest = found[1] and string.match(found[1], "^[RE] %d+ ([%w_-]+)$")
    if not count or found[1] and (not digest or count == 0) then return nil end
    return digest or false, count
end
