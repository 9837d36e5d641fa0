"""What device.kind asks for, on a machine without a card; with torch_npu's own Python: tests/ascend_wheel."""

import re
import sys

import pytest
import torch

from npd_ascend.device import collective_backend, device_communicator, open_device
from npd_ascend.errors import UserError


def test_cpu():
    assert open_device("cpu", 0) == torch.device("cpu")
    assert collective_backend(torch.device("cpu")) == "gloo"


def test_an_npu_without_torch_npu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(
        UserError, match=r"device.kind=npu: torch_npu does not load \(No module .*docs/ascend.md"
    ) as error:
        open_device("npu", 0)
    assert "\n" not in str(error.value)


def test_each_rank_has_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device = open_device("cuda", 0)
    assert (device, taken) == (torch.device("cuda", 3), [3])
    assert collective_backend(device) == "nccl"


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = (
        rf"^device.kind=cuda: this rank wants CUDA device 1 and torch {re.escape(torch.__version__)} sees 1 "
        r"\(CUDA_VISIBLE_DEVICES is 6\); lower parallel.tp x parallel.dp, or set device.kind=cpu$"
    )
    with pytest.raises(UserError, match=said):
        open_device("cuda", 0)


def test_a_gpu_that_cannot_be_opened_is_told_in_one_line(monkeypatch):
    def fail(_):
        raise RuntimeError("CUDA error: all CUDA-capable devices\nare busy or unavailable")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"CUDA device 0 cannot be opened \(CUDA error: all [^\n]* unavailable\); "):
        open_device("cuda", 0)


def test_a_communicator_that_is_not_installed_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"rollout\.weights=device: vLLM's nccl communicator cannot be imported"
    ) as error:
        device_communicator(torch.device("cuda", 0))
    assert "\n" not in str(error.value)
