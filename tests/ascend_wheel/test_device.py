"""device.kind: npu, as far as torch_npu goes with a stub in CANN's place: eight devices, and nothing computes.

Two more stubs in processes of their own: no device at all, and devices that refuse every call.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npd_ascend.device import collective_backend, group_bytes, open_device
from npd_ascend.errors import UserError


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("LOCAL_RANK", "HCCL_DETERMINISTIC", "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "HCCL_BUFFSIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop("PYTORCH_NPU_ALLOC_CONF", None)  # the stub has no memory that grows
    torch.use_deterministic_algorithms(False)


def test_each_rank_has_its_own_npu(monkeypatch):
    assert open_device("npu", 0) == torch.device("npu", 0)
    assert torch.npu.current_device() == 0
    taken = []
    monkeypatch.setattr(torch.npu, "set_device", taken.append)  # the stub's autograd threads would not follow
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert open_device("npu", 0) == torch.device("npu", 3)
    assert taken == [3]


def test_a_rank_without_an_npu_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(UserError, match=r"this rank wants NPU device 8 and torch \S+ sees 8 .*lower parallel.tp x"):
        open_device("npu", 0)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (0, "this rank wants NPU device 0 and torch"),
        (8, "NPU device 0 cannot be opened (Initialize:../torch_npu/csrc/core/npu/sys_ctrl/npu_sys_ctrl.cpp"),
    ],
)
def test_a_machine_without_a_working_npu_is_told(devices, said):
    code = (
        f"from wheel import load_stub; load_stub('-DSTRICT', '-DDEVICES={devices}')\n"
        "from npd_ascend.device import open_device\nfrom npd_ascend.errors import UserError\n"
        "try:\n    open_device('npu', 0)\nexcept UserError as error:\n    print(error)"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("device.kind=npu: "))
    assert said in line
    assert "docs/ascend.md" in line


def test_determinism_is_one_switch_for_collectives_and_operators(monkeypatch):
    open_device("npu", 0)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("HCCL_DETERMINISTIC", "true")
    open_device("npu", 0)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("variable", "value", "then"),
    [
        (None, "", "expandable_segments:True"),
        ("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:64", "max_split_size_mb:64"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:False", None),  # torch_npu refuses both names
    ],
)
def test_blocks_of_memory_may_grow_unless_the_user_says_otherwise(variable, value, then, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, value)
    open_device("npu", 0)
    assert os.environ.get("PYTORCH_NPU_ALLOC_CONF") == then


def test_collectives(monkeypatch):
    assert collective_backend(open_device("npu", 0)) == "hccl"
    assert "hccl" in torch.distributed.Backend.backend_list
    assert group_bytes("npu") == 2 * 200 * 10**6
    monkeypatch.setenv("HCCL_BUFFSIZE", "256")
    assert group_bytes("npu") == 2 * 256 * 10**6
    assert group_bytes("cpu") == 0
