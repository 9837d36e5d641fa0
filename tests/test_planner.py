"""Plans: times and memory by hand, and what is said of a layout that cannot fit."""

import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from planned_models import UNTIED

from npd_ascend import preflight
from npd_ascend.__main__ import main
from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.model.families import read_config
from npd_ascend.placement import place, recipe
from npd_ascend.planner.command import HEADROOM, _Asked, held_of_a_set
from npd_ascend.planner.memory import (
    Layout,
    rollout_memory,
    trainer_memory,
)
from npd_ascend.planner.rates import ASCEND, this_host
from npd_ascend.planner.timing import Samples, Workload, cycle, decode_tokens_per_s, step_seconds

ROOT = Path(__file__).parent.parent
# hidden, intermediate, layers, heads, heads of keys and values, vocabulary, whether the head is the embedding
PANGU_1B = (1536, 6144, 26, 12, 6, 153376, True)
PANGU_7B = (4096, 12800, 34, 32, 8, 153376, False)
QWEN_1_5B = (1536, 8960, 28, 12, 2, 151936, True)
QWEN_7B = (3584, 18944, 28, 28, 4, 152064, False)


def test_a_set_that_the_host_may_not_hold_is_said_before_it_is_made(tmp_path, monkeypatch, caplog):
    """Once more where it is not to be trained on any more, and where each of two nodes has one of the two ranks."""
    monkeypatch.setattr(preflight, "host_memory", lambda: 100_000)
    asked = ["data.prompts.count=90", "data.heldout.count=15", f"run.folder={tmp_path}"]
    preflight.check_run(load_config(CONFIGS / "addition_cpu.yaml", asked))
    assert re.search(
        r"npd: a set of 105 rollouts, held by 1 .* takes up to 0 GB of this host's memory, and it", caplog.text
    )
    assert "lower data.prompts.count" in caplog.text
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "roles_to_do", lambda *_: {"distill"})  # as in a replay, which refuses those
        preflight.check_run(load_config(CONFIGS / "addition_cpu.yaml", asked))
    assert "take fewer ranks and teacher workers here" in caplog.text
    assert "data.prompts" not in caplog.text
    caplog.clear()
    two = load_config(CONFIGS / "addition_cpu.yaml", [*asked, "parallel.dp=2"])
    alone, of_one = held_of_a_set(two, 105, 9.5)
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (alone, *held_of_a_set(two, 105, 9.5)) == (2, 1, of_one)
    three = load_config(CONFIGS / "addition_cpu.yaml", ["processes.teacher=3", "parallel.dp=2"])
    assert held_of_a_set(three, 105, 9.5)[0] == 2  # workers 0 and 2 of them are here
    monkeypatch.delenv("NNODES")
    more = {(): 3, ("npd.overlap=true",): 5, ("parallel.dp=4",): 4}
    for settings, held in more.items():
        config = load_config(CONFIGS / "addition_cpu.yaml", ["processes.teacher=3", "parallel.dp=2", *settings])
        assert held_of_a_set(config, 105, 9.5)[0] == held
    monkeypatch.setattr(preflight, "roles_to_do", lambda *_: {"grpo"})
    preflight.check_run(load_config(CONFIGS / "addition_cpu.yaml", asked))
    assert not caplog.text


def test_a_stream_trains_every_sample_once_and_whole_shards_in_a_step():
    stream = ["npd.stream={shards_per_step: 2}", "rollout.batch_size=1000", "npd.pack_tokens=512"]
    plan = _Asked(load_config(CONFIGS / "addition_stream.yaml", stream), ASCEND)
    plan = plan.plan(plan.layout)
    config = load_config(CONFIGS / "addition_stream.yaml", stream)
    answers = config.npd.epochs * config.data.prompts.count + config.data.heldout.count
    tokens = {time.stage: time.tokens for time in plan.times}
    assert tokens["rollout"] == answers * config.rollout.max_new_tokens
    mean = tokens["distill"] / answers  # every answer once
    assert 6 < mean < 30
    assert plan.layout.packs_per_rank == math.ceil(2 * 1000 * mean / 512)


