-- The head of a sale: its settings, its epoch, and the number and chain value of its last event.
-- nil if the sale is not the one the caller knows: no key, another epoch, an outbox whose last
-- entry is not the head's, or a damaged number of refills. Then no script may write until a
-- rebuild (`recovering`). Only a partition has `refills`.
local function open_head(sale, outbox, epoch)
    local found = redis.call(
        "HMGET", sale, "epoch", "seq", "chain", "status", "opens_at", "closes_at",
        "hold_seconds", "hold_policy", "require_admission", "currency", "tombstone_seq",
        "refills")
    if found[1] ~= epoch then return nil end
    local refills = found[12]
    if refills and not (string.find(refills, "^%d+$") and #refills <= 15) then return nil end
    local last = redis.pcall("XREVRANGE", outbox, "+", "-", "COUNT", "1")
    if last.err or not last[1] or last[1][1] ~= found[2] .. "-0" then return nil end
    return {
        sale = sale, outbox = outbox, seq = tonumber(found[2]), chain = found[3],
        status = found[4], opens_at = tonumber(found[5]), closes_at = tonumber(found[6]),
        hold_seconds = tonumber(found[7]), hold_policy = found[8],
        require_admission = found[9] == "1", currency = found[10],
        has_tombstones = found[11] and true, refills = tonumber(refills or nil),
    }
end

-- Whether this server has lost events that the caller has seen: its sale ends before the caller's
-- mark, or with another event under the same number. Then no script may write either: its event
-- would reuse a number under which others know another event.
local function went_back(head, mark_seq, mark_chain)
    if head.seq ~= mark_seq then return head.seq < mark_seq end
    return mark_chain ~= "" and mark_chain ~= head.chain
end

-- Appends one event, as each step's first write. The entry's id is the event's number, and
-- open_head has checked that the stream ends right before it, so XADD cannot fail half-way.
local function append_event(head, event, order_id, at_ms, data)
    local seq, at = int(head.seq + 1), int(at_ms)
    local chain = redis.sha1hex(
        head.chain .. "|" .. seq .. "|" .. event .. "|" .. order_id .. "|" .. at .. "|" .. data)
    redis.call(
        "XADD", head.outbox, seq .. "-0",
        "event", event, "order", order_id, "at", at, "data", data, "chain", chain)
    head.seq, head.chain = head.seq + 1, chain
    return seq
end

-- Counts a refill of a partition: a change that adds to `available`, or that lifts the deadline of
-- a hold which is due. Two readings with the same count therefore had no such change between them.
local function count_refill(head)
    if not head.refills then return end
    head.refills, head.was_refilled = head.refills + 1, true
end

-- Writes the head, and returns the caller's next mark.
local function close_head(head)
    redis.call("HSET", head.sale, "seq", int(head.seq), "chain", head.chain)
    if head.was_refilled then redis.call("HSET", head.sale, "refills", int(head.refills)) end
    return {int(head.seq), head.chain}
end
