"""npd.stream as real processes: one student, whatever dies, hangs or is damaged on the way."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from command import npd, npd_here
from conftest import CONFIGS
from safetensors.torch import load_file, save_file

from npd_ascend.metrics import read_metrics
from npd_ascend.runfolder import reopen_run
from npd_ascend.stream import Stream

pytestmark = pytest.mark.slow

ROOT = CONFIGS.parent
SMALL = [
    "data.gold.count=200",
    "data.prompts.count=300",
    "data.heldout.count=60",
    "sft.epochs=4",
    "npd.epochs=4",
    "npd.refresh_after=[]",
    "npd.pack_tokens=512",
    "npd.checkpoint_every_steps=3",
    "rollout.batch_size=64",
    "filters.tau=0.95",
    "device.threads=1",
    "evaluate.every_steps=8",
]
ONE_BEHIND = "npd.stream={publish_every: 4, max_lag: 1}"


def settings(folder: Path, *more: str) -> list[str]:
    return ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={folder}", *SMALL, *more]


def whole_run(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return npd("run", *settings(folder, *more))


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = whole_run(folder, ONE_BEHIND, "processes={rollout: 2, teacher: 2}")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_live_run_leaves_all_it_promises(reference):
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["processes"].keys() == {"rollout-0", "rollout-1", "score-0", "score-1", "npd"}
    assert all(spent["busy"] > 0 for spent in summary["processes"].values())
    assert summary["seconds_total"] < 0.8 * sum(summary["seconds"].values())  # side by side counts once
    rows = read_metrics(reference)
    steps = [row["step"] for row in rows if "train/lag" in row]
    assert steps == list(range(19))
    assert {row["publish/version"] for row in rows if "publish/version" in row} == {1, 2, 3, 4}
    heldout = [row for row in rows if "heldout/kl_teacher" in row]
    assert [row["step"] for row in heldout] == [0, 8, 16, 19]
    assert heldout[-1]["heldout/exact_match"] == pytest.approx(summary["scores"]["npd"], abs=1e-6)
    assert all(1 < row["heldout/answer_tokens"] <= 6 and row["heldout/entropy"] > 0 for row in heldout)
    assert all(row["rollout/entropy"] > 0 for row in rows if "rollout/tokens" in row)
    lags = [row["train/lag"] for row in rows if "train/lag" in row]
    assert summary["lag"] == pytest.approx(sum(lags) / len(lags))
    assert max(row["train/lag_max"] for row in rows if "train/lag" in row) <= 1
    assert all(0 < row["pack/fill"] <= 1 for row in rows if "train/lag" in row)
    assert all(row["rollout/canary"] < 2e-3 for row in rows if "rollout/canary" in row)
    page = (reference / "report.html").read_text()
    assert "Lag of the generator" in page
    assert "Who worked and who waited" in page
    assert "What new weights cost" in page
    assert [part["count"] for part in summary["sync"]] == [4, pytest.approx(8, abs=4)]
    assert [path.name for path in sorted((reference / "weights").iterdir())] == ["v0", "v3", "v4"]


def test_without_lag_it_is_the_student_that_one_process_makes(tmp_path):
    stream = "npd.stream={publish_every: 3, max_lag: 0, shards_per_step: 2}"
    assert whole_run(tmp_path / "live", stream).returncode == 0
    assert npd_here("sft", *settings(tmp_path / "alone", stream)).returncode == 0
    subprocess.run([sys.executable, ROOT / "tests" / "sequential_stream.py", tmp_path / "alone"], check=True)
    assert weights(tmp_path / "live") == weights(tmp_path / "alone")


def test_drift_publishes_before_the_interval_is_over(tmp_path):
    stream = "npd.stream={publish_every: 16, publish_at_kl: 0.001, publish_not_before: 2}"
    done = whole_run(tmp_path / "run", stream)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    drift = {row["step"] + 1: row["train/drift"] for row in rows if "train/drift" in row}
    published = [row["step"] for row in rows if "publish/version" in row]
    assert published
    assert all(drift[step] > 0.001 for step in published)
    assert all(later - earlier >= 2 for earlier, later in zip([0, *published], published, strict=False))


def test_the_ranks_of_the_trainer_wait_together(reference, tmp_path):
    """Another layout of ranks, trained again on the same stream: the same student up to rounding."""
    from safetensors.torch import load_file

    folder = replayed(reference, tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("  tp: 1\n  dp: 1\n", "  tp: 2\n  dp: 1\n"))
    assert "tp: 2" in config.read_text()
    done = npd_here("distill", "--run", folder)
    assert done.returncode == 0, done.stderr
    wanted, got = (load_file(path / "student" / "model.safetensors") for path in (reference, folder))
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name


def replayed(reference: Path, folder: Path) -> Path:
    """The stream and version 0 of a run, and nothing that a trainer made of them."""
    folder.mkdir()
    shutil.copy(reference / "config.yaml", folder)
    shutil.copytree(reference / "stream", folder / "stream")
    shutil.copytree(reference / "weights" / "v0", folder / "weights" / "v0")
    (folder / "logs").mkdir()
    return folder


def test_nothing_is_lost_through_random_kills():
    """benchmarks/soak.py with more kills for the long form."""
    kills = os.environ.get("NPD_KILL_POINTS", "6")
    words = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--kills", kills, "data.prompts.count=750"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def test_the_soak_sees_what_it_looks_for(soak, reference, tmp_path):
    assert soak.check(reference) == []

    def damaged(name, change):
        folder = Path(shutil.copytree(reference, tmp_path / name))
        change(folder)
        return soak.check(folder)

    def twice(folder):
        packs = folder / "stream" / "packs.jsonl"
        lines = packs.read_text().splitlines(keepends=True)
        packs.write_text("".join([*lines, lines[-1]]))

    def lost(folder):
        manifest = folder / "stream" / "manifest.jsonl"
        lines = manifest.read_text().splitlines(keepends=True)
        manifest.write_text("".join(line for line in lines if '"shard": 3,' not in line or "rollouts" not in line))
        (folder / "stream" / ".rollouts-v0-00003.partial").touch()

    def other_weights(folder):
        path = folder / "student" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    assert any("trained" in fault for fault in damaged("twice", twice))
    faults = damaged("lost", lost)
    assert any("generated" in fault for fault in faults)
    assert any("00003.partial is left" in fault for fault in faults)
    assert damaged("weights", other_weights) == ["trained again from the stream, the student has other bits"]


def wait_for(condition, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain")


def children(pid: int) -> dict[str, int]:
    """Role -> pid of the supervisor's children."""
    found = {}
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if len(words) > 3:
                found[words[3]] = int(child)
    except FileNotFoundError:
        pass
    return found


