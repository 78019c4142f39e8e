-- For the scripts in scripts/lua: `make lint-lua`.
std = "lua51"
max_line_length = 100
max_cyclomatic_complexity = false
-- What the server gives every script. None of it may be set.
read_globals = {"redis", "cjson", "cmsgpack", "bit", "KEYS", "ARGV"}

-- The steps of scripts/lua/lib. `--@include` puts their text into a script before it is sent, where
-- they are locals; alone, a script sees them as globals and a step seems to be used by nobody.
files["scripts/lua"] = {
    read_globals = {
        "server_ms", "int", "count_of",
        "open_head", "went_back", "append_event", "close_head", "count_refill",
        "COUNTER", "take_lines", "check_lines", "move_lines",
        "DUE_MAX", "due_orders", "payment_count", "PAID_ORDERS", "check_paid", "paid_step",
        "next_version", "write_version", "withdraw_lines",
        "guarded", "run_batch", "move_stock", "write_stocks", "check_back", "give_back",
        "read_item", "read_wish", "write_deadlines", "holds_ran_out", "name_due",
        "count_in", "own_due", "unpaid_refusal", "rate_refusal", "write_arrival",
        "window_refusal", "limit_refusal", "stock_refusal", "write_hold", "retake_refusal",
        "new_batch", "read_basket", "basket_refusal", "transfer_field", "lot_of",
        "order_field", "buyer_field", "is_bucket_of", "tombstone_of", "read_ended",
    },
}
files["scripts/lua/lib"] = {ignore = {"211"}}
