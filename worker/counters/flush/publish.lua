#!lua flags=allow-oom
-- Publishes many messages in one command: a pipeline of single PUBLISHes takes several times as long.
--
-- ARGV[1] channel   ARGV[2…] messages, at least one
--
-- Returns how many it published: 1 where nobody listens, else all. PUBLISH counts the subscribers of this server only;
-- those of a replica are not known, so with replicas somebody may listen.

local function may_be_heard()
  local ok, text = pcall(redis.call, 'INFO', 'replication')
  return not ok or type(text) ~= 'string' or not string.find(text, 'connected_slaves:0', 1, true)
end

if redis.call('PUBLISH', ARGV[1], ARGV[2]) == 0 and not may_be_heard() then return 1 end
for i = 3, #ARGV do redis.call('PUBLISH', ARGV[1], ARGV[i]) end
return #ARGV - 1
