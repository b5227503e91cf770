#!/usr/bin/env bash
# Benchmark `loratool merge` and `extract` on devices, and compare the bytes of merges.
#
#   benches/devices.sh LORATOOL WORK ROUNDS DEVICE...        (WORK: 9 GB free; a quiet machine)
#
# LORATOOL is built with the features of the devices, such as `cuda`. 1. Merge of a base with the shapes of Llama-3.2-1B
# (2.5 GB, bf16) at ranks 16, 64 and 256: seconds on `cpu` and on each device in the same rounds, and whether the files
# are the same. 2. Extraction of one layer of 4096 x 4096 at rank 32 from a difference of pure noise. With torch and
# CUDA (PYTHON=...), the same merge arithmetic in torch on the GPU, from memory to memory.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: devices.sh LORATOOL WORK ROUNDS DEVICE...}
work=${2:?usage: devices.sh LORATOOL WORK ROUNDS DEVICE...}
rounds=${3:?usage: devices.sh LORATOOL WORK ROUNDS DEVICE...}
devices=(cpu "${@:4}")
python=${PYTHON:-python3}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

measure() { python3 "$here/measure.py" "$@"; }
seconds() { local out; out=$(measure "$@") || exit; echo "${out%% *}"; }
median() { python3 -c 'import statistics, sys; print(f"{statistics.median(map(float, sys.argv[1:])):.3f}")' "$@"; }
ratio() { python3 -c 'import sys; print(f"{float(sys.argv[1]) / float(sys.argv[2]):.2f}")' "$@"; }
clean() { rm -rf "$work"/out-*; sync -f "$work"; }
trap clean EXIT

[[ -e $work/base ]] || python3 "$here/generate.py" base "$work/base"
echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), devices ${devices[*]}"

# Seconds of a command on every device in turn; DEVICE and OUT stand for the device and its output.
on_all() { # on_all WHAT COMMAND...
    local what=$1 device round
    local -A times=()
    for ((round = 0; round < rounds; round++)); do
        clean
        for device in "${devices[@]}"; do
            local command=("${@:2}")
            command=("${command[@]//OUT/$work/out-$device}")
            times[$device]+=" $(seconds "${command[@]//DEVICE/$device}")"
        done
    done
    for device in "${devices[@]}"; do
        # Words on purpose: times of one device are a list.
        # shellcheck disable=SC2086
        local median=$(median ${times[$device]}) cpu=$(median ${times[cpu]})
        echo "$what, $device: $median s, $(ratio "$median" "$cpu") of cpu (${times[$device]# })"
    done
}

for rank in 16 64 256; do
    [[ -e $work/rank-$rank ]] || python3 "$here/generate.py" adapter "$work/rank-$rank" --rank "$rank"
    on_all "merge, rank $rank" "$tool" merge --quiet --base "$work/base" --adapter "$work/rank-$rank" \
        --output OUT --device DEVICE
    for device in "${devices[@]:1}"; do
        for file in "$work"/out-cpu/*.safetensors; do
            cmp "$file" "$work/out-$device/$(basename "$file")"
        done
        echo "merge, rank $rank, $device: the bytes of cpu"
    done
    clean
    if "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        "$python" "$here/devices.py" "$work/base" "$work/rank-$rank" "$rounds"
    fi
done

if "$python" -c 'import torch' 2>/dev/null; then
    "$python" "$here/extract.py" layers "$work"
    on_all 'extract, one layer' "$tool" extract --quiet --base "$work/noise/bf16/base" --tuned "$work/noise/bf16/tuned" --rank 32 \
        --output OUT --device DEVICE
fi
