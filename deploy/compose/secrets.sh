#!/usr/bin/env bash
# Makes the files of secrets that compose.yaml names, with random passwords. What is there stays.
# The provider's key is taken from GEMINI_API_KEY; without one its file is left to be written.
set -euo pipefail
umask 022
folder=$(cd "$(dirname "$0")" && pwd)/secrets
# The folder is closed to others; the files in it are not, since containers read them as other users.
mkdir -p "$folder"
chmod 700 "$folder"

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

keep() {
    [[ -s $folder/$1 ]] || printf '%s' "$2" >"$folder/$1"
}

keep valkey_password "$(random)"
keep postgres_password "$(random)"
keep admin_token "$(random)"
keep redis_url "redis://:$(<"$folder/valkey_password")@valkey:6379/0"
keep database_url "postgresql://tidegate:$(<"$folder/postgres_password")@postgres:5432/tidegate"
if [[ -n ${GEMINI_API_KEY:-} ]]; then
    keep gemini_api_key "$GEMINI_API_KEY"
elif [[ ! -s $folder/gemini_api_key ]]; then
    echo "tidegate: write your key for the Gemini API into $folder/gemini_api_key" >&2
fi
