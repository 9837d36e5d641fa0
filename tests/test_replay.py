"""npd replay on real runs: the recorded student's bits, or those of the run that it stands for."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import npd, npd_here
from conftest import CONFIGS

from npd_ascend.config import load_config
from npd_ascend.config_file import load_yaml
from npd_ascend.preflight import roles_to_do
from npd_ascend.prompts import wanted_shards
from npd_ascend.replay import open_replay, plan_replay
from npd_ascend.runfolder import reopen_run
from npd_ascend.sweep import SweepConfig
from npd_ascend.tokenizer import ChatTokenizer

pytestmark = pytest.mark.slow

SMALL = [
    "data.gold.count=200",
    "data.prompts.count=300",
    "data.heldout.count=60",
    "sft.epochs=4",
    "npd.epochs=2",
    "npd.pack_tokens=512",
    "rollout.batch_size=100",
    "filters.tau=0.95",
    "device.threads=1",
]
OTHER = [
    "npd.lambda=0.5",
    "npd.normalise=sample",
    "npd.targets=tail",
    "npd.divergence=reverse",
    "npd.pack_tokens=256",
    "npd.packs_per_step=3",
    "teacher.top_k=3",
    "filters.tau=0.6",
    "filters.ifd_form=perplexity",
]


def refused(*words: str | Path) -> str:
    """What a command says that ends before it starts anything."""
    done = npd_here(*words)
    assert done.returncode == 2
    return done.stderr


def here(*words: str | Path) -> None:
    done = npd_here(*words)
    assert done.returncode == 0, done.stderr


def record(folder: Path, *more: str, sets: int = 1) -> Path:
    """A run stage by stage, which tests/test_run.py shows to be what `npd run` makes."""
    here("sft", "--config", CONFIGS / "addition_cpu.yaml", f"run.folder={folder}", *SMALL, *more)
    for number in range(sets):
        for stage in ("rollout", "score"):
            here(stage, "--run", folder, "--set", str(number))
        here("distill", "--run", folder)
    return folder


def retrain(source: Path, folder: Path, *overrides: str) -> Path:
    """What `npd replay` does, without evaluation and report."""
    open_replay(source, folder, overrides)
    here("distill", "--run", folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def cycle(tmp_path_factory) -> Path:
    folder = record(tmp_path_factory.mktemp("cycle") / "run", "npd.refresh_after=[1]", sets=2)
    for stage in ("eval", "report"):
        here(stage, "--run", folder)
    return folder


@pytest.fixture(scope="module")
def one_set(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("one-set") / "run", "npd.refresh_after=[]")


def test_unchanged_it_is_the_same_student_and_nothing_is_made_again(cycle, tmp_path):
    done = npd("replay", "--run", cycle, tmp_path / "replay")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "replay") == weights(cycle)
    for shard in (cycle / "stream").glob("[rs]*.parquet"):
        assert (tmp_path / "replay" / "stream" / shard.name).samefile(shard)
    stages = [json.loads(line)["stage"] for line in (tmp_path / "replay" / "logs" / "stages.jsonl").open()]
    assert stages == ["distill", "eval", "report"]
    summary, recorded = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "replay", cycle))
    for key in ("scores", "heldout_kl", "kept", "drift_max"):
        assert summary[key] == recorded[key]
    assert (tmp_path / "replay" / "report.html").exists()


def test_only_what_is_left_to_do_has_to_fit(cycle, tmp_path):
    recorded = reopen_run(cycle).config
    open_replay(cycle, tmp_path / "replay", [])
    replayed = reopen_run(tmp_path / "replay").config
    new = recorded.model_copy(update={"run": recorded.run.model_copy(update={"folder": tmp_path / "new"})})
    assert roles_to_do(new, 4) == {"sft", "rollout", "teacher", "distill"}
    assert roles_to_do(replayed, 4) == {"distill"}
    assert roles_to_do(recorded, 4) == set()


def test_a_stream_of_a_live_run_gives_the_same_student(tmp_path):
    live = ["npd.stream={publish_every: 2, max_lag: 1}", "npd.refresh_after=[]"]
    recorded = tmp_path / "run"
    done = npd("run", "--config", CONFIGS / "addition_cpu.yaml", f"run.folder={recorded}", *SMALL, *live)
    assert done.returncode == 0, done.stderr
    config = open_replay(recorded, tmp_path / "replay", []).config
    assert roles_to_do(config, len(wanted_shards(config, ChatTokenizer(config.student.path)))) == {"distill"}
    assert weights(retrain(recorded, tmp_path / "replay")) == weights(recorded)
    for override in ("npd.epochs=1", "run.seed=5"):  # other shards, and shards of other prompts
        said = refused("replay", "--run", recorded, tmp_path / "more", override)
        assert f"{override}: the stream of" in said


def test_with_other_settings_it_is_the_run_that_had_them(one_set, tmp_path):
    """With one set of rollouts the settings of training do not change what is generated, so a real run can be asked."""
    retrain(one_set, tmp_path / "replay", *OTHER)
    assert weights(tmp_path / "replay") == weights(record(tmp_path / "run", "npd.refresh_after=[]", *OTHER))
    assert weights(tmp_path / "replay") != weights(one_set)
    changes = json.loads((tmp_path / "replay" / "replay.json").read_text())["changes"]
    assert changes["teacher.top_k"] == [10, 3]
    assert changes.keys() == {setting.split("=")[0] for setting in OTHER}


def test_another_number_of_sets(cycle, one_set, tmp_path):
    """Set 0 of a cycle is what the run without refreshes has."""
    assert weights(retrain(cycle, tmp_path / "replay", "npd.refresh_after=[]")) == weights(one_set)


def test_killed_on_the_way_it_goes_on(one_set, tmp_path):
    command = [sys.executable, "-m", "npd_ascend", "replay", "--run", one_set, tmp_path / "replay"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()  # the plan: the folder is there
    process.kill()
    process.wait()
    assert not (tmp_path / "replay" / "student").exists()
    done = npd("replay", "--run", one_set, tmp_path / "replay")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "replay") == weights(one_set)
    said = refused("replay", "--run", one_set, tmp_path / "replay", "npd.lambda=0.5")
    assert "npd.lambda was 0.9, is 0.5" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.prompts.count=100", "data.prompts.count=100: the stream of"),
        ("rollout.temperature=0.5", "rollout.temperature=0.5: the stream of"),
        ("npd.overlap=true", "npd.overlap=True: the stream of"),
        ("npd.stream={max_lag: 1}", "a replay generates nothing; start a new run for it"),
        ("teacher.top_k=12", "teacher.top_k=12:"),
        ("npd.refresh_after=[1, 2]", "shards of rollouts of set 1 are not recorded"),
        ("npd.typo=1", "unknown key npd.typo"),
    ],
)
def test_what_was_not_recorded_is_refused(one_set, tmp_path, override, said):
    assert said in refused("replay", "--run", one_set, tmp_path / "replay", "npd.epochs=4", override)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_forgotten_and_one_that_is_named_twice_are_told(one_set, tmp_path):
    assert "npd.lambda=0.5: a setting where the new run folder should be" in refused(
        "replay", "--run", one_set, "npd.lambda=0.5"
    )
    said = refused("replay", "--run", one_set, tmp_path / "replay", f"run.folder={tmp_path / 'other'}")
    assert f"the new run folder is {tmp_path / 'replay'}, as it was named" in said
    assert list(tmp_path.iterdir()) == []


def test_filters_that_let_more_through_are_refused(tmp_path):
    recorded = record(tmp_path / "run", "npd.refresh_after=[]", "filters.min_answer_tokens=5")
    said = refused("replay", "--run", recorded, tmp_path / "replay", "filters.min_answer_tokens=1")
    assert "were dropped in" in said
    assert not (tmp_path / "replay").exists()


def test_a_replay_goes_on_with_its_own_stream_only(one_set, tmp_path):
    open_replay(one_set, tmp_path / "replay", ())
    other = Path(shutil.copytree(one_set, tmp_path / "other"))
    said = refused("replay", "--run", other, tmp_path / "replay")
    assert f"replay: a replay of {one_set}, not of {other}" in said


def test_other_folders_are_left_alone(one_set, tmp_path):
    for folder in (one_set, tmp_path):
        assert f"{folder}: there already, and no replay" in refused("replay", "--run", one_set, folder)


def sweep_file(folder: Path, source: Path, variants: dict) -> Path:
    sweep = {"source": str(source), "folder": str(folder / "sweep"), "seeds": [0, 1], "variants": variants}
    (folder / "sweep.yaml").write_text(json.dumps(sweep))  # JSON is YAML
    return folder / "sweep.yaml"


def test_a_sweep_is_its_replays_in_one_table(one_set, tmp_path):
    file = sweep_file(tmp_path, one_set, {"as recorded": [], "λ = 0.0": ["npd.lambda=0", "filters.tau=null"]})
    done = npd("sweep", file, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table] == ["| variant", "| ---", "| as recorded", "| λ = 0.0"]
    assert "npd.lambda=0" in table[3]
    outcomes = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(row["variant"], row["seed"]) for row in outcomes] == [
        (name, seed) for name in ("as recorded", "λ = 0.0") for seed in (0, 1)
    ]
    replayed = tmp_path / "sweep" / "0.0-seed1"
    assert all((tmp_path / "sweep" / f"0.0-seed{seed}.log").exists() for seed in (0, 1))
    summary = json.loads((replayed / "summary.json").read_text())
    assert outcomes[3]["heldout_kl"] == summary["heldout_kl"]["last"]
    assert outcomes[3]["npd"] == summary["scores"]["npd"]
    mean = (outcomes[2]["heldout_kl"] + outcomes[3]["heldout_kl"]) / 2
    assert f"| {mean:,.4f} ± " in table[3]
    assert (tmp_path / "sweep" / "sweep.html").read_text().count("<svg") == 2
    changed = sweep_file(tmp_path, one_set, {"as recorded": [], "λ = 0.0": ["npd.lambda=0.1", "filters.tau=null"]})
    said = refused("sweep", changed)
    assert "variant 'λ = 0.0': " in said
    assert "npd.lambda was 0.0, is 0.1" in said
    file = sweep_file(tmp_path, one_set, {"as recorded": [], "λ = 0.0": ["npd.lambda=0", "filters.tau=null"]})
    before = (replayed / "student" / "model.safetensors").stat().st_mtime_ns
    assert npd("sweep", file).returncode == 0  # what is there is not made again
    assert (replayed / "student" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ({"good": [], "more": ["teacher.top_k=12"]}, "variant 'more': teacher.top_k=12"),
        ({"a b": [], "a-b": []}, "several would have the folder a-b"),
        ({}, "variants: "),
        ({"text": "npd.lambda=1"}, "variants.text: "),
    ],
)
def test_a_sweep_with_a_mistake_does_not_begin(one_set, tmp_path, variants, said):
    assert said in refused("sweep", sweep_file(tmp_path, one_set, variants))
    assert not (tmp_path / "sweep").exists()


def test_a_variant_that_fails_is_told_with_its_own_reason(one_set, tmp_path):
    """Of the attempt before stands more in the log than a count of its letters would skip."""
    file = sweep_file(tmp_path, one_set, {"as recorded": []})
    log = tmp_path / "sweep" / "as-recorded-seed0.log"
    log.parent.mkdir()
    log.write_text("npd replay: an old reason\n" + "█" * 4000 + "\n")
    # somebody else is at work in its folder
    open_replay(one_set, tmp_path / "sweep" / "as-recorded-seed0", ["run.seed=0"])
    with (tmp_path / "sweep" / "as-recorded-seed0" / "logs" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused("sweep", file)
    assert "variant 'as recorded', seed 0: exit code 2, npd run: " in said
    assert "another `npd run` is working on this run" in said


def test_a_sweep_of_whole_runs(tmp_path):
    small = ["data.gold.count=40", "data.heldout.count=20", "sft.epochs=1", "npd=null", "teacher=null", "rollout=null"]
    sweep = {
        "config": str(CONFIGS / "addition_cpu.yaml"),
        "folder": str(tmp_path / "sweep"),
        "seeds": [5],
        "settings": [*small, "sft.pack_tokens=64"],
        "variants": {"only SFT": ["data.prompts=null", "sft.pack_tokens=128"]},
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(sweep))
    done = npd("sweep", file)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "| variant | settings | exact match after SFT | steps of NPD |"  # no column without a value
    ran = yaml.safe_load((tmp_path / "sweep" / "only-sft-seed5" / "config.yaml").read_text())
    assert (ran["run"]["seed"], ran["data"]["gold"]["count"], ran["sft"]["pack_tokens"]) == (5, 40, 128)
    assert f"addition_cpu.yaml, all with {' '.join(sweep['settings'])}." in done.stdout
    file.write_text(json.dumps(sweep | {"variants": {"only SFT": ["sft.epocs=1"]}}))
    said = refused("sweep", file)
    assert "variant 'only SFT': " in said
    assert "sft.epocs" in said
    for origin in ({"source": "runs/a"}, {"config": None}):
        file.write_text(json.dumps(sweep | origin))
        assert "want source, a recorded run to replay, or config, the YAML of runs" in refused("sweep", file)


@pytest.mark.parametrize("file", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_that_come_with_the_project_would_begin(cycle, tmp_path, file):
    sweep = load_yaml(SweepConfig, file, ())
    for overrides in sweep.variants.values():
        overrides = [*sweep.settings, *overrides]
        if sweep.source:
            plan_replay(cycle, tmp_path / "replay", overrides)
        else:
            load_config(CONFIGS.parent / sweep.config, overrides)


def test_a_damaged_shard_is_not_replayed(one_set, tmp_path):
    source = Path(shutil.copytree(one_set, tmp_path / "source"))
    shard = source / "stream" / reopen_run(source).stream.entries("scores", 0)[1].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said = refused("replay", "--run", source, tmp_path / "replay")
    assert f"{shard.name}: differs from the checksum" in said
    assert not (tmp_path / "replay").exists()