@pytest.fixture
def start_long(reference):
    """start_long(folder, *overrides): a live run that would take minutes, once its trainer has trained a few steps."""

    def start(folder: Path, *more: str) -> subprocess.Popen:
        shutil.copytree(reference / "weights" / "v0", folder / "weights" / "v0")
        words = [sys.executable, "-m", "npd_ascend", "run"]
        words += settings(folder, ONE_BEHIND, "data.prompts.count=8000", *more)
        # tests that run in the background of a script have inherited that SIGINT is ignored
        as_in_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
        )
        packs = folder / "stream" / "packs.jsonl"
        wait_for(lambda: packs.exists() and packs.read_text().count("\n") > 5)
        return process

    return start


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def test_what_hangs_is_started_again_and_nothing_is_lost(soak, start_long, tmp_path):
    """First the workers; then the trainer, behind which the stream fills up until the generator may not begin more."""
    folder = tmp_path / "run"
    process = start_long(folder, "processes.timeout_s=60", "data.prompts.count=1000")
    try:
        hung = {role: pid for role, pid in children(process.pid).items() if role != "distill"}
        for pid in hung.values():
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: all(children(process.pid).get(role, pid) != pid for role, pid in hung.items()))
        packs = folder / "stream" / "packs.jsonl"
        before = packs.read_text().count("\n")
        wait_for(lambda: packs.read_text().count("\n") > before + 4)  # by the new workers
        trainer = children(process.pid)["distill"]
        os.kill(trainer, signal.SIGSTOP)
        stream, log = Stream(folder / "stream"), folder / "logs" / "rollout.log"
        wait_for(lambda: "waiting for the trainer to reach shard" in log.read_text())
        generated = len(stream.shards("rollouts"))
        time.sleep(2)
        assert len(stream.shards("rollouts")) == generated
        assert children(process.pid)["distill"] == trainer
        _, said = process.communicate(timeout=400)
    finally:
        stop(process)
    assert process.returncode == 0, said
    # the line of all processes beside the trainer's bar
    assert re.search(r"lag \d\.\d.*; tokens/s generated [\d,]+, scored [\d,]+, trained [\d,]+; busy .*npd \d+%", said)
    said = (folder / "logs" / "run.log").read_text()
    for role in ("rollout", "score", "distill"):
        assert f"npd {role} gave no sign of life for" in said
        assert f"npd {role} was killed by SIGKILL; restart 1 of 5" in said
    assert soak.check(folder) == []


