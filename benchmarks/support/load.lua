--[[
load.lua: requests of wrk. Each is one hold with its own buyer and idempotency key.

With BENCH_RATE the requests keep to a timetable (an open loop, regardless of latency); late requests
are counted. Without it each connection sends as soon as it has its answer.
With BENCH_OTHERS every tenth request goes to another sale, each of them in turn.
]]
local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds; long nanoseconds; } bench_time;
int clock_gettime(int clock, bench_time *out);
]]

local CLOCK_MONOTONIC = 1
--- Behind the timetable by more than this, in ms, a request counts as late: wrk's timer has 1 ms.
local LATE_MS = 5

local run = assert(os.getenv("BENCH_RUN"))
local path = assert(os.getenv("BENCH_PATH"))
local body = assert(os.getenv("BENCH_BODY"))
local others = tonumber(os.getenv("BENCH_OTHERS") or "0")
local OTHERS_EVERY = 10
local rate = tonumber(os.getenv("BENCH_RATE") or "0")
local buyers = assert(io.open(assert(os.getenv("BENCH_BUYERS"))))
local time = ffi.new("bench_time")

local function now_ms()
    ffi.C.clock_gettime(CLOCK_MONOTONIC, time)
    return tonumber(time.seconds) * 1e3 + tonumber(time.nanoseconds) / 1e6
end

local function next_line()
    local line = buyers:read("*l")
    if not line then
        buyers:seek("set")
        line = buyers:read("*l")
    end
    return line
end

buyers:seek("set", tonumber(os.getenv("BENCH_SKIP") or "0"))
next_line() -- the offset may be in the midst of one

local function head_of(url)
    return "POST " .. url .. " HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        .. "Content-Length: " .. #body .. "\r\nAuthorization: Bearer "
end

local HEAD = head_of(path)
local other_heads = {}
for number = 1, others do
    other_heads[number] = head_of(string.format(os.getenv("BENCH_OTHER_PATH"), number - 1))
end

sent = 0 -- global, as late below: the main state reads it when all is done
function request()
    local line = next_line()
    local gap = string.find(line, " ", 1, true)
    sent = sent + 1
    local head = HEAD
    if others > 0 and sent % OTHERS_EVERY == 0 then
        head = other_heads[sent / OTHERS_EVERY % others + 1]
    end
    return head .. string.sub(line, gap + 1)
        .. "\r\nX-Buyer: " .. string.sub(line, 1, gap - 1)
        .. "\r\nIdempotency-Key: " .. run .. "-" .. sent
        .. "\r\n\r\n" .. body
end

if rate > 0 then
    local first_at, slots
    late = 0
    function delay()
        local now = now_ms()
        if not first_at then first_at, slots = now, 0 end
        local due = first_at + slots * 1e3 / rate
        slots = slots + 1
        if now - due > LATE_MS then late = late + 1 end
        return math.max(0, math.floor(due - now))
    end
end

local thread
function setup(one) thread = one end

function done(summary, latency)
    local late_count = rate > 0 and thread:get("late") or 0
    io.write(string.format(
        'BENCH {"seconds":%.6f,"sent":%d,"answers":%d,"refused":%d,"broken":%d,"late":%d,'
            .. '"p50_ms":%.3f,"p99_ms":%.3f,"p999_ms":%.3f,"max_ms":%.3f}\n',
        summary.duration / 1e6, thread:get("sent"), summary.requests, summary.errors.status,
        summary.errors.connect + summary.errors.read + summary.errors.write
            + summary.errors.timeout,
        late_count, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
        latency:percentile(99.9) / 1e3, latency.max / 1e3))
end
