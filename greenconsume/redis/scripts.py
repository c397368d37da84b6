"""Owns every change of more than one key: Lua scripts, each of which happens as a whole or not at all.

A message leaves a place only in the script that puts it in another, and what cannot be put is put back.
Keys and arguments are as each script says. Does no I/O. Called by `ledger`, `feed` and `keeper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1


@dataclass(frozen=True, slots=True)
class Script:
    """A script, and the name by which the server knows it once it has run."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        """Return the script of a text."""
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local stamp = clock[1] .. '.' .. string.format('%06d', clock[2])
"""
#: Changes nothing of the index, the first key. A server that has no memory left refuses the first change that
#: may need some, but lets a script end that has begun: and leases are to be refreshed all the same.
_BEGUN = "redis.call('ZREM', KEYS[1], '')"

#: Moves up to ARGV[1] messages from the queues to the unacknowledged ones, as fields ARGV[2] .. ARGV[3], …
#: + 1, …. KEYS: unacked, its index, then the queues in their order. ARGV[4]: bytes after which no more is
#: taken; then for each queue what ends its entries, and the milliseconds after which it expires, or 0.
#: Where all was taken that there is, also if no more was wanted, the length of each queue is read behind the
#: last change of it: tracking then tells of the next message, and no message can come between. Returns that
#: (1 or 0), and the messages of each queue. Of many who wait most find nothing: that is the shortest way.
TAKE = Script.of(
    """
local wanted, number, room = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
local reply, stamp = {0}, nil
for i = 3, #KEYS do
  local tail, taken = ARGV[2 * i - 1], {}
  while wanted > 0 and room > 0 and redis.call('LLEN', KEYS[i]) > 0 do
    if not stamp then
      local clock = redis.call('TIME')
      stamp = clock[1] .. '.' .. string.format('%06d', clock[2])
    end
    local messages = redis.call('RPOP', KEYS[i], math.min(wanted, 100))
    local entries, index = {}, {}
    for j, message in ipairs(messages) do
      local field = ARGV[2] .. string.format('%d', number)
      number = number + 1
      room = room - #message
      entries[2 * j - 1], entries[2 * j] = field, '[' .. message .. tail
      index[2 * j - 1], index[2 * j] = stamp, field
      taken[#taken + 1] = message
    end
    local done = redis.pcall('HSET', KEYS[1], unpack(entries))
    if type(done) ~= 'table' then done = redis.pcall('ZADD', KEYS[2], unpack(index)) end
    if type(done) == 'table' and done.err then
      for j = #messages, 1, -1 do
        redis.call('RPUSH', KEYS[i], messages[j])
        redis.pcall('HDEL', KEYS[1], entries[2 * j - 1])
      end
      return done
    end
    wanted = wanted - #messages
  end
  local expires = tonumber(ARGV[2 * i])
  if expires > 0 then redis.call('PEXPIRE', KEYS[i], expires) end
  reply[i - 1] = taken
end
if wanted <= 0 or room <= 0 then
  for i = 3, #KEYS do
    if redis.call('LLEN', KEYS[i]) > 0 then return reply end
  end
end
reply[1] = 1
return reply
"""
)

#: Puts messages back to the end that they came from, their bytes unchanged; those whose record is gone are
#: not ours any more. KEYS: unacked, its index, then a queue for each message; ARGV: for each its field, and
#: the length of what ends its entry. The last that was taken comes first. Returns how many went back.
GIVE_BACK = Script.of(
    """
local count = 0
for i = 3, #KEYS do
  local field, tail = ARGV[2 * i - 5], tonumber(ARGV[2 * i - 4])
  local entry = redis.call('HGET', KEYS[1], field)
  local score = redis.call('ZSCORE', KEYS[2], field)
  redis.call('ZREM', KEYS[2], field)
  if entry then
    local done = redis.pcall('RPUSH', KEYS[i], string.sub(entry, 2, #entry - tail))
    if type(done) == 'table' and done.err then
      if score then redis.call('ZADD', KEYS[2], score, field) end
      return done
    end
    redis.call('HDEL', KEYS[1], field)
    count = count + 1
  end
end
return count
"""
)

#: Puts back what a take moved whose answer nobody waits for, each to the end that it came from. KEYS: as in
#: TAKE. ARGV: what the fields begin with, the first number, how many; then for each list the end of its
#: entries and its step of priority. What is none of ours any more is left alone.
RECALL = Script.of(
    """
local function home(entry)
  local found, priority
  for i = 3, #KEYS do
    local tail = ARGV[2 * i - 2]
    if string.sub(entry, -#tail) == tail then
      if not priority then
        local ok, message = pcall(cjson.decode, string.sub(entry, 2, -#tail - 1))
        ok, priority = pcall(function() return tonumber(message.properties.priority) end)
        if not ok then priority = 0 end
        priority = priority or 0
      end
      if not found or tonumber(ARGV[2 * i - 1]) <= priority then
        found = {KEYS[i], string.sub(entry, 2, -#tail - 1)}
      end
    end
  end
  return found
end
for number = tonumber(ARGV[2]) + tonumber(ARGV[3]) - 1, tonumber(ARGV[2]), -1 do
  local field = ARGV[1] .. string.format('%d', number)
  local entry = redis.call('HGET', KEYS[1], field)
  local to = entry and home(entry)
  if to then
    local done = redis.pcall('RPUSH', to[1], to[2])
    if type(done) ~= 'table' then redis.call('HDEL', KEYS[1], field) end
    if type(done) ~= 'table' then redis.call('ZREM', KEYS[2], field) end
  end
end
"""
)

