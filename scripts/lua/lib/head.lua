-- The head of a sale: its settings, its epoch, and the number and chain value of its last event.
-- nil if the key is missing, has another epoch than the caller's, does not match the last entry of
-- the outbox, or has a damaged count of refills. The script then replies `recovering`, because only
-- a rebuild may write. Only a partition has `refills`.
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

-- Whether this server has lost events that the caller has seen: its last event is older than the
-- caller's mark, or is another event with the same number. A script must not write then: its event
-- would reuse a number that already belongs to another event in SQL or in other processes.
local function went_back(head, mark_seq, mark_chain)
    if head.seq ~= mark_seq then return head.seq < mark_seq end
    return mark_chain ~= "" and mark_chain ~= head.chain
end

-- Appends one event; the first write of each step. The entry's id is the event's number. open_head
-- has checked that the outbox ends at the number before it, so XADD cannot fail after other writes.
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
-- an overdue hold. If two readings have the same count, no refill happened between them.
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
