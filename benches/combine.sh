#!/usr/bin/env bash
# Benchmark `loratool combine`: eight adapters of rank 16 on one layer of 4096 x 4096, to rank 32.
#
#   PYTHON=PEERS/bin/python benches/combine.sh LORATOOL WORK [ROUNDS]        (WORK: 50 MB free; a quiet machine)
#
# The whole command, from files to a file, against PEFT's `add_weighted_adapter` with `svd` of the same adapters in
# memory, which forms the change and decomposes it whole. Both in one run; PEFT takes minutes and is timed once.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: combine.sh LORATOOL WORK [ROUNDS]}
work=${2:?usage: combine.sh LORATOOL WORK [ROUNDS]}
rounds=${3:-5}
python=${PYTHON:-python3}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"
"$python" "$here/combine.py" "$tool" "$work" "$rounds"
