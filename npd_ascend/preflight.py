"""Everything that can be known to be wrong before anything is trained, and the plan in words."""

import shutil
from pathlib import Path

from npd_ascend.config import Config
from npd_ascend.errors import UserError
from npd_ascend.model.families import DecoderConfig, read_config
from npd_ascend.prompts import max_prompt_tokens, read_heldout, read_prompts, wanted_shards
from npd_ascend.records import Prompt
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.stages import phases

# Parquet bytes per answer token beside the top-k: ids, log-probs, offsets, before compression.
_BYTES_PER_TOKEN = 16


def check_run(config: Config) -> str:
    """The plan as text; UserError names the first thing that would fail."""
    student = read_config(config.student.path)
    tokenizer = ChatTokenizer(config.student.path)
    lines = [f"run      {config.run.name} -> {config.run.folder}"]
    lines.append(f"student  {_millions(student)} ({config.student.init}), {config.student.path}")
    if config.teacher:
        lines.append(f"teacher  {_millions(read_config(config.teacher.path))}, {config.teacher.path}")
        _check_vocabularies(config, tokenizer)
    for model in [config.student] + ([config.teacher] if config.teacher else []):
        if getattr(model, "init", "pretrained") == "pretrained":
            _check_weights(model.path)
    heldout = read_heldout(config, tokenizer, config.evaluate.max_new_tokens)
    if config.sft:
        gold = read_prompts(
            config.data.gold,
            tokenizer,
            key="data.gold",
            max_prompt_tokens=max_prompt_tokens(config, 1),
            need_answer=True,
        )
        _check_apart(gold, heldout, "data.gold")
        lines.append(f"sft      {len(gold)} gold answers x {config.sft.epochs} epochs")
    if config.npd:
        lines += _npd_lines(config, tokenizer, heldout)
    lines.append(f"evaluate {len(heldout)} held-out prompts")
    _check_disk(config, student, tokenizer)
    return "\n".join(lines)


def _npd_lines(config: Config, tokenizer: ChatTokenizer, heldout: list[Prompt]) -> list[str]:
    shards = wanted_shards(config, tokenizer)
    wanted = [pair for shard in shards for pair in shard]
    _check_apart([prompt for prompt, _ in wanted if not prompt.heldout], heldout, "data.prompts")
    return [
        f"npd      epochs {phase.first + 1}-{phase.last} on {len(wanted) - len(heldout)} rollouts of version "
        f"{phase.version} (+ {len(heldout)} held-out), at most {config.rollout.max_new_tokens} new tokens"
        for phase in phases(config.npd)
    ]


def _check_vocabularies(config: Config, tokenizer: ChatTokenizer) -> None:
    if difference := tokenizer.difference(ChatTokenizer(config.teacher.path)):
        raise UserError(
            f"teacher and student do not share a vocabulary: {difference}; "
            f"top-k targets would name other tokens, so choose models with one tokenizer"
        )
    for folder in (config.teacher.path, config.student.path):
        if read_config(folder).vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"{folder}/config.json: vocab_size={read_config(folder).vocab_size} is smaller than the "
                f"tokenizer's {tokenizer.vocab_size} tokens"
            )


def _check_weights(folder: Path) -> None:
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(f"{folder}: no model.safetensors; only safetensors are read (npd convert makes them from GGUF)")


def _check_apart(training: list[Prompt], heldout: list[Prompt], key: str) -> None:
    texts = {prompt.text for prompt in heldout}
    if both := [prompt for prompt in training if prompt.text in texts]:
        raise UserError(
            f"{key}: {len(both)} prompts also stand in data.heldout, first {both[0].prompt_id} "
            f"({both[0].text[:40]!r}); the scores would measure memory, so remove them from one of the two"
        )


def _check_disk(config: Config, student: DecoderConfig, tokenizer: ChatTokenizer) -> None:
    """Checkpoints (master and two moments, two kept and one being written), versions, the student, the stream."""
    weights = 4 * _num_parameters(student)
    need = weights * 3 * 3 + weights
    if config.npd:
        samples = sum(map(len, wanted_shards(config, tokenizer)))
        token_bytes = _BYTES_PER_TOKEN + 8 * config.teacher.top_k
        per_version = weights + samples * config.rollout.max_new_tokens * token_bytes
        need += per_version * len(phases(config.npd))
    existing = next(path for path in (config.run.folder, *config.run.folder.parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < need:
        raise UserError(
            f"{existing}: {free / 1e9:.1f} GB free, but the run may need {need / 1e9:.1f} GB; "
            f"free some space or set run.folder to another disk"
        )


def _num_parameters(c: DecoderConfig) -> int:
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return c.num_layers * layer + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2) + c.hidden_size


def _millions(config: DecoderConfig) -> str:
    return f"{_num_parameters(config) / 1e6:.2f}M parameters, {config.num_layers} layers of {config.hidden_size}"
