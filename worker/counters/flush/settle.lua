#!lua flags=allow-oom
-- Subtracts one committed flush from the counters and moves the marker to it. All of it, or nothing.
--
-- KEYS[1] marker               ARGV[1] marker of the flush before
-- KEYS[2] a missing counter    ARGV[2] marker of this flush
-- KEYS[3…] counters            ARGV[3…] views that the flush took from each counter
--
-- Returns {'settled', left out, clamped} with the positions (1 = KEYS[3]) of counters that do not hold a count and stay
-- as they are, and of counters that held less than was taken; {'already'} when the marker names this flush;
-- {'moved', marker} when it names any other.
--
-- allow-oom: settling frees memory, so it must work at maxmemory too.

local MAX = '9223372036854775807'

-- Lua numbers are doubles and would round; counts are compared as strings and subtracted by Redis.
local function is_count(value)
  return value == '0' or (string.match(value, '^[1-9]%d*$') and (#value < #MAX or (#value == #MAX and value <= MAX)))
end

local function is_above(a, b)
  if #a ~= #b then return #a > #b end
  return a > b
end

local marker = redis.call('GET', KEYS[1])
if marker == ARGV[2] then return {'already'} end
if marker ~= ARGV[1] then return {'moved', marker} end

-- Look at every counter first: a script that fails after its first write leaves that write behind.
local left_out, clamped, emptied, reduced = {}, {}, {}, {}
for first = 3, #KEYS, 1000 do
  local last = math.min(first + 999, #KEYS)
  local values = redis.call('MGET', unpack(KEYS, first, last))
  for i = first, last do
    local value, taken = values[i - first + 1], ARGV[i]
    if value == taken then
      table.insert(emptied, i)
    elseif value == false then
      -- Missing: it was reset, there is nothing to subtract. Another type: leave it alone.
      local kind = redis.call('TYPE', KEYS[i]).ok
      table.insert(kind == 'none' and clamped or left_out, i - 2)
    elseif not is_count(value) then
      table.insert(left_out, i - 2)
    elseif is_above(value, taken) then
      table.insert(reduced, i)
    else
      table.insert(clamped, i - 2)
      table.insert(emptied, i)
    end
  end
end

-- The first call of each kind of write changes nothing, in case this kind is refused.
redis.call('SET', KEYS[1], ARGV[1])
local any = reduced[1] or emptied[1]
if any then redis.call('DECRBY', KEYS[any], 0) end
local deletes = type(redis.pcall('DEL', KEYS[2])) == 'number'
for first = 1, #emptied, 1000 do
  local keys = {}
  for i = first, math.min(first + 999, #emptied) do table.insert(keys, KEYS[emptied[i]]) end
  -- Without the right to delete, a zero is left: the worker does not count it.
  if deletes then redis.call('DEL', unpack(keys)) else
    for _, key in ipairs(keys) do redis.call('DECRBY', key, redis.call('GET', key)) end
  end
end
for _, i in ipairs(reduced) do redis.call('DECRBY', KEYS[i], ARGV[i]) end
redis.call('SET', KEYS[1], ARGV[2])
return {'settled', left_out, clamped}
