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
        "open_head", "went_back", "append_event", "close_head",
        "COUNTER", "take_lines", "check_lines", "move_lines",
        "DUE_MAX", "due_orders", "payment_count", "PAID_ORDERS", "check_paid", "paid_step",
        "next_version", "write_version",
    },
}
files["scripts/lua/lib"] = {ignore = {"211"}}
