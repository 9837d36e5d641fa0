"""What the trainer trains on and measures: rows of the stream, and gold answers."""

from collections.abc import Iterable, Iterator, Sequence

from npd_ascend.config import Config, StageConfig
from npd_ascend.device import open_device
from npd_ascend.errors import UserError
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.prompts import max_prompt_tokens, read_heldout, read_prompts
from npd_ascend.records import Prompt, Rollout, Sample, Score
from npd_ascend.runfolder import RunFolder
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.heldout import Heldout, Questions, References, make_heldout, make_references

_KINDS = ("rollouts", "scores", "decisions")


def kept_samples(run: RunFolder, version: int) -> list[Sample]:
    """Training rows of one version: rollouts joined with scores, where the decision says kept."""
    kept = {decision.sample_id for decision in run.stream.read("decisions", version) if decision.kept}
    samples: list[Sample] = []
    for rollouts, scores in _in_shards(run, version):
        samples += (sample for _, sample in _joined(run, rollouts, scores, kept, f"version {version}"))
    _check_all_there(run, kept, samples, f"version {version}")
    return samples


def kept_in_shards(run: RunFolder, shards: Iterable[int]) -> list[tuple[Rollout, Sample]]:
    """The same for shards of the schedule with npd.stream, with the rollouts."""
    rows = []
    for shard in shards:
        rollouts, scores, decisions = (run.stream.read_shard(run.stream.shards(kind)[shard]) for kind in _KINDS)
        kept = {decision.sample_id for decision in decisions if decision.kept}
        joined = _joined(run, rollouts, scores, kept, f"shard {shard}")
        _check_all_there(run, kept, [sample for _, sample in joined], f"shard {shard}")
        rows += joined
    return rows


def _in_shards(run: RunFolder, version: int) -> Iterator[tuple[list[Rollout], list[Score]]]:
    """One after the other: of a whole set only what is asked for should be held."""
    rollouts, scores = (run.stream.entries(kind, version) for kind in ("rollouts", "scores"))
    for shard in sorted(rollouts):
        score_entry = scores.get(shard)
        yield run.stream.read_shard(rollouts[shard]), run.stream.read_shard(score_entry) if score_entry else []


def _check_all_there(run: RunFolder, kept: set[str], samples: list[Sample], where: str) -> None:
    if {sample.sample_id for sample in samples} != kept or len(samples) != len(kept):
        raise _of_different_origin(run, where)


def _of_different_origin(run: RunFolder, where: str) -> UserError:
    return UserError(
        f"{run.stream.folder}: rollouts, scores and decisions of {where} do not belong together; run "
        f"`npd rollout` and `npd score --run {run.path}` again, which make what is missing anew"
    )


def _joined(
    run: RunFolder, rollouts: list[Rollout], scores: list[Score], kept: set[str], where: str
) -> list[tuple[Rollout, Sample]]:
    score_of = {score.sample_id: score for score in scores}
    rollouts = [rollout for rollout in rollouts if rollout.sample_id in kept]
    for rollout in rollouts:
        if rollout.sample_id not in score_of:
            raise _of_different_origin(run, where)
        if (scored := len(score_of[rollout.sample_id].teacher_topk_ids)) != rollout.answer_len:
            raise UserError(
                f"{run.stream.folder}: {rollout.sample_id} of {where} has {rollout.answer_len} answer tokens and "
                f"scores of {scored}, which would be trained on for other tokens; start a new run.folder"
            )
    top_k = run.config.teacher.top_k
    return [(rollout, _sample(rollout, score_of[rollout.sample_id], top_k)) for rollout in rollouts]


def _sample(rollout: Rollout, score: Score, top_k: int) -> Sample:
    """top_k: a replay may take fewer than were recorded."""
    return Sample(
        sample_id=rollout.sample_id,
        token_ids=rollout.token_ids,
        prompt_len=rollout.prompt_len,
        teacher_topk_ids=score.teacher_topk_ids[:, :top_k],
        teacher_topk_logprobs=score.teacher_topk_logprobs[:, :top_k],
    )


def gold_samples(config: Config, tokenizer: ChatTokenizer) -> list[Sample]:
    """Training rows of SFT; UserError names the first that no pack can hold."""
    room = min(config.sft.pack_tokens, max_prompt_tokens(config, 0))
    prompts = read_prompts(config.data, "gold", tokenizer, max_prompt_tokens=room)
    samples = [
        Sample(
            sample_id=prompt.prompt_id,
            token_ids=prompt.token_ids + tokenizer.encode_answer(prompt.answer),
            prompt_len=len(prompt.token_ids),
        )
        for prompt in prompts
    ]
    longest = max(samples, key=lambda sample: len(sample.token_ids))
    if len(longest.token_ids) > room:
        raise UserError(
            f"data.gold: {longest.sample_id} has {len(longest.token_ids)} tokens with its answer, but the smaller of "
            f"sft.pack_tokens and the student's context is {room}; raise sft.pack_tokens or remove the sample"
        )
    return samples


