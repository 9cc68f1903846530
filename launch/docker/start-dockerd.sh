#!/usr/bin/env bash
# Start a private Docker engine where none answers, for CI and machines without systemd.
#
#   eval "$(launch/docker/start-dockerd.sh [FOLDER])"     sets DOCKER_HOST
#
# FOLDER (default /var/tmp/thunder-docker) gets the socket, the images and the log. Containers of
# this engine have no network at all. Installs nothing; needs root and dockerd. Idempotent.
set -euo pipefail
folder=${1:-/var/tmp/thunder-docker}
wait_s=${DOCKERD_WAIT_S:-60}
socket="$folder/docker.sock"

say() { echo "start-dockerd: $*" >&2; }

if [ $# -eq 0 ] && docker info >/dev/null 2>&1; then
    say "an engine already answers at ${DOCKER_HOST:-the default socket}"
    echo "export DOCKER_HOST=${DOCKER_HOST:-unix:///var/run/docker.sock}"
    exit 0
fi
if DOCKER_HOST="unix://$socket" docker info >/dev/null 2>&1; then
    say "an engine already answers at $socket"
    echo "export DOCKER_HOST=unix://$socket"
    exit 0
fi
[ "$(id -u)" -eq 0 ] || { say "needs root (the engine sets up namespaces and mounts)"; exit 1; }
command -v dockerd >/dev/null || { say "no dockerd on PATH; install one, e.g. apt-get install docker.io"; exit 1; }

mkdir -p "$folder/data" "$folder/exec"
rm -f "$folder/docker.pid"
# Not with the caller's open files: a lock among them would be held for as long as the engine runs.
(
    for descriptor in /proc/"$BASHPID"/fd/*; do
        if ((${descriptor##*/} > 2)); then eval "exec ${descriptor##*/}>&-"; fi
    done
    exec setsid dockerd --bridge=none --iptables=false --ip-forward=false --ip-masq=false \
        --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/docker.pid" \
        -H "unix://$socket"
) >"$folder/dockerd.log" 2>&1 </dev/null &
engine=$!

for ((i = 0; i < wait_s * 5; i++)); do
    if DOCKER_HOST="unix://$socket" docker info >/dev/null 2>&1; then
        say "ready at $socket (log: $folder/dockerd.log)"
        echo "export DOCKER_HOST=unix://$socket"
        exit 0
    fi
    kill -0 "$engine" 2>/dev/null || break
    sleep 0.2
done
say "the engine did not come up within ${wait_s} s; the end of $folder/dockerd.log:"
tail -n 20 "$folder/dockerd.log" >&2
kill "$engine" 2>/dev/null || true
exit 1
