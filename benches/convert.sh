#!/usr/bin/env bash
# Benchmark `loratool convert`.
#
#   benches/convert.sh LORATOOL WORK [ROUNDS]        (WORK: 5 GB free; a quiet machine)
#
# A LoRA of FLUX.1 of rank 64 in bf16 (0.7 GB, diffusers' names) becomes PEFT's, whose tensors are the same, and kohya's,
# whose layers are fused and whose data are hashed. The yardstick is `cp` of the input and a sync, in the same rounds.
# Then the peak RssAnon of each, which should hardly depend on the size of the file.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: convert.sh LORATOOL WORK [ROUNDS]}
work=${2:?usage: convert.sh LORATOOL WORK [ROUNDS]}
rounds=${3:-5}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

measure() { python3 "$here/measure.py" "$@"; }
seconds() { local out; out=$(measure "$@") || exit; echo "${out%% *}"; }
clean() { rm -rf "$work"/out-*; sync -f "$work"; }
trap clean EXIT

for rank in 16 64; do
    [[ -e $work/flux$rank.safetensors ]] && continue
    python3 "$here/generate.py" flux "$work/flux.part" --rank "$rank"
    mv "$work/flux.part" "$work/flux$rank.safetensors"
done
input=$work/flux64.safetensors
echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"
cat "$input" >/dev/null # read from the page cache

declare -A all
for ((i = 0; i <= rounds; i++)); do
    for what in cp peft kohya; do
        clean
        case $what in
        cp) t=$(seconds bash -c 'cp "$1" "$2" && sync -f "$2"' cp "$input" "$work/out-cp") ;;
        # loratool syncs what it writes itself, so no sync is added here.
        *) t=$(seconds "$tool" convert "$input" --to "$what" --family flux1 --output "$work/out-$what") ;;
        esac
        # The first round is for the disk and is not counted.
        if ((i > 0)); then all[$what]+="$t "; fi
    done
done
python3 - "${all[cp]}" "${all[peft]}" "${all[kohya]}" <<'PY'
import statistics, sys
cp, *rest = [[float(value) for value in text.split()] for text in sys.argv[1:]]
print(f"cp + sync: median {statistics.median(cp):.3f} s")
for name, values in zip(("peft", "kohya"), rest):
    ratios = [a / b for a, b in zip(values, cp)]
    print(f"to {name}: median {statistics.median(values):.3f} s, ratio of rounds {statistics.median(ratios):.2f}")
PY
for rank in 16 64; do
    for to in peft kohya; do
        clean
        t=$(measure --rss "$tool" convert "$work/flux$rank.safetensors" --to $to --family flux1 --output "$work/out-$to")
        read -r s anon rss <<<"$t"
        echo "rank $rank to $to: RssAnon $anon MB, RSS with mapped files $rss MB ($s s)"
    done
done
