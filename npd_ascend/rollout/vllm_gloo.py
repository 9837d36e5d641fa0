"""vLLM's end of the fast path: a backend of its weight-transfer API, known where this module was imported.

Unlike vLLM's own backends it takes nothing into the model before all of it is here and checked, so a transfer that
fails leaves the engine with the weights that it had. The price is the weights once more in host memory while it lasts.

So vllm_versions.py calls receive_weights and load_received by themselves, and not the worker's start, update and
finish: in vLLM 0.23, and in vllm-ascend, that worker takes the model apart when an update starts, and waits for an
accelerator that a CPU does not have.
"""

from typing import Any

import torch.distributed as dist
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from npd_ascend.weights.collective import GroupInfo, Manifest, open_group, receive_buckets

BACKEND = "npd_gloo"


class GlooEngine(WeightTransferEngine):
    init_info_cls = GroupInfo
    update_info_cls = Manifest

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group: dist.ProcessGroupGloo | None = None
        self._received: list[tuple[str, Any]] = []

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = open_group(init_info, 1 + rank)

    def receive_weights(self, update_info: Manifest, load_weights: None = None) -> None:
        """load_weights: of vLLM 0.23, which would take the tensors one by one."""
        self._received = []
        self._received = update_info.views(receive_buckets(update_info, self._group))

    def load_received(self, model_config: Any) -> None:
        initialize_layerwise_reload(self.model)
        self.model.load_weights(iter(self._received))
        finalize_layerwise_reload(self.model, model_config)
        self._received = []

    def shutdown(self) -> None:
        self._group, self._received = None, []

    # abstract in 0.32, or in 0.23, and not called
    def start_weight_update(self) -> None:
        raise AssertionError("receive_weights is the start")

    def finish_weight_update(self) -> None:
        raise AssertionError("load_received is the end")

    @staticmethod
    def trainer_send_weights(*arguments: Any) -> None:
        raise AssertionError("npd_ascend/weights/sender.py sends")


WeightTransferEngineFactory.register_engine(BACKEND, GlooEngine)
