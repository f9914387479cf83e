#!lua flags=no-writes,allow-oom
-- Checks which commands of the worker and its scripts the Redis user may not run, without running them.
--
-- KEYS[1] marker   KEYS[2] probe   KEYS[3] a counter   KEYS[4…] streams, if used
-- ARGV[1] channel of totals   ARGV[2] channel of messages, or ''   ARGV[3…] streams to which it appends
--
-- Returns the names of the denied commands, and 1 if the user may read settings, which the worker does not need; false
-- if the server cannot check them (before Redis 7).

if not redis.acl_check_cmd then return false end

local denied = {}
local commands = {
  {'PING'}, {'INFO'}, {'SCAN', '0'}, {'TYPE', KEYS[1]}, {'STRLEN', KEYS[3]}, {'EXISTS', KEYS[1]}, {'GET', KEYS[1]}, {'MGET', KEYS[1], KEYS[3]},
  {'SET', KEYS[1], ''}, {'SET', KEYS[2], ''}, {'DEL', KEYS[2]}, {'DECRBY', KEYS[3], '1'}, {'DEL', KEYS[3]},
  {'EVALSHA', '', '1', KEYS[1]}, {'PUBLISH', ARGV[1], ''},
}
if ARGV[2] ~= '' then table.insert(commands, {'SUBSCRIBE', ARGV[2]}) end
for i = 4, #KEYS do
  for _, command in ipairs({
    {'XRANGE', KEYS[i], '-', '+'}, {'XREAD', 'STREAMS', KEYS[i], '0'}, {'XTRIM', KEYS[i], 'MINID', '0'},
    {'XINFO', 'STREAM', KEYS[i]}, {'XINFO', 'GROUPS', KEYS[i]}, {'XINFO', 'CONSUMERS', KEYS[i], ''},
    {'XGROUP', 'CREATE', KEYS[i], '', '0'}, {'XGROUP', 'CREATECONSUMER', KEYS[i], '', ''},
    {'XGROUP', 'SETID', KEYS[i], '', '0'}, {'XGROUP', 'DESTROY', KEYS[i], ''}, {'XPENDING', KEYS[i], ''}, {'TIME'}, {'SCRIPT', 'LOAD', ''},
  }) do table.insert(commands, command) end
end
for i = 3, #ARGV do table.insert(commands, {'XADD', ARGV[i], '*', '', ''}) end
for _, command in ipairs(commands) do
  if not redis.acl_check_cmd(unpack(command)) then table.insert(denied, command[1]) end
end
-- Raises where the server has no CONFIG.
local exists, allowed = pcall(redis.acl_check_cmd, 'CONFIG', 'GET', '')
return {denied, exists and allowed and 1 or 0}
