#!/usr/bin/env bash
# Checks and measures everything on a GPU, in at most nine minutes:
#
#     bash benchmarks/gpu.sh [--steps N] [--data-dir DIR] [--output FILE.jsonl]
#
# benchmarks/gpu.py says what is run. On a CPU, `--steps 2` is a trial of it. PYTHON names another Python.
set -euo pipefail
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

missing() {
  "$python" -c 'import sys
from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if not find_spec(name)])' "$@"
}

needed=$(missing torch torchvision numpy PIL accelerate safetensors)
if [ -n "$needed" ]; then
  echo "$python has no $needed; install requirements.txt, or name another Python: PYTHON=..." >&2
  exit 2
fi
unneeded=$(missing pytest triton)
if [ -n "$unneeded" ]; then
  echo "note: $python has no $unneeded: no tests with the first, nothing compiled on a GPU without triton" >&2
fi
exec "$python" -m benchmarks.gpu "$@"
