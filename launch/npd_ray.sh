#!/usr/bin/env bash
# A run over several nodes: Ray places the rollout and teacher workers, the trainer stays on the first node.
#   bash launch/npd_ray.sh head --config FILE [key=value ...]    on the first node: starts Ray, then the run
#   bash launch/npd_ray.sh join ADDRESS:PORT                     on every other node, before or while the run runs
# When the run ends, the first node's Ray is stopped with every other Ray of this user there; keep processes.* of
# workers to the cards that the trainer leaves (on the first node it takes the first ones).
# The repository and the run folder must lie at the same paths on all nodes. Ray listens on NPD_RAY_HOST, 127.0.0.1
# unless it is set, so a second node can only join if you name an address of a network that you trust: whoever reaches
# Ray's ports can run programs. NPD_RAY_PORT: 6379 unless set. NPD_RAY_NODE: options for `ray start`, for example
# --num-cpus=2 or --resources={"NPU":8}, without blanks in one of them; without it Ray counts by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv-ray requirements.txt requirements-ray.txt
bin=.venv-ray/bin
export RAY_USAGE_STATS_ENABLED=0
read -ra node <<< "${NPD_RAY_NODE:-}"
role=${1:-}
shift || true
case $role in
  head)
    host=${NPD_RAY_HOST:-127.0.0.1} port=${NPD_RAY_PORT:-6379}
    # else Ray takes the address of this host's network for it, on Linux; there is no other node to reach then
    [ "$host" != 127.0.0.1 ] || export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    $bin/ray start --head --node-ip-address "$host" --port "$port" --include-dashboard=false \
      --disable-usage-stats "${node[@]}" > /dev/null
    trap '$bin/ray stop > /dev/null' EXIT
    echo "other nodes: bash launch/npd_ray.sh join $host:$port"
    $bin/npd run "$@" "processes.ray=$host:$port"
    ;;
  join)
    exec $bin/ray start --address "${1:?ADDRESS:PORT of the first node}" --block --disable-usage-stats \
      ${NPD_RAY_HOST:+--node-ip-address "$NPD_RAY_HOST"} "${node[@]}"
    ;;
  *)
    sed -n '2,11p' "$0" >&2
    exit 2
    ;;
esac
