-- One reading of the server's clock per script: TIME advances inside a script on Redis 7.0.
local function server_ms()
    local time = redis.call("TIME")
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Lua prints numbers with 14 digits; this prints every integer below 2^53 exactly.
local function int(number)
    return string.format("%d", number)
end
