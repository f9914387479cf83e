#!lua flags=allow-oom
-- Leaves the probe that a birth must find again.
--
-- KEYS[1] probe   ARGV[1] nonce   ARGV[2] seconds after which it is gone
--
-- allow-oom: the first flush frees memory, so it must be possible to begin at maxmemory too.

redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 'left'
