-- does: stores a process's note for the other processes of its pool, reads the notes of all, or claims a name
-- keys: meta
-- args: request
-- request: sid note keep_ms most claim
-- returns: rows of sid and note, of the sessions that expire last; an empty list after a note was stored; for a claim 1 if it is the first of its name, else 0
-- units: ms; most is the number of notes read
-- uses: core
local function note_key(sid) return T.prefix .. 'note:' .. sid end

if q.claim ~= '' then
  local first = call('SET', T.prefix .. 'claim:' .. q.claim, q.sid, 'NX', 'PX', q.keep_ms)
  return cmsgpack.pack({ first and 1 or 0 })
end
if q.note ~= '' then
  call('SET', note_key(q.sid), q.note, 'PX', q.keep_ms)
  return cmsgpack.pack({})
end
local found = {}
for _, sid in ipairs(call('ZRANGE', T.sessions_key, -q.most, -1)) do
  local note = call('GET', note_key(sid))
  if note then found[#found + 1] = { sid, note } end
end
return cmsgpack.pack(found)
