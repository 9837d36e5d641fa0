"""vllm-ascend's own engine for weights, from its wheel, fed by our sender: NPU tensors of torch_npu, HCCL of a stub.

Its files run as they are, down to the calls of libhccl.so, which stub_hccl.c answers; vllm_in_part.py has what they
take from vLLM. No card, no CANN and no model of vLLM's is in it.
"""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from vllm_in_part import load_vllm_in_part

from npd_ascend.model.decoder import PLAIN, Decoder, initialise
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.weights import collective
from npd_ascend.weights.collective import packed_sizes, tensor_sums
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.gather import whole_tensors
from npd_ascend.weights.receiver import WeightReceiver
from npd_ascend.weights.sender import open_sender

if not load_vllm_in_part():
    pytest.skip("vllm-ascend's wheel is not installed; launch/test.sh brings it", allow_module_level=True)

from vllm_ascend.distributed.device_communicators import pyhccl, pyhccl_wrapper
from vllm_ascend.distributed.weight_transfer.hccl_engine import HCCLWeightTransferEngine

from npd_ascend.rollout import vllm_versions

NPU, TIMEOUT_S, BUCKET_BYTES = torch.device("npu", 0), 3.0, 1 << 14
CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    qkv_bias=True,
    o_bias=True,
    qk_norm=False,
    tie_embeddings=True,
    init_std=0.02,
)


class Model:
    """Keeps what it should load."""

    def __init__(self):
        self.batches = []

    def load_weights(self, weights):
        assert all(tensor.device == NPU for _, tensor in weights)
        self.batches.append([(name, tensor.cpu()) for name, tensor in weights])


class Llm:
    """vLLM 0.23's LLM over vllm-ascend's worker, as far as weights go: the engine, and who calls it when."""

    def __init__(self):
        self._engine = HCCLWeightTransferEngine(
            None, SimpleNamespace(data_parallel_index=0, world_size=1, rank=0), model=None
        )
        self.model, self._active = Model(), False

    @property
    def batches(self):
        return self.model.batches

    def init_weight_transfer_engine(self, request):
        self._engine.init_transfer_engine(self._engine.parse_init_info(request["init_info"]))

    def collective_rpc(self, ask):
        return [ask(SimpleNamespace(get_model=lambda: self.model))]

    def start_weight_update(self):
        assert not self._active
        self._active, self.model.batches = True, []

    def update_weights(self, request):
        info = self._engine.parse_update_info(request["update_info"])
        self._engine.receive_weights(info, load_weights=self.model.load_weights)
        torch.npu.synchronize()

    def finish_weight_update(self):
        self._active = False


class Worker:
    """What the engine of a rollout worker does, with its checks of the manifest left out."""

    def __init__(self, folder):
        self.llm, self._group = Llm(), None
        self._receiver = WeightReceiver(folder, "rollout-0", timeout_s=TIMEOUT_S, device=True)

    def take(self, version):
        with self._receiver.transfer(version):
            if info := self._receiver.connect(1):
                vllm_versions.join_sender(self.llm, info)
                self._group = info
            manifest = self._receiver.manifest(version)
            self._receiver.start()
            vllm_versions.load_from_device(self.llm, manifest, self._group)
            self._receiver.confirm()
        self.llm.finish_weight_update()
        return [pair for batch in self.llm.batches for pair in batch]


class WithoutZeros:
    """torch for pyhccl.py: the stub of CANN has memory, but nothing that could fill it on the device."""

    zeros = staticmethod(lambda count, device: torch.empty(count, device=device).copy_(torch.zeros(count)))

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def _pyhccl(monkeypatch):
    monkeypatch.setattr(pyhccl, "torch", WithoutZeros())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    # nor anything that could multiply and add there
    for module in (collective, vllm_versions):
        monkeypatch.setattr(module, "tensor_sums", lambda tensor: tensor_sums(tensor.cpu()))


@pytest.fixture
def model():
    model = Decoder(CONFIG, PLAIN).requires_grad_(False)
    initialise(model, 0)
    return model


@pytest.fixture
def sender(tmp_path):
    with open_sender(tmp_path, torch.float32, timeout_s=TIMEOUT_S, device=NPU, bucket_bytes=BUCKET_BYTES) as sender:
        yield sender


def change(model):
    for parameter in model.parameters():
        parameter.add_(1.0)


