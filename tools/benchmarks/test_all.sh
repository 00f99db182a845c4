#!/usr/bin/env bash
# Tests what the training scripts left, for all benchmark configs of a toolbox.
# BACKBONE=clustr-s takes those of one backbone.
set -euo pipefail && shopt -s failglob
if (($# < 2)); then
    echo "usage: $0 mmdet|mmpose|mmpretrain|mmseg WORK_DIRS [arguments of evaluate.py ...]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd) configs=()
for config in "$root/configs/$1"/*${BACKBONE:-}_*.py; do
    [[ ${config##*/} == *toy* ]] || configs+=("$config")
done
python "$root/tools/evaluate.py" "$2" --configs "${configs[@]}" "${@:3}"
