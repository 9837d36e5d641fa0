"""One rollout process: take the wanted samples of a weight version, generate, commit shard by shard."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

import numpy as np

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, collective_backend, open_device
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog
from npd_ascend.pacing import Pacing, left_of, open_grpo_pacing, open_pacing, share
from npd_ascend.progress import progress
from npd_ascend.prompts import Wanted, wanted_shards
from npd_ascend.records import Rollout, sample_id
from npd_ascend.rollout.engine import Completion, Engine, Request, Sampling
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.rollout.journal import Journal, begun_shards, drop_committed, journal_path, read_journal
from npd_ascend.rollout.vllm_engine import VllmEngine
from npd_ascend.runfolder import RunFolder, worker_name
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.weights.canary import compare, read_probes
from npd_ascend.weights.control import SILENCE_S, TransferError
from npd_ascend.weights.receiver import WeightReceiver

_log = logging.getLogger(__name__)
# Mean difference of log-probs that rounding explains, where the coarser of trainer and generator has that type; other
# weights of the smallest models differ by 0.1 and more.
CANARY_NATS = {"float32": 2e-3, "bfloat16": 0.1}


def run_rollouts(run: RunFolder, number: int, worker: int | None) -> bool:
    """Commit every missing rollout shard of set `number`; False if none is missing.

    worker: makes its share among config.processes.rollout of them; None makes all.
    """
    run.needs_npd()
    tokenizer = run.tokenizer()
    shards = wanted_shards(run.config, tokenizer, number)
    committed, version = run.stream.entries("rollouts", number), run.config.npd.generator_of(number)
    drop_committed(run.stream.folder, committed, number)
    mine = share(range(len(shards)), worker, run.config.processes.rollout)
    missing, total, done = left_of(mine, committed, shards)
    if missing:
        with (
            open_maker(run, tokenizer, shards, "rollout", worker, label=f"rollout-v{number}") as maker,
            progress(f"rollout v{number}", total, "samples", done) as maker.bar,
        ):
            for shard in missing:
                maker.make(shard, version, number)
    return bool(missing)


def run_live_rollouts(run: RunFolder, worker: int | None) -> bool:
    """The schedule with npd.stream: every missing shard, each with the newest weights as soon as it may begin; False if
    none is missing."""
    run.needs_npd()
    tokenizer = run.tokenizer()
    return _make_live(run, worker, tokenizer, open_pacing(run.config, tokenizer), "rollout")


def run_grpo_rollouts(run: RunFolder, worker: int | None) -> bool:
    """The same for GRPO: the groups of a step as soon as the weights are there that may answer them."""
    part = run.for_grpo()
    tokenizer = part.tokenizer()
    return _make_live(part, worker, tokenizer, open_grpo_pacing(run.config, tokenizer), "grpo-rollout")


def _make_live(run: RunFolder, worker: int | None, tokenizer: ChatTokenizer, pacing: Pacing, name: str) -> bool:
    committed = run.stream.shards("rollouts")
    drop_committed(run.stream.folder, committed)
    mine = share(pacing.order, worker, run.config.processes.rollout)
    missing, total, done = left_of(mine, committed, pacing.shards)
    if not missing:
        return False
    with (
        open_maker(run, tokenizer, pacing.shards, name, worker) as maker,
        progress(name, total, "samples", done) as maker.bar,
    ):
        _load_first(run, maker, missing[0])  # before there is anything to wait for
        for shard in missing:
            if (begun := maker.begun(shard)) is not None:
                maker.make(shard, begun, begun)
                continue
            waited = maker.heartbeat.wait(
                partial(_may_begin, run, pacing, shard), f"the trainer to reach shard {shard}"
            )
            version = 0 if shard in pacing.heldout else run.weights.newest()[0]
            maker.make(shard, version, version, waited)
    return True


def _load_first(run: RunFolder, maker: "Maker", shard: int) -> None:
    """The version that `shard` was begun with, else the newest. Nothing waits for this worker yet, so that one may be
    replaced and dropped while it is read."""
    while True:
        begun = maker.begun(shard)
        version = run.weights.newest()[0] if begun is None else begun
        try:
            maker.load(version)
            return
        except UserError:
            if version == 0 or version in run.weights.versions():
                raise
            _log.info("weight version %d was replaced while it was read", version)


def _may_begin(run: RunFolder, pacing: Pacing, shard: int) -> bool:
    steps_done = run.stream.steps_done()
    return pacing.may_begin(shard, published_at=run.weights.newest()[1], steps_done=steps_done)


class Maker:
    """An engine, the weights it has, and the shards it makes with them."""

    def __init__(self, run: RunFolder, engine: Engine, shards: Sequence[Sequence[Wanted]], process: str, label: str):
        """process: whose heartbeat the supervisor looks for. label: of its metrics."""
        self._run, self._engine, self._shards = run, engine, shards
        self._version: int | None = None
        self._receiver: WeightReceiver | None = None
        self.bar = progress(label, 0, "samples", shown=False)  # moved by every answer
        weights = run.config.rollout.weights
        if weights != "disk":
            self._receiver = WeightReceiver(
                run.weights.folder, process, timeout_s=SILENCE_S, device=weights == "device"
            )
        self.metrics, self.heartbeat = MetricsLog(run.path, label), run.heartbeat(process)

    def _receive(self, version: int) -> bool:
        """Whether `version` came from the trainer's memory; if it should have, the log says why not."""
        if self._receiver is None or not isinstance(self._engine, VllmEngine):
            return False
        try:
            received = self._engine.receive_weights(self._receiver, version)
        except TransferError as error:
            _log.warning("%s; it is loaded from disk", error)
            return False
        self.metrics.log(
            version,
            sync__bytes=received.total_bytes,
            sync__gather_s=received.gather_s,
            sync__wait_s=received.wait_s,
            sync__transfer_s=received.transfer_s,
            sync__load_s=received.load_s,
            sync__reset_s=received.reset_s,
        )
        return True

    def load(self, version: int) -> float:
        """Give the engine the weights of `version` unless it has them, and let the canary look; returns seconds."""
        if version == self._version:
            return 0.0
        started = time.perf_counter()
        if self._version is None or not self._receive(version):
            self._engine.load_weights(self._run.generator(version))
        folder = self._run.weights.path(version) if version else self._run.generator(version)
        probes = read_probes(folder)
        if version and not probes:
            raise UserError(f"{folder}: no canary.json, which says whether the generator has these weights; restore it")
        if probes:
            found = self._engine.next_logprobs([probe.context for probe in probes], [probe.next_id for probe in probes])
            config = self._run.config
            nats = max(CANARY_NATS[config.rollout.dtype], CANARY_NATS[config.student.dtype])
            difference = compare(probes, found, nats, folder)
            self.metrics.log(version, rollout__canary=difference)
        self._version = version
        self.heartbeat.beat()
        return time.perf_counter() - started

    def begun(self, shard: int) -> int | None:
        """Weight version with which a worker that was killed began a shard of the schedule with npd.stream; its answers
        are there, and make(shard, version, version) goes on with it. None: the shard starts anew.

        Such a shard waits for nothing. Pacing.may_begin held for that version when it was begun, and that counts which
        versions can still come before the shard's step; how long the shard takes, and who ends it, is not in it. For
        the same reason the trainer, which keeps the last max_lag versions, has not dropped that one.
        """
        usable = None
        for begun in begun_shards(self._run.stream.folder, shard) if self._engine.separable else ():
            asked, answers, _ = read_journal(begun.path)
            if answers and asked == self._asked(shard, begun.number):
                usable = begun.number
                continue
            if answers:
                why = f"weight version {begun.number}, with which they were made, is gone or another"
                _log.warning("%s: its %d answers are lost, since %s", begun.path, len(answers), why)
            begun.path.unlink(missing_ok=True)
        return usable

    def make(self, shard: int, version: int, number: int, waited: float = 0.0) -> None:
        """Generate what is missing of one shard with weights `version` and commit it to set `number`.

        waited: seconds that it had to, for the log.
        """
        loading = self.load(version)
        started = time.perf_counter()
        path = journal_path(self._run.stream.folder, number, shard)
        journal = Journal(path, self._asked(shard, version)) if self._engine.separable else None
        with journal or nullcontext():
            completions = self._complete(self._requests(shard, version), journal)
            rollouts = self._rollouts(shard, version, completions)
            self._run.stream.commit("rollouts", number, shard, rollouts)
            kept = journal.kept if journal else {}
            if journal:
                journal.delete()
        seconds, tokens = time.perf_counter() - started, sum(r.answer_len for r in rollouts)
        generated = tokens - sum(len(completion.token_ids) for completion in kept.values())
        self.metrics.log(
            shard,
            **self._entropy(rollouts),
            rollout__samples=len(rollouts),
            rollout__resumed=len(kept),
            rollout__tokens=tokens,
            rollout__answer_tokens=tokens / len(rollouts),
            rollout__tokens_per_s=generated / seconds,
            rollout__version=version,
            rollout__busy_s=seconds,
            rollout__load_s=loading,
            rollout__wait_s=waited,
        )
        self.heartbeat.beat()

    def _names(self, shard: int, version: int) -> list[str]:
        return [sample_id(prompt.prompt_id, index, version) for prompt, index in self._shards[shard]]

    def _requests(self, shard: int, version: int) -> list[Request]:
        config, names = self._run.config, self._names(shard, version)
        return [
            Request(prompt.token_ids, config.rollout.max_new_tokens, seed_of(config.run.seed, name))
            for (prompt, _), name in zip(self._shards[shard], names, strict=True)
        ]

    def _asked(self, shard: int, version: int) -> str:
        """One line that is another one if anything is that the answers depend on."""
        rollout, stamp = self._run.config.rollout, self._run.weights.path(version) / "version.json"
        how = [rollout.engine, rollout.dtype, rollout.temperature, rollout.top_p]
        weights = ""  # of a version that is gone
        if stamp.exists():
            weights = stamp.read_text()  # with their checksum
        elif version == 0:  # the student as given, too large to be summed up for this
            files = sorted(self._run.generator(0).glob("*.safetensors"))
            weights = str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
        what = [how, weights, self._names(shard, version), [asdict(r) for r in self._requests(shard, version)]]
        return json.dumps({"version": version, "sha256": hashlib.sha256(json.dumps(what).encode()).hexdigest()})

    def _complete(self, requests: Sequence[Request], journal: Journal | None) -> list[Completion]:
        """Answers in the order of their requests: those of the journal, and the others, which are added to it."""
        done = dict(journal.kept) if journal else {}
        missing = [index for index in range(len(requests)) if index not in done]
        self.bar.update(len(done))
        sampling = Sampling(self._run.config.rollout.temperature, self._run.config.rollout.top_p)
        for at, completion in self._engine.generate([requests[index] for index in missing], sampling):
            done[missing[at]] = completion
            if journal:
                journal.add(missing[at], completion)
            self.heartbeat.beat()
            self.bar.update()
        return [done[index] for index in range(len(requests))]

    def _rollouts(self, shard: int, version: int, completions: Sequence[Completion]) -> list[Rollout]:
        return [
            Rollout(
                sample_id=name,
                prompt_id=prompt.prompt_id,
                weight_version=version,
                heldout=prompt.heldout,
                token_ids=prompt.token_ids + done.token_ids,
                prompt_len=len(prompt.token_ids),
                logprobs=done.logprobs,
                finish_reason=done.finish_reason,
            )
            for name, (prompt, _), done in zip(
                self._names(shard, version), self._shards[shard], completions, strict=True
            )
        ]

    def _entropy(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Only where what was sampled is the distribution whose log-probs are recorded."""
        sampling = self._run.config.rollout
        if sampling.temperature != 1 or sampling.top_p != 1:
            return {}
        return {"rollout__entropy": -float(np.concatenate([r.logprobs for r in rollouts]).mean(dtype=np.float64))}


@contextmanager
def open_maker(
    run: RunFolder,
    tokenizer: ChatTokenizer,
    shards: Sequence[Sequence[Wanted]],
    process: str,
    worker: int | None,
    *,
    label: str | None = None,
) -> Iterator[Maker]:
    """label: of the metrics, if not `process`, whose heartbeat the supervisor looks for."""
    longest = max(len(prompt.token_ids) for shard in shards for prompt, _ in shard)
    engine = open_engine(run.config, tokenizer, longest)
    maker = Maker(run, engine, shards, worker_name(process, worker), worker_name(label or process, worker))
    try:
        yield maker
    finally:
        maker.metrics.close()


def open_engine(config: Config, tokenizer: ChatTokenizer, longest_prompt: int) -> Engine:
    """The engine that config.rollout names, without weights. longest_prompt: in tokens."""
    rollout, device = config.rollout, open_device(config.device.kind, config.device.threads)
    if rollout.engine == "vllm":
        return VllmEngine(
            dtype=DTYPES[rollout.dtype],
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            max_model_len=longest_prompt + rollout.max_new_tokens,
            kv_cache_gib=rollout.kv_cache_gib,
            eager=rollout.eager,
            device_backend=collective_backend(device) if rollout.weights == "device" else None,
        )
    return HfEngine(
        dtype=DTYPES[rollout.dtype],
        device=device,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
    )


def seed_of(run_seed: int, name: str) -> int:
    """63 bits from the run's seed and the sample's name."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{name}".encode()).digest()[:8]) >> 1