def test_a_process_that_never_stays_alive_ends_the_run(start_long, tmp_path):
    process = start_long(tmp_path / "run", "processes.restarts=1")
    try:
        for _ in range(2):
            pid = wait_for(lambda: children(process.pid).get("score"))
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: children(process.pid).get("score", pid) != pid or process.poll() is not None)
        _, said = process.communicate(timeout=200)
    finally:
        stop(process)
    assert process.returncode == 2
    assert "npd score was killed by SIGKILL, after 1 restarts (processes.restarts)" in said.splitlines()[-1]


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_process_outlives_the_supervisor(start_long, tmp_path, signal_):
    process = start_long(tmp_path / "run")
    alive = children(process.pid)
    assert alive.keys() == {"distill", "rollout", "score"}
    os.kill(process.pid, signal_)
    process.communicate(timeout=200)
    assert process.returncode == (130 if signal_ == signal.SIGINT else -9)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in alive.values()))


def test_a_damaged_shard_ends_the_run_and_is_named(reference, tmp_path):
    """One bit of it, by the disk; with the bit as it was, the same run goes on to the same student."""
    folder = replayed(reference, tmp_path / "run")
    (shard,) = (folder / "stream").glob("rollouts-*-00007.parquet")
    whole, manifest = shard.read_bytes(), folder / "stream" / "manifest.jsonl"
    shard.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    done = npd("run", "--run", folder)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("npd ")]
    assert [f"{shard}: differs from the checksum in manifest.jsonl" in line for line in said] == [True]
    assert manifest.read_bytes() == (reference / "stream" / "manifest.jsonl").read_bytes()
    assert not (folder / "student").exists()
    shard.write_bytes(whole)
    (scores,) = (folder / "stream").glob("scores-*-00007.parquet")
    score = scores.read_bytes()
    scores.write_bytes(b"rotten")
    done = npd_here("distill", "--run", folder)
    assert done.returncode == 2
    assert f"{scores.name}: differs from the checksum in manifest.jsonl" in done.stderr
    scores.write_bytes(score)
    assert npd_here("distill", "--run", folder).returncode == 0
    assert weights(folder) == weights(reference)


def test_a_worker_that_starts_anew_generates_with_the_newest_version(reference, tmp_path):
    """Shard 0, as if it were missing still: version 0 made it when the run was young."""
    folder = replayed(reference, tmp_path / "run")
    shutil.copytree(reference / "weights", folder / "weights", dirs_exist_ok=True)
    stream = Stream(folder / "stream")
    first = stream.shards("rollouts")[0]
    assert first.version == 0
    lines = stream.manifest.read_text().splitlines(keepends=True)
    stream.manifest.write_text("".join(line for line in lines if first.file not in line))
    assert npd_here("rollout", "--run", folder, "--worker", "0").returncode == 0
    again = Stream(folder / "stream").shards("rollouts")[0]
    assert again.version == 4
    assert {rollout.weight_version for rollout in stream.read_shard(again)} == {4}


def test_other_samples_than_were_trained_on_are_not_taken_for_them(reference, tmp_path):
    folder = replayed(reference, tmp_path / "run")
    packs = folder / "stream" / "packs.jsonl"
    lines = packs.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace("prompts:", "others:", 1)
    packs.write_text("".join(lines))
    done = npd_here("distill", "--run", folder)
    assert done.returncode == 2
    assert "packs.jsonl: step 3 was trained on other samples" in done.stderr


