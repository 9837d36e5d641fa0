"""The whole recipe on real files and real processes: outputs, recomputation, kills, full disk, bad teachers.

The recipe is configs/addition_cpu.yaml made small; what it learns is measured elsewhere (benchmarks/).
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import npd, npd_here
from conftest import CONFIGS
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from npd_ascend.filters.ifd import ifd
from npd_ascend.metrics import read_metrics
from npd_ascend.stream import Stream
from npd_ascend.tokenizer import ChatTokenizer

pytestmark = pytest.mark.slow

MODELS = ("student", "teacher")
SMALL = [
    "data.gold.count=200",
    "data.prompts.count=300",
    "data.heldout.count=60",
    "sft.epochs=4",
    "sft.checkpoint_every_steps=2",
    "npd.epochs=4",
    "npd.refresh_after=[2]",
    "npd.checkpoint_every_steps=3",
    "npd.pack_tokens=512",
    "rollout.batch_size=64",
    "filters.min_answer_tokens=2",
    "filters.drop_below_zero=true",
    "filters.tau_mode=absolute",
    "filters.tau=3",
    "device.threads=1",
]


def settings(folder: Path, *more: str) -> list[str]:
    return ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={folder}", *SMALL, *more]


def whole_run(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return npd("run", *settings(folder, *more))


def stage(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    """Alone, without a supervisor."""
    return npd_here(name, *settings(folder, *more))


def stage_on(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    """On an existing run folder."""
    return npd_here(name, "--run", folder, *more)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line of a UserError."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return next(line for line in reversed(done.stderr.splitlines()) if line.startswith("npd "))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = whole_run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def test_a_run_leaves_all_it_promises(reference):
    for name in ("config.yaml", "stream/manifest.jsonl", "metrics.jsonl", "tensorboard", "summary.json", "report.html"):
        assert (reference / name).exists(), name
    summary = json.loads((reference / "summary.json").read_text())
    assert list(summary["scores"]) == ["start", "sft", "npd", "grpo", "teacher"]
    assert summary["scores"]["grpo"] is None  # a stage that this run does not have
    assert summary["scores"]["teacher"] > 0.99
    model = AutoModelForCausalLM.from_pretrained(reference / "student")
    assert isinstance(model, LlamaForCausalLM)
    page = (reference / "report.html").read_text()
    assert "<svg" in page or "data:image/png" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    steps = [row["step"] for row in read_metrics(reference) if row["stage"] == "npd" and "train/loss" in row]
    assert steps == list(range(len(steps)))


def test_held_out_metrics_say_what_the_evaluation_says(reference):
    scores = json.loads((reference / "summary.json").read_text())["scores"]
    rows = [row for row in read_metrics(reference) if "heldout/kl_teacher" in row]
    assert [row["train/epoch"] for row in rows] == [0, 1, 2, 2, 3, 4]  # before the refresh and after it
    assert rows[0]["heldout/exact_match"] == pytest.approx(scores["sft"], abs=1e-6)
    assert rows[-1]["heldout/exact_match"] == pytest.approx(scores["npd"], abs=1e-6)
    assert all(row["heldout/busy_s"] > 0 for row in rows)


def test_every_rollout_is_accounted_for(reference):
    stream = Stream(reference / "stream")
    for version in (0, 1):
        rollouts, decisions = stream.read("rollouts", version), stream.read("decisions", version)
        assert len(rollouts) == 360 == len({r.sample_id for r in rollouts})
        assert [d.sample_id for d in decisions] == [r.sample_id for r in rollouts]
        assert sum(d.reason == "heldout" for d in decisions) == 60
        scored = {s.sample_id for s in stream.read("scores", version)}
        assert scored == {d.sample_id for d in decisions if d.ifd_delta is not None}
        assert {d.sample_id for d in decisions if d.kept} <= scored


@torch.inference_mode()
def test_plain_transformers_gives_the_same_scores_for_every_row(reference):
    """Teacher top-k, all four IFD losses and the decisions, one sample at a time, fp32, 1e-4."""
    teacher = AutoModelForCausalLM.from_pretrained(CONFIGS / "addition" / "teacher")
    tokenizer = ChatTokenizer(CONFIGS / "addition" / "student")
    context = list(tokenizer.alone_context("assistant_header"))
    stream, worst = Stream(reference / "stream"), 0.0
    for version in (0, 1):
        student = AutoModelForCausalLM.from_pretrained(reference / "weights" / f"v{version}")
        scores = {score.sample_id: score for score in stream.read("scores", version)}
        decisions = {decision.sample_id: decision for decision in stream.read("decisions", version)}
        for rollout in stream.read("rollouts", version):
            answer = torch.tensor(rollout.token_ids[rollout.prompt_len :])

            def logprobs(model, prefix, answer=answer):
                ids = torch.cat([torch.tensor(prefix), answer])
                return model(ids[None]).logits[0, len(prefix) - 1 : -1].log_softmax(-1)

            prompt = list(rollout.token_ids[: rollout.prompt_len])
            picked = logprobs(student, prompt).gather(1, answer[:, None])[:, 0].numpy()
            worst = max(worst, np.abs(picked - rollout.logprobs).max())
            if rollout.sample_id not in scores:
                continue
            score, given = scores[rollout.sample_id], logprobs(teacher, prompt)
            top = given.topk(10)
            worst = max(worst, float((top.values - torch.tensor(score.teacher_topk_logprobs)).abs().max()))
            stored = given.gather(1, torch.tensor(score.teacher_topk_ids).long())
            worst = max(worst, float((top.values - stored).abs().max()))  # the same ids, up to exact ties
            losses = [
                -float(logprobs(model, prefix).gather(1, answer[:, None]).mean())
                for model, prefix in ((teacher, prompt), (teacher, context), (student, prompt), (student, context))
            ]
            mine = (score.teacher_loss, score.teacher_loss_alone, score.student_loss, score.student_loss_alone)
            worst = max(worst, *(abs(a - b) for a, b in zip(losses, mine, strict=True)))
            delta = ifd(losses[0], losses[1], "loss") - ifd(losses[2], losses[3], "loss")
            decision = decisions[rollout.sample_id]
            if not rollout.heldout and min(abs(delta), abs(delta - 3)) > 1e-3:
                assert decision.kept == (0 <= delta <= 3)
    assert worst < 1e-4


def test_stages_by_hand_give_the_same_weights(reference, tmp_path):
    folder = tmp_path / "run"
    assert "nothing is scored yet" in refused(stage("distill", folder))
    assert stage("sft", folder).returncode == 0
    assert "0 of 6 rollout shards of set 0" in refused(stage("score", folder))
    for number in "01":
        for name, *more in (["rollout", "--set", number], ["score", "--set", number], ["distill"]):
            assert stage_on(name, folder, *more).returncode == 0
    assert weights(folder) == weights(reference)


@pytest.mark.parametrize("kind", ["rollouts", "scores"])
def test_what_a_message_advises_for_a_damaged_shard_works(reference, tmp_path, kind):
    """Its line removed, the same run makes it anew and ends with the same student."""
    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "checkpoints" / "npd")
    shutil.rmtree(folder / "weights" / "v1")
    (folder / "stream" / f"{kind}-v0-00001.parquet").write_bytes(b"rotten")
    said = refused(stage_on("distill", folder))
    assert f"{kind}-v0-00001.parquet: differs" in said
    manifest = folder / "stream" / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if f"{kind}-v0-00001" not in line))
    assert stage_on("distill", folder).returncode == 2  # not trained on a part
    assert npd("run", "--run", folder).returncode == 0
    assert weights(folder) == weights(reference)


def test_a_version_is_not_made_from_later_weights(reference, tmp_path):
    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "weights" / "v1")
    assert "past epoch 2 where this phase ends" in refused(stage_on("distill", folder))
    assert not (folder / "weights" / "v1").exists()


def test_another_configuration_in_the_same_folder_is_refused(reference):
    said = refused(whole_run(reference, "npd.lambda=0.5"))
    assert "npd.lambda was 0.9, is 0.5" in said


def run_with_kills(folder: Path, rng: random.Random, most: int) -> int:
    """Run to the end through at most `most` SIGKILLs at random moments; returns how many struck.

    Half of them hit only the stage, which the supervisor starts again by itself; the others hit the supervisor,
    which takes its stage along, and the same command is typed again.
    """
    kills = 0
    while kills < most:
        command = [sys.executable, "-m", "npd_ascend", "run", *settings(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(3, 14))
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        stages = [int(pid) for pid in children.stdout.split()]
        if stages and rng.random() < 0.5:
            os.kill(stages[0], signal.SIGKILL)
            kills += 1
            time.sleep(rng.uniform(1, 8))
        if process.poll() is not None:
            break
        process.kill()
        kills += 1
        process.wait()
    done = whole_run(folder)
    assert done.returncode == 0, done.stderr
    return kills


def test_killed_at_random_and_started_again_it_ends_with_equal_bits(reference, tmp_path):
    """NPD_KILL_POINTS=20 for the long form; the seed of a failure is printed."""
    wanted, seed = int(os.environ.get("NPD_KILL_POINTS", "3")), int(os.environ.get("NPD_KILL_SEED", time.time()))
    print(f"NPD_KILL_SEED={seed}")
    rng, kills, runs = random.Random(seed), 0, 0
    while kills < wanted:
        folder, runs = tmp_path / f"run{runs}", runs + 1
        kills += run_with_kills(folder, rng, min(5, wanted - kills))
        assert weights(folder) == weights(reference)
    print(f"{kills} kills in {runs} runs")


@pytest.fixture
def broken_teacher(tmp_path) -> Path:
    """The teacher's folder with random weights, as a failed download or a lost update leaves it."""
    folder = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "teacher"))
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config)
    model.save_pretrained(folder)
    return folder


