#!/usr/bin/env bash
# Benchmark `loratool resize`.
#
#   PYTHON=PEERS/bin/python benches/resize.sh LORATOOL WORK SD_SCRIPTS [ROUNDS]        (WORK: 1 GB free; a quiet machine)
#
# A LoRA of rank 64 in kohya's spelling, f32, on the attention of one block of each width of Stable Diffusion 1 (48 linear
# layers), comes to rank 16. The yardsticks are `resize_lora_model` of sd-scripts (a source tree of kohya-ss/sd-scripts)
# and PEFT's `add_weighted_adapter` with `combination_type="svd"`, which both decompose the whole matrix of each layer; of
# them only the arithmetic is timed, of loratool the whole command. Then the peak RssAnon of loratool.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tool=${1:?usage: resize.sh LORATOOL WORK SD_SCRIPTS [ROUNDS]}
work=${2:?usage: resize.sh LORATOOL WORK SD_SCRIPTS [ROUNDS]}
scripts=${3:?usage: resize.sh LORATOOL WORK SD_SCRIPTS [ROUNDS]}
rounds=${4:-3}
python=${PYTHON:-python3}
[[ -x $tool ]] || { echo "no program at $tool" >&2; exit 2; }
mkdir -p "$work"

trap 'rm -f "$work"/out-*' EXIT
"$python" "$here/resize.py" make "$work/lora.safetensors"
echo "cores $(nproc), load $(cut -d' ' -f1-3 /proc/loadavg), file system $(stat -f -c %T "$work")"
"$python" "$here/resize.py" time "$tool" "$work" "$scripts" "$rounds"
rm -f "$work"/out-*
read -r s anon rss <<<"$(python3 "$here/measure.py" --rss "$tool" resize "$work/lora.safetensors" --rank 16 \
    --output "$work/out-memory.safetensors")"
echo "RssAnon $anon MB, RSS with mapped files $rss MB ($s s)"
