"""What device.kind asks for, on a machine without an NPU; with torch_npu's own Python: tests/ascend_wheel."""

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


def test_a_communicator_that_is_not_installed_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"rollout\.weights=device: vLLM's nccl communicator cannot be imported"
    ) as error:
        device_communicator(torch.device("cuda", 0))
    assert "\n" not in str(error.value)
