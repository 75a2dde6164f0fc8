#!/usr/bin/env bash
# Installs what the tests need besides Python: a browser for the browser tests, zsh for the request
# script, Debian's servers to test the limiter with, besides the one in the wheel, and the programs
# that read the files under deploy/. As root it uses apt-get if available; otherwise it names the
# missing packages, which is a failure with CI=true: a test that cannot run has not passed.
# `setup_system.sh bench` does the same for the benchmark of gateways, which continues without
# missing programs.
set -euo pipefail

declare -A package_of=(
    [chromium]=chromium [zsh]=zsh [curl]=curl
    [redis-server]=redis-server [valkey-server]=valkey-server [pgbouncer]=pgbouncer
    [docker-compose]=docker-compose [haproxy]=haproxy [nginx]=nginx [kustomize]=kustomize
    [systemd-analyze]=systemd [promtool]=prometheus
)
# Optional: these only make the tests faster.
declare -A quicker=([chromium-headless-shell]=chromium-headless-shell)
whose="the tests also need"
PATH=$PATH:/usr/sbin
if [[ ${1:-} == bench ]]; then
    package_of=([gcc]="gcc libc6-dev" [nginx]=nginx [node]=nodejs [npm]=npm)
    quicker=()
    whose="the benchmark also measures with"
fi

missing() {
    local command
    for command in "${!package_of[@]}"; do
        command -v "$command" >/dev/null || printf '%s\n' ${package_of[$command]}
    done
}

install_quicker() {
    local command
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 0
    for command in "${!quicker[@]}"; do
        command -v "$command" >/dev/null || DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends -o Acquire::Retries=0 \
            -o Acquire::http::Timeout=5 "${quicker[$command]}" >/dev/null 2>&1 || true
    done
}

mapfile -t wanted < <(missing)
((${#wanted[@]})) || { install_quicker && exit 0; }

if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "tidegate: installing ${wanted[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || true
    apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null || true
    # The tests start their own servers: a newly installed server must not run as a service.
    for name in "${wanted[@]}"; do
        [[ $name != *-server && $name != nginx && $name != pgbouncer &&
            $name != haproxy && $name != prometheus ]] ||
            systemctl disable --now --quiet "$name" 2>/dev/null || true
    done
    install_quicker
    mapfile -t wanted < <(missing)
    ((${#wanted[@]})) || exit 0
fi

echo "tidegate: $whose these system packages: ${wanted[*]}" >&2
if [[ ${CI:-} == true || ${CI:-} == 1 ]]; then
    exit 1
fi