def read_heldout_set(run: RunFolder, version: int, mesh: Mesh) -> Heldout:
    """Held-out rollouts of version 0, and of `version` for the drift from it."""
    rollouts, scores = heldout_rows(run, 0)
    newest = run.stream.entries("rollouts", version)
    drifted = [row for shard in sorted(newest) for row in run.stream.read_shard(newest[shard]) if row.heldout]
    return _heldout(run, rollouts, scores, drifted, mesh)


def heldout_rows(run: RunFolder, version: int) -> tuple[list[Rollout], list[Score]]:
    """Held-out rollouts of a version, and their scores."""
    rollouts: list[Rollout] = []
    scores: list[Score] = []
    for rollouts_here, scores_here in _in_shards(run, version):
        names = {rollout.sample_id for rollout in rollouts_here if rollout.heldout}
        rollouts += (rollout for rollout in rollouts_here if rollout.sample_id in names)
        scores += (score for score in scores_here if score.sample_id in names)
    return rollouts, scores


def heldout_in_shards(run: RunFolder, shards: Iterable[int], mesh: Mesh) -> Heldout:
    """The held-out shards of the schedule with npd.stream, which measures drift on what it trains on."""
    rollouts, scores = (
        [row for shard in shards for row in run.stream.read_shard(run.stream.shards(kind)[shard])]
        for kind in ("rollouts", "scores")
    )
    return _heldout(run, rollouts, scores, [], mesh)


def heldout_references(config: Config, stage: StageConfig, mesh: Mesh) -> Heldout | None:
    """For SFT and GRPO, which have no held-out rollouts; None without evaluate.every_steps."""
    if config.evaluate.every_steps is None:
        return None
    references, questions = _references_and_questions(config, stage.pack_tokens, mesh)
    return Heldout(references=references, questions=questions)


def _references_and_questions(
    config: Config, pack_tokens: int, mesh: Mesh
) -> tuple[References | None, Questions | None]:
    tokenizer, limit = ChatTokenizer(config.student.path), config.evaluate.max_new_tokens
    prompts = read_heldout(config, tokenizer, limit)
    return _references(config, tokenizer, prompts, pack_tokens, mesh), _questions(
        config, tokenizer, prompts, pack_tokens
    )


def _questions(
    config: Config, tokenizer: ChatTokenizer, prompts: Sequence[Prompt], pack_tokens: int
) -> Questions | None:
    """At an interval of steps only: to answer takes longer than to look at what is there."""
    chosen = [prompt.token_ids for prompt in prompts[: config.evaluate.answers]]
    if config.evaluate.every_steps is None or not chosen:
        return None
    limit = config.evaluate.max_new_tokens
    return Questions(
        prompts=chosen,
        # keys and values of a pack's tokens take no more room than its activations do in a step
        batch=max(1, pack_tokens // (max(map(len, chosen)) + limit)),
        max_new_tokens=limit,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )


def _references(
    config: Config, tokenizer: ChatTokenizer, prompts: Sequence[Prompt], pack_tokens: int, mesh: Mesh
) -> References | None:
    """Held-out prompts with the first evaluate.max_new_tokens tokens of answer and end token; None: no answers there.

    What `npd eval` counts but for this: it compares texts, without white space around them and without a thought before
    them. So it also takes other tokens of the same text, which this does not.
    """
    limit = config.evaluate.max_new_tokens
    prompts = [prompt for prompt in prompts if prompt.answer is not None]
    if not prompts:
        return None
    ids = [tokenizer.encode_answer(prompt.answer) for prompt in prompts]
    answered = [
        Sample(
            sample_id=prompt.prompt_id,
            token_ids=prompt.token_ids + answer[:limit],
            prompt_len=len(prompt.token_ids),
        )
        for prompt, answer in zip(prompts, ids, strict=True)
        if len(answer) <= limit + 1  # the end token alone may be missing
    ]
    return make_references(
        answered,
        prompts=len(prompts),
        vocab_size=tokenizer.vocab_size,
        pack_tokens=pack_tokens,
        device=open_device(config.device.kind, config.device.threads),
        multiple_of=mesh.row_multiple,
    )


def _heldout(
    run: RunFolder, rollouts: list[Rollout], scores: list[Score], newest: list[Rollout], mesh: Mesh
) -> Heldout:
    score_of = {score.sample_id: score for score in scores}
    references, questions = _references_and_questions(run.config, run.config.npd.pack_tokens, mesh)
    return make_heldout(
        [(rollout, score_of[rollout.sample_id]) for rollout in rollouts if rollout.heldout],
        newest,
        pack_tokens=run.config.npd.pack_tokens,
        loss_impl=run.config.kernels.loss,
        device=open_device(run.config.device.kind, run.config.device.threads),
        multiple_of=mesh.row_multiple,
        references=references,
        questions=questions,
    )
