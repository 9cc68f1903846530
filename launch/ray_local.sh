#!/usr/bin/env bash
# A Ray cluster on this machine for one run: started, used and stopped. `thunder-rollout rollout` alone starts a
# private one just as well; use this to watch the run with Ray's own tools or to limit what Ray sees.
#   NUM_CPUS=16 NUM_GPUS=2 launch/ray_local.sh rollout.n=8
set -xeuo pipefail
BIN=${BIN:-$PWD/.venv/bin}
PORT=${PORT:-6379}
NUM_CPUS=${NUM_CPUS:-$(nproc)}
NUM_GPUS=${NUM_GPUS:-0}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}  # else whoever reaches the port runs code here

"$BIN/ray" get-auth-token --generate >/dev/null

"$BIN/ray" start --head --block --port="$PORT" --num-cpus="$NUM_CPUS" \
  --num-gpus="$NUM_GPUS" --include-dashboard=false --disable-usage-stats &
head=$!
trap 'kill "$head" 2>/dev/null; wait "$head" || true' EXIT
for _ in {1..60}; do
  if "$BIN/ray" health-check --address="127.0.0.1:$PORT"; then break; fi
  kill -0 "$head"
  sleep 1
done

"$BIN/thunder-rollout" rollout ray.address="127.0.0.1:$PORT" "$@"
