"""What the planner says of memory, against real steps, real scoring and generating, real sets and real layers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planned_models import TIED, UNTIED

from npd_ascend.device import DTYPES
from npd_ascend.model.decoder import PLAIN, Decoder, recomputed
from npd_ascend.parallel.plan import cut_model
from npd_ascend.planner.layer import Live, count_layer, silent_mesh
from npd_ascend.planner.memory import (
    Layout,
    beside_reference,
    bytes_of_set,
    rollout_memory,
    teacher_memory,
    trainer_memory,
)
from npd_ascend.planner.transfer import beside_sender

ROOT = Path(__file__).parent.parent
CASES = [
    (TIED, "float32", 1024, "off", 1),
    (TIED, "bfloat16", 512, "selective", 1),
    (UNTIED, "float32", 512, "full", 2),
    (TIED, "float32", 512, "off", 2, "grpo"),
]


def _planned(config, dtype, pack_tokens, recompute, packs, grpo=""):
    layout = Layout(
        tp=1, dp=1, sequence_parallel=False, recompute=recompute, pack_tokens=pack_tokens, packs_per_rank=packs
    )
    answers = pack_tokens * 3 // 4  # of measured_step.py's samples
    memory = trainer_memory("distill", config, layout, DTYPES[dtype], device="cpu", answer_tokens=answers)
    memory = beside_sender(memory, config, torch.float32, of_card=False, group_bytes=0)
    return beside_reference(memory) if grpo else memory


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0].num_parameters // 10**6}M {' '.join(map(str, case[1:]))}"
)
def test_within_15_percent_of_real_steps(case):
    config, dtype, pack_tokens, recompute, packs, *grpo = case
    keys = {"config": config.__dict__, "dtype": dtype, "pack_tokens": pack_tokens, "recompute": recompute}
    command = [
        sys.executable,
        str(ROOT / "tests" / "measured_step.py"),
        json.dumps(keys | {"packs": packs, "grpo": bool(grpo)}),
    ]
    # freed memory goes back to the system at once, so that the process holds what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    measured, planned = json.loads(printed), _planned(*case)
    for part in ("step", "checkpoint", "transfer"):
        value = getattr(planned, part)  # pytest -s shows it
        print(f"{part}: measured {measured[part] / 2**20:.0f} MiB, planned {value / measured[part]:.3f} of it")
    assert planned.step == pytest.approx(measured["step"], rel=0.15)
    assert planned.checkpoint == pytest.approx(measured["checkpoint"], rel=0.15)
    assert planned.transfer == pytest.approx(measured["transfer"], rel=0.15)
    # planted mistakes lie outside
    for wrong in (
        planned.step - planned.optimizer,
        planned.step - planned.gradients,
        planned.step + planned.checkpoint,
        _planned(replace(config, num_layers=config.num_layers * 3 // 2), *case[1:]).step,
        _planned(config, dtype, 2 * pack_tokens, "off", packs, *grpo).step,
        *([_planned(*case[:5]).step] if grpo else []),  # without the reference
    ):
        assert wrong != pytest.approx(measured["step"], rel=0.15)
    for versions in (1, 3):
        assert planned.transfer * versions / 2 != pytest.approx(measured["transfer"], rel=0.15)
    assert planned.checkpoint * 2 / 3 != pytest.approx(measured["checkpoint"], rel=0.15)


@pytest.mark.parametrize(("config", "tp", "dp"), [(TIED, 2, 1), (UNTIED, 1, 2)], ids=["tp", "dp"])
def test_within_15_percent_of_real_steps_of_two_ranks(tmp_path, config, tp, dp):
    """Of each of them: gloo's copies of the gradients too, without which the second would be planned at 0.76."""
    keys = {"config": config.__dict__, "dtype": "float32", "pack_tokens": 512, "recompute": "full", "packs": 2}
    words = [
        sys.executable,
        ROOT / "tests" / "measured_step.py",
        json.dumps(keys | {"grpo": False, "tp": tp, "dp": dp}),
    ]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*words, str(rank), tmp_path / "store"], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    measured = [json.loads(rank.communicate(timeout=300)[0])["step"] for rank in ranks]
    layout = Layout(tp=tp, dp=dp, sequence_parallel=False, recompute="full", pack_tokens=512, packs_per_rank=2)
    planned = trainer_memory("distill", config, layout, torch.float32, device="cpu", answer_tokens=512 * 3 // 4)
    print(
        f"measured {[value // 2**20 for value in measured]} MiB, planned {planned.step // 2**20}"
    )  # pytest -s shows it
    assert measured == pytest.approx([planned.step] * 2, rel=0.15)
    for wrong in (planned.step - planned.optimizer, planned.step - planned.gradients):
        assert wrong != pytest.approx(max(measured), rel=0.15)


def _scoring(pack_tokens, dtype, models=(UNTIED, TIED)):
    return teacher_memory(*models, (DTYPES[dtype],) * 2, pack_tokens, device="cpu")


def _generating(batch, prompt_tokens, new_tokens, dtype, config=UNTIED):
    return rollout_memory(config, DTYPES[dtype], batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)


def _generating_of_many_words(**keys):
    return _generating(**keys, config=TIED)


@pytest.mark.parametrize(
    ("planned", "keys"),
    [
        (_scoring, {"pack_tokens": 2048, "dtype": "float32"}),
        (_scoring, {"pack_tokens": 512, "dtype": "bfloat16"}),
        # most of it are keys and values in the end, the forward of the prompts, and what a draw holds
        (_generating, {"batch": 16, "prompt_tokens": 16, "new_tokens": 240, "dtype": "float32"}),
        (_generating, {"batch": 32, "prompt_tokens": 64, "new_tokens": 64, "dtype": "bfloat16"}),
        (_generating_of_many_words, {"batch": 256, "prompt_tokens": 4, "new_tokens": 2, "dtype": "float32"}),
    ],
)
def test_within_15_percent_of_real_scoring_and_generating(planned, keys):
    models = {_scoring: (UNTIED, TIED), _generating: (UNTIED,), _generating_of_many_words: (TIED,)}[planned]
    case = keys | {"role": planned.__name__, "configs": [config.__dict__ for config in models]}
    command = [sys.executable, str(ROOT / "tests" / "measured_inference.py"), json.dumps(case)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    memory = planned(**keys)
    print(f"{keys}: measured {measured / 2**20:.0f} MiB, planned {memory.peak / measured:.3f} of it")
    assert memory.peak == pytest.approx(measured, rel=0.15)
    larger = max(memory.kv_cache, memory.loss)
    for wrong in (
        memory.peak - memory.weights // len(models),  # a model left out
        memory.peak + larger,
        memory.peak - max(larger, memory.activations),
    ):
        assert wrong != pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("prompt_tokens", "answer_tokens", "top_k"), [(188, 512, 10), (600, 100, 10), (100, 400, 2)], ids=str
)
def test_within_15_percent_of_a_real_set(prompt_tokens, answer_tokens, top_k, tmp_path):
    samples, tokens = 1500, prompt_tokens + answer_tokens
    command = [sys.executable, str(ROOT / "tests" / "measured_set.py"), str(samples)]
    command += [str(prompt_tokens), str(answer_tokens), str(top_k), str(tmp_path)]
    # as above; Arrow keeps some megabytes else
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    planned = bytes_of_set(samples, tokens, answer_tokens, top_k)
    print(f"{measured / samples:.0f} bytes a sample, planned {planned / measured:.3f} of it")
    assert planned == pytest.approx(measured, rel=0.15)
    for wrong in (
        bytes_of_set(samples, 2 * tokens, answer_tokens, top_k),
        bytes_of_set(samples, tokens, 0, top_k),  # what belongs to an answer's tokens forgotten
    ):
        assert wrong != pytest.approx(measured, rel=0.15)


def _kept_by_a_real_layer(mesh, config, recompute):
    """Counted on tensors that have values."""
    with torch.device("meta"):
        model = Decoder(replace(config, num_layers=1, vocab_size=64 * mesh.tp), PLAIN, recompute)
    cut_model(model, mesh)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    rotary = model.rotary(torch.arange(512))
    x_TD = torch.randn(512 // mesh.row_multiple, config.hidden_size).requires_grad_()
    with Live(*model.parameters(), *rotary, x_TD) as live:
        y_TD = recomputed(recompute == "full", model.layers[0], x_TD, rotary, [0, 512])
        kept = live.bytes
        y_TD.sum().backward()
    return kept


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensors_without_values_keep_what_real_ones_keep(recompute, sequence_parallel):
    with silent_mesh(2, sequence_parallel=sequence_parallel) as mesh:
        real = _kept_by_a_real_layer(mesh, UNTIED, recompute)
        assert count_layer(UNTIED, torch.float32, 512, mesh, recompute).kept == pytest.approx(real, rel=0.01)
    with silent_mesh(2, sequence_parallel=not sequence_parallel) as mesh:  # a planted mistake is seen
        assert count_layer(UNTIED, torch.float32, 512, mesh, recompute).kept != pytest.approx(real, rel=0.1)
