#!lua flags=allow-oom
--[[
touch.lua: write a field of the sale with its own value, so that replicas receive one more change.

WAIT looks at its own connection's last write. A reply that reports an earlier call's change is
therefore preceded by this write: a replica that has it has every change before it.

Keys     carries the sale's hash tag
  KEYS[1]   sale   hash   rsv:{S}:sale   settings, epoch, last seq and chain
Args
  none
Returns  the first that applies
  not_found  no such sale: nothing is written, and no key is created
  done       one write was sent to the replicas
Keeps    everything: the value stays; no outbox entry
Cost     O(1)
]]
local sale = KEYS[1]

local epoch = redis.call("HGET", sale, "epoch")
if not epoch then return {"not_found"} end
redis.call("HSET", sale, "epoch", epoch)
return {"done"}