def check_same(arrived, model):
    wanted = list(whole_tensors(model, ALONE))
    assert [name for name, _ in arrived] == [name for name, _ in wanted]
    for (name, tensor), (_, right) in zip(arrived, wanted, strict=True):
        assert tensor.dtype == right.dtype
        assert torch.equal(tensor, right), name


def test_the_bytes_that_arrive_are_those_of_the_trainer(sender, model, tmp_path):
    worker = Worker(tmp_path)
    for version in (1, 2, 3):
        change(model)
        sender.offer(version, model)
        check_same(worker.take(version), model)
    assert len(worker.llm.batches) > 3
    assert [sum(tensor.nbytes for _, tensor in batch) for batch in worker.llm.batches] == packed_sizes(
        [tensor.nbytes for _, tensor in whole_tensors(model, ALONE)], BUCKET_BYTES
    )


def test_the_test_sees_a_step(sender, model, tmp_path):
    sender.offer(1, model)
    arrived = Worker(tmp_path).take(1)
    change(model)  # what was offered does not move with the model
    with pytest.raises(AssertionError):
        check_same(arrived, model)


def _other_order(info):
    return {"names": [info["names"][1], info["names"][0], *info["names"][2:]]}


def _other_dtype(info):
    return {"dtype_names": ["int32", *info["dtype_names"][1:]]}


def _half(info):
    return {"dtype_names": ["bfloat16"] * len(info["names"])}


def _other_shape(info):
    return {"shapes": [info["shapes"][0][::-1], *info["shapes"][1:]]}


def _other_buffer(info):
    return {"packed_buffer_size_bytes": info["packed_buffer_size_bytes"] * 2}


def _one_by_one(info):
    return {"packed": False}


@pytest.mark.parametrize("mistake", [_other_order, _other_dtype, _half, _other_shape, _other_buffer, _one_by_one])
def test_planted_mistakes_do_not_arrive_as_if_nothing_were(mistake, sender, model, tmp_path):
    worker = Worker(tmp_path)
    really = worker.llm.update_weights
    worker.llm.update_weights = lambda request: really(
        {"update_info": request["update_info"] | mistake(request["update_info"])}
    )
    sender.offer(1, model)
    with pytest.raises((AssertionError, TransferError)):
        check_same(worker.take(1), model)


def test_a_sender_that_cuts_otherwise_is_an_error(sender, model, tmp_path, monkeypatch):
    monkeypatch.setattr(collective, "packed_sizes", lambda sizes, limit: packed_sizes(sizes, limit // 2))
    sender.offer(1, model)
    with pytest.raises(TransferError, match="ranks gave different sizes"):
        Worker(tmp_path).take(1)


def test_a_torn_transfer_is_an_error_and_the_next_worker_gets_all(sender, model, tmp_path, monkeypatch):
    sender.offer(1, model)
    sent, really = [], pyhccl.PyHcclCommunicator.broadcast

    def broadcast(communicator, tensor, src, stream=None):
        if communicator.rank == 0:
            sent.append(tensor)
            if len(sent) == 2:
                raise RuntimeError("the link broke")
        return really(communicator, tensor, src, stream)

    with monkeypatch.context() as patch:
        patch.setattr(pyhccl.PyHcclCommunicator, "broadcast", broadcast)
        with pytest.raises(
            TransferError, match="weight version 1 did not come from memory: HCCL error: a rank was lost"
        ):
            Worker(tmp_path).take(1)
    check_same(Worker(tmp_path).take(1), model)


def test_a_communicator_without_its_library_is_not_taken_for_one_that_works(sender, model, tmp_path, monkeypatch):
    """vllm-ascend's says nothing and moves nothing then."""

    def missing(*_):
        raise OSError("libhccl.so: cannot open shared object file")

    sender.offer(1, model)
    first = threading.get_ident()
    really = pyhccl.HCCLLibrary
    monkeypatch.setattr(
        pyhccl, "HCCLLibrary", lambda path: really(path) if threading.get_ident() == first else missing()
    )
    started = time.monotonic()
    with pytest.raises(TransferError):
        Worker(tmp_path).take(1)
    assert time.monotonic() - started < 60  # vLLM's rendezvous alone would wait for 300 s


def test_the_stub_is_what_pyhccl_calls():
    assert pyhccl_wrapper.HCCLLibrary()._funcs["HcclGetErrorString"](7) == b"ranks gave different sizes"
