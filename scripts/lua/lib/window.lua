-- The sale's admission, window and status, in the order of their refusals.
local function window_refusal(head, wish, now_ms)
    if head.require_admission and not wish.admitted then return {"not_admitted"} end
    if head.status == "closed" or now_ms >= head.closes_at then return {"closed"} end
    if now_ms < head.opens_at then return {"not_open", int(head.opens_at)} end
    if head.status == "paused" then return {"paused"} end
end
