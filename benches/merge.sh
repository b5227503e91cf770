#!/usr/bin/env bash
# Benchmark `loratool merge` and `inspect`.
#
#   benches/merge.sh LORATOOL WORK [ROUNDS]        (WORK: 35 GB free; a quiet machine)
#
# 1. Merge speed: writing a merged checkpoint cannot beat writing a copy by much, so the yardstick is `cp -r` of the
#    base and a sync, run in the same rounds: disks change speed from minute to minute, and only the ratio is steady.
# 2. Merge memory: peak RssAnon for a 2.5 GB base and one ten times as large, which should hardly differ.
# 3. Inspect: a file of 5,000 tensors (1 GB) against `loratool --version`, that is, against starting at all.
#
# LORATOOL=cp-only as the first argument runs the cp part alone.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: merge.sh LORATOOL WORK [ROUNDS]}
work=${2:?usage: merge.sh LORATOOL WORK [ROUNDS]}
rounds=${3:-5}
[[ $tool == cp-only || -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

measure() { python3 "$here/measure.py" "$@"; }
seconds() { local out; out=$(measure "$@") || exit; echo "${out%% *}"; }
median() { python3 -c 'import statistics, sys; print(f"{statistics.median(map(float, sys.argv[1:])):.4f}")' "$@"; }
ratio() { python3 -c 'import sys; print(f"{float(sys.argv[1]) / float(sys.argv[2]):.2f}")' "$@"; }

# Made under another name first: a run that was cut off leaves nothing that looks complete.
make() { # make KIND NAME [options]
    local kind=$1 name=$2
    [[ -e $work/$name ]] && return
    rm -rf "$work/$name.part"
    python3 "$here/generate.py" "$kind" "$work/$name.part" "${@:3}"
    mv "$work/$name.part" "$work/$name"
}

# Each timed run writes new files onto a disk with nothing left to write.
clean() { rm -rf "$work/out-cp" "$work/out-merge"; sync -f "$work"; }
trap clean EXIT

time_cp() {
    clean
    t=$(seconds bash -c 'cp -r "$1" "$2" && sync -f "$2"' cp "$work/base" "$work/out-cp")
    cp_s+=("$t")
}
time_merge() {
    [[ $tool == cp-only ]] && return
    clean
    # loratool syncs what it writes itself, so no sync is added here.
    t=$(seconds "$tool" merge --force --base "$work/base" --adapter "$work/adapter" --output "$work/out-merge")
    merge_s+=("$t")
}

echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"
make base base
make adapter adapter
cat "$work"/base/* "$work"/adapter/* >/dev/null # both read from the page cache
cp_s=() merge_s=()
time_cp # a first round for the disk, not counted
cp_s=()

echo "== merge of a 2.5 GB base, seconds"
for ((i = 0; i < rounds; i++)); do
    # Alternate which goes first, so that neither always gets the disk that the other left behind.
    if ((i % 2)); then time_merge; time_cp; else time_cp; time_merge; fi
    if [[ $tool == cp-only ]]; then
        echo "round $((i + 1)): cp + sync ${cp_s[i]}"
    else
        echo "round $((i + 1)): cp + sync ${cp_s[i]}, merge ${merge_s[i]}, ratio $(ratio "${merge_s[i]}" "${cp_s[i]}")"
    fi
done
c=$(median "${cp_s[@]}")
[[ $tool == cp-only ]] && { echo "median:  cp + sync $c"; exit; }
m=$(median "${merge_s[@]}")
echo "median:  cp + sync $c, merge $m, ratio of medians $(ratio "$m" "$c")"

echo "== peak memory of merge, MB"
# Ten times the bytes, by wider layers (matrices four times as large) and more of them. The base is a hole in a file:
# it takes no disk, reads as zeros, and is merged like any other.
make base base10 --scale 10 --width 2 --sparse
make adapter adapter10 --scale 10 --width 2
for size in "" 10; do
    clean
    t=$(measure --rss "$tool" merge --force --base "$work/base$size" --adapter "$work/adapter$size" --output "$work/out-merge")
    read -r s anon rss <<<"$t"
    echo "base$size: RssAnon $anon, RSS with mapped files $rss ($s s)"
done
clean

echo "== inspect of 5,000 tensors in 1 GB, seconds"
make many many.safetensors
inspect_s=() version_s=()
for ((i = 0; i < 20; i++)); do
    t=$(seconds "$tool" --version)
    version_s+=("$t")
    t=$(seconds "$tool" inspect "$work/many.safetensors")
    inspect_s+=("$t")
done
v=$(median "${version_s[@]}")
n=$(median "${inspect_s[@]}")
echo "median of 20: inspect $n, --version $v, ratio $(ratio "$n" "$v")"
