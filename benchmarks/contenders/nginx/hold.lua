-- The sale in nginx and LuaJIT: lua-resty-redis, one EVALSHA for each request.
local redis = require("nginx.redis")
local cjson = require("cjson.safe")

local SALE = "bench"
local TAG = "rsv:{" .. SALE .. "}:"
local NOT_AFTER_MS, INTERVAL_MS, BURST = 2000, 50, 20
local SECRET = "order ids of the benchmark"
--- As many idle connections to Redis as there are buyers at once.
local POOL, IDLE_MS = 256, 60000

local socket = "unix:" .. os.getenv("BENCH_SOCKET")
local epoch = os.getenv("BENCH_EPOCH")

local file = assert(io.open(os.getenv("BENCH_SCRIPT")))
local source = file:read("*a")
file:close()
local sha

local hold = {}

local function refuse(status, code)
    ngx.status = status
    ngx.print(cjson.encode({code = code}))
end

local function connected()
    local client = redis:new()
    assert(client:connect(socket))
    sha = sha or assert(client:script("LOAD", source))
    return client
end

local function wish()
    ngx.req.read_body()
    local body = ngx.req.get_body_data()
    local data = body and cjson.decode(body)
    local line = data and type(data.items) == "table" and data.items[1]
    if not line or type(line.sku) ~= "string" or type(line.quantity) ~= "number"
        or type(data.amount) ~= "number" then
        return nil
    end
    return data, line, body
end

function hold.answer()
    local data, line, body = wish()
    if not data then return refuse(400, "malformed_request") end
    local buyer, key = ngx.var.http_x_buyer, ngx.var.http_idempotency_key
    local mac = ngx.encode_base64(ngx.hmac_sha1(SECRET, buyer .. ":" .. key) .. "    ")
    local order = SALE .. "-" .. string.gsub(string.sub(mac, 1, 24), "[+/]", {["+"] = "-", ["/"] = "_"})
    local now = ngx.now() * 1000
    local client = connected()
    local replies, err = client:evalsha(
        sha, 10, TAG .. "sale", TAG .. "deadlines", TAG .. "outbox", TAG .. "confirming",
        TAG .. "deposits", TAG .. "stock:" .. line.sku,
        TAG .. "order:" .. order, TAG .. "buyer:" .. buyer, TAG .. "buyer-orders:" .. buyer,
        TAG .. "rate:" .. buyer, now + NOT_AFTER_MS, epoch, 0, "", now, INTERVAL_MS, BURST, 0, 0, 0,
        1, 1, 1, "1", 1, "", line.sku,
        string.sub(ngx.md5(body), 1, 12), "Hoodie", '"Hoodie"', data.amount, 0, "1 " .. line.quantity)
    if not replies then
        ngx.log(ngx.ERR, err)
        return refuse(503, "unavailable")
    end
    client:set_keepalive(IDLE_MS, POOL)
    local word, expires_at, created_at, _, lines = unpack(replies[1])
    local decided = replies[2]
    if type(decided) ~= "number" then return refuse(409, decided and decided[1] or word) end
    local items = cjson.decode(lines)
    for i, item in ipairs(items) do
        items[i] = {sku = item[1], quantity = item[2], price = item[3]}
    end
    ngx.status = 201
    ngx.print(cjson.encode({
        orderId = order, saleId = SALE, status = "HELD", amount = data.amount, items = items,
        createdAt = tonumber(created_at), expiresAt = tonumber(expires_at),
    }))
end

return hold
