"""bfloat16 with float32 masters follows float32; without them it demonstrably does not."""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from conftest import CONFIGS

from npd_ascend.config import OptimizerConfig, load_config
from npd_ascend.model.load import load_decoder
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.samples import gold_samples
from npd_ascend.trainer.step import train_step

CPU = torch.device("cpu")
BAND = 0.02  # nats; measured in this shape: 0.008 with masters, 0.10 without
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 176}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}
STEPS, LR = 120, 3e-5  # an update is far below bfloat16's rounding of a weight


class _NoMasters:
    """The mistake: AdamW on the bfloat16 parameters themselves."""

    def __init__(self, model):
        self._model = model
        self._adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
        self.gradients = SimpleNamespace(last_backward=nullcontext)

    def reduce_and_clip(self):
        return float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0))

    def step(self, lr):
        self._adam.step()
        self._adam.zero_grad()


def _curve(folder, dtype, optimizer_of):
    config = load_config(CONFIGS / "addition_cpu.yaml", ["data.gold.count=32"])
    samples, objective = gold_samples(config, ChatTokenizer(folder)), Objective()
    model = load_decoder(folder, seed=0, dtype=dtype, device=CPU)
    batch, total = make_batch(samples, objective, CPU), weight_sum(samples, objective)
    optimizer = optimizer_of(model)
    return [train_step(model, [batch], optimizer, objective, weight_sum=total, lr=LR).loss for _ in range(STEPS)]


def _distance(curve, other):
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


def test_masters_keep_bfloat16_on_the_float32_curve(addition_student):
    config = addition_student / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SHAPE))
    curve = partial(_curve, addition_student)
    with_masters = lambda model: MasterAdamW(model, OptimizerConfig())  # noqa: E731
    wanted = curve(torch.float32, with_masters)
    assert wanted[0] - wanted[-1] > 10 * BAND  # it learns
    assert _distance(curve(torch.bfloat16, with_masters), wanted) < BAND
    assert _distance(curve(torch.bfloat16, _NoMasters), wanted) > 2 * BAND


def test_a_model_is_made_and_updated_without_the_compiler_of_torch():
    """It takes a second to import, in every process of a run."""
    code = f"""
import sys
import torch
from npd_ascend.config import OptimizerConfig
from npd_ascend.model.load import load_decoder
from npd_ascend.trainer.optimizer import MasterAdamW
model = load_decoder({str(CONFIGS / "addition" / "student")!r}, seed=0, dtype=torch.float32, device=torch.device("cpu"))
optimizer = MasterAdamW(model, OptimizerConfig())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.reduce_and_clip()
optimizer.step(1.0)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
