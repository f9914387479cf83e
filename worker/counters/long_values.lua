#!lua flags=no-writes,allow-oom
-- Finds values that are too long to be counts, without fetching them.
--
-- KEYS[1…] counters   ARGV[1] bytes
--
-- Returns the positions (1 = KEYS[1]) of strings with more bytes.

local limit, long = tonumber(ARGV[1]), {}
for i, key in ipairs(KEYS) do
  local size = redis.pcall('STRLEN', key)  -- a key of another type is an error
  if type(size) == 'number' and size > limit then table.insert(long, i) end
end
return long
