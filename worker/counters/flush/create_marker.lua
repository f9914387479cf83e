#!lua flags=allow-oom
-- Creates the marker, if this is still the data set that the evidence is about.
--
-- KEYS[1] marker   KEYS[2] probe   ARGV[1] nonce of the probe   ARGV[2] the marker to write
--
-- Returns 'created'; 'exists' when the marker's key exists, with any type; 'moved' when the probe is gone or another:
-- another data set was put in place since the probe was written, or another worker is creating a marker.

if redis.call('EXISTS', KEYS[1]) == 1 then return 'exists' end
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'moved' end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
return 'created'
