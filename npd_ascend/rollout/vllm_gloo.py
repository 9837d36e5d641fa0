"""vLLM's end of the fast path: a backend of its weight-transfer API, known where this module was imported.

Unlike vLLM's own backends it takes nothing into the model before all of it is here and checked, so a transfer that
fails leaves the engine with the weights that it had. The price is the weights once more in host memory while it lasts.

In vLLM 0.23 the worker itself turns to layerwise reloading when an update starts, not the backend as in 0.32; this
has NOT been run there, and the class would then do in receive_weights what finish_weight_update does here.
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

    def start_weight_update(self) -> None:
        self._received = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Without the base class's wait for the device: nothing has gone there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Manifest) -> None:
        self._received = update_info.views(receive_buckets(update_info, self._group))

    def finish_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        self.model.load_weights(iter(self._received))
        finalize_layerwise_reload(self.model, self.model_config)
        self._received = []

    def shutdown(self) -> None:
        self._group, self._received = None, []


WeightTransferEngineFactory.register_engine(BACKEND, GlooEngine)
