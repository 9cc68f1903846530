#!/usr/bin/env bash
# Stop the engine that start-dockerd.sh started in FOLDER, with its containers. Idempotent.
# Images stay in FOLDER; delete the folder to be rid of them.
set -euo pipefail
folder=${1:-/var/tmp/thunder-docker}
pidfile="$folder/docker.pid"
[ -s "$pidfile" ] || exit 0
engine=$(cat "$pidfile")
if kill -0 "$engine" 2>/dev/null; then
    DOCKER_HOST="unix://$folder/docker.sock" docker ps -aq 2>/dev/null |
        DOCKER_HOST="unix://$folder/docker.sock" xargs -r docker rm -f >/dev/null 2>&1 || true
    kill "$engine"
    for ((i = 0; i < 100; i++)); do
        kill -0 "$engine" 2>/dev/null || exit 0
        sleep 0.2
    done
    echo "stop-dockerd: engine $engine did not stop within 20 s" >&2
    exit 1
fi
