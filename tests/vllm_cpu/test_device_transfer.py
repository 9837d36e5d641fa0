"""vLLM's own engine for weights from device to device, on CPU: every line of it, over gloo where its library would be.

tests/device_stand_in.py says what is replaced. Nothing here has run on a device.
"""

import signal
import threading
from importlib.util import find_spec
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from device_stand_in import stand_in_for_devices
from memory_trainer import TIMEOUT_S, Trainer
from safetensors.torch import load_file
from test_vllm_engine import LONG, close, make_engine, make_folder

from npd_ascend.errors import UserError
from npd_ascend.rollout import vllm_versions
from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.weights.canary import compare, read_probes
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.receiver import WeightReceiver

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; launch/test.sh runs this in an environment of its own", allow_module_level=True)

PROMPTS = [(5, 9, 11), LONG, (12, 13)]
LIMIT, EOS_ID, NATS = 8, 2, 2e-3
BACKEND = "nccl"
DEVICE = {"device": torch.device("cpu")}


class Run:
    """A trainer that sends from its device, an engine, and what joins them."""

    def __init__(self, family, folder):
        _, self.source = make_folder(family, folder / "source", 0)
        self.folder, self.version = folder / "weights", 0
        self.trainer = Trainer(self.folder, self.source, **DEVICE)
        self.receiver = WeightReceiver(self.folder, "rollout-0", timeout_s=TIMEOUT_S, device=True)
        self.engine = make_engine(EOS_ID, device_backend=BACKEND)
        self.engine.load_weights(self.source)

    def publish(self):
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
        wanted = self.trainer.ask("greedy", PROMPTS, LIMIT, EOS_ID)
        for done, (tokens, logprobs) in zip(self.answers(), wanted, strict=True):
            assert done.token_ids == tokens
            assert np.abs(done.logprobs - logprobs).max() < 1e-4


@pytest.fixture(scope="module", params=["llama", "pangu"])
def run(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_devices(patch)
        run = Run(request.param, tmp_path_factory.mktemp("run"))
        yield run
        run.trainer.close()
        close(run.engine)


@pytest.fixture
def healed(run):
    """A published version that has not been taken, and a trainer without a planted mistake afterwards."""
    run.publish()
    yield run
    run.trainer.ask("heal")


def watch_loads(run, patch):
    """Batches of (name, copy) as they reach vLLM's loader."""
    batches = []

    def watch(model):
        really = type(model).load_weights

        def load(self, weights):
            weights = list(weights)
            batches.append([(name, tensor.clone()) for name, tensor in weights])
            return really(self, weights)

        patch.setattr(type(model), "load_weights", load)

    run.engine._llm.apply_model(watch)
    return batches


def test_the_bytes_that_arrive_are_those_of_the_trainer(run):
    """In buckets, in the trainer's order; the version on disk is what the trainer had when it offered it."""
    run.publish()
    with pytest.MonkeyPatch.context() as patch:
        batches = watch_loads(run, patch)
        received = run.receive()
    wanted = load_file(run.folder / f"v{run.version}" / "model.safetensors")
    arrived = [pair for batch in batches for pair in batch]
    assert len(batches) > 3
    assert [name for name, _ in arrived] == list(run.engine._shapes)
    assert wanted.keys() - dict(arrived).keys() <= {"lm_head.weight"}
    for name, tensor in arrived:
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name
    assert received.total_bytes == sum(tensor.nbytes for _, tensor in arrived)


def test_after_every_update_the_engine_answers_as_the_trainer_does(run):
    for _ in range(4):
        run.answers()  # fills the prefix cache
        run.publish()
        run.receive()
        assert run.canary() < 1e-4
        run.check_greedy()


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("order", "another network"),
        ("shape", "another network"),
        ("dtype", "it is in bfloat16 and not in torch.float32"),
        ("buckets", "does not cut it into the buckets"),
    ],
)
def test_a_wrong_manifest_is_refused_before_anything_comes(healed, mistake, said):
    healed.receive()
    before = healed.answers()
    healed.publish()
    healed.trainer.ask("plant", mistake)
    with pytest.raises(TransferError, match=said):
        healed.receive()
    healed.trainer.warning_with(said) if mistake in ("dtype", "buckets") else None
    assert [done.token_ids for done in healed.answers()] == [done.token_ids for done in before]


