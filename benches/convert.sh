#!/usr/bin/env bash
# Benchmark `loratool convert`.
#
#   benches/convert.sh LORATOOL WORK [ROUNDS]        (WORK: 5 GB free; a quiet machine)
#
# A LoRA of FLUX.1 of rank 64 in bf16 (0.5 GB, diffusers' names) becomes PEFT's, whose tensors are the same, and kohya's,
# whose layers are fused (0.9 GB) and whose data are hashed. The yardstick is `cp` of the file that is written and a sync,
# in the same rounds. Then the peak RssAnon of each, for a file of a quarter as well.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: convert.sh LORATOOL WORK [ROUNDS]}
work=${2:?usage: convert.sh LORATOOL WORK [ROUNDS]}
rounds=${3:-5}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

measure() { python3 "$here/measure.py" "$@"; }
seconds() { local out; out=$(measure "$@") || exit; echo "${out%% *}"; }
median() { python3 -c 'import statistics, sys; print(f"{statistics.median(map(float, sys.argv[1:])):.2f}")' "$@"; }
ratio() { python3 -c 'import sys; print(f"{float(sys.argv[1]) / float(sys.argv[2]):.2f}")' "$@"; }
clean() { rm -rf "$work"/out-*; sync -f "$work"; }
trap clean EXIT

for rank in 16 64; do
    [[ -e $work/flux$rank.safetensors ]] && continue
    python3 "$here/generate.py" flux "$work/flux.part" --rank "$rank"
    mv "$work/flux.part" "$work/flux$rank.safetensors"
done
input=$work/flux64.safetensors
echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"
convert() { "$tool" convert "$work/flux$1.safetensors" --to "$2" --family flux1 --output "$3" >/dev/null; }

for to in peft kohya; do
    [[ -e $work/made-$to ]] || convert 64 "$to" "$work/made-$to"
    cat "$input" "$work/made-$to"/* >/dev/null # read from the page cache
    ratios=() times=()
    for ((i = 0; i <= rounds; i++)); do
        clean
        c=$(seconds bash -c 'cp -r "$1" "$2" && sync -f "$2"' cp "$work/made-$to" "$work/out-cp")
        clean
        # loratool syncs what it writes itself, so no sync is added here.
        t=$(seconds "$tool" convert "$input" --to "$to" --family flux1 --output "$work/out-$to")
        # The first round is for the disk and is not counted.
        ((i == 0)) || { times+=("$t"); ratios+=("$(ratio "$t" "$c")"); }
    done
    echo "to $to: median $(median "${times[@]}") s, ratio to cp + sync $(median "${ratios[@]}") (${ratios[*]})"
done
for rank in 16 64; do
    for to in peft kohya; do
        clean
        t=$(measure --rss "$tool" convert "$work/flux$rank.safetensors" --to $to --family flux1 --output "$work/out-$to")
        read -r s anon rss <<<"$t"
        echo "rank $rank to $to: RssAnon $anon MB, RSS with mapped files $rss MB ($s s)"
    done
done
