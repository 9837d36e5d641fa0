"""Everything that can be known to be wrong before anything is trained, and the plan in words."""

import logging
import shutil
from pathlib import Path

import torch

from npd_ascend.config import Config
from npd_ascend.device import NPU, open_device
from npd_ascend.errors import UserError
from npd_ascend.model.decoder import PLAIN, Decoder
from npd_ascend.model.families import DecoderConfig, read_config
from npd_ascend.model.hf_weights import check_hf_weights
from npd_ascend.model.load import choose_kernels
from npd_ascend.pacing import Pacing, open_pacing
from npd_ascend.parallel.plan import refusal
from npd_ascend.placement import check_cards
from npd_ascend.planner.command import check_that_it_fits, held_of_a_set
from npd_ascend.planner.rates import host_memory
from npd_ascend.prompts import Wanted, grpo_shards, read_heldout, wanted_shards
from npd_ascend.records import Prompt
from npd_ascend.rewards.functions import check_installed
from npd_ascend.rollout.vllm_versions import require_vllm
from npd_ascend.runfolder import RunFolder
from npd_ascend.stream import Stream
from npd_ascend.teacher.check import check_teacher
from npd_ascend.teacher.worker import check_vocabularies, load_teacher, shared_vocab_size
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.samples import gold_samples

# Parquet bytes per answer token beside the top-k: ids, log-probs, offsets, before compression.
_BYTES_PER_TOKEN = 16
_log = logging.getLogger(__name__)


def check_run(config: Config) -> str:
    """The plan as text; UserError names the first thing that would fail."""
    if (config.npd or config.grpo) and config.rollout.engine == "vllm":
        require_vllm("rollout.engine")
    if config.evaluate.engine == "vllm":
        require_vllm("evaluate.engine")
    RunFolder(config).check_data(keep=False)
    student, tokenizer = read_config(config.student.path), ChatTokenizer(config.student.path)
    lines = [f"run      {config.run.name} -> {config.run.folder}"]
    lines.append(f"student  {_millions(student)} ({config.student.init}), {config.student.path}")
    check_cards(config)
    choose_kernels(config.kernels, open_device(config.device.kind, config.device.threads))
    lines.append(f"kernels  {', '.join(f'{key} {impl}' for key, impl in config.kernels)}")
    if reason := refusal(student, config.parallel.tp):
        raise UserError(f"{config.student.path}/config.json: {reason}; choose another parallel.tp")
    shards = wanted_shards(config, tokenizer) if config.npd else []
    if config.device.kind == NPU:  # on a CPU a run that is too large ends in swap or by SIGKILL, and is told so
        check_that_it_fits(config, roles_to_do(config, len(shards)))
    if config.student.init == "pretrained":
        _check_weights(config.student.path)
    if config.teacher:
        lines.append(f"teacher  {_millions(read_config(config.teacher.path))}, {config.teacher.path}")
        check_vocabularies(config, tokenizer)
        if config.teacher.engine == "local":
            _check_weights(config.teacher.path)
    heldout = read_heldout(config, tokenizer, config.evaluate.max_new_tokens)
    if config.sft:
        gold = gold_samples(config, tokenizer)
        _check_apart({s.token_ids[: s.prompt_len] for s in gold}, heldout, "data.gold")
        lines.append(f"sft      {len(gold)} gold answers x {config.sft.epochs} epochs")
    if config.npd:
        lines += _npd_lines(config, tokenizer, shards, heldout)
    if config.grpo:
        lines.append(_grpo_line(config, tokenizer, heldout))
    lines.append(f"evaluate {len(heldout)} held-out prompts")
    _check_disk(config, student, sum(map(len, shards)))
    to_do = roles_to_do(config, len(shards))
    if config.npd and not config.npd.stream and "distill" in to_do:
        _warn_of_host_memory(config, shards, made="rollout" not in to_do)
    if config.npd and not Stream(config.run.folder / "stream").entries("scores", 0):
        lines.append(_check_teacher(config, tokenizer, heldout))
    return "\n".join(lines)