@pytest.mark.parametrize(("mistake", "said"), [("bytes", "2 of"), ("bit", "1 of")])
def test_other_bytes_are_seen_before_anything_is_generated_with_them(healed, mistake, said):
    """Two tensors in each other's place, and one low bit, which no canary would see."""
    healed.trainer.ask("plant", mistake)
    with pytest.raises(TransferError, match=rf"differs from its checksum \({said} \d+ tensors\)"):
        healed.receive()
    check_broken(healed)
    healed.trainer.ask("heal")
    healed.publish()
    healed.receive()
    assert healed.canary() < 1e-4


def without_checksums(patch):
    really = vllm_versions._checksums_of_loads
    patch.setattr(vllm_versions, "_checksums_of_loads", lambda worker: dict.fromkeys(really(worker), ANY))


def test_without_checksums_the_canary_sees_swapped_tensors(healed, monkeypatch):
    healed.trainer.ask("plant", "bytes")
    with monkeypatch.context() as patch:
        without_checksums(patch)
        healed.receive()
    with pytest.raises(UserError, match="the generator does not have these weights"):
        healed.canary()
    healed.trainer.ask("heal")
    healed.receive()
    assert healed.canary() < 1e-4


def test_without_the_look_at_the_manifest_a_swapped_name_is_seen_by_the_canary(healed, monkeypatch):
    healed.trainer.ask("plant", "order")
    with monkeypatch.context() as patch:
        without_checksums(patch)
        patch.setattr(healed.engine, "_check", lambda manifest: None)
        healed.receive()
    with pytest.raises(UserError, match="the generator does not have these weights"):
        healed.canary()
    healed.trainer.ask("heal")
    healed.receive()
    assert healed.canary() < 1e-4


def check_broken(run):
    """No weights at all, until they are loaded from disk."""
    with pytest.raises(RuntimeError, match="load_weights comes before anything else"):
        run.answers()
    with pytest.raises(RuntimeError, match="load_weights comes before anything else"):
        run.canary()
    run.load()
    assert run.canary() < 1e-4


def test_broadcasts_of_another_size_break_the_transfer_and_disk_mends_it(healed):
    healed.trainer.ask("plant", "cut")
    with pytest.raises(TransferError, match=r"a broadcast of \d+ bytes meets one of \d+"):
        healed.receive()
    check_broken(healed)
    healed.check_greedy()
    healed.trainer.ask("heal")
    healed.publish()
    healed.receive()  # the new engine joins a new group
    assert healed.canary() < 1e-4


def test_a_load_in_place_after_a_broken_transfer_would_not_mend_it(healed):
    """Why vLLM is started again: what it keeps of the broken load makes the next one end too early and fail."""
    healed.trainer.ask("plant", "cut")
    with pytest.raises(TransferError):
        healed.receive()  # ends between the rows of q and those of k, which vLLM holds in one parameter
    healed.trainer.ask("heal")
    healed.engine._torn = False
    with pytest.raises(AttributeError, match="weight_loader"):
        healed.load()
    healed.engine._torn = True
    check_broken(healed)


def test_a_worker_that_wants_it_from_host_memory_is_told(healed):
    other = WeightReceiver(healed.folder, "rollout-1", timeout_s=TIMEOUT_S)
    with pytest.raises(TransferError, match=r"rollout\.weights is not the same"):
        healed.engine.receive_weights(other, healed.version)
    healed.receive()
    assert healed.canary() < 1e-4


def test_a_trainer_killed_in_the_middle_leaves_no_engine_but_disk_does(run):
    """Last of all: its trainer is gone afterwards, and another one, begun again from what was published, comes."""
    run.publish()
    run.receive()
    run.publish()
    wanted = run.trainer.ask("greedy", PROMPTS, LIMIT, EOS_ID)
    run.trainer.ask("damage", (), 2)
    threading.Thread(target=run.trainer.signal_when_stopped, args=[signal.SIGKILL]).start()
    with pytest.raises(TransferError, match=f"weight version {run.version} did not come from memory"):
        run.receive()
    check_broken(run)
    assert [done.token_ids for done in run.answers()] == [tokens for tokens, _ in wanted]
    run.trainer = Trainer(run.folder, run.folder / f"v{run.version}", **DEVICE)
    run.publish()
    run.receive()
    run.check_greedy()
