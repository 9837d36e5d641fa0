"""What vllm-ascend's weight transfer takes from vLLM 0.23, which is not installed here, in the fewest lines that do it.

vllm_ascend's own files are loaded from its wheel as they are: hccl_engine.py, packed_tensor.py, pyhccl.py and
pyhccl_wrapper.py. The package's __init__ and utils.py, which want all of vLLM, are not.
"""

import logging
import sys
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch

Init = TypeVar("Init")
Update = TypeVar("Update")


class WeightTransferEngine(Generic[Init, Update]):
    def __init__(self, config, parallel_config, model):
        self.config, self.parallel_config, self.model = config, parallel_config, model

    def parse_init_info(self, given):
        return self.init_info_cls(**given)

    def parse_update_info(self, given):
        return self.update_info_cls(**given)


class Info:
    pass


@dataclass
class NCCLWeightTransferInitInfo:
    """As of 0.23: without the packing."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class StatelessProcessGroup:
    rank: int
    world_size: int
    store: torch.distributed.TCPStore

    @staticmethod
    def create(host, port, rank, world_size, data_expiration_seconds=3600, store_timeout=300, listen_socket=None):
        store = torch.distributed.TCPStore(
            host_name=host,
            port=port,
            world_size=world_size,
            is_master=rank == 0,
            timeout=timedelta(seconds=store_timeout),
            use_libuv=False,
            **({"master_listen_fd": listen_socket.detach()} if listen_socket else {}),
        )
        return StatelessProcessGroup(rank, world_size, store)

    def broadcast_obj(self, obj, src):
        """vLLM sends a pickle; the bytes of the one structure that is sent here do."""
        if self.rank == src:
            self.store.set("object", bytes(obj))
            return obj
        return type(obj).from_buffer_copy(self.store.get("object"))


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    sys.modules[name] = module
    return module


def load_vllm_in_part() -> bool:
    """Whether vllm_ascend is installed; its weight transfer can be imported then, and vllm_versions.py."""
    spec = find_spec("vllm_ascend")
    if spec is None:
        return False
    _module("vllm", __spec__=spec)  # find_spec("vllm") is asked
    _module("vllm.config")
    _module("vllm.config.parallel", ParallelConfig=object)
    _module("vllm.config.weight_transfer", WeightTransferConfig=object)
    _module("vllm.logger", logger=logging.getLogger("vllm"))
    _module("vllm.distributed")
    _module("vllm.distributed.utils", StatelessProcessGroup=StatelessProcessGroup)
    base = {"WeightTransferInitInfo": Info, "WeightTransferUpdateInfo": Info}
    _module("vllm.distributed.weight_transfer")
    _module("vllm.distributed.weight_transfer.base", WeightTransferEngine=WeightTransferEngine, **base)
    _module("vllm.distributed.weight_transfer.factory", WeightTransferEngineFactory=object)
    nccl = {"NCCLWeightTransferInitInfo": NCCLWeightTransferInitInfo}
    _module("vllm.distributed.weight_transfer.nccl_engine", **nccl)
    _module("transformers", AutoConfig=object, LlamaConfig=object)
    _module("vllm_ascend").__path__ = [str(Path(spec.origin).parent)]
    streams = {"current_stream": torch.npu.current_stream, "find_hccl_library": lambda: "libhccl.so"}
    _module("vllm_ascend.utils", **streams)
    return True
