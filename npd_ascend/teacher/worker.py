"""One scoring process: free filters, teacher prefill, unconditional passes, then the decisions."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, open_device
from npd_ascend.errors import UserError
from npd_ascend.filters import decide, free_reasons
from npd_ascend.metrics import MetricsLog
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.families import read_config
from npd_ascend.model.load import choose_kernels, load_decoder
from npd_ascend.progress import progress
from npd_ascend.prompts import read_heldout, wanted_shards
from npd_ascend.records import Rollout, Score
from npd_ascend.runfolder import RunFolder
from npd_ascend.teacher.check import check_scores, check_teacher
from npd_ascend.teacher.local import LocalScorer
from npd_ascend.teacher.scorer import Scorer
from npd_ascend.teacher.served import open_served
from npd_ascend.tokenizer import ChatTokenizer


def run_scoring(run: RunFolder, version: int) -> None:
    """Commit every missing score shard of `version`, then one shard of decisions.

    Score shard i holds the rollouts of rollout shard i that pass the free filters.
    """
    run.needs_npd()
    entries, committed = run.stream.entries("rollouts", version), run.stream.entries("scores", version)
    if run.stream.entries("decisions", version) and entries.keys() == committed.keys():
        return
    tokenizer = ChatTokenizer(run.config.student.path)
    expected = len(wanted_shards(run.config, tokenizer))
    if len(entries) < expected:
        raise UserError(
            f"{run.stream.folder}: {len(entries)} of {expected} rollout shards of version {version} are there; "
            f"run `npd rollout --run {run.path} --version {version}` first"
        )
    shards = {shard: run.stream.read_shard(entry) for shard, entry in sorted(entries.items())}
    rollouts = [rollout for shard in shards.values() for rollout in shard]
    dropped = free_reasons(rollouts, run.config.filters, run.config.npd.pack_tokens)
    metrics = MetricsLog(run.path, f"score-v{version}")
    if missing := [shard for shard in shards if shard not in committed]:
        _score_shards(run, version, tokenizer, shards, missing, dropped, metrics)
    scores = {score.sample_id: score for score in run.stream.read("scores", version)}
    decisions = decide(rollouts, scores, dropped, run.config.filters)
    run.stream.commit("decisions", version, 0, decisions)
    trainable = [decision for decision in decisions if decision.reason != "heldout"]
    metrics.log(0, filter__kept=sum(decision.kept for decision in trainable) / len(trainable))
    metrics.close()


def _score_shards(
    run: RunFolder,
    version: int,
    tokenizer: ChatTokenizer,
    shards: Mapping[int, list[Rollout]],
    missing: Sequence[int],
    dropped: Mapping[str, str],
    metrics: MetricsLog,
) -> None:
    teacher_config, name = run.config.teacher, str(run.config.teacher.path)
    vocab_size = shared_vocab_size(run.config)
    teacher, student = load_teacher(run.config), _load_generator(run, version)
    heldout = read_heldout(run.config, tokenizer, 0)
    check_teacher(
        teacher,
        heldout,
        tokenizer,
        dtype=teacher_config.dtype,
        vocab_size=vocab_size,
        pack_tokens=teacher_config.pack_tokens,
        name=name,
    )
    context = tokenizer.alone_context(teacher_config.alone_context)
    total = sum(map(len, shards.values()))
    with progress(f"score v{version}", total, "samples", total - sum(len(shards[s]) for s in missing)) as bar:
        for shard in missing:
            started = time.perf_counter()
            passing = [rollout for rollout in shards[shard] if rollout.sample_id not in dropped]
            scores = score_rollouts(
                teacher,
                student,
                passing,
                context,
                top_k=min(teacher_config.top_k, vocab_size),
                pack_tokens=teacher_config.pack_tokens,
            )
            if scores:
                check_scores(scores, vocab_size, name)
            run.stream.commit("scores", version, shard, scores)
            tokens = sum(len(rollout.token_ids) for rollout in passing)
            seconds = time.perf_counter() - started
            metrics.log(shard, score__samples=len(scores), score__tokens=tokens, score__tokens_per_s=tokens / seconds)
            bar.update(len(shards[shard]))


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
