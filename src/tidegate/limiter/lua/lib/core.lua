-- does: derives the pool's keys from the key that is passed, and reads the request; describes how scripts are built
-- keys: meta
-- args: request
-- returns: nothing
-- units: none
--
-- How a script is built: a file in `lua/` is a script, and the files in `lua/lib/` are its parts. The script's header
-- names them. The parts in `uses` are put before the script in that order. The parts in `later` become functions,
-- which run in that order when an undefined name is first used, because an ordinary request needs few of them and
-- creating a function costs more than calling it. So a field of `T` that may be read before it is set begins as
-- `false`: a read of nil creates them all. One request is one run; no state is kept in Lua between runs. A run
-- loads what the request names, changes it in memory, and writes the changes at its end.
--
-- What the parts share:
--   call   redis.call
--   q      the request, unpacked; a field that was not sent is 0 or an empty list
--   T      all functions, and the shared state of the run: T.limits, T.tenants and
--          T.queues by name as loaded so far; T.touched, limits under which a waiter may be admitted
--          now; T.changed, fields of the record to be written; T.granted, T.stamps, T.refused,
--          T.barred, T.waited and T.outbox, the content of the reply and the pushes
--   pool   the record of the pool (`pool.lua`): run, epoch, now, seq, revision, bands and the like
--   own    the session that sends (`permits.lua`): gen, batch, held by ticket, queues by the number
--          of their flow; own.sid is set once the request is accepted
--   me     that session's fields in the reply (`session.lua`): gen and sent
--
-- All functions and most state are fields of `T`: for each local that a new function captures, Lua searches all
-- captured locals, so that a hundred of them would cost more than the work itself.
local call = redis.call
local none = {}
local q = setmetatable(cmsgpack.unpack(ARGV[1]), { __index = {
  gen = 0, epoch = 0, uptime_ms = 0, revision = 0, ack = 0, roster = 0, flows = none, wants = none,
  transfers = none, releases = none, cancels = none, enqueues = none, settles = none,
  resets = none, looks = none, told = 0, pages = none, asks = none, lefts = none,
  firm = none, uses = none, dues = none, firsts = none, stamps = none,
} })
local T = { meta_key = KEYS[1], prefix = string.sub(KEYS[1], 1, -5) }
T.sessions_key = T.prefix .. 'sessions'
T.lapsing_key = T.prefix .. 'lapsing'
T.carried_key = T.prefix .. 'carried'
T.timed_key = T.prefix .. 'timed'
T.starving_key = T.prefix .. 'starving'
T.spending_key = T.prefix .. 'spending'
T.restored_key = T.prefix .. 'restored'
T.local_key = T.prefix .. 'local'
T.paused_key = T.prefix .. 'paused'

-- A session's own keys outlive the pool's.
T.POOL_KEEP_MS = 3600000
T.SESSION_KEEP_MS = 7200000

function T.session_key(sid) return T.prefix .. 'session:' .. sid end
function T.stalled_key(sid) return T.prefix .. 'stalled:' .. sid end
function T.owed_key(sid) return T.prefix .. 'owed:' .. sid end
function T.channel(sid) return T.prefix .. 'grants:' .. sid end

-- tostring() keeps only 14 digits.
function T.int(number) return string.format('%d', number) end

-- Formats the stamp of a ticket: a whole number, or a number between two (see `deadlines.lua`).
function T.place(stamp) return string.format(stamp % 1 == 0 and '%d' or '%.17g', stamp) end
