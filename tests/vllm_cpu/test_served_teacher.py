"""Targets from a real vLLM server on this host against the model's own prefill, float32."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import CONFIGS

from npd_ascend.__main__ import main
from npd_ascend.errors import UserError
from npd_ascend.model.load import load_decoder
from npd_ascend.stream import Stream
from npd_ascend.teacher.local import LocalScorer
from npd_ascend.teacher.served import ServedScorer
from npd_ascend.tokenizer import ChatTokenizer

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

torch.set_num_threads(1)
TEACHER = CONFIGS / "addition" / "teacher"
VOCAB, MAX_LOGPROBS = 15, 10


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TEACHER)]
    command += ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-logprobs", str(MAX_LOGPROBS), "--kv-cache-memory-bytes", "50000000"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its engine and worker too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def make_rows():
    """Right answers, wrong ones and answers behind a context of one token; (token ids, prompt length)."""
    tokenizer = ChatTokenizer(TEACHER)
    rows = []
    for first, second, answer in ((123, 456, "579"), (999, 1, "1000"), (500, 500, "999"), (321, 111, "12")):
        prompt, ids = tokenizer.encode_prompt(f"{first}+{second}"), tokenizer.encode_answer(answer)
        rows += [(prompt + ids, len(prompt)), ((1, *ids), 1)]
    return rows


@pytest.mark.parametrize(("top_k", "pack_tokens"), [(10, 4096), (3, 30), (1, 1)])
def test_a_server_gives_the_targets_of_the_model(url, top_k, pack_tokens):
    model = load_decoder(TEACHER, dtype=torch.float32, device=torch.device("cpu"))
    rows = make_rows()
    ours = LocalScorer(model, VOCAB).score(rows, top_k=top_k, pack_tokens=4096)
    served = ServedScorer(url, VOCAB).score(rows, top_k=top_k, pack_tokens=pack_tokens)
    for (ids, prompt_len), one, other in zip(rows, ours, served, strict=True):
        assert other.topk_ids_AK.shape == (len(ids) - prompt_len, top_k)
        assert (other.topk_ids_AK.dtype, other.topk_logprobs_AK.dtype) == (np.int32, np.float32)
        check_close(one.logprob_A, other.logprob_A)
        check_close(one.topk_logprobs_AK, other.topk_logprobs_AK)
        same = one.topk_ids_AK == other.topk_ids_AK
        assert (same | near_ties(one.topk_logprobs_AK)).all()
        check_close(one.loss, other.loss)
        # the largest that agrees with the top-k
        assert (other.entropy_A > one.entropy_A - 1e-4).all()
        assert (other.entropy_A < np.log(VOCAB) + 1e-4).all()
        if top_k == 10:
            assert np.abs(one.entropy_A - other.entropy_A).max() < 0.3


def check_close(ours, served):
    """1e-4 nats, and a little more far down, at -10 to -23, where vLLM's own rounding against float64 is 1.4e-4."""
    ours, served = np.asarray(ours, np.float64), np.asarray(served, np.float64)
    assert (np.abs(ours - served) < 1e-4 + 2e-5 * np.abs(ours)).all()


def near_ties(logprobs_AK):
    """Where the next or the last one is closer than rounding, so that either order is right."""
    close = np.zeros(logprobs_AK.shape, bool)
    step = logprobs_AK[:, :-1] - logprobs_AK[:, 1:] < 1e-4
    close[:, :-1] |= step
    close[:, 1:] |= step
    return close


def test_another_vocabulary_or_too_many_logprobs_are_refused(url):
    ServedScorer(url, VOCAB).check(MAX_LOGPROBS)
    with pytest.raises(UserError, match=r"has token 14, but .* vocab_size=14"):
        ServedScorer(url, VOCAB - 1).check(MAX_LOGPROBS)
    with pytest.raises(UserError, match=r"lacks token 15, but .* vocab_size=16"):
        ServedScorer(url, VOCAB + 1).check(MAX_LOGPROBS)
    with pytest.raises(UserError, match="--max-logprobs 11"):
        ServedScorer(url, VOCAB).check(MAX_LOGPROBS + 1)
    with pytest.raises(UserError, match="start the server with --max-model-len 65"):
        ServedScorer(url, VOCAB).score([((3,) * 64, 10)], top_k=1, pack_tokens=1)


def test_scores_of_a_run_are_those_of_the_local_teacher(url, tmp_path):
    made = []
    for settings in (["teacher.engine=local"], ["teacher.engine=served", f"teacher.url={url}"]):
        run = tmp_path / settings[0]
        config = ["--config", str(CONFIGS / "addition_cpu.yaml"), f"run.folder={run}", *settings]
        config += [f"student.path={TEACHER}", "student.init=pretrained", "sft=null", "device.threads=1"]
        config += ["data.prompts.count=40", "data.heldout.count=24", "rollout.batch_size=32"]
        assert main(["rollout", *config]) == 0
        assert main(["score", "--run", str(run)]) == 0
        made.append(Stream(run / "stream").read("scores", 0))
    assert len(made[0]) == 64
    for one, other in zip(*made, strict=True):
        assert one.sample_id == other.sample_id
        for name in ("teacher_topk_logprobs", "teacher_logprob", "teacher_loss", "teacher_loss_alone"):
            check_close(getattr(one, name), getattr(other, name))
        assert one.student_loss_alone == other.student_loss_alone
