#!/usr/bin/env bash
# Make .venv hold exactly requirements/lock-cpu.txt and this package. A no-op while they are unchanged.
#   PYTHON=python3.12  the interpreter to use (3.11 or 3.12; default: the first found)
#   VENV=.venv         where
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
LOCK=requirements/lock-cpu.txt
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() { printf 'set-up: %s\n' "$*" >&2; exit 2; }

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_supported "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true); Python 3.11 or 3.12 is needed"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11; do
    if is_supported "$candidate"; then echo "$candidate"; return; fi
  done
  die "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.12"
}

has_library() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null; }

pip_install() {  # a registry's hiccup should not cost the whole set-up: one more try
  "$VENV/bin/python" -m pip install -qq --no-deps --no-build-isolation "$@" || {
    echo "set-up: pip failed, trying once more" >&2
    sleep 5
    "$VENV/bin/python" -m pip install -qq --no-deps --no-build-isolation "$@"
  }
}

is_current() { [[ $(cat "$VENV/$1" 2>/dev/null) == "$2" ]]; }

python=$(find_python)
version=$("$python" -c 'import sys; print(sys.version, sys.base_prefix)')
lock_stamp=$(cat - "$LOCK" requirements/setup.sh requirements/vllm-shim/setup.py <<< "$version" | sha256sum)
package_stamp=$(cat - setup.py <<< "$PWD" | sha256sum)

if ! is_current .lock-stamp "$lock_stamp"; then
  has_library libnuma.so.1 || die "vLLM's CPU build loads libnuma.so.1, which is missing; on Debian: apt-get install libnuma1"
  echo "set-up: $VENV from $LOCK on $("$python" --version); the first time takes a few minutes and 4 GB"
  "$python" -m venv --clear "$VENV" || die "could not make $VENV; on Debian: apt-get install python3-venv"
  pip_install "$(grep '^setuptools==' "$LOCK")"  # builds the pins that ship no wheel
  # The CPU build of torch lies on PyTorch's own index, unless pip is already set up to find it.
  torch=$(grep '^torch==' "$LOCK")
  "$VENV/bin/python" -m pip install -qq --no-deps "$torch" 2>/dev/null \
    || pip_install --extra-index-url "$TORCH_CPU_INDEX" "$torch"
  pip_install --requirement "$LOCK"
  pip_install requirements/vllm-shim
  echo "$lock_stamp" > "$VENV/.lock-stamp"
fi
if ! is_current .package-stamp "$package_stamp"; then
  pip_install --editable .
  echo "$package_stamp" > "$VENV/.package-stamp"
fi
