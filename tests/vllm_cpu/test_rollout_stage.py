"""`npd rollout` with rollout.engine=vllm: a process of its own, the run folder's contract, a resumed run."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import CONFIGS
from killing import kill_in_shard

from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.evaluate.exact_match import exact_match
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.prompts import read_heldout, wanted_shards
from npd_ascend.rollout.engine import Completion
from npd_ascend.rollout.journal import Journal, journal_path, read_journal
from npd_ascend.runfolder import open_run
from npd_ascend.stream import Stream
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.student import load_student, publish

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

TEACHER = CONFIGS / "addition" / "teacher"  # in the student's place: what it answers can be judged
SETTINGS = [
    f"student.path={TEACHER}",
    "student.init=pretrained",
    "sft=null",
    "data.prompts.count=40",
    "data.heldout.count=24",
    "rollout.batch_size=32",
    "device.threads=1",
]


def rollout(*arguments: str) -> None:
    command = [sys.executable, "-m", "npd_ascend", "rollout", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same rollouts by both engines."""
    made = {}
    for engine in ("vllm", "hf"):
        made[engine] = tmp_path_factory.mktemp(engine) / "run"
        arguments = [f"run.folder={made[engine]}", f"rollout.engine={engine}", "rollout.kv_cache_gib=0.05"]
        rollout("--config", str(CONFIGS / "addition_cpu.yaml"), *SETTINGS, *arguments)
    return made


def test_the_shards_are_those_of_the_other_engine_but_for_the_draws(folders):
    files = [sorted(path.name for path in (folders[e] / "stream").glob("*.parquet")) for e in ("vllm", "hf")]
    assert files[0] == files[1] == ["rollouts-v0-00000.parquet", "rollouts-v0-00001.parquet"]
    for name in files[0]:
        schemas = [pq.read_schema(folders[engine] / "stream" / name) for engine in ("vllm", "hf")]
        assert schemas[0].equals(schemas[1])
    by_vllm, by_hf = (Stream(folders[engine] / "stream").read("rollouts", 0) for engine in ("vllm", "hf"))
    assert [(r.sample_id, r.prompt_len, r.heldout) for r in by_vllm] == [
        (r.sample_id, r.prompt_len, r.heldout) for r in by_hf
    ]


def test_a_teacher_that_is_always_right_is_right(folders):
    tokenizer = ChatTokenizer(TEACHER)
    rollouts = Stream(folders["vllm"] / "stream").read("rollouts", 0)
    assert len(rollouts) == 64
    for made in rollouts:
        first, second = made.prompt_id.split(":")[1].split("+")
        assert tokenizer.decode_answer(made.token_ids[made.prompt_len :]) == str(int(first) + int(second))
        assert made.finish_reason == "stop"
        assert made.logprobs.sum() > -1


def test_scores_are_those_of_the_other_engine():
    """Of two models, one after the other: a bad student, and a teacher that is always right."""
    tokenizer, found = ChatTokenizer(TEACHER), {}
    for engine in ("hf", "vllm"):
        config = load_config(CONFIGS / "addition_cpu.yaml", [*SETTINGS, f"evaluate.engine={engine}"])
        prompts = read_heldout(config, tokenizer, config.evaluate.max_new_tokens)
        models = (CONFIGS / "addition" / "student", TEACHER)
        found[engine] = [exact_match(config, folder, tokenizer, prompts, folder.name) for folder in models]
    assert [one | {"engine": "vllm"} for one in found["hf"]] == found["vllm"]
    assert [one["exact_match"] for one in found["hf"]] == [0.0, 1.0]


def test_a_shard_made_again_by_another_process_has_the_same_bits(folders, tmp_path):
    again = Path(shutil.copytree(folders["vllm"], tmp_path / "run"))
    manifest = again / "stream" / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(lines[0])  # as if killed before the second was committed
    rollout("--run", str(again))
    assert json.loads(manifest.read_text().splitlines()[1]) == json.loads(lines[1])  # its checksum too