def test_a_teacher_that_knows_nothing_stops_the_run(broken_teacher, tmp_path):
    said = refused(whole_run(tmp_path / "run", f"teacher.path={broken_teacher}"))
    assert "the teacher's loss on 60 reference answers" in said
    assert not (tmp_path / "run" / "weights").exists()  # found out before the first training step
    for name in ("sft", "rollout"):
        assert stage(name, tmp_path / "run", f"teacher.path={broken_teacher}").returncode == 0
    assert "the teacher's loss on" in refused(stage("score", tmp_path / "run", f"teacher.path={broken_teacher}"))
    assert Stream(tmp_path / "run" / "stream").entries("scores", 0) == {}


def test_without_reference_answers_the_entropy_on_rollouts_gives_it_away(broken_teacher, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}+{n}"}) + "\n" for n in range(100, 130)))
    changes = [f"teacher.path={broken_teacher}", f"data.heldout={{kind: jsonl, path: {prompts}}}"]
    for name in ("sft", "rollout"):
        assert stage(name, tmp_path / "run", *changes).returncode == 0
    assert "the teacher's entropy on" in refused(stage("score", tmp_path / "run", *changes))


def test_other_vocabularies_are_refused_before_anything_starts(tmp_path):
    folder = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "teacher"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    file.write_text(json.dumps(tokenizer))
    said = refused(stage("run", tmp_path / "run", f"teacher.path={folder}", "--dry-run"))
    assert "do not share a vocabulary: token '3' is 9" in said or "token '3' is 8" in said
    assert not (tmp_path / "run").exists()


