#!/usr/bin/env bash
# A run over several nodes: the same command on every node, with these variables in the environment.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/npd_cluster.sh --config FILE [--dry-run] [key=value ...]
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash launch/npd_cluster.sh --config FILE [--dry-run] [key=value ...]
# MASTER_ADDR is an address of node 0 in a network that you trust: whoever reaches MASTER_PORT (29500 unless set) can
# take part. --dry-run prints every process of every node with its environment and command line, and needs no NPU and
# no model. The repository, the models and the run folder must lie at the same paths on all nodes, the run folder on a
# file system that all see. Killed or interrupted, the same command on every node goes on where it stopped.
# The trainer's ranks, the rollout and the teacher workers are spread evenly: docs/parallel.md. GLOO_SOCKET_IFNAME and
# HCCL_SOCKET_IFNAME: interface of the network between the nodes (lo for a trial on one machine). NPD_DEVICE=cpu: no NPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" != --config ] || [ -z "${2:-}" ] || [ -z "${NNODES:-}" ] || [ -z "${NODE_RANK:-}" ]; then
  sed -n '2,11p' "$0" >&2
  exit 2
fi
config=$2
shift 2
# some schedulers count nodes in the names that ranks read
unset RANK WORLD_SIZE LOCAL_RANK
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
case ${NPD_DEVICE:-npu} in
  npu)
    _npd_dry=$dry . launch/env_ascend.sh
    npd=("${PYTHON:-python3}" -m npd_ascend)
    export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  cpu)
    . launch/env.sh
    environment .venv requirements.txt
    npd=(.venv/bin/npd)
    ;;
  *)
    echo "NPD_DEVICE=$NPD_DEVICE: want npu or cpu" >&2
    exit 2
    ;;
esac
if [ -n "$dry" ]; then exec "${npd[@]}" processes --config "$config" "$@"; fi
if [ "${NPD_DEVICE:-npu}" = npu ]; then
  "${npd[@]}" doctor --config "$config" "$@"
  "${npd[@]}" plan --config "$config" "$@"
fi
exec "${npd[@]}" run --config "$config" "$@"
