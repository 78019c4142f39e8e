-- The deadlines of a batch of holds: `new_deadlines` are written by one command for many, and
-- before they are read; `due` are the overdue holds, the same for all baskets.
local function write_deadlines(batch)
    local new = batch.new_deadlines
    if #new > 0 then redis.call("ZADD", batch.deadlines, unpack(new)) end
    batch.new_deadlines = {}
end

local function holds_ran_out(batch)
    if not batch.holds then return false end
    batch.due = batch.due or due_orders(batch.deadlines, batch.expiry_ms)
    return #batch.due > 0
end

-- Only the first `due` of a reply has the ids.
local function name_due(batch)
    if batch.due_named then return {"due"} end
    batch.due_named = true
    return {"due", unpack(batch.due)}
end
