#!/usr/bin/env bash
# The run as a job of a Ray cluster that runs already: RAY_API=http://head:8265 recipes/verl_swe_gpu/submit.sh
set -xeuo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
RAY_API=${RAY_API:-http://127.0.0.1:8265}
ENTRY=${ENTRY:-$here/run.sh} # a path that every node has: a checkout on shared storage

settings=() # of run.sh, which has the defaults
for name in CONFIG MODEL DATA LOOP ROUTER PYTHON; do
    if [ -n "${!name:-}" ]; then settings+=("$name=${!name}"); fi
done

exec ray job submit --address "$RAY_API" --no-wait -- env "${settings[@]}" "$ENTRY" "$@"
