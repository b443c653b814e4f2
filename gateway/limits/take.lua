-- Brings buckets up to date and takes what a batch of requests asks of them: one round trip, one atomic step.
--
-- A bucket is a hash: l (level, microunits), f (millionths of a microunit), t (time of both, microseconds), b (a
-- budget's amount), and for each process "<held> <expires> <seq> <call> <taken>": what it holds on loan, until when
-- (microseconds), its last charge's number, its last call's, and what this took beside charges.
-- The arithmetic is that of bucket.py. Numbers are doubles: whole, below 2^53, and never printed but by '%.0f'.
--
-- KEYS     the buckets
-- ARGV     process, loan's life (us), number of the call, then for each bucket:
--            burst, rate, debt, kind, held, seq, charge, ceiling, want, observe, life (ms, 0 for ever), keep, known
--              kind     0 tokens; 1 slots; 2 budget: what is left is enough for any request
--              held     tokens: unused of the loan; slots: in use, and free ones that are kept
--              keep     1: tokens held stay on loan; 0: they are returned herewith
--              charge   taken after the fact, once for each seq; negative: given back
--              ceiling  the level is at most this; -1: any
--              want     to take on loan beyond what the requests need and what is kept
--              known    the process's last call about the bucket that was answered: what a later one took of a budget,
--                       which nothing refills, is put back
--            then the number of requests, and for each: the number of its needs, and for each: bucket, amount
-- Returns  {levels}, {loans}, {for each request {0, observed buckets...} or {the bucket that refuses}}; nothing, and
--          does nothing, for a call that comes behind a later one: nobody waits for it
local MICRO = 1000000
local ELAPSED_MAX = 100000000000000
local FORGET = 600 * MICRO
local WIDTH = 13

local function text(number)
  return string.format('%.0f', number)
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * MICRO + tonumber(time[2])
local process = ARGV[1]
local life = tonumber(ARGV[2])
local number = tonumber(ARGV[3])
local buckets = {}

for i, key in ipairs(KEYS) do
  local at = 3 + (i - 1) * WIDTH
  local b = {
    burst = tonumber(ARGV[at + 1]), rate = tonumber(ARGV[at + 2]), debt = tonumber(ARGV[at + 3]),
    kind = tonumber(ARGV[at + 4]), held = tonumber(ARGV[at + 5]), seq = tonumber(ARGV[at + 6]),
    want = tonumber(ARGV[at + 9]), observe = ARGV[at + 10] == '1', life = tonumber(ARGV[at + 11]), kept = 0,
    level = tonumber(ARGV[at + 1]), frac = 0, at = now, out = 0, mine = 0, done = 0, taken = 0, back = 0,
    changed = false,
  }
  local raw = redis.call('HGETALL', key)
  local amount = b.burst -- the budget's, when its level was written
  local unheard = 0
  for j = 1, #raw, 2 do
    local field, value = raw[j], raw[j + 1]
    if field == 'l' then
      b.level = tonumber(value)
    elseif field == 'f' then
      b.frac = tonumber(value)
    elseif field == 't' then
      b.at = tonumber(value)
    elseif field == 'b' then
      amount = tonumber(value)
    else
      local held, expires, seq, call, taken = string.match(value, '^(%d+) (%d+) (%d+) ?(%d*) ?(-?%d*)$')
      held, expires = tonumber(held), tonumber(expires)
      if field == process then
        call = tonumber(call) or 0
        if call > number then
          return {}
        end
        if call > tonumber(ARGV[at + 13]) then
          unheard = tonumber(taken)
        end
        b.done = tonumber(seq)
        if expires > now then
          b.mine = held
        end
      elseif expires > now then
        b.out = b.out + held
      elseif expires + FORGET < now then
        redis.call('HDEL', key, field)
      end
    end
  end
  if b.kind == 2 then
    b.level = b.level + b.burst - amount
    if unheard ~= 0 then
      b.level, b.mine, b.changed = b.level + unheard, b.held, true
    end
  end
  if b.kind == 1 then
    b.level = b.burst - b.out - b.held
  else
    -- the refill of bucket.py; the loans of this process count until they are returned
    local room = b.burst - b.out - b.mine
    local elapsed = math.min(math.max(0, now - b.at), ELAPSED_MAX)
    b.at = math.max(now, b.at)
    if b.level >= room then
      b.level, b.frac = room, 0
    else
      local units = math.floor(b.rate / MICRO)
      local rest = b.rate - units * MICRO
      local seconds = math.floor(elapsed / MICRO)
      local part = (elapsed - seconds * MICRO) * rest + b.frac
      local level = b.level + elapsed * units + seconds * rest + math.floor(part / MICRO)
      if level >= room then
        b.level, b.frac = room, 0
      else
        b.level, b.frac = level, part % MICRO
      end
    end
    if ARGV[at + 12] == '1' then
      b.kept = b.held
      room = b.burst - b.out - b.kept
    else
      room = b.burst - b.out
      b.level = b.level + b.held
      b.back = b.held
    end
    b.level = math.min(b.level, room)
    local charge, ceiling = tonumber(ARGV[at + 7]), tonumber(ARGV[at + 8])
    if charge ~= 0 and b.seq > b.done then
      b.level = math.min(math.max(b.level - charge, -b.debt), room)
      b.changed = true
    end
    if ceiling >= 0 and b.level > ceiling then
      b.level = ceiling
      b.changed = true
    end
  end
  buckets[i] = b
end

local verdicts = {}
local at = 4 + #KEYS * WIDTH
local requests = tonumber(ARGV[at])
for r = 1, requests do
  at = at + 1
  local first = at + 1
  local last = at + 2 * tonumber(ARGV[at])
  local verdict = {0}
  for j = first, last, 2 do
    local i, amount = tonumber(ARGV[j]), tonumber(ARGV[j + 1])
    local b = buckets[i]
    local enough = b.level >= amount
    if b.kind == 2 then
      enough = b.level > 0
    end
    if not enough then
      if b.observe then
        verdict[#verdict + 1] = i
      else
        verdict = {i}
        break
      end
    end
  end
  if verdict[1] == 0 then
    for j = first, last, 2 do
      local i, amount = tonumber(ARGV[j]), tonumber(ARGV[j + 1])
      local b = buckets[i]
      local enough = not b.observe or b.level >= amount
      if enough then
        b.level = b.level - amount
        b.taken = b.taken + amount
      end
    end
  end
  verdicts[r] = verdict
  at = last
end

local levels, loans = {}, {}
for i, key in ipairs(KEYS) do
  local b = buckets[i]
  local loan = math.max(0, math.min(b.want, math.floor(b.level / 4)))
  levels[i], loans[i] = text(b.level - loan), text(loan)
  local hold = b.kept + loan
  if b.kind == 1 then
    hold = b.held + b.taken + loan
  end
  local entry = text(hold) .. ' ' .. text(now + life) .. ' ' .. text(math.max(b.seq, b.done))
  if b.kind == 2 then
    entry = entry .. ' ' .. text(number) .. ' ' .. text(b.taken + loan - b.back)
  end
  if b.kind == 1 then
    if hold > 0 then
      redis.call('HSET', key, process, entry)
      redis.call('PEXPIRE', key, text(b.life))
    elseif b.mine > 0 then
      redis.call('HDEL', key, process)
    end
  elseif b.changed or b.taken > 0 or hold > 0 or b.mine > 0 or b.held > 0 then
    redis.call('HSET', key, 'l', text(b.level - loan), 'f', text(b.frac), 't', text(b.at), process, entry)
    if b.kind == 2 then
      redis.call('HSET', key, 'b', text(b.burst))
    end
    if b.life > 0 then
      redis.call('PEXPIRE', key, text(b.life))
    end
  end
end
return {levels, loans, verdicts}