def roles_to_do(config: Config, shards: int) -> set[str]:
    """Those of the plan that start a process yet: a replay generates nothing, a resumed run has done some.

    shards: of rollouts, which the run has in all.
    """
    run, roles = RunFolder(config), set()
    if config.sft and not run.has_trained("sft"):
        roles.add("sft")
    if config.npd and not run.has_trained("npd"):
        if config.npd.stream:
            answered = len(run.stream.shards("decisions")) == shards
        else:
            answered = all(run.stream.is_decided(phase.number) for phase in config.npd.phases)
        roles |= {"distill"} if answered else {"rollout", "teacher", "distill"}
    if config.grpo and not run.has_trained("grpo"):
        roles |= {"grpo-rollout", "grpo"}
    return roles


def _check_teacher(config: Config, tokenizer: ChatTokenizer, heldout: list[Prompt]) -> str:
    """Load it and ask it something: cheaper than finding out after SFT and rollouts."""
    return check_teacher(
        load_teacher(config),
        heldout,
        tokenizer,
        dtype=config.teacher.dtype,
        vocab_size=shared_vocab_size(config),
        pack_tokens=config.teacher.pack_tokens,
        name=config.teacher.name,
    )


def _npd_lines(
    config: Config, tokenizer: ChatTokenizer, shards: list[list[Wanted]], heldout: list[Prompt]
) -> list[str]:
    wanted = [pair for shard in shards for pair in shard]
    _check_apart({prompt.token_ids for prompt, _ in wanted if not prompt.heldout}, heldout, "data.prompts")
    _check_lengths(config, [len(prompt.token_ids) for prompt, _ in wanted if not prompt.heldout])
    if config.npd.stream:
        return [_stream_line(config, open_pacing(config, tokenizer))]
    return [
        f"npd      epochs {phase.first + 1}-{phase.last} on {len(wanted) - len(heldout)} rollouts of set "
        f"{phase.number} by version {phase.version} (+ {len(heldout)} held-out), "
        f"at most {config.rollout.max_new_tokens} new tokens"
        for phase in config.npd.phases
    ]


def _check_lengths(config: Config, prompt_tokens: list[int]) -> None:
    """UserError where no sample at all could be kept; that some cannot is told."""
    pack_tokens, answer = config.npd.pack_tokens, config.rollout.max_new_tokens
    shortest, longest = min(prompt_tokens) + 1, max(prompt_tokens) + answer
    if pack_tokens < shortest:
        raise UserError(
            f"npd.pack_tokens={pack_tokens}: no sample fits, the shortest has {shortest} tokens; raise it to "
            f"{longest}, the longest that a sample can be, or more"
        )
    if config.filters.min_answer_tokens > answer:
        raise UserError(
            f"filters.min_answer_tokens={config.filters.min_answer_tokens} is above rollout.max_new_tokens={answer}, "
            f"so no answer would be kept; lower the first"
        )
    if pack_tokens < longest:
        _log.warning("npd.pack_tokens=%d: samples may have %d tokens; longer ones are dropped", pack_tokens, longest)


def _grpo_line(config: Config, tokenizer: ChatTokenizer, heldout: list[Prompt]) -> str:
    check_installed(config.grpo.rewards)
    grpo, shards = config.grpo, grpo_shards(config, tokenizer)
    problems = {prompt.prompt_id: prompt for shard in shards for prompt, _ in shard}
    _check_apart({prompt.token_ids for prompt in problems.values()}, heldout, "data.problems")
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in grpo.rewards.items())
    return (
        f"grpo     {grpo.steps} steps of {grpo.groups_per_step} problems x {grpo.group_size} answers, {len(problems)} "
        f"problems in all, reward {rewards}; new weights every {grpo.publish_every} steps, lag at most {grpo.max_lag}"
    )


