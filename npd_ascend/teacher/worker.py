"""One scoring process: free filters, teacher prefill, unconditional passes, then the decisions."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, open_device
from npd_ascend.errors import UserError
from npd_ascend.filters import decide, free_reasons
from npd_ascend.metrics import MetricsLog
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.families import read_config
from npd_ascend.model.load import choose_kernels, load_decoder
from npd_ascend.pacing import left_of, open_pacing, share
from npd_ascend.progress import progress
from npd_ascend.prompts import read_heldout, wanted_shards
from npd_ascend.records import Rollout, Score
from npd_ascend.runfolder import RunFolder, worker_name
from npd_ascend.teacher.check import check_scores, check_teacher
from npd_ascend.teacher.local import LocalScorer
from npd_ascend.teacher.scorer import Scorer
from npd_ascend.teacher.served import open_served
from npd_ascend.tokenizer import ChatTokenizer


def run_scoring(run: RunFolder, number: int, worker: int | None) -> bool:
    """Commit every missing score shard of set `number`, then one shard of decisions; False if they are there.

    Score shard i holds the rollouts of rollout shard i that pass the free filters. worker: scores its share among
    config.processes.teacher of them, and number 0 waits for the others and decides; None does all.
    """
    run.needs_npd()
    if run.stream.is_decided(number):
        return False
    entries, committed = run.stream.entries("rollouts", number), run.stream.entries("scores", number)
    tokenizer = run.tokenizer()
    expected = len(wanted_shards(run.config, tokenizer, number))
    if run.config.npd.overlap:  # they are being generated beside
        is_generated = partial(_is_generated, run, number, expected)
        run.heartbeat(worker_name("score", worker)).wait(is_generated, f"rollouts of set {number}")
        entries = run.stream.entries("rollouts", number)
    if len(entries) < expected:
        raise UserError(
            f"{run.stream.folder}: {len(entries)} of {expected} rollout shards of set {number} are there; "
            f"run `npd rollout --run {run.path} --set {number}` first"
        )
    shards = {shard: run.stream.read_shard(entry) for shard, entry in sorted(entries.items())}
    rollouts = [rollout for shard in shards.values() for rollout in shard]
    dropped = free_reasons(rollouts, run.config.filters, run.config.npd.pack_tokens)
    mine = share(list(shards), worker, run.config.processes.teacher)
    missing, total, done = left_of(mine, committed, shards)
    with open_reader(run, tokenizer, worker, label=f"score-v{number}") as reader:
        with progress(f"score v{number}", total, "samples", done) as bar:
            for shard in missing:
                reader.score(number, shard, shards[shard], dropped)
                bar.update(len(shards[shard]))
        if worker in (None, 0):
            reader.heartbeat.wait(
                lambda: run.stream.entries("scores", number).keys() == shards.keys(), "the other teacher workers"
            )
            scores = {score.sample_id: score for score in run.stream.read("scores", number)}
            reader.decide(number, 0, rollouts, scores, dropped)
    return True


def run_live_scoring(run: RunFolder, worker: int | None) -> bool:
    """The schedule with npd.stream: score and decide every shard as soon as it is generated; False if all are.

    What a set is for the filters (a duplicate, a quantile of Δ-IFD) is then the shard.
    """
    run.needs_npd()
    tokenizer = run.tokenizer()
    pacing = open_pacing(run.config, tokenizer)
    mine = share(pacing.order, worker, run.config.processes.teacher)
    missing, total, done = left_of(mine, run.stream.shards("decisions"), pacing.shards)
    if not missing:
        return False
    with open_reader(run, tokenizer, worker) as reader, progress("score", total, "samples", done) as bar:
        for shard in missing:
            waited = reader.heartbeat.wait(partial(_is_shard_generated, run, shard), f"rollouts of shard {shard}")
            rollouts = run.stream.read_shard(run.stream.shards("rollouts")[shard])
            version = rollouts[0].weight_version
            dropped = free_reasons(rollouts, run.config.filters, run.config.npd.pack_tokens)
            scores = {score.sample_id: score for score in reader.score(version, shard, rollouts, dropped, waited)}
            reader.decide(version, shard, rollouts, scores, dropped)
            bar.update(len(rollouts))
    return True


def _is_generated(run: RunFolder, number: int, shards: int) -> bool:
    return len(run.stream.entries("rollouts", number)) == shards


def _is_shard_generated(run: RunFolder, shard: int) -> bool:
    return shard in run.stream.shards("rollouts")


class Reader:
    """The teacher, and the student as it was when it generated; both read rollouts, one shard at a time."""

    def __init__(self, run: RunFolder, tokenizer: ChatTokenizer, process: str, label: str):
        """process: whose heartbeat the supervisor looks for. label: of its metrics."""
        self._run, self._tokenizer = run, tokenizer
        self._teacher: Scorer | None = None
        self._student: Scorer | None = None
        self._version: int | None = None
        self.metrics, self.heartbeat = MetricsLog(run.path, label), run.heartbeat(process)

    def score(
        self, number: int, shard: int, rollouts: Sequence[Rollout], dropped: Mapping[str, str], waited: float = 0.0
    ) -> list[Score]:
        """Score and commit what passed the free filters, to set `number`. waited: seconds for it, for the log."""
        config = self._run.config.teacher
        vocab_size = shared_vocab_size(self._run.config)
        self._load(rollouts[0].weight_version)
        started = time.perf_counter()
        passing = [rollout for rollout in rollouts if rollout.sample_id not in dropped]
        scores = score_rollouts(
            self._teacher,
            self._student,
            passing,
            self._tokenizer.alone_context(config.alone_context),
            top_k=min(config.top_k, vocab_size),
            pack_tokens=config.pack_tokens,
        )
        if scores:
            check_scores(scores, vocab_size, config.name)
        self._run.stream.commit("scores", number, shard, scores)
        tokens, seconds = sum(len(rollout.token_ids) for rollout in passing), time.perf_counter() - started
        self.metrics.log(
            shard,
            score__samples=len(scores),
            score__tokens=tokens,
            score__tokens_per_s=tokens / seconds,
            score__busy_s=seconds,
            score__wait_s=waited,
        )
        self.heartbeat.beat()
        return scores

    def decide(
        self,
        number: int,
        shard: int,
        rollouts: Sequence[Rollout],
        scores: Mapping[str, Score],
        dropped: Mapping[str, str],
    ) -> None:
        """Commit one decision for each of `rollouts`."""
        decisions = decide(rollouts, scores, dropped, self._run.config.filters)
        self._run.stream.commit("decisions", number, shard, decisions)
        if trainable := [decision for decision in decisions if decision.reason != "heldout"]:
            self.metrics.log(shard, filter__kept=sum(decision.kept for decision in trainable) / len(trainable))
        self.heartbeat.beat()

    def _load(self, version: int) -> None:
        config = self._run.config
        if self._teacher is None:
            check_vocabularies(config, self._tokenizer)  # the check before the run saw the files of that moment
            self._teacher = load_teacher(config)
            check_teacher(
                self._teacher,
                read_heldout(config, self._tokenizer, 0),
                self._tokenizer,
                dtype=config.teacher.dtype,
                vocab_size=shared_vocab_size(config),
                pack_tokens=config.teacher.pack_tokens,
                name=config.teacher.name,
            )
        if self._version != version:
            self._student, self._version = _load_generator(self._run, version), version
        self.heartbeat.beat()


@contextmanager
def open_reader(
    run: RunFolder, tokenizer: ChatTokenizer, worker: int | None, *, label: str = "score"
) -> Iterator[Reader]:
    reader = Reader(run, tokenizer, worker_name("score", worker), worker_name(label, worker))
    try:
        yield reader
    finally:
        reader.metrics.close()


def score_rollouts(
    teacher: Scorer,
    student: Scorer,
    rollouts: Sequence[Rollout],
    context: tuple[int, ...],
    *,
    top_k: int,
    pack_tokens: int,
) -> list[Score]:
    """Three prefills: teacher with the prompt, teacher and student with `context` in the prompt's place."""
    if not rollouts:
        return []
    given = [(rollout.token_ids, rollout.prompt_len) for rollout in rollouts]
    alone = [(context + rollout.token_ids[rollout.prompt_len :], len(context)) for rollout in rollouts]
    teacher_given = teacher.score(given, top_k=top_k, pack_tokens=pack_tokens)
    teacher_alone = teacher.score(alone, top_k=1, pack_tokens=pack_tokens)
    student_alone = student.score(alone, top_k=1, pack_tokens=pack_tokens)
    return [
        Score(
            sample_id=rollout.sample_id,
            weight_version=rollout.weight_version,
            teacher_topk_ids=t_given.topk_ids_AK,
            teacher_topk_logprobs=t_given.topk_logprobs_AK,
            teacher_logprob=t_given.logprob_A,
            teacher_entropy=float(t_given.entropy_A.mean()),
            teacher_loss=t_given.loss,
            teacher_loss_alone=t_alone.loss,
            student_loss=-float(rollout.logprobs.mean(dtype="float64")),
            student_loss_alone=s_alone.loss,
        )
        for rollout, t_given, t_alone, s_alone in zip(
            rollouts, teacher_given, teacher_alone, student_alone, strict=True
        )
    ]


