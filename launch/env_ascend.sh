# Sourced by what runs on Ascend NPUs:  . launch/env_ascend.sh
# Every variable with its reason; their public sources stand in docs/ascend.md. What is set already stays as it is,
# but for the last.
# With _npd_dry CANN is not looked for, and the variables are printed: for --dry-run.

if [ -z "${_npd_dry:-}" ]; then
  # CANN's own environment: libraries, ASCEND_HOME_PATH, the operators' compiler. ASCEND_INSTALL: where it was installed.
  _install=${ASCEND_INSTALL:-/usr/local/Ascend}
  _found=
  for _script in "$_install/cann/set_env.sh" "$_install/ascend-toolkit/set_env.sh"; do
    if [ -e "$_script" ]; then
      _found=$_script
      break
    fi
  done
  if [ -z "$_found" ]; then
    echo "launch/env_ascend.sh: no set_env.sh of CANN under $_install; install CANN (docs/ascend.md) or set ASCEND_INSTALL" >&2
    return 2
  fi
  # these scripts read variables that may not be set, and test things that may fail
  _options=$-
  set +eu
  . "$_found"
  # libatb.so, which vllm-ascend needs
  [ -e "$_install/nnal/atb/set_env.sh" ] && . "$_install/nnal/atb/set_env.sh"
  case $_options in *e*) set -e ;; esac
  case $_options in *u*) set -u ;; esac
  unset _install _found _script _options
fi

# `import torch` would import torch_npu by itself and die of a missing CANN before anyone could say so in one line.
export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}

# Packs differ in length, so blocks of memory do too: segments that grow leave fewer holes. torch_npu refuses to have
# both names set; vLLM's sleep mode does not go with it and is not used here.
[ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}

# Level 2 moves more of an operator's launch to a second thread. It may raise the peak of memory.
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}

# Each process stays on the cores beside its NPU. 2, the finer form, would put the launching threads of a trainer and
# of a rollout engine that share a card on the same few cores.
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}

# Seconds until two ranks must have met (default 120). Ranks load their weights before they first talk,
# and a cold disk takes longer than that for one of them.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}

# MiB that a collective moves at once; each group of ranks takes twice as much of every card. Meant to be tokens of a
# pack x hidden size x 2 bytes: 96 for openPangu-1B, 256 for 7B at 32,768 tokens. `npd plan` reads it too.
export HCCL_BUFFSIZE=${HCCL_BUFFSIZE:-256}

# Ports for the hosts' and the NPUs' sockets, apart for each process where several share an NPU (trainer and rollouts).
export HCCL_HOST_SOCKET_PORT_RANGE=${HCCL_HOST_SOCKET_PORT_RANGE:-60000-60050}
export HCCL_NPU_SOCKET_PORT_RANGE=${HCCL_NPU_SOCKET_PORT_RANGE:-61000-61050}

# false: fast sums whose order may change. true: the same bits each time, for a resumed run that must be bit-equal;
# device.py then asks torch's operators for the same.
export HCCL_DETERMINISTIC=${HCCL_DETERMINISTIC:-false}

# Weights are replaced in place after a refresh; in the NPU's own block format (FRACTAL_NZ) they could not be. So a
# rollout worker sets it whatever it was, and so does this.
export VLLM_ASCEND_ENABLE_NZ=0

if [ -n "${_npd_dry:-}" ]; then
  echo "in every environment, after CANN's own set_env.sh (launch/env_ascend.sh):"
  for _name in $(grep -oE 'export [A-Z_]+=' launch/env_ascend.sh | grep -oE '[A-Z_]{2,}'); do
    [ -z "${!_name:-}" ] || echo "   $_name=${!_name}"
  done
  unset _name
fi
