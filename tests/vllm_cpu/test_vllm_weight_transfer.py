"""New weights for a living vLLM from the memory of a trainer that goes on training: tokens, caches, failures."""

import signal
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from memory_trainer import TIMEOUT_S, Trainer
from test_vllm_engine import LONG, close, make_engine, make_folder

from npd_ascend.errors import UserError
from npd_ascend.rollout import vllm_engine, vllm_versions
from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.weights.canary import compare, read_probes
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.receiver import WeightReceiver

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

PROMPTS = [(5, 9, 11), LONG, LONG[:140], (12, 13)]
LIMIT, EOS_ID, NATS = 10, 2, 2e-3
UPDATES = 20


class Run:
    """A trainer, an engine with the weights that the trainer began with, and what joins them."""

    def __init__(self, family, folder):
        _, self.source = make_folder(family, folder / "source", 0)
        self.family, self.folder, self.version = family, folder / "weights", 0
        self.trainer = Trainer(self.folder, self.source)
        self.receiver = WeightReceiver(self.folder, "rollout-0", timeout_s=TIMEOUT_S)
        self.engine = make_engine(EOS_ID)
        self.engine.load_weights(self.source)

    def publish(self):
        """A step, then a new version."""
        self.trainer.ask("step")
        self.version += 1
        self.trainer.ask("publish", self.version, PROMPTS)

    def receive(self):
        return self.engine.receive_weights(self.receiver, self.version)

    def load(self):
        self.engine.load_weights(self.folder / f"v{self.version}")

    def canary(self):
        folder = self.folder / f"v{self.version}"
        probes = read_probes(folder)
        found = self.engine.next_logprobs([probe.context for probe in probes], [probe.next_id for probe in probes])
        return compare(probes, found, NATS, folder)

    def answers(self):
        return in_order(self.engine.generate([Request(prompt, LIMIT, 0) for prompt in PROMPTS], Sampling(0.0)))

    def check_greedy(self):
        for done, (tokens, logprobs) in zip(
            self.answers(), self.trainer.ask("greedy", PROMPTS, LIMIT, EOS_ID), strict=True
        ):
            assert done.token_ids == tokens
            assert np.abs(done.logprobs - logprobs).max() < 1e-4


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "pangu"])
def run(request, tmp_path_factory):
    run = Run(request.param, tmp_path_factory.mktemp("run"))
    yield run
    run.trainer.close()
    close(run.engine)


def test_after_every_update_the_engine_answers_as_the_trainer_does(run):
    """The engine joins late: the first version that it takes is the third."""
    run.check_greedy()
    for _ in range(2):
        run.publish()
    answers = set()
    for _ in range(UPDATES):
        before = run.answers()  # fills the prefix cache
        run.publish()
        received = run.receive()
        assert run.canary() < 1e-4
        run.check_greedy()
        assert received.total_bytes == sum(4 * np.prod(shape) for shape in run.engine._shapes.values())
        answers.add(tuple(done.token_ids for done in before))
    assert len(answers) > UPDATES // 2  # the steps do change what is said


def test_a_cache_that_outlived_its_weights_is_seen(run, monkeypatch):
    """Where the new weights answer otherwise; what is trained on random tokens comes not to care for its context."""
    run.trainer.ask("begin_again")
    run.answers()
    run.publish()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "reset_prefix_cache", lambda llm: None)
        run.receive()
        with pytest.raises(UserError, match="the generator does not have these weights"):
            run.canary()
        with pytest.raises(AssertionError):
            run.check_greedy()
    run.receive()
    assert run.canary() < 1e-4


def test_a_head_that_kept_the_old_embedding_is_seen(run, monkeypatch):
    run.publish()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_versions, "_pack_head", lambda model: None)
        run.receive()
        if run.family == "pangu":  # tied
            with pytest.raises(UserError, match="the generator does not have these weights"):
                run.canary()
    run.receive()
    assert run.canary() < 1e-4


def test_a_flipped_bit_changes_nothing(run):
    run.publish()
    run.receive()
    before = run.answers()
    run.publish()
    run.trainer.ask("damage", [1])
    with pytest.raises(TransferError, match=rf"weight version {run.version}: bucket 1 of \d+ differs"):
        run.receive()
    run.trainer.ask("heal")
    assert [done.token_ids for done in run.answers()] == [done.token_ids for done in before]
    run.load()  # from disk
    assert run.canary() < 1e-4
    run.check_greedy()
    run.publish()
    run.receive()  # by a new connection
    assert run.canary() < 1e-4


def test_a_version_that_is_gone_is_told(run):
    run.publish()
    run.publish()
    with pytest.raises(TransferError, match=f"has version {run.version}, not {run.version - 1}"):
        run.engine.receive_weights(run.receiver, run.version - 1)
    run.receive()
    run.check_greedy()


def test_another_network_does_not_take_its_place(run, monkeypatch):
    before = run.answers()
    run.publish()
    with monkeypatch.context() as patch:
        patch.setattr(run.engine, "_shapes", {})
        with pytest.raises(TransferError, match="another network"):
            run.receive()
    assert "another network" in run.trainer.warning_with("of another network")
    assert [done.token_ids for done in run.answers()] == [done.token_ids for done in before]


def test_a_trainer_killed_in_the_middle_leaves_a_sane_engine(run):
    """Last of all: its trainer is gone afterwards, and another one, begun again from what was published, comes."""
    run.publish()
    run.receive()
    before = run.answers()
    run.publish()
    wanted = run.trainer.ask("greedy", PROMPTS, LIMIT, EOS_ID)
    run.trainer.ask("damage", (), 2)
    threading.Thread(target=run.trainer.signal_when_stopped, args=[signal.SIGKILL]).start()
    started = time.monotonic()
    with pytest.raises(TransferError, match=f"weight version {run.version} did not come from memory"):
        run.receive()
    assert time.monotonic() - started < TIMEOUT_S
    assert [done.token_ids for done in run.answers()] == [done.token_ids for done in before]
    run.load()
    assert run.canary() < 1e-4
    assert [done.token_ids for done in run.answers()] == [tokens for tokens, _ in wanted]
    run.trainer = Trainer(run.folder, run.folder / f"v{run.version}")
    run.publish()
    run.receive()
    run.check_greedy()


def test_bfloat16_is_made_once_by_the_sender(tmp_path):
    _, source = make_folder("llama", tmp_path / "source", 0)
    trainer = Trainer(tmp_path / "weights", source, dtype=torch.bfloat16)
    trainer.ask("step")
    trainer.ask("publish", 1, PROMPTS)
    engine = make_engine(EOS_ID, torch.bfloat16)
    engine.load_weights(source)
    receiver = WeightReceiver(tmp_path / "weights", "rollout-0", timeout_s=TIMEOUT_S)
    received = engine.receive_weights(receiver, 1)
    probes = read_probes(tmp_path / "weights" / "v1")
    contexts, ids = [probe.context for probe in probes], [probe.next_id for probe in probes]
    found = engine.next_logprobs(contexts, ids)
    assert received.total_bytes == sum(2 * np.prod(shape) for shape in engine._shapes.values())
    assert compare(probes, found, 0.1, tmp_path) < 0.1
    engine.load_weights(tmp_path / "weights" / "v1")  # rounded by vLLM in its turn
    assert np.array_equal(engine.next_logprobs(contexts, ids), found)
    trainer.close()
    close(engine)
