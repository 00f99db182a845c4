#!/usr/bin/env bash
# Trains the benchmark configs of a toolbox one after another on this machine's GPUs.
# BACKBONE=clustr-s takes those of one backbone, as CLUSTR_CHECKPOINT is of one;
# clustr-s-linear and clustr-s-w224 are others.
set -euo pipefail && shopt -s failglob
if (($# < 2)); then
    echo "usage: $0 mmdet|mmpose|mmpretrain|mmseg GPUS [arguments of mim train ...]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
for config in "$root/configs/$1"/*${BACKBONE:-}_*.py; do
    [[ ${config##*/} == *toy* ]] && continue
    mim train "$1" "$config" --launcher pytorch --gpus "$2" "${@:3}"
done
