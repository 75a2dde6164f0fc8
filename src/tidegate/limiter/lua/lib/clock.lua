-- does: reads the server's clock; tests replace this fragment by one that reads a key
-- keys: none
-- args: none
-- returns: T.wall_clock_ms()
-- units: ms since 1970
function T.wall_clock_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
