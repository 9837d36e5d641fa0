"""A trainer in a process of its own that sends weights from memory, and a worker without an engine that takes them."""

import copy
import logging
import multiprocessing as mp
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from device_stand_in import stand_in_for_devices
from safetensors.torch import save

from npd_ascend.model.hf_weights import load_hf_weights
from npd_ascend.model.load import load_decoder
from npd_ascend.records import Prompt
from npd_ascend.trainer.canary import make_probes
from npd_ascend.weights import collective
from npd_ascend.weights.collective import open_group, receive_buckets
from npd_ascend.weights.disk import DiskChannel
from npd_ascend.weights.receiver import WeightReceiver
from npd_ascend.weights.sender import open_sender

CPU = torch.device("cpu")
TIMEOUT_S = 4.0


class _Trainer:
    """What a Trainer's process does; every method is a command."""

    def __init__(self, sender, folder, source):
        self._sender, self._disk, self._source = sender, DiskChannel(folder), source
        self._model = load_decoder(source, dtype=torch.float32, device=CPU)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.002)
        self._random = torch.Generator().manual_seed(5)
        self._really_broadcast, self._healed = collective.broadcast, threading.Event()
        self._really_manifest, self._really_buckets = collective.Snapshot.manifest, collective.Snapshot.buckets

    def _logits(self, ids):
        return self._model(torch.tensor(ids), [0, len(ids)]) @ self._model.head_weight_VD.T

    def step(self):
        ids = torch.randint(3, 61, (24,), generator=self._random).repeat(2)  # the second half asks for attention
        loss = torch.nn.functional.cross_entropy(self._logits(ids[:-1].tolist()), ids[1:])
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def begin_again(self):
        """With the weights that it began with, far from those of now."""
        load_hf_weights(self._model, self._source)

    def publish(self, version, prompts):
        """On disk first; that is what makes a version exist."""
        records = [Prompt(prompt_id=f"p{i}", text="", token_ids=ids) for i, ids in enumerate(prompts)]
        self._disk.publish(version, self._model, self._source, make_probes(self._model, records, "chunked"))
        return self.offer(version)

    def offer(self, version):
        return self._sender.offer(version, self._model)

    @torch.inference_mode()
    def greedy(self, prompts, limit, eos_id):
        """(tokens, their log-probs) of every answer, without a cache."""
        return [self._greedy(prompt, limit, eos_id) for prompt in prompts]

    def _greedy(self, prompt, limit, eos_id):
        ids, logprobs = list(prompt), []
        while len(logprobs) < limit and (not logprobs or ids[-1] != eos_id):
            last = self._logits(ids)[-1].log_softmax(-1)
            ids.append(int(last.argmax()))
            logprobs.append(float(last.max()))
        return tuple(ids[len(prompt) :]), np.array(logprobs)

    def damage(self, flipped=(), stop_at=None):
        """From now on a bit of these buckets is flipped on the way; before that one the sender stops until `heal`."""
        sent = iter(range(10**9))

        def broadcast(bucket, group):
            number = next(sent)
            if number == stop_at:
                self._stopped = True
                self._healed.wait()
            if number in flipped:
                bucket = bucket.clone()
                bucket[len(bucket) // 2] ^= 16
            return self._really_broadcast(bucket, group)

        self._stopped = False
        self._healed.clear()
        collective.broadcast = broadcast

    def plant(self, mistake):
        """In what is offered from now on until `heal`, with two tensors of one shape or the first of all."""
        manifest, buckets = self._really_manifest, self._really_buckets
        if mistake == "cut":  # the manifest is right, the broadcasts are not, from the second on
            collective.Snapshot.buckets = property(lambda snapshot: _with_a_wrong_cut(buckets.fget(snapshot)))
        elif mistake in ("bytes", "bit"):
            change = {"bytes": _with_swapped_values, "bit": _with_a_flipped_bit}[mistake]
            collective.Snapshot.buckets = property(lambda snapshot: buckets.fget(change(snapshot)))
        else:
            collective.Snapshot.manifest = lambda snapshot: _wrong_manifest(manifest(snapshot), mistake)

    def is_stopped(self):
        return self._stopped

    def heal(self):
        collective.broadcast = self._really_broadcast
        collective.Snapshot.manifest, collective.Snapshot.buckets = self._really_manifest, self._really_buckets
        self._healed.set()


def _twins(names, shapes):
    """Numbers of two tensors of one shape."""
    first = next(i for i, name in enumerate(names) if name.endswith("layers.0.post_attention_layernorm.weight"))
    second = next(i for i, name in enumerate(names) if name.endswith("layers.1.post_attention_layernorm.weight"))
    assert shapes[first] == shapes[second]
    return first, second


def _with_a_wrong_cut(buckets):
    first, second, *rest = buckets
    return first, second[:-4], *rest


def _with_swapped_values(snapshot):
    """Its names are as before, the bytes of two of them are each other's."""
    first, second = _twins(snapshot._names, snapshot._shapes)
    wrong = copy.copy(snapshot)
    wrong._values = snapshot._values.clone()
    parts = [wrong._values.split([torch.Size(shape).numel() for shape in snapshot._shapes])[i] for i in (first, second)]
    kept = parts[0].clone()
    parts[0].copy_(parts[1])
    parts[1].copy_(kept)
    return wrong


def _with_a_flipped_bit(snapshot):
    """The lowest of one value in the middle."""
    wrong = copy.copy(snapshot)
    wrong._values = snapshot._values.clone()
    words = wrong._values.view(torch.int16)
    words[len(words) // 4 * 2] ^= 1
    return wrong


def _wrong_manifest(manifest, mistake):
    if mistake == "order":
        first, second = _twins(manifest.names, manifest.shapes)
        names = list(manifest.names)
        names[first], names[second] = names[second], names[first]
        return replace(manifest, names=names)
    if mistake == "dtype":
        return replace(manifest, dtype="bfloat16")
    if mistake == "shape":
        return replace(manifest, shapes=[manifest.shapes[0][::-1], *manifest.shapes[1:]])
    assert mistake == "buckets"
    return replace(manifest, bucket_sizes=[sum(manifest.bucket_sizes)])


def _work(pipe, folder, source, dtype, settings):
    torch.set_num_threads(1)
    if settings.get("device"):
        stand_in_for_devices(None)
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    with open_sender(folder, dtype, timeout_s=TIMEOUT_S, **settings) as sender:
        trainer = _Trainer(sender, folder, source)
        pipe.send("ready")
        while (command := pipe.recv()) is not None:
            name, *arguments = command
            pipe.send(lines if name == "warnings" else getattr(trainer, name)(*arguments))
    pipe.send("closed")


class Trainer:
    """folder: RUN/weights. source: the model it begins with. What it is asked it answers when that is done."""

    def __init__(self, folder: Path, source: Path, dtype=torch.float32, **settings):
        folder.mkdir(parents=True, exist_ok=True)
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, folder, source, dtype, {"bucket_bytes": 1 << 14} | settings)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        assert self._pipe.recv() == "ready"

    def ask(self, *command):
        self._pipe.send(command)
        assert self._pipe.poll(60), command
        return self._pipe.recv()

    def warning_with(self, words: str) -> str:
        """The one warning that has them; it may still be on its way."""
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while not (found := [line for line in self.ask("warnings") if words in line]):
            assert time.monotonic() < deadline, (words, self.ask("warnings"))
            time.sleep(0.05)
        assert len(found) == 1
        return found[0]

    def signal_when_stopped(self, how):
        """In the middle of a transfer."""
        self.wait_until_stopped()
        os.kill(self.process.pid, how)

    def wait_until_stopped(self):
        while not self.ask("is_stopped"):
            time.sleep(0.05)

    def close(self):
        if self.process.is_alive():
            self._pipe.send(None)
            assert self._pipe.recv() == "closed"
        self.process.join(10)


class Worker:
    """Does with a receiver what an engine does, and keeps the tensors."""

    def __init__(self, folder: Path, name: str = "rollout-0", timeout_s: float = TIMEOUT_S):
        self._receiver, self._group = WeightReceiver(folder, name, timeout_s=timeout_s), None

    def take(self, version: int) -> dict[str, torch.Tensor]:
        with self._receiver.transfer(version):
            if info := self._receiver.connect(1):
                self._group = open_group(info, 1)
            manifest = self._receiver.manifest(version)
            self._receiver.start()
            buffer = receive_buckets(manifest, self._group)
        return dict(manifest.views(buffer))


def work_once(folder: Path, version: int, name: str, pipe) -> None:
    """A worker process that takes one version and sends what came of it: the weights (safetensors) or the error."""
    torch.set_num_threads(1)
    try:
        pipe.send(save(Worker(folder, name).take(version)))
    except RuntimeError as error:
        pipe.send(str(error))
