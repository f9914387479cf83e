#!lua flags=allow-oom
-- Leaves the probe that a birth must find again.
--
-- KEYS[1] probe   ARGV[1] nonce
--
-- Without a lifetime: at maxmemory, keys that have one are evicted first.
-- allow-oom: the first flush frees memory, so it must be possible to begin at maxmemory too.

redis.call('SET', KEYS[1], ARGV[1])
return 'left'
