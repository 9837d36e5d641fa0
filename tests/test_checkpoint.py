"""Checkpoints and weight versions: whole or not at all, checksummed, the one before is used."""

import pytest
import torch
from conftest import CONFIGS

from npd_ascend.checkpoint import Checkpoints, Rectangle
from npd_ascend.errors import UserError
from npd_ascend.model.load import load_decoder
from npd_ascend.weights.disk import DiskChannel


def _state(value=float("nan")):
    return [Rectangle("master/w", (0,), (3,), torch.full((3,), float(value)))]


def _save(folder, *steps):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save({"epoch": 0, "step": step}, _state(step))
    checkpoints.wait()


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    state = _state()
    assert Checkpoints(tmp_path).load(state) is None
    _save(tmp_path, 1, 2, 3)
    assert Checkpoints(tmp_path).load(state) == {"epoch": 0, "step": 3}
    assert state[0].values.tolist() == [3, 3, 3]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "torn", "no cursor"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(tmp_path, damage, caplog):
    _save(tmp_path, 1, 2)
    (file,) = (tmp_path / "step-00000002").glob("*.safetensors")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        (tmp_path / "step-00000002" / "cursor.json").unlink()
    state = _state()
    assert Checkpoints(tmp_path).load(state)["step"] == 1
    assert state[0].values.tolist() == [1, 1, 1]
    assert "step-00000002: damaged" in caplog.text
    _save(tmp_path, 2)  # the name is free again
    assert Checkpoints(tmp_path).load(state)["step"] == 2


def test_a_weight_version_whose_bytes_changed_is_refused(tmp_path):
    source = CONFIGS / "addition" / "student"
    model = load_decoder(source, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    channel = DiskChannel(tmp_path)
    with pytest.raises(UserError, match="version 0 is not published"):
        channel.fetch(0)
    channel.publish(0, model, source, [])
    (tmp_path / "v0.bak").mkdir()  # somebody's copy
    assert channel.versions() == [0]
    file = channel.fetch(0) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="differs from its checksum"):
        channel.fetch(0)
