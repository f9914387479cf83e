#!lua flags=allow-oom
-- Subtracts one committed flush from the counters and moves the marker to it. All of it, or nothing.
--
-- KEYS[1] marker            ARGV[1] marker of the flush before    ARGV[2] marker of this flush
-- KEYS[2…] counters         ARGV[3…] views that the flush took from each counter
--
-- Returns {'settled', left out, clamped} with the positions (1 = KEYS[2]) of counters that do not hold a count and stay
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
local left_out, clamped, take, zero = {}, {}, {}, {}
for first = 2, #KEYS, 1000 do
  local last = math.min(first + 999, #KEYS)
  local values = redis.call('MGET', unpack(KEYS, first, last))
  for i = first, last do
    local value, taken = values[i - first + 1], ARGV[i + 1]
    if value == false then
      -- Missing: it was reset, there is nothing to subtract. Another type: leave it alone.
      local kind = redis.call('TYPE', KEYS[i]).ok
      table.insert(kind == 'none' and clamped or left_out, i - 1)
    elseif not is_count(value) then
      table.insert(left_out, i - 1)
    elseif is_above(value, taken) then
      table.insert(take, {KEYS[i], taken})
    else
      if value ~= taken then table.insert(clamped, i - 1) end
      if value ~= '0' then table.insert(take, {KEYS[i], value}) end
      table.insert(zero, KEYS[i])
    end
  end
end

-- The first call of each kind of write changes nothing, in case this kind or the next is refused.
redis.call('SET', KEYS[1], ARGV[1])
for _, counter in ipairs(take) do redis.call('DECRBY', counter[1], counter[2]) end
redis.call('SET', KEYS[1], ARGV[2])
-- The counters are at zero now: a DEL that is refused leaves a zero, not a count.
for first = 1, #zero, 1000 do
  redis.call('DEL', unpack(zero, first, math.min(first + 999, #zero)))
end
return {'settled', left_out, clamped}