def test_what_is_advised_for_a_base_model_with_another_end_token_works(tmp_path):
    """One vocabulary, as Qwen2.5-Math-1.5B has it with its Instruct teacher; also for who serves what comes out."""
    folders = {name: Path(shutil.copytree(CONFIGS / "addition" / name, tmp_path / name)) for name in MODELS}
    for name, end in zip(MODELS, ({"eos_token": "<pad>"}, {"eos_token": "</s>"}), strict=True):
        id_ = {"eos_token_id": 0 if name == "student" else 2}
        for file, change in {"tokenizer_config.json": end, "config.json": id_, "generation_config.json": id_}.items():
            path = folders[name] / file
            path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    changes = [f"{name}.path={folder}" for name, folder in folders.items()]
    changes += ["npd.refresh_after=[]", "npd.epochs=1", "data.prompts.count=64"]
    said = refused(stage("run", tmp_path / "run", *changes, "--dry-run"))
    assert f"eos is 0 in {folders['student']} and 2 in {folders['teacher']}" in said
    files, source, place = re.search(r"copy (\S+, \S+ and \S+) of (\S+) into ([^;]+);", said).groups()
    for name in re.split(", | and ", files):
        for file in Path(source).glob(name):
            shutil.copy(file, place)
    for name in ("sft", "rollout", "score", "distill"):
        done = stage(name, tmp_path / "run", *changes)
        assert done.returncode == 0, done.stderr
    student, tokenizer = tmp_path / "run" / "student", ChatTokenizer(tmp_path / "run" / "student")
    prompt = torch.tensor([tokenizer.encode_prompt("123+456")])
    answer = (
        LlamaForCausalLM.from_pretrained(student).generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    )
    assert answer.index(tokenizer.eos_id) == len(answer) - 1 < 19


