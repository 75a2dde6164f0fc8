#!/usr/bin/env zsh
# Sends COUNT concurrent requests, follows each to its end and prints a summary. Needs only curl;
# runs in zsh and bash: `bash scripts/test_requests.zsh 0 10` does the same.

set -u
LC_ALL=C
export LC_ALL

usage() {
  cat >&2 <<'END'
usage: scripts/test_requests.zsh TYPE [COUNT]

  TYPE   0 text, 1 multi-modal (a picture and a text file), 2 image generation
  COUNT  how many concurrent requests, 1 by default

BASE_URL says where the gateway is; else it is on this machine, on PORT, 8000 by default.
Exit code: 0 when all succeeded, 1 when any failed or nothing answers, 2 for wrong arguments.
END
  exit 2
}

[ $# -ge 1 ] && [ $# -le 2 ] || usage
kind=$1
count=${2:-1}
base=${BASE_URL:-http://localhost:${PORT:-8000}}
base=${base%/}
case $kind in
  0) kind_name="text" ;;
  1) kind_name="multi-modal" ;;
  2) kind_name="image generation" ;;
  *) usage ;;
esac
case $count in
  '' | *[!0-9]* | 0*) usage ;;
esac
[ ${#count} -le 5 ] || usage
command -v curl >/dev/null || { echo "curl is not installed" >&2; exit 2; }

folder=$(mktemp -d "${TMPDIR:-/tmp}/test_requests.XXXXXX") || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

make_files() {
  # A red PNG of 8 by 8 pixels, and a text: real files, written by hand.
  {
    printf '\211PNG\015\012\032\012\000\000\000\015IHDR\000\000\000\010\000\000\000\010'
    printf '\010\002\000\000\000Km\051\334\000\000\000\021IDATx\332c\070\241\240\200\025'
    printf '\061\014\055\011\000\364\077B\001\054\042\077\320\000\000\000\000IEND\256B'
    printf '\140\202'
  } >"$folder/red.png"
  printf 'The tide comes in twice a day.\nThe gate lets in as much as the harbour can hold.\n' >"$folder/tide.txt"
}

# Prints the body, then a line with the HTTP status (000 without an answer).
ask() {
  curl -sS --max-time 90 -w '\n%{http_code}\n' "$@" 2>>"$folder/errors"
}

submit() {
  case $kind in
    0) ask "$base/submit" -H 'Content-Type: application/json' \
      -d "{\"data\": \"Explain in a few words what the tide is. ($1)\"}" ;;
    1) ask "$base/submit" -F "data=Describe these files ($1)" \
      -F "file=@$folder/red.png;type=image/png" -F "file=@$folder/tide.txt;type=text/plain" ;;
    2) ask "$base/submit" -H 'Content-Type: application/json' \
      -d "{\"data\": \"Generate an image of a tide gate at sunset, number $1.\"}" ;;
  esac
}

# Prints the value of a text field that occurs once in an answer: field NAME FILE
field() {
  sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$2" | head -n 1
}

# Writes the last answer to FOLDER/NUMBER, and its end as one line to FOLDER/NUMBER.end.
follow() {
  answer="$folder/$1"
  submit "$1" >"$answer"
  id=$(field request_id "$answer")
  if [ "$(tail -n 1 "$answer")" != 202 ] || [ -z "$id" ]; then
    echo "refused $(tail -n 1 "$answer")" >"$answer.end"
    return
  fi
  failures=0
  while :; do
    ask "$base/status/$id?wait=20" >"$answer"
    if [ "$(tail -n 1 "$answer")" != 200 ]; then
      failures=$((failures + 1))
      if [ "$failures" -ge 5 ]; then
        echo "lost $(tail -n 1 "$answer") $id" >"$answer.end"
        return
      fi
      sleep 1
      continue
    fi
    failures=0
    # The status of the request: in an answer's text, a "status" would have \" before it.
    state=$(sed -n 's/.*[,{]"status": *"\([a-z]*\)".*/\1/p' "$answer" | head -n 1)
    case $state in
      queued | running) ;;
      *)
        echo "${state:-unknown} 200 $id $(field submitted_at "$answer")" \
          "$(field admitted_at "$answer") $(field finished_at "$answer")" \
          "$(sed -n 's/.*"upstream_ms": *\([0-9.]*\).*/\1/p' "$answer" | head -n 1)" \
          >"$answer.end"
        return
        ;;
    esac
  done
}

if [ "$(ask "$base/health/live" | tail -n 1)" = 000 ]; then
  echo "nothing answers at $base: start it with \`make run\`, or set BASE_URL or PORT" >&2
  exit 1
fi
make_files
echo "$count request(s) of type $kind ($kind_name) to $base"
number=1
while [ "$number" -le "$count" ]; do
  follow "$number" &
  number=$((number + 1))
done
wait

cat "$folder"/*.end | awk -v count="$count" '
  # Returns the seconds since the start of the day of a time such as 2026-01-01T12:00:01.25Z.
  function seconds(text, part, clock) {
    split(text, part, "T")
    sub(/Z$|[+-][0-9][0-9]:[0-9][0-9]$/, "", part[2])
    split(part[2], clock, ":")
    return clock[1] * 3600 + clock[2] * 60 + clock[3]
  }
  function since(first, last) { return last < first ? last - first + 86400 : last - first }
  NR == 1 { start = -1 }
  {
    ends[$1]++
    if ($1 != "succeeded") {
      failed++
      if (failed <= 5) shown = shown "\n  failed: " $0
    }
    if (NF == 7) {
      if (start < 0) start = seconds($4)
      took = since(seconds($4), seconds($6))
      total += took; timed++
      if (took > slowest) { slowest = took; which = $3 }
      # Relative to the first request, so that midnight may pass. A call ends before its answer is
      # stored.
      from[timed] = since(start - 3600, seconds($5))
      till[timed] = from[timed] + $7 / 1000
    }
  }
  END {
    # The maximum number of concurrent calls, counted at the begin of each.
    for (one = 1; one <= timed; one++) {
      at_once = 0
      for (other = 1; other <= timed; other++)
        if (from[other] <= from[one] && from[one] < till[other]) at_once++
      if (at_once > most) most = at_once
    }
    printf "  done             %d of %d\n", ends["succeeded"], count
    printf "  failed           %d\n", failed
    if (timed) {
      printf "  slowest          %.2f s (%s)\n", slowest, which
      printf "  on average       %.2f s\n", total / timed
    }
    printf "  concurrent       %d at most", most
    print shown
    exit (failed > 0 || ends["succeeded"] != count) ? 1 : 0
  }'
result=$?
if [ "$result" -ne 0 ] && [ -s "$folder/errors" ]; then
  sort "$folder/errors" | uniq -c | sort -rn | head -n 5 >&2
fi
exit "$result"
