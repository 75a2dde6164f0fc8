-- does: returns the commands that the user of this connection may not run
-- keys: meta
-- args: request
-- request: commands
-- returns: the commands that are denied
-- units: none; a command is `command` or `command|subcommand`
-- uses:
local q = cmsgpack.unpack(ARGV[1])
local denied = {}
for _, name in ipairs(q.commands) do
  local words, may = {}, false
  for word in string.gmatch(name, '[^|]+') do words[#words + 1] = word end
  -- The check needs as many arguments as the command takes, so up to 7 are tried. A key is valid in any position.
  for _ = 1, 8 do
    local sound, answer = pcall(redis.acl_check_cmd, unpack(words))
    may = may or (sound and answer)
    words[#words + 1] = KEYS[1]
  end
  if not may then denied[#denied + 1] = name end
end
return cmsgpack.pack(denied)