def test_rollouts_and_teachers_on_cards_of_their_own_take_their_share_of_the_time():
    model, layout = UNTIED, Layout(tp=1, dp=1, sequence_parallel=False, recompute="off", pack_tokens=512)
    work = Workload(samples=10, prompt_tokens=30, answer_tokens=70, epochs=4, sets=2)
    models = [(model, torch.bfloat16)] * 2
    one = cycle(*models, (torch.bfloat16, 8), layout, work, ASCEND)
    many = cycle(*models, (torch.bfloat16, 8), layout, work, ASCEND, processes=(4, 2))
    assert [a.seconds / b.seconds for a, b in zip(one, many, strict=True)] == pytest.approx([4, 2, 1])
    assert [a.card_hours for a in one] == pytest.approx([b.card_hours for b in many])


def test_replicas_share_masters_and_moments():
    def peak(dp, **changes):
        layout = Layout(tp=1, dp=dp, sequence_parallel=False, recompute="full", pack_tokens=512)
        return trainer_memory("distill", UNTIED, layout, torch.bfloat16, device="cpu", answer_tokens=384, **changes)

    parameters = UNTIED.num_parameters
    assert peak(1).optimizer == 12 * parameters
    assert peak(4).optimizer == pytest.approx(3 * parameters, rel=0.01)
    assert peak(4, group_bytes=10**8).peak == peak(4).peak + 10**8
    assert peak(1, group_bytes=10**8).peak == peak(1).peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_operator_that_adds_its_product_needs_no_room_for_it(dtype):
    layout = Layout(tp=1, dp=1, sequence_parallel=False, recompute="full", pack_tokens=512)

    def loss(impl):
        return trainer_memory("distill", UNTIED, layout, dtype, device="cpu", answer_tokens=384, loss_impl=impl).loss

    head = UNTIED.vocab_size * UNTIED.hidden_size
    assert loss("triton") == loss("chunked")
    assert loss("chunked") - loss("npu") == (2 * head if dtype == torch.bfloat16 else 0)
    assert loss("mindspeed") == loss("npu")


def test_times_by_hand():
    layout = Layout(tp=2, dp=4, sequence_parallel=True, recompute="off", pack_tokens=2048)
    samples = Samples(1024, 0.5)
    compute, talk = step_seconds(UNTIED, layout, torch.bfloat16, ASCEND, samples)
    forward = UNTIED.forward_flops([1024, 1024], 1024)
    assert compute == pytest.approx(3 * forward / 2 / (0.4 * 354e12))
    reduces = (4 * 6 + 2) * 2048 * 512 * 2 * 2 / 2  # 4 a layer and 2, of [T, D] in bfloat16, 2 (tp-1)/tp of it
    assert talk == pytest.approx((reduces + UNTIED.num_parameters / 2 * 6 * 3 / 4) / 100e9)
    again, _ = step_seconds(UNTIED, replace(layout, recompute="full"), torch.bfloat16, ASCEND, samples)
    assert again == pytest.approx(compute * 4 / 3)
    # few requests: the least time of a step; many: the traffic of weights and keys and values; each draws a token
    assert decode_tokens_per_s(UNTIED, torch.bfloat16, ASCEND, batch=1, context=100) == pytest.approx(1 / 0.017035)
    keys = 4000 * 1000 * 2 * 6 * 4 * 64 * 2
    assert decode_tokens_per_s(UNTIED, torch.bfloat16, ASCEND, batch=4000, context=1000) == pytest.approx(
        4000 / ((2 * UNTIED.num_parameters + keys) / 0.8e12 + 4000 * 35e-6)
    )


def test_tokens_of_a_cycle_by_hand():
    layout = Layout(tp=1, dp=2, sequence_parallel=False, recompute="off", pack_tokens=2048)
    work = Workload(samples=10, prompt_tokens=30, answer_tokens=70, epochs=4, sets=2, kept=0.5)
    model = (UNTIED, torch.bfloat16)
    stages = cycle(model, model, (torch.bfloat16, 8), layout, work, ASCEND)
    assert [(s.stage, s.tokens, s.cards) for s in stages] == [
        ("rollout", 10 * 2 * 70, 1),
        ("score", 10 * 2 * (100 + 2 * 70), 1),
        ("distill", 0.5 * 10 * 100 * 4, 2),
    ]