def test_the_answers_of_a_stage_that_is_killed_in_a_shard_are_kept(folders, tmp_path):
    run = Path(shutil.copytree(folders["vllm"], tmp_path / "run"))
    stream, config = Stream(run / "stream"), yaml.safe_load((run / "config.yaml").read_text())
    config["rollout"]["kv_cache_gib"] = 0.001  # for few answers at a time, so that there is a middle
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    made = stream.read("rollouts", 0)[32:]
    stream.manifest.write_text(stream.manifest.read_text().splitlines(keepends=True)[0])

    journal = journal_path(stream.folder, 0, 1)
    kill_in_shard([sys.executable, "-m", "npd_ascend", "rollout", "--run", str(run)], journal, 3, tmp_path / "said")
    asked, kept, _ = read_journal(journal)
    assert 3 <= len(kept) < len(made) == 32
    first = next(iter(kept))
    with Journal(journal, asked) as opened:  # what no model would say: it is not asked again
        opened.add(first, replace(kept[first], logprobs=kept[first].logprobs - 1))
    rollout("--run", str(run))
    assert not journal.exists()
    again = Stream(stream.folder).read("rollouts", 0)[32:]
    assert [(r.sample_id, r.token_ids) for r in again] == [(r.sample_id, r.token_ids) for r in made]
    apart = [np.abs(one.logprobs - other.logprobs).max() for one, other in zip(again, made, strict=True)]
    assert [index for index, nats in enumerate(apart) if nats > 1e-4] == [first]


def test_a_stage_whose_cache_outlives_its_weights_is_stopped_by_the_canary(tmp_path, monkeypatch, caplog):
    """Questions longer than a block of keys, so that there is something in the cache to outlive them."""
    from npd_ascend.rollout import vllm_engine
    from npd_ascend.rollout.worker import open_maker

    model = Path(shutil.copytree(TEACHER, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": f"{n}+" * 60 + "1", "answer": "1"}) + "\n" for n in range(100, 104))
    )
    asked = f"{{kind: jsonl, path: {questions}}}"
    settings = [
        *SETTINGS[1:3],
        f"student.path={model}",
        f"teacher.path={model}",
        "device.threads=1",
        f"data.prompts={asked}",
        f"data.heldout={asked}",
        "rollout.batch_size=4",
    ]
    settings += [f"run.folder={tmp_path / 'run'}", "rollout.engine=vllm", "rollout.kv_cache_gib=0.05"]
    run = open_run(load_config(CONFIGS / "addition_cpu.yaml", settings))
    other = load_student(run.config, None, ALONE)  # random weights
    publish(run, 1, other, ALONE)
    tokenizer = run.tokenizer()
    shards = wanted_shards(run.config, tokenizer, 0)
    with open_maker(run, tokenizer, shards, "rollout", None) as maker:
        maker.make(0, 0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(vllm_engine, "reset_prefix_cache", lambda llm: None)
            with pytest.raises(UserError, match="canary: the generator does not have these weights"):
                maker.make(1, 1, 1)
        assert len(run.stream.shards("rollouts")) == 1
    with open_maker(run, tokenizer, shards, "rollout", None) as maker:
        maker.make(0, 0, 0)
        check_what_a_killed_worker_has_begun(run, maker, tmp_path, caplog)
        maker.make(1, 1, 1)
    assert len(run.stream.shards("rollouts")) == 2


def check_what_a_killed_worker_has_begun(run, maker, elsewhere, caplog):
    """Shard 1 with version 1, which is the newest; nobody goes on with answers of weights that are not there."""

    def begin() -> Path:
        path = journal_path(run.stream.folder, 1, 1)
        with Journal(path, maker._asked(1, 1)) as journal:
            journal.add(2, Completion((3, 2), np.zeros(2, np.float32), "stop"))
        return path

    weights, stamp = run.weights.path(1), run.weights.path(1) / "version.json"
    was = stamp.read_text()
    begin()
    assert (maker.begun(0), maker.begun(1)) == (None, 1)
    stamp.write_text(was.replace('"sha256": "', '"sha256": "0'))  # trained once more, they came out otherwise
    assert maker.begun(1) is None
    stamp.write_text(was)
    assert maker.begun(1) is None  # it was deleted
    path = begin()
    weights.rename(elsewhere / "v1")
    assert maker.begun(1) is None
    assert not path.exists()
    (elsewhere / "v1").rename(weights)
    assert caplog.text.count("its 1 answers are lost, since weight version 1, with which they were made") == 2