def test_a_teacher_that_breaks_on_the_way_ends_the_run_with_its_own_words(start_long, tmp_path):
    """Its weights are replaced while it runs; what a new worker loads knows nothing."""
    from transformers import AutoModelForCausalLM

    teacher = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "teacher"))
    process = start_long(tmp_path / "run", f"teacher.path={teacher}")
    try:
        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(teacher).config)
        model.save_pretrained(teacher)
        os.kill(children(process.pid)["score"], signal.SIGKILL)
        _, said = process.communicate(timeout=300)
    finally:
        stop(process)
    assert process.returncode == 2
    assert "the teacher's loss on 60 reference answers" in said
    assert not (tmp_path / "run" / "student").exists()


def test_a_teacher_without_numbers_ends_the_run_before_they_are_trained_on(tmp_path):
    """And without reference answers, on which it would show before anything is generated."""
    teacher = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "teacher"))
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}+{n}"}) + "\n" for n in range(100, 130)))
    heldout = f"data.heldout={{kind: jsonl, path: {prompts}}}"
    done = whole_run(tmp_path / "run", ONE_BEHIND, f"teacher.path={teacher}", heldout)
    assert done.returncode == 2
    assert re.search(r"the teacher's log-probs are not numbers at \d+ of \d+ tokens", done.stderr)
    stream = Stream(tmp_path / "run" / "stream")
    assert stream.shards("rollouts")
    assert not stream.shards("scores")
    assert stream.steps_done() == 0


def test_the_last_step_may_be_saved_already(reference, tmp_path):
    """When it is a checkpoint's turn there, and when a killed trainer had come as far."""
    folder = replayed(reference, tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("checkpoint_every_steps: 3", "checkpoint_every_steps: 19"))
    assert "checkpoint_every_steps: 19" in config.read_text()
    for _ in range(2):
        done = npd_here("distill", "--run", folder)
        assert done.returncode == 0, done.stderr
        assert weights(folder) == weights(reference)
        shutil.rmtree(folder / "student")


def test_a_cycle_with_overlap_is_the_same_by_hand(tmp_path):
    """Set 1 is generated while set 0 trains, by the weights that phase 0 starts from: other samples of version 0."""
    cycle = ["npd.refresh_after=[1]", "npd.epochs=2", "data.prompts.count=150", "npd.overlap=true"]
    done = whole_run(tmp_path / "run", *cycle)
    assert done.returncode == 0, done.stderr
    hand = tmp_path / "hand"
    assert npd_here("sft", *settings(hand, *cycle)).returncode == 0
    for number in "01":
        for name, *words in (["rollout", "--set", number], ["score", "--set", number], ["distill"]):
            done = npd_here(name, "--run", hand, *words)
            assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(hand)
    run = reopen_run(hand)
    samples = [{rollout.sample_id for rollout in run.stream.read("rollouts", number)} for number in range(2)]
    assert samples[0].isdisjoint(samples[1])
    assert all(rollout.weight_version == 0 for rollout in run.stream.read("rollouts", 1))
    started = {row["stage"]: row["started"] for row in map(json.loads, (tmp_path / "run/logs/stages.jsonl").open())}
    ended = [
        row["started"] + row["seconds"]
        for row in map(json.loads, (tmp_path / "run/logs/stages.jsonl").open())
        if row["stage"] == "distill"
    ]
    assert started["rollout-v1"] < ended[0]  # side by side


def test_workers_share_the_shards_of_a_cycle(tmp_path):
    """Two workers of each kind make the files that one makes, and the first of the teacher's decides."""
    two = ["data.prompts.count=150", "npd.refresh_after=[1]", "npd.epochs=2", "processes={rollout: 2, teacher: 2}"]
    assert npd_here("sft", *settings(tmp_path / "two", *two)).returncode == 0
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for role in ("rollout", "score"):
        words = [sys.executable, "-m", "npd_ascend", role, "--run"]
        workers = [subprocess.Popen([*words, tmp_path / "two", "--worker", number]) for number in "01"]
        assert [worker.wait() for worker in workers] == [0, 0]
        assert npd_here(role, "--run", tmp_path / "one").returncode == 0
    one, two = (reopen_run(tmp_path / name).stream for name in ("one", "two"))
    assert len(one.every()) == 4 + 4 + 1
    assert sorted(map(str, one.every())) == sorted(map(str, two.every()))  # checksums among them
