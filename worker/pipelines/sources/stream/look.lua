#!lua flags=allow-oom
-- What a stream and its group are like at this instant: the evidence from which the worker decides what to carry.
--
-- KEYS[1] stream
-- ARGV[1] group        ARGV[2] '1': write nothing      ARGV[3] id to read after   ARGV[4] committed position
-- ARGV[5] expected mark, or ''                         ARGV[6] entries read up to the position, or ''
-- ARGV[7] mark to create, or ''                        ARGV[8] milliseconds to keep what is carried, or ''
--
-- Returns {role, type of the key}, and for a stream also {…, consumers of the group (-1: no group), mark, last delivered id
-- of the group, last id, entries added, length, first id, first id above ARGV[3], last id that is present}; ids that are not
-- there are ''.
--
-- It writes in two cases only. The mark is the expected one and the stream is not behind the position: mirror the position
-- into the group, and trim. There is no mark, one to create is given, and nothing that the position could have
-- skipped: create group and mark.
--
-- allow-oom: reading must work at maxmemory. No flag `no-writes`: a replica must refuse this script.

local key, group, look_only, after, position = KEYS[1], ARGV[1], ARGV[2] == '1', ARGV[3], ARGV[4]
local expected, entries_read, new_mark, keep = ARGV[5], ARGV[6], ARGV[7], ARGV[8]

-- Parts of ids may be too large for Lua's numbers: compare them as text.
local function is_above(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if #a_ms ~= #b_ms then return #a_ms > #b_ms end
  if a_ms ~= b_ms then return a_ms > b_ms end
  if #a_seq ~= #b_seq then return #a_seq > #b_seq end
  return a_seq > b_seq
end

local function by_name(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

local function look()
  local stream = by_name(redis.call('XINFO', 'STREAM', key))
  local seen = {
    consumers = -1, mark = '', delivered = '', others = {},
    last = stream['last-generated-id'], added = stream['entries-added'], length = stream['length'],
    first = '', above = '', present = '',
  }
  if stream['first-entry'] then seen.first = stream['first-entry'][1] end
  if stream['last-entry'] then seen.present = stream['last-entry'][1] end
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local found = by_name(flat)
    if found['name'] == group then
      seen.consumers, seen.delivered = found['consumers'], found['last-delivered-id']
    else
      table.insert(seen.others, found)
    end
  end
  if seen.consumers > 0 then seen.mark = by_name(redis.call('XINFO', 'CONSUMERS', key, group)[1])['name'] end
  local following = redis.call('XRANGE', key, '(' .. after, '+', 'COUNT', 1)
  if following[1] then seen.above = following[1][1] end
  return seen
end

-- Keeps what another group has not read, or has read and not acknowledged.
local function trim(seen)
  local now = redis.call('TIME')
  local before = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000) - tonumber(keep)
  if before <= 0 then return end
  local limit = string.format('%.0f-0', before)
  if is_above(limit, position) then limit = position end
  for _, other in ipairs(seen.others) do
    if is_above(limit, other['last-delivered-id']) then limit = other['last-delivered-id'] end
    local oldest = redis.call('XPENDING', key, other['name'])[2]
    if oldest and is_above(limit, oldest) then limit = oldest end
  end
  redis.call('XTRIM', key, 'MINID', '~', limit, 'LIMIT', 10000)
end

local role = string.match(redis.call('INFO', 'replication'), 'role:(%a+)')
local kind = redis.call('TYPE', key).ok
if kind ~= 'stream' then return {role, kind} end

local seen = look()
if not look_only then
  local is_behind = is_above(position, seen.last)
  if seen.consumers == 1 and seen.mark == expected and not is_behind then
    if seen.delivered ~= position then
      local command = {'XGROUP', 'SETID', key, group, position}
      if entries_read ~= '' then
        table.insert(command, 'ENTRIESREAD')
        table.insert(command, math.min(tonumber(entries_read), seen.added))
      end
      redis.call(unpack(command))
    end
    if keep ~= '' then trim(seen) end
    seen = look()
  elseif new_mark ~= '' and seen.consumers < 1 and (seen.first == '' or is_above(seen.first, position)) and not (seen.first == '' and is_behind) then
    if seen.consumers == 0 then
      redis.call('XGROUP', 'SETID', key, group, position)
    else
      redis.call('XGROUP', 'CREATE', key, group, position)
    end
    redis.call('XGROUP', 'CREATECONSUMER', key, group, new_mark)
    seen = look()
  end
end
return {
  role, kind, seen.consumers, seen.mark, seen.delivered, seen.last, seen.added, seen.length,
  seen.first, seen.above, seen.present,
}