def load_teacher(config: Config) -> Scorer:
    """The teacher that teacher.engine names, ready to score over the vocabulary that both models have."""
    if config.teacher.engine == "served":
        return open_served(config.teacher, shared_vocab_size(config))
    return LocalScorer(_load(config, config.teacher.path, config.teacher.dtype), shared_vocab_size(config))


def _load_generator(run: RunFolder, version: int) -> Scorer:
    """In the numbers that generated; over its whole vocabulary, like the log-probs that came with the rollouts."""
    model = _load(run.config, run.generator(version), run.config.rollout.dtype)
    return LocalScorer(model, model.config.vocab_size)


def _load(config: Config, folder: Path, dtype: str) -> Decoder:
    device = open_device(config.device.kind, config.device.threads)
    kernels = choose_kernels(config.kernels, device)
    return load_decoder(folder, dtype=DTYPES[dtype], device=device, kernels=kernels)


def shared_vocab_size(config: Config) -> int:
    """Rows of the head that both models have. What one pads beyond them stands for no token."""
    return min(read_config(config.teacher.path).vocab_size, read_config(config.student.path).vocab_size)


def check_vocabularies(config: Config, tokenizer: ChatTokenizer) -> None:
    """UserError if a token id is not the same token for teacher and student."""
    if difference := tokenizer.difference(ChatTokenizer(config.teacher.path)):
        raise UserError(
            f"teacher and student do not share a vocabulary: {difference}; "
            f"top-k targets would name other tokens otherwise"
        )
    for folder in (config.teacher.path, config.student.path):
        if read_config(folder).vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"{folder}/config.json: vocab_size={read_config(folder).vocab_size} is smaller than the "
                f"tokenizer's {tokenizer.vocab_size} tokens"
            )