#: Moves unacknowledged messages elsewhere, changed. KEYS: unacked, its index, then where each goes to.
#: ARGV[1]: only what was last refreshed ARGV[1] seconds ago or earlier; empty: all. Then for each message
#: its field, the side of the lists it goes to, L or R, what is put there, and how many lists these are; it
#: goes to all of them or to none. Returns for each whether it was moved.
MOVE = Script.of(
    _NOW
    + """
local moved, first = {}, 3
for i = 2, #ARGV, 4 do
  local field, side, payload, last = ARGV[i], ARGV[i + 1], ARGV[i + 2], first + ARGV[i + 3] - 1
  local score = redis.call('ZSCORE', KEYS[2], field)
  local due = ARGV[1] == '' or not score or tonumber(score) <= now - tonumber(ARGV[1])
  moved[#moved + 1] = 0
  if due and redis.call('HEXISTS', KEYS[1], field) == 1 then
    redis.call('ZREM', KEYS[2], field)
    for j = first, last do
      local done = redis.pcall(side .. 'PUSH', KEYS[j], payload)
      if type(done) == 'table' and done.err then
        for k = j - 1, first, -1 do redis.call(side .. 'POP', KEYS[k]) end
        if score then redis.call('ZADD', KEYS[2], score, field) end
        return done
      end
    end
    redis.call('HDEL', KEYS[1], field)
    moved[#moved] = 1
  elseif due then
    redis.call('ZREM', KEYS[2], field)
  end
  first = last + 1
end
return moved
"""
)

#: Refreshes leases. KEYS: the index; ARGV: the fields. Returns those that are not there any more.
REFRESH = Script.of(
    _NOW
    + _BEGUN
    + """
local lost = {}
for i = 1, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[1], 'XX', stamp, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

#: Says that an owner of leases lives, and asks what is overdue. KEYS: the index, the owners, the index of
#: what is delayed. ARGV: the owner or an empty text, its connection's id, the visibility timeout, how many
#: overdue fields to name, and behind how many. Returns those fields, the owners with the seconds since they
#: were heard of, the seconds until the next delayed message is due (empty: none).
BEAT = Script.of(
    _NOW
    + _BEGUN
    + """
if ARGV[1] ~= '' then redis.call('HSET', KEYS[2], ARGV[1], stamp .. ' ' .. ARGV[2]) end
local limit = now - tonumber(ARGV[3])
local overdue = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', limit, 'LIMIT', ARGV[5], ARGV[4])
local owners = {}
local known = redis.call('HGETALL', KEYS[2])
for i = 1, #known, 2 do
  local at, id = string.match(known[i + 1], '^(%S+) (%S+)$')
  owners[#owners + 1] = {known[i], at and tostring(now - tonumber(at)) or '0', id or ''}
end
local next = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
return {overdue, owners, next[2] and tostring(tonumber(next[2]) - now) or ''}
"""
)

#: Has an unacknowledged message wait. KEYS: unacked, its index, what is delayed, its index. ARGV: the
#: field, the seconds, what is put. Returns whether the message was still there.
DELAY = Script.of(
    _NOW
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
local done = redis.pcall('HSET', KEYS[3], ARGV[1], ARGV[3])
if type(done) ~= 'table' then
  done = redis.pcall('ZADD', KEYS[4], string.format('%.6f', now + tonumber(ARGV[2])), ARGV[1])
end
if type(done) == 'table' and done.err then
  redis.call('ZADD', KEYS[2], stamp, ARGV[1])
  return done
end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
"""
)

#: Puts what was delayed and is due at the end of its queue. KEYS: what is delayed, its index; ARGV[1]: how
#: many. Its entries are the key of the queue, a line feed, the message. Returns the keys that got one, the
#: seconds until the next is due (empty: none), and why one stays (empty: none does): it may be for another
#: user.
DUE = Script.of(
    _NOW
    + """
local fields = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, tonumber(ARGV[1]))
local touched, refusal = {}, ''
for _, field in ipairs(fields) do
  local entry = redis.call('HGET', KEYS[1], field)
  local due = redis.call('ZSCORE', KEYS[2], field)
  redis.call('ZREM', KEYS[2], field)
  if entry then
    local cut = string.find(entry, '\\n', 1, true)
    local key = string.sub(entry, 1, cut - 1)
    local done = redis.pcall('LPUSH', key, string.sub(entry, cut + 1))
    if type(done) == 'table' and done.err then
      redis.call('ZADD', KEYS[2], due, field)
      refusal = done.err
    else
      redis.call('HDEL', KEYS[1], field)
      touched[#touched + 1] = key
    end
  end
end
local next = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return {touched, next[2] and tostring(tonumber(next[2]) - now) or '', refusal}
"""
)

#: Deletes the tables of bindings whose deadline is over, up to ARGV[3] of them, as kombu 5.7 does; but not
#: where a queue that does not expire is bound as well. KEYS: the deadlines; ARGV: what the keys of the tables
#: begin with, and those of the lasting bindings.
SWEEP_BINDINGS = Script.of(
    """
local now = redis.call('TIME')
local ms = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
local overdue = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ms, 'LIMIT', 0, tonumber(ARGV[3]))
for _, exchange in ipairs(overdue) do
  if redis.call('EXISTS', ARGV[2] .. exchange) == 0 then redis.call('DEL', ARGV[1] .. exchange) end
  redis.call('ZREM', KEYS[1], exchange)
end
"""
)

#: Raises the deadline of a binding, as kombu 5.7 does. KEYS: the binding table, the deadlines; ARGV: the
#: member, the exchange, milliseconds.
REFRESH_BINDING = Script.of(
    """
redis.call('SADD', KEYS[1], ARGV[1])
local now = redis.call('TIME')
local ms = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
redis.call('ZADD', KEYS[2], 'GT', ms + tonumber(ARGV[3]), ARGV[2])
"""
)
