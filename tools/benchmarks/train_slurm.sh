#!/usr/bin/env bash
# Queues the benchmark configs of a toolbox in Slurm, all at once, and waits for them.
# BACKBONE=clustr-s takes those of one backbone, as CLUSTR_CHECKPOINT is of one;
# clustr-s-linear and clustr-s-w224 are others.
set -euo pipefail && shopt -s failglob
usage="usage: $0 mmdet|mmpose|mmpretrain|mmseg PARTITION GPUS GPUS_PER_NODE [arguments of mim train ...]"
(($# >= 4)) || { echo "$usage" >&2 && exit 2; }
mkdir -p work_dirs && root=$(cd "$(dirname "$0")/../.." && pwd) jobs=() status=0
trap 'trap - TERM; kill 0' INT TERM # else Ctrl-C would leave the jobs
for config in "$root/configs/$1"/*${BACKBONE:-}_*.py; do
    [[ ${config##*/} == *toy* ]] && continue
    mim train "$1" "$config" --launcher slurm --partition "$2" --gpus "$3" \
        --gpus-per-node "$4" "${@:5}" &>"work_dirs/$(basename "$config" .py).log" & jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || status=1; done
exit $status
