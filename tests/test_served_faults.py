"""A served teacher that dies, hangs or talks nonsense in the middle: one line, soon, and what was scored stays.

tests/vllm_cpu/test_served_teacher.py asks a real server.
"""

import json
import math
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest
from command import npd, npd_here
from conftest import CONFIGS

from npd_ascend.errors import UserError
from npd_ascend.runfolder import reopen_run
from npd_ascend.teacher import served
from npd_ascend.teacher.served import ServedScorer

TEACHER = CONFIGS / "addition" / "teacher"
VOCAB, TOP_K = 15, 10
ROWS = [((1, 5, 9, 2, 4), 2)] * 4


class Server(ThreadingHTTPServer):
    """Speaks as vLLM does, of a model that gives 0.9 to whatever token came, until `fault` sets in."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault, self.healthy_batches, self.ended = "", 10**9, Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._say({"data": [{"id": "m", "max_model_len": 64}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(asked["prompt"][0], int):  # what ServedScorer.check asks
            self._say({}, code=200 if asked.get("allowed_token_ids", [0])[0] < VOCAB else 400)
            return
        self.server.healthy_batches -= 1
        fault = self.server.fault if self.server.healthy_batches < 0 else ""
        top_k, share = asked["prompt_logprobs"], 1 / VOCAB if fault == "uniform" else 0.9
        choices = [
            {"index": i, "prompt_logprobs": [None, *(_entry(token, top_k, share) for token in ids[1:])]}
            for i, ids in enumerate(asked["prompt"])
        ]
        entry = choices[-1]["prompt_logprobs"][-1]
        if fault == "hangs":
            self.server.ended.wait()
        elif fault == "hangs up":
            return
        elif fault == "error":
            self._say("EngineCore\nencountered an issue", code=500)
            return
        elif fault in ("NaN", "null"):
            next(iter(entry.values()))["logprob"] = math.nan if fault == "NaN" else None
        elif fault == "no log-probs":
            choices[-1]["prompt_logprobs"] = None
        elif fault == "a token less":
            del choices[-1]["prompt_logprobs"][-1]
        elif fault == "another token":
            entry.pop(str(asked["prompt"][-1][-1]))
        self._say([] if fault == "no choices" else {"choices": choices}, whole=fault != "dies")

    def _say(self, said, code=200, whole=True):
        body = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if whole else body[: len(body) // 2])

    def log_message(self, *_):
        pass


def _entry(token, top_k, share):
    ids = [token, *(id_ for id_ in range(VOCAB) if id_ != token)][:top_k]
    return {str(id_): {"logprob": math.log(share if id_ == token else (1 - share) / (VOCAB - 1))} for id_ in ids}


@pytest.fixture
def server():
    with Server() as server:
        thread = Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


FAULTS = {
    "dies": "no vLLM server answers .IncompleteRead",
    "hangs up": "no vLLM server answers .Remote end closed connection",
    "hangs": "no vLLM server answers .timed out",
    "error": "/v1/completions: 500 .*EngineCore.* see the server's log",
    "NaN": "log-probs are not numbers",
    "null": "log-probs are not numbers",
    "no log-probs": "not what vLLM answers",
    "a token less": "not what vLLM answers",
    "another token": "not what vLLM answers",
    "no choices": "not what vLLM answers",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_in_the_middle_is_said_in_one_line(server, fault, monkeypatch):
    monkeypatch.setattr(served, "_TIMEOUT_S", 0.5)
    scorer = ServedScorer(server.url, VOCAB)
    scorer.check(TOP_K)
    right = scorer.score(ROWS, top_k=TOP_K, pack_tokens=10)
    assert [score.loss for score in right] == pytest.approx([-math.log(0.9)] * 4)
    server.fault, server.healthy_batches = fault, 1
    started = time.monotonic()
    with pytest.raises(UserError, match=FAULTS[fault]) as error:
        scorer.score(ROWS, top_k=TOP_K, pack_tokens=10)
    assert time.monotonic() - started < 5
    assert server.healthy_batches == -1, "the first batch was right, the second was not, and nothing was asked again"
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_is_gone_is_said(server):
    scorer = ServedScorer(server.url, VOCAB)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"no vLLM server answers .*refused"):
        scorer.score(ROWS, top_k=TOP_K, pack_tokens=10)


def written(run):
    return {
        shard: (run.stream.folder / entry.file).stat().st_mtime_ns
        for shard, entry in run.stream.entries("scores", 0).items()
    }


def served_run(folder, server):
    """Settings of a run that takes the teacher for its student, without SFT."""
    settings = ["--config", CONFIGS / "addition_cpu.yaml", f"run.folder={folder}", f"student.path={TEACHER}"]
    settings += ["student.init=pretrained", "sft=null", "device.threads=1", "npd.refresh_after=[]"]
    settings += ["data.prompts.count=40", "data.heldout.count=24", "rollout.batch_size=16", "teacher.pack_tokens=64"]
    return [*settings, "teacher.engine=served", f"teacher.url={server.url}"]


@pytest.mark.parametrize("fault", ["dies", "NaN"])
def test_a_run_keeps_what_was_scored_and_goes_on_when_the_server_is_well_again(server, tmp_path, fault):
    assert npd_here("rollout", *served_run(tmp_path / "run", server)).returncode == 0
    run = reopen_run(tmp_path / "run")
    server.fault, server.healthy_batches = fault, 26
    done = npd_here("score", "--run", run.path)
    assert done.returncode == 2
    assert [server.url in line for line in done.stderr.splitlines() if line.startswith("npd score: ")] == [True]
    before = written(run)
    assert 0 < len(before) < len(run.stream.entries("rollouts", 0))
    assert not run.stream.is_decided(0)
    server.fault = ""
    assert npd_here("score", "--run", run.path).returncode == 0
    after = written(run)
    assert after.keys() == run.stream.entries("rollouts", 0).keys()
    assert before.items() <= after.items()
    assert run.stream.is_decided(0)


NO_TEACHER = {
    "NaN": "the teacher's log-probs are not numbers",
    "uniform": r"the teacher's entropy on 16 rollouts is 2\.71 nats/token",
}


@pytest.mark.slow
def test_a_whole_run_stops_with_its_teacher_and_goes_on_to_the_same_student(server, tmp_path, capfd):
    healthy, folder = tmp_path / "healthy", tmp_path / "run"
    for stage in ("rollout", "score", "distill"):
        assert npd_here(stage, *served_run(healthy, server), "npd.epochs=1").returncode == 0
    server.fault, server.healthy_batches = "dies", 40
    done = npd("run", *served_run(folder, server), "npd.epochs=1")
    assert done.returncode == 2
    assert [server.url in line for line in done.stderr.splitlines() if line.startswith("npd ")] == [True]
    assert "npd score ended with exit code 2; mend that, and the same command continues from here" in done.stderr
    assert "restart" not in done.stderr
    run = reopen_run(folder)
    before = written(run)
    assert 0 < len(before) < len(run.stream.entries("rollouts", 0))
    for server.fault, what in NO_TEACHER.items():  # in the place of the one that died
        server.healthy_batches = 14  # what a worker asks before it scores
        assert npd_here("run", *served_run(folder, server), "npd.epochs=1").returncode == 2
        (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("npd score: ")]
        assert re.search(f"{server.url}: {what}", said)
        assert written(run) == before
        assert not run.stream.is_decided(0)
    server.fault = ""
    for stage in ("score", "distill"):  # what the same command would start
        assert npd_here(stage, "--run", folder).returncode == 0
    assert before.items() <= written(run).items()
    students = [path / "student" / "model.safetensors" for path in (healthy, folder)]
    assert students[0].read_bytes() == students[1].read_bytes()