@pytest.fixture
def large_student(addition_student):
    """openPangu-Embedded-1B's shape with the addition tokenizer: enough for a plan, which reads no weights."""
    return _shaped(addition_student, PANGU_1B)


def _shaped(folder: Path, shape: tuple[int, ...]) -> Path:
    path = folder / "config.json"
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    raw = json.loads(path.read_text()) | dict(zip((*names, "vocab_size", "tie_word_embeddings"), shape, strict=True))
    path.write_text(json.dumps(raw | {"head_dim": 128, "max_position_embeddings": 32768}))
    return folder


def test_a_layout_that_cannot_fit_is_refused_with_one_that_does(large_student, capsys):
    arguments = ["plan", "--config", str(CONFIGS / "addition_cpu.yaml"), f"student.path={large_student}", "sft=null"]
    arguments += ["student.init=pretrained", "student.dtype=bfloat16", "rollout.dtype=bfloat16", "device.kind=npu"]
    arguments += ["data.prompts.count=8", "rollout.batch_size=8"]
    assert main([*arguments, "npd.pack_tokens=32768", "parallel.dp=8"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"npd plan: distill needs 8\d.\d GiB of a card and 54.6 GiB are there .*\n", said.err)
    assert "distill" in said.out
    layout = said.err.split("this fits: ")[1].split()
    assert "parallel.tp=2" in layout
    assert main([*arguments, *layout]) == 0
    assert "peak" in capsys.readouterr().out


def test_a_run_on_npus_that_does_not_fit_is_refused_without_npd_plan(large_student, monkeypatch):
    """npd run asks too; the device itself is not what this is about."""
    monkeypatch.setattr(preflight, "open_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(preflight, "choose_kernels", lambda *_: None)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    words = [f"student.path={large_student}", "sft=null", "student.init=pretrained", "student.dtype=bfloat16"]
    words += ["data.prompts.count=8", "rollout.batch_size=8", "device.kind=npu", "parallel.dp=8"]
    with pytest.raises(
        UserError, match=r"^distill needs 8\d.\d GiB of a card and 60.7 GiB are there .100% of .*fits: "
    ):
        preflight.check_run(load_config(CONFIGS / "addition_cpu.yaml", [*words, "npd.pack_tokens=32768"]))


def test_the_way_out_has_the_limit_and_the_roles_of_the_refusal(large_student):
    """npd run takes all of a card, npd plan a tenth less, and a stage that is done asks for nothing."""
    words = [f"student.path={large_student}", "sft=null", "student.init=pretrained", "data.prompts.count=8"]
    asked = _Asked(load_config(CONFIGS / "addition_cpu.yaml", [*words, "parallel.dp=2"]), ASCEND)
    layouts = [asked.plan(layout) for layout in asked._other_layouts()]
    distill = min((one for plan in layouts for one in plan.memory if one.role == "distill"), key=lambda one: one.peak)
    asked._hardware = replace(ASCEND, memory=replace(ASCEND.memory, value=distill.peak / 0.95 + ASCEND.idle.value))
    assert asked.way_out(distill, 1.0, {"distill"}).startswith("this fits: ")
    assert asked.way_out(distill, HEADROOM, {"distill"}).startswith("no layout of these cards fits")


@pytest.mark.parametrize("sft", [[], ["sft=null", "student.init=pretrained"]])
def test_grpo_has_a_plan_too(sft, capsys):
    assert main(["plan", "--config", str(CONFIGS / "addition_grpo.yaml"), *sft]) == 0
    out = capsys.readouterr().out
    roles = [line.split()[0] for line in out.split("role ")[1].split("\n\n")[0].splitlines()[1:]]
    assert roles == ([] if sft else ["sft"]) + ["grpo-rollout", "grpo"]
    config = load_config(CONFIGS / "addition_grpo.yaml", sft)
    asked = _Asked(config, ASCEND)
    rollout, grpo = asked.plan(asked.layout).times[-2:]
    # one pass over all answers, each as long as it may be; all problems have nine tokens
    answers, longest = config.grpo.steps * config.grpo.groups_per_step * config.grpo.group_size, 6
    assert (rollout.tokens, grpo.tokens) == (answers * longest, answers * (9 + longest))


def test_the_reference_of_grpo_is_one_more_student():
    found = []
    for weight in (0, 0.1):
        asked = _Asked(load_config(CONFIGS / "addition_grpo.yaml", [f"grpo.kl_weight={weight}"]), ASCEND)
        found.append(asked.plan(asked.layout).memory[-1])
    plain, with_kl = found
    assert with_kl.peak - plain.peak == with_kl.weights - plain.weights == plain.weights


@pytest.mark.parametrize(
    ("name", "roles", "student", "teacher"),
    [
        ("repro/openpangu_1b/sft", ["gold"], PANGU_1B, None),
        ("repro/openpangu_1b/npd", ["prompts"], PANGU_1B, PANGU_7B),
        ("repro/openpangu_1b/grpo", ["problems"], PANGU_1B, None),
        ("openpangu_1b_8npu", ["prompts"], PANGU_1B, PANGU_7B),
        ("repro/qwen25_math/run", ["gold", "prompts"], QWEN_1_5B, QWEN_7B),
        ("repro/qwen25_coder/run", ["gold", "prompts"], QWEN_1_5B, QWEN_7B),
    ],
)
def test_what_is_shipped_for_npus_fits_a_card(addition_student, tmp_path, name, roles, student, teacher):
    """Of the models only the shapes are known here; prompts are sums."""
    words = ["data.heldout={kind: addition, first: 1, count: 8}"]
    words += [f"data.{role}={{kind: addition, first: 10000, count: 64}}" for role in roles]
    if teacher:
        shutil.copytree(addition_student, tmp_path / "teacher")
        words.append(f"teacher.path={_shaped(tmp_path / 'teacher', teacher)}")
    words.append(f"student.path={_shaped(addition_student, student)}")
    asked = _Asked(load_config(CONFIGS / f"{name}.yaml", words), ASCEND)
    plan = asked.plan(asked.layout)
    assert [memory.role for memory in plan.memory if memory.peak > plan.limits[memory.role]] == []


def test_the_schedules_of_the_benchmark_fit_eight_cards(addition_student, tmp_path, monkeypatch):
    """Both of them as benchmarks/npu.sh asks for them, and the one that the configuration's comment names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    schedules = importlib.import_module("schedules")
    script = (ROOT / "benchmarks" / "npu.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall("measure schedules (.*)", script)
    options = schedules.arguments(shlex.split(line))
    options.config = ROOT / options.config
    comment = options.config.read_text().replace("\n# ", " ")
    side_by_side = shlex.split(re.search("describes it: (.*), in shorter packs", comment).group(1))
    shutil.copytree(addition_student, tmp_path / "teacher")
    models = [f"teacher.path={_shaped(tmp_path / 'teacher', PANGU_7B)}"]
    models += [f"student.path={_shaped(addition_student, PANGU_1B)}"]
    sums = [f"data.{role}={{kind: addition, first: {first}}}" for role, first in (("heldout", 1), ("prompts", 9999))]
    for words in (options.overrides, schedules.on_policy_words(options), side_by_side):
        counts = ["data.heldout.count=8", "data.prompts.count=512"]
        config = load_config(options.config, [*models, *sums, *counts, *words])
        asked = _Asked(config, ASCEND)
        plan = asked.plan(asked.layout)
        assert [memory.role for memory in plan.memory if memory.peak > plan.limits[memory.role]] == [], words
        for group in recipe(config):
            place(config, group, list("01234567"))


def test_each_stage_is_planned_with_packs_of_its_own():
    words = ["npd.pack_tokens=64", "grpo={pack_tokens: 512, steps: 2}", "data.problems={kind: addition, count: 40}"]
    asked = _Asked(load_config(CONFIGS / "addition_cpu.yaml", [*words, "processes.rollout=4"]), this_host())
    plan = asked.plan(asked.layout)
    memory = {one.role: one for one in plan.memory}
    assert memory["grpo"].activations > 4 * memory["distill"].activations
    shorter = asked.plan(replace(asked.layout, pack_tokens=32))
    assert {one.role: one for one in shorter.memory}["grpo"].activations < memory["distill"].activations
    assert plan.limits["grpo-rollout"] == plan.limits["rollout"] == plan.limits["distill"] // 4


@pytest.mark.parametrize(("name", "section"), [("addition_teacher", "sft"), ("addition_grpo", "grpo")])
def test_the_layout_that_fits_names_the_packs_of_its_own_section(name, section):
    asked = _Asked(load_config(CONFIGS / f"{name}.yaml", ["data.gold.count=8"]), ASCEND)
    (said,) = {str(layout).split()[-1].split(".")[0] for layout in asked._other_layouts()}
    assert said == section


@pytest.mark.parametrize("grpo", [False, True])
def test_weights_on_their_way_are_counted_where_they_lie(addition_student, monkeypatch, grpo):
    """The trainer's two versions are whole ones though it is cut; sft and weights from disk have none."""
    monkeypatch.setenv("HCCL_BUFFSIZE", "200")
    name, role = ("addition_grpo", "grpo") if grpo else ("addition_stream", "distill")
    words = [f"student.path={_shaped(addition_student, PANGU_1B)}", "rollout.engine=vllm", "rollout.dtype=bfloat16"]
    words += ["processes.rollout=3", "parallel.tp=2", "data.gold.count=8"]
    words += ["data.problems.count=8", "grpo.steps=2"] if grpo else ["data.prompts.count=8"]
    whole = 2 * read_config(addition_student).num_parameters

    def planned(kind, weights):
        keys = [*words, f"device.kind={kind}", f"rollout.weights={weights}"]
        asked = _Asked(load_config(CONFIGS / f"{name}.yaml", keys), ASCEND)
        roles = {one.role: one for one in asked.plan(asked.layout).memory}
        return roles["grpo-rollout" if grpo else "rollout"], roles[role], roles["sft"]

    for kind, weights in (("npu", "memory"), ("npu", "device"), ("cpu", "memory")):
        generator, trainer, sft = planned(kind, "disk")
        assert generator.transfer == trainer.transfer == 0
        receiver, sender, same = planned(kind, weights)
        of_card, group = kind == "cpu" or weights == "device", 4 * 10**8 * (weights == "device")
        assert sender.transfer == 2 * whole
        assert sender.peak - trainer.peak == sender.step - trainer.step == of_card * 2 * whole + 3 * group
        loading = generator.weights + generator.kv_cache + of_card * receiver.transfer
        assert receiver.peak == group + max(generator.peak, loading)
        if weights == "device":  # the embedding alone is one bucket, each of the next two ends within a layer
            assert 2**29 < receiver.transfer - 2 * 153376 * 1536 < 2**29 + 2 * (2 * 6144 * 1536)
        else:
            assert receiver.transfer == whole
        assert same == sft


def test_vllm_reads_no_more_prompt_tokens_at_once_than_its_limit():
    def peak(prompt_tokens, kv_cache_bytes, **changes):
        lens = {"batch": 512, "prompt_tokens": prompt_tokens, "new_tokens": 2048}
        return rollout_memory(UNTIED, torch.bfloat16, **lens, kv_cache_bytes=kv_cache_bytes, **changes).peak

    assert peak(16, 2**30) == peak(4096, 2**30)  # 512 x 16 is the limit
    assert peak(4096, None) > peak(16, None)
    # on a CPU 4,096, or the longest prompt with its answer
    whole = [peak(tokens, 2**30, whole_prompts=True) for tokens in (8, 16, 4096, 6144)]
    assert whole[0] == whole[1] < whole[2] < peak(16, 2**30) == whole[3]


def test_a_card_without_rates_is_not_planned(capsys):
    assert main(["plan", "--config", str(CONFIGS / "addition_cpu.yaml"), "device.kind=cuda"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("npd plan: device.kind=cuda: npd_ascend/planner/rates.py has no rates of such a card")
    assert not said.out


def test_the_document_is_what_the_planner_says():
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert printed == (ROOT / "docs" / "scale.md").read_text(), "python benchmarks/scale.py > docs/scale.md"
