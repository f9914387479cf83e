#!lua flags=allow-oom
-- Writes the probe that the creation of the marker must find again.
--
-- KEYS[1] probe   ARGV[1] nonce
--
-- Without a lifetime: at maxmemory, keys with a lifetime are evicted first.
-- allow-oom: the first flush frees memory, so a worker must be able to start at maxmemory.

redis.call('SET', KEYS[1], ARGV[1])
return 'written'