def _stream_line(config: Config, pacing: Pacing) -> str:
    stream, processes = config.npd.stream, config.processes
    kl = f", or once the drift passes {stream.publish_at_kl:g} nats" if stream.publish_at_kl is not None else ""
    answers = sum(len(pacing.shards[shard]) for shard in range(pacing.training))
    return (
        f"npd      {pacing.steps} steps on {answers} rollouts, at most {config.rollout.max_new_tokens} new tokens; "
        f"new weights every {stream.publish_every} steps{kl}, lag at most {stream.max_lag}; "
        f"{processes.rollout} rollout and {processes.teacher} teacher processes beside the trainer"
    )


def _check_weights(folder: Path) -> None:
    with torch.device("meta"):
        model = Decoder(read_config(folder), PLAIN)
    check_hf_weights(model, folder)


def _check_apart(training: set[tuple[int, ...]], heldout: list[Prompt], key: str) -> None:
    if both := [prompt for prompt in heldout if prompt.token_ids in training]:
        raise UserError(
            f"{key}: {len(both)} of its prompts also stand in data.heldout, such as {both[0].prompt_id} "
            f"({both[0].text[:40]!r}); the scores would measure memory, so remove them from one of the two"
        )


def _check_disk(config: Config, student: DecoderConfig, samples: int) -> None:
    """Checkpoints (master and two moments; two of every stage are kept and one is being written), versions, the
    student, the stream. samples: of a set, with npd.stream of the run."""
    weights = 4 * student.num_parameters
    stages = sum(section is not None for section in (config.sft, config.npd, config.grpo))
    need = weights * 3 * (2 * stages + 1) + weights
    if config.npd:
        token_bytes = _BYTES_PER_TOKEN + 8 * config.teacher.top_k
        per_set = samples * config.rollout.max_new_tokens * token_bytes
        # the stream's shards hold all rollouts of the run, and only so many versions are kept
        sets = 1 if config.npd.stream else len(config.npd.phases)
        versions = config.npd.stream.max_lag + 3 if config.npd.stream else sets
        need += weights * versions + per_set * sets
    if config.grpo:
        # versions: the reference, the newest and those that may still be asked for
        answers = config.grpo.steps * config.grpo.groups_per_step * config.grpo.group_size
        need += weights * (config.grpo.max_lag + 4)
        need += answers * config.rollout.max_new_tokens * _BYTES_PER_TOKEN
    run = config.run.folder
    need -= sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) if run.exists() else 0
    existing = next(path for path in (config.run.folder, *config.run.folder.parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < need:
        raise UserError(
            f"{existing}: {free / 1e9:.1f} GB free, but the run may need {need / 1e9:.1f} GB; "
            f"free some space or set run.folder to another disk"
        )


def _warn_of_host_memory(config: Config, shards: list[list[Wanted]], *, made: bool) -> None:
    """A process that takes too much is killed after the set was made; how long its answers are is not known before.

    made: the set is there already, as in a replay, and stays as large as it is.
    """
    prompts = [len(prompt.token_ids) for shard in shards for prompt, _ in shard]
    held, of_one = held_of_a_set(config, len(prompts), sum(prompts) / len(prompts))
    way_out = "lower data.prompts.count or rollout.samples_per_prompt, or set npd.stream, which reads shard by shard"
    if made:
        way_out = (
            "take fewer ranks and teacher workers here (parallel.dp, parallel.tp, processes.teacher) or more memory"
        )
    if (there := host_memory()) < held * of_one:
        _log.warning(
            "npd: a set of %d rollouts, held by %d processes of trainer and teacher at a time, takes up to %.0f GB of "
            "this host's memory, and it has %.0f GB; if answers are not much shorter than rollout.max_new_tokens, %s",
            len(prompts),
            held,
            held * of_one / 1e9,
            there / 1e9,
            way_out,
        )


def _millions(config: DecoderConfig) -> str:
    return f"{config.num_parameters / 1e6:.2f}M parameters, {config.num_layers} layers of {config.hidden_size}"
