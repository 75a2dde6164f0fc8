#!/usr/bin/env bash
# Creates the secret files that compose.yaml names, with random passwords. Existing files are kept.
# Provider keys are read from GEMINI_API_KEY, OPENAI_API_KEY and ANTHROPIC_API_KEY; other keys, such
# as of a second account, are files named like their variable in secrets/providers.
set -euo pipefail
umask 022
folder=$(cd "$(dirname "$0")" && pwd)/secrets
# The folder is closed to other users; the files are not, because containers read them as other
# users.
mkdir -p "$folder/providers"
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
keep grafana_password "$(random)"
keep redis_url "redis://:$(<"$folder/valkey_password")@valkey:6379/0"
keep database_url "postgresql://tidegate:$(<"$folder/postgres_password")@postgres:5432/tidegate"
for name in GEMINI_API_KEY OPENAI_API_KEY ANTHROPIC_API_KEY; do
    [[ -z ${!name:-} ]] || keep "providers/$name" "${!name}"
done
# The place of the previous release.
[[ ! -s $folder/gemini_api_key ]] || keep providers/GEMINI_API_KEY "$(<"$folder/gemini_api_key")"
: >"$folder/providers.env"
for file in "$folder/providers/"*; do
    [[ ! -s $file ]] || echo "${file##*/}_FILE=/run/secrets/providers/${file##*/}" >>"$folder/providers.env"
done
if [[ ! -s $folder/providers.env ]]; then
    echo "tidegate: no provider's key: set OPENAI_API_KEY, ANTHROPIC_API_KEY or GEMINI_API_KEY and run" >&2
    echo "this again, unless an upstream in tidegate.toml needs none" >&2
fi
