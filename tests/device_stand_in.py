"""CPU and gloo in the place of a device and its collectives, below all that vLLM's weight transfer and ours do.

What is replaced: the communicator between devices, streams, and the number of the current device. What is not: vLLM's
engine, its packed broadcasts, its rendezvous and its loaders, and our sender and receiver.
"""

import tempfile
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from npd_ascend.weights import collective

TIMEOUT_S = 4.0


class GlooCommunicator:
    """With the signature of vLLM's PyNcclCommunicator; ranks find each other by an object of rank 0, as there.

    Two sizes for one broadcast are an error here; on a device they would hang or be torn.
    """

    disabled = False

    def __init__(self, group, device):
        self.rank, self.world_size, self.group, self.device = group.rank, group.world_size, group, device
        folder = group.broadcast_obj(tempfile.mkdtemp() if self.rank == 0 else None, src=0)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=TIMEOUT_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        store = dist.FileStore(f"{folder}/store", self.world_size)
        store.set_timeout(options._timeout)
        self._gloo = dist.ProcessGroupGloo(store, self.rank, self.world_size, options)
        self._gloo.allreduce([torch.zeros(1)]).wait()

    def broadcast(self, tensor, src, stream=None):
        assert src == 0
        assert tensor.dtype == torch.uint8
        assert tensor.is_contiguous()
        size = torch.tensor([tensor.numel()])
        self._gloo.broadcast([size], dist.BroadcastOptions()).wait()
        if int(size) != tensor.numel():
            raise RuntimeError(f"a broadcast of {int(size)} bytes meets one of {tensor.numel()}")
        collective.broadcast(tensor, self._gloo).wait()

    def destroy(self):
        self._gloo = None


class _Stream(torch.cpu.Stream):
    def query(self):
        return True

    def synchronize(self):
        pass


def stand_in_for_devices(monkeypatch) -> None:
    """In this process; for good without `monkeypatch`."""
    replace = monkeypatch.setattr if monkeypatch else setattr
    replace(torch.cpu, "Stream", _Stream)
    if find_spec("vllm"):
        from vllm.distributed.device_communicators import pynccl
        from vllm.distributed.weight_transfer import packed_tensor

        replace(pynccl, "PyNcclCommunicator", GlooCommunicator)
        replace(packed_tensor, "_get_streams", lambda device, count: tuple(_Stream() for _ in range(count)))
        replace(torch.accelerator, "current_device_index", lambda: 0)
        replace(torch.accelerator, "synchronize", lambda *_: None)