def test_heldout_prompts_that_are_trained_on_are_refused(tmp_path):
    said = refused(stage("run", tmp_path / "run", "data.heldout.first=10", "--dry-run"))
    assert "data.gold: 60 of its prompts also stand in data.heldout" in said


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoint(reference, tmp_path):
    said = refused(stage("sft", tmp_path / "run", "sft.optimizer.lr=1e30", "sft.checkpoint_every_steps=1"))
    assert "the last checkpoint is good" in said
    assert not (tmp_path / "run" / "weights").exists()


def _copy(reference: Path, folder: Path) -> Path:
    """A finished run moved elsewhere, without its final student."""
    shutil.copytree(reference, folder)
    shutil.rmtree(folder / "student")
    return folder


def test_a_corrupted_shard_stops_the_stage_that_reads_it(reference, tmp_path):
    folder = _copy(reference, tmp_path / "run")
    shard = folder / "stream" / "scores-v1-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = stage_on("distill", folder)
    assert "scores-v1-00000.parquet: differs from the checksum" in refused(done)


def test_a_phase_does_not_start_with_a_fresh_optimizer(reference, tmp_path):
    folder = _copy(reference, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "npd")
    done = stage_on("distill", folder)
    assert "no intact checkpoint of epoch 2" in refused(done)


def test_two_processes_do_not_work_on_one_stage(reference, tmp_path):
    folder = _copy(reference, tmp_path / "run")
    with (folder / "logs" / "distill.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = stage_on("distill", folder)
    assert "another `npd distill` is working on this run" in refused(done)


def test_what_is_done_already_adds_no_seconds(reference, tmp_path):
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    stages = (run / "logs" / "stages.jsonl").read_text()
    for name in ("sft", "rollout", "score", "distill", "eval"):
        done = stage_on(name, run)
        assert done.returncode == 0, done.stderr
        assert (run / "logs" / "stages.jsonl").read_text() == stages, name
    scores = json.loads((run / "evaluations.json").read_text())
    assert {score["engine"] for score in scores.values()} == {"hf"}
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(scores)
    assert f"sft       {scores['sft']['exact_match']:.3f} ± " in done.stdout
    assert stage_on("report", run).stdout.splitlines()[-1] == f"report: {run / 'report.html'}"


def test_an_evaluation_without_reference_answers_is_done_once(tmp_path):
    file = tmp_path / "heldout.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}+{n}"}) + "\n" for n in range(900, 920)))
    heldout = f"data.heldout={{kind: jsonl, path: {file}, count: 20}}"
    assert stage("eval", tmp_path / "run", heldout).returncode == 0
    assert json.loads((tmp_path / "run" / "evaluations.json").read_text()) == {}
    stages = (tmp_path / "run" / "logs" / "stages.jsonl").read_text()
    assert stage_on("eval", tmp_path / "run").returncode == 0
    assert (tmp_path / "run" / "logs" / "stages.jsonl").read_text() == stages


def _mounted(folder: Path, size: str) -> bool:
    folder.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False).returncode == 0


def test_on_a_full_disk_it_stops_and_goes_on_when_there_is_room(reference, tmp_path):
    """A real file system of 6 MB; what was committed before it was full is kept."""
    disk = tmp_path / "disk"
    if os.geteuid() != 0 or not _mounted(disk, "6m"):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        filler = disk / "filler"
        filler.write_bytes(b"0" * 3_000_000)
        done = npd("sft", *settings(disk / "run"))
        assert "the disk is full" in refused(done)
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert stage("sft", disk / "run").returncode == 0
        made, wanted = (run / "weights" / "v0" / "model.safetensors" for run in (disk / "run", reference))
        assert made.read_bytes() == wanted.read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)
