#!lua flags=allow-oom
-- Writes the first marker, if this is still the data set that was judged.
--
-- KEYS[1] marker   KEYS[2] probe   ARGV[1] nonce that the probe was given   ARGV[2] the marker to write
--
-- Returns 'born'; 'exists' when there is a marker (or anything else under its name); 'moved' when the probe is gone,
-- which means that another data set was put in place since it was left, or that another worker is at it.

if redis.call('EXISTS', KEYS[1]) == 1 then return 'exists' end
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'moved' end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
return 'born'
