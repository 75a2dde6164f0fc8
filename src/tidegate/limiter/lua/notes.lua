-- does: stores a process's note for the other processes of its pool, or reads the notes of all
-- keys: meta
-- args: request
-- request: sid note keep_ms most
-- returns: rows of sid and note, of the sessions that expire last; none after a note was stored
-- units: ms; most is the number of notes read
-- uses: core
local function note_key(sid) return T.prefix .. 'note:' .. sid end

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
