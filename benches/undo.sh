#!/usr/bin/env bash
# Benchmark `merge --undo`, `unmerge` and `switch`.
#
#   benches/undo.sh LORATOOL WORK [ROUNDS]        (WORK: 15 GB free; a quiet machine)
#
# 1. Size of the undo file by the relative change of the weights: a 2.5 GB base in bf16, rank 16 on all linear layers.
# 2. Wall time of merge, merge --undo, unmerge with the undo file, unmerge without, and switch, each against `cp -r` of
#    the base and a sync in the same round. Then the peak RssAnon of each.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: undo.sh LORATOOL WORK [ROUNDS]}
work=${2:?usage: undo.sh LORATOOL WORK [ROUNDS]}
rounds=${3:-5}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

measure() { python3 "$here/measure.py" "$@"; }
seconds() { local out; out=$(measure "$@") || exit; echo "${out%% *}"; }
median() { python3 -c 'import statistics, sys; print(f"{statistics.median(map(float, sys.argv[1:])):.2f}")' "$@"; }
ratio() { python3 -c 'import sys; print(f"{float(sys.argv[1]) / float(sys.argv[2]):.2f}")' "$@"; }
clean() { rm -rf "$work"/out-*; sync -f "$work"; }
trap clean EXIT

for kind in base adapter; do
    [[ -e $work/$kind ]] && continue
    python3 "$here/generate.py" $kind "$work/$kind.part"
    mv "$work/$kind.part" "$work/$kind"
done
echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"

merge() { "$tool" merge --base "$work/base" --adapter "$work/adapter" --strength "$1" -o "$work/out-m" --force --json "${@:2}"; }
told() { python3 -c '
import json, sys
report = json.load(sys.stdin)
worst = [change["relative"] for change in report["changes"]]
print(sum(worst) / len(worst), report["undo"]["share"] if "undo" in report else "")'; }

echo '== size of the undo file, of the tensors that changed'
clean
read -r one _ <<<"$(merge 1 | told)"
for change in 0.005 0.014 0.05 0.2; do
    clean
    strength=$(python3 -c 'import sys; print(float(sys.argv[1]) / float(sys.argv[2]))' $change "$one")
    read -r relative share <<<"$(merge "$strength" --undo "$work/out-m.undo" | told)"
    python3 -c 'import sys; print("change of %.2f %%: %.3f %%" % tuple(100 * float(v) for v in sys.argv[1:]))' "$relative" "$share"
done

echo '== seconds, and ratio to cp and sync of the base'
strength=$(python3 -c 'import sys; print(0.014 / float(sys.argv[1]))' "$one")
rm -rf "$work/kept-m" "$work/kept.undo"
"$tool" merge --quiet --base "$work/base" --adapter "$work/adapter" --strength "$strength" -o "$work/kept-m" --undo "$work/kept.undo"
cat "$work"/base/* "$work"/kept-m/* "$work"/adapter/* >/dev/null # read from the page cache
calls() {
    case $1 in
        merge) echo merge --base "$work/base" --adapter "$work/adapter" ;;
        merge--undo) echo merge --base "$work/base" --adapter "$work/adapter" --undo "$work/out-u" ;;
        unmerge--undo) echo unmerge --merged "$work/kept-m" --adapter "$work/adapter" --undo "$work/kept.undo" ;;
        unmerge) echo unmerge --merged "$work/kept-m" --adapter "$work/adapter" --strength "$strength" ;;
        switch) echo switch --merged "$work/kept-m" --adapter "$work/adapter" --undo "$work/kept.undo" --to-adapter "$work/adapter" --strength -1 ;;
    esac
}
for what in merge merge--undo unmerge--undo unmerge switch; do
    ratios=() times=()
    for ((i = 0; i <= rounds; i++)); do
        clean
        c=$(seconds bash -c 'cp -r "$1" "$2" && sync -f "$2"' cp "$work/base" "$work/out-cp")
        clean
        # loratool syncs what it writes itself, so no sync is added here.
        # shellcheck disable=SC2046
        t=$(seconds "$tool" $(calls $what) --quiet -o "$work/out-t")
        # The first round is for the disk and is not counted.
        ((i == 0)) || { times+=("$t"); ratios+=("$(ratio "$t" "$c")"); }
    done
    clean
    # shellcheck disable=SC2046
    read -r _ anon _ <<<"$(measure --rss "$tool" $(calls $what) --quiet -o "$work/out-t")"
    echo "$what: median $(median "${times[@]}") s, ratio $(median "${ratios[@]}") (${ratios[*]}), RssAnon $anon MB"
done
clean
"$tool" unmerge --quiet --merged "$work/kept-m" --adapter "$work/adapter" --undo "$work/kept.undo" -o "$work/out-back"
diff -r "$work/base" "$work/out-back" && echo 'the base came back byte by byte'
