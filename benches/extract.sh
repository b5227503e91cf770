#!/usr/bin/env bash
# Benchmark `loratool extract`.
#
#   PYTHON=PEERS/bin/python benches/extract.sh LORATOOL WORK [ROUNDS]        (WORK: 8 GB free; a quiet machine)
#
# 1. One layer of 4096 x 4096 at rank 32: the full SVD of torch and its `svd_lowrank` on the difference in memory, against
#    the whole command, from files to a file, with the certificate and without. The ratios are of the same rounds.
# 2. A pair of 1.8 GB per side with the shapes of an 8B Llama (three of its layers, a smaller vocabulary): seconds, and
#    what that is for all 8B by number of parameters. Then the peak RssAnon, and that of an embedding of 8B's size alone.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: extract.sh LORATOOL WORK [ROUNDS]}
work=${2:?usage: extract.sh LORATOOL WORK [ROUNDS]}
rounds=${3:-5}
python=${PYTHON:-python3}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

measure() { python3 "$here/measure.py" "$@"; }
seconds() { local out; out=$(measure "$@") || exit; echo "${out%% *}"; }
median() { python3 -c 'import statistics, sys; print(f"{statistics.median(map(float, sys.argv[1:])):.2f}")' "$@"; }
times() { python3 -c 'import sys; print(f"{float(sys.argv[1]) * float(sys.argv[2]):.0f}")' "$@"; }
clean() { rm -rf "$work"/out-*; sync -f "$work"; }
trap clean EXIT
extract() { # extract PAIR [options]
    echo "$tool" extract --base "$work/$1/base" --tuned "$work/$1/tuned" --output "$work/out-$1" --rank 32 --quiet "${@:2}"
}

"$python" "$here/extract.py" layers "$work"
"$python" "$here/extract.py" pair "$work/llama"
"$python" "$here/extract.py" pair "$work/embedding" --layers 0 --vocabulary 128256
echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"

echo "== one layer"
"$python" "$here/extract.py" time "$tool" "$work" "$rounds"

echo "== a pair with the shapes of 8B"
read -r parameters share <"$work/llama/parameters"
echo "$parameters parameters; 8B has $share times as many"
certified=() plain=()
for ((i = 0; i < rounds; i++)); do
    cat "$work"/llama/*/*.safetensors >/dev/null # read from the page cache
    clean
    t=$(seconds $(extract llama))
    certified+=("$t")
    clean
    t=$(seconds $(extract llama --tolerance none))
    plain+=("$t")
done
c=$(median "${certified[@]}") p=$(median "${plain[@]}")
echo "certified: median $c s (${certified[*]}), projected $(times "$c" "$share") s"
echo "not certified: median $p s (${plain[*]}), projected $(times "$p" "$share") s"
for pair in llama embedding; do
    clean
    read -r s anon rss <<<"$(measure --rss $(extract $pair))"
    echo "$pair: RssAnon $anon MB, RSS with mapped files $rss MB ($s s)"
done
