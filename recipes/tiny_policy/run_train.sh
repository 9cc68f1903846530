#!/usr/bin/env bash
# Build the tiny policy (once), then let it act on unseen tasks.
set -xeuo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON=${PYTHON:-$here/../../.venv/bin/python}
CONFIG=${CONFIG:-$here/config.yaml}
NUM_UNSEEN=${NUM_UNSEEN:-50}
TEMPERATURE=${TEMPERATURE:-0}

PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$here/train.py" \
    --config "$CONFIG" --evaluate "$NUM_UNSEEN" --temperature "$TEMPERATURE" "$@"
