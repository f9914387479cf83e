#!lua flags=allow-oom
-- Puts a new group with one consumer, the mark, in place of the group of this worker.
--
-- KEYS[1] stream   ARGV[1] group   ARGV[2] last delivered id   ARGV[3] mark
--
-- Returns 'set', or 'missing' when there is no stream.

if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return 'missing' end
redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[2])
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[3])
return 'set'
