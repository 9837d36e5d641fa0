"""Where prompts come from. A source is a function of its configuration, and of a file that may not change: a restart
sees the same rows."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from typing import Literal

import numpy as np

from npd_ascend.config import AdditionSource, Config, DataConfig, JsonlSource, ReasoningGymSource
from npd_ascend.errors import UserError
from npd_ascend.model.families import read_config
from npd_ascend.records import Prompt
from npd_ascend.tokenizer import ChatTokenizer

# A sample is wanted as (prompt, index among the answers to that prompt).
Wanted = tuple[Prompt, int]


def wanted_shards(config: Config, tokenizer: ChatTokenizer, number: int = 0) -> list[list[Wanted]]:
    """All samples of set `number` in shards of rollout.batch_size, held-out prompts last.

    With npd.stream: of the whole run, a fresh answer per prompt and epoch, every epoch in an order of its own, and
    the held-out prompts in shards of their own. The same for every set and every restart: a shard is generated as
    one batch, so its numbers cannot depend on where an earlier process was killed.
    """
    room = _read_by_both(config, config.rollout.max_new_tokens)
    training = read_prompts(config.data, "prompts", tokenizer, max_prompt_tokens=room)
    heldout = [(prompt, 0) for prompt in read_heldout(config, tokenizer, config.rollout.max_new_tokens)]
    answers, size = config.rollout.samples_per_prompt, config.rollout.batch_size
    if config.npd is None or config.npd.stream is None:
        wanted = [(prompt, index) for prompt in training for index in range(answers)] + heldout
        # with overlap one version generates two sets, and asked for the same samples it would give the same answers
        again = number * answers if config.npd and config.npd.overlap else 0
        return _cut([(prompt, index + again) for prompt, index in wanted], size)
    wanted = []
    for epoch in range(config.npd.epochs):
        order = np.random.Generator(np.random.PCG64([config.run.seed, epoch])).permutation(len(training) * answers)
        wanted += [(training[at // answers], epoch * answers + at % answers) for at in order.tolist()]
    return _cut(wanted, size) + _cut(heldout, size)


def grpo_shards(config: Config, tokenizer: ChatTokenizer) -> list[list[Wanted]]:
    """All answers of GRPO, step after step, every step in equally many shards; a group stands together in one shard.

    The problems come in an order of their own in every pass over them, with fresh answers.
    """
    grpo, room = config.grpo, max_prompt_tokens(config, config.rollout.max_new_tokens)
    problems = read_prompts(config.data, "problems", tokenizer, max_prompt_tokens=room)
    needs_reference = grpo.rewards.keys() & {"exact_match", "math_verify"}
    if needs_reference and (bare := [problem for problem in problems if problem.answer is None]):
        raise UserError(
            f"data.problems: {bare[0].prompt_id} has no answer, which grpo.rewards.{min(needs_reference)} needs"
        )
    groups: list[tuple[Prompt, int]] = []  # with the pass that it belongs to
    wanted = grpo.steps * grpo.groups_per_step
    for number in range(-(-wanted // len(problems))):
        order = np.random.Generator(np.random.PCG64([config.run.seed, number])).permutation(len(problems))
        groups += [(problems[at], number) for at in order.tolist()]
    per_shard, shards = config.rollout.batch_size // grpo.group_size, []
    for start in range(0, wanted, grpo.groups_per_step):
        step = groups[start : start + grpo.groups_per_step]
        for part in (step[at : at + per_shard] for at in range(0, len(step), per_shard)):
            shards.append([(p, number * grpo.group_size + i) for p, number in part for i in range(grpo.group_size)])
    return shards


def _cut(wanted: list[Wanted], size: int) -> list[list[Wanted]]:
    return [wanted[at : at + size] for at in range(0, len(wanted), size)]


def read_heldout(config: Config, tokenizer: ChatTokenizer, max_new_tokens: int) -> list[Prompt]:
    """The held-out prompts, each with room for an answer of `max_new_tokens`."""
    room = _read_by_both(config, max_new_tokens)
    return read_prompts(config.data, "heldout", tokenizer, max_prompt_tokens=room)


def fingerprints(config: Config) -> dict[str, str]:
    """Role -> sha256 of the rows, for every source of the run that is a file: their prompt ids are numbers of lines."""
    used = {"gold": config.sft, "prompts": config.npd, "problems": config.grpo, "heldout": True}
    found = {}
    for role, source in config.data:
        if isinstance(source, JsonlSource) and used[role]:
            digest = hashlib.sha256()
            for row in _jsonl(source):
                digest.update(json.dumps(row[1:]).encode() + b"\n")
            found[role] = digest.hexdigest()
    return found


def max_prompt_tokens(config: Config, max_new_tokens: int) -> int:
    """Prompt tokens that leave room for an answer in the student's context."""
    return read_config(config.student.path).max_position - max_new_tokens


def _read_by_both(config: Config, max_new_tokens: int) -> int:
    """The same where the teacher reads prompt and answer too."""
    room = max_prompt_tokens(config, max_new_tokens)
    return min(room, read_config(config.teacher.path).max_position - max_new_tokens) if config.npd else room


def read_prompts(
    data: DataConfig,
    role: Literal["gold", "prompts", "problems", "heldout"],
    tokenizer: ChatTokenizer,
    *,
    max_prompt_tokens: int,
) -> list[Prompt]:
    """All prompts of data.<role>, tokenised, data.prompt_suffix behind each.

    Ids begin with the role, so that two files of one name stay apart. UserError for an empty source, a line that does
    not fit, a gold row without an answer, the same row twice, or a prompt above `max_prompt_tokens`.
    """
    source, key = getattr(data, role), f"data.{role}"
    if max_prompt_tokens < 1:
        raise UserError(
            f"{key}: no prompt fits before an answer of max_new_tokens, which fills the models' context; lower "
            f"rollout.max_new_tokens or evaluate.max_new_tokens"
        )
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for place, row_id, text, answer in _rows(source):
        prompt_id = f"{role}:{row_id}"
        if prompt_id in seen:
            raise UserError(f"{key}: {place} comes twice; name each data set once")
        seen.add(prompt_id)
        if role == "gold" and answer is None:
            raise UserError(f"{key}: {place} has no answer, and SFT needs one")
        token_ids = tokenizer.encode_prompt(text + data.prompt_suffix)
        if len(token_ids) > max_prompt_tokens:
            raise UserError(
                f"{key}: {place} has {len(token_ids)} tokens, but only {max_prompt_tokens} fit before the answer; "
                f"shorten or remove it, lower max_new_tokens, or take models with a longer context"
            )
        prompts.append(
            Prompt(prompt_id=prompt_id, text=text, token_ids=token_ids, answer=answer, heldout=role == "heldout")
        )
    if not prompts:
        raise UserError(
            f"{key}: {getattr(source, 'path', source.kind)} gives no prompt; add lines, or name another source"
        )
    return prompts


def _rows(source: JsonlSource | AdditionSource | ReasoningGymSource) -> Iterator[tuple[str, str, str, str | None]]:
    """(place for errors, prompt id, text, reference answer) of every prompt."""
    if isinstance(source, JsonlSource):
        return _jsonl(source)
    return _addition(source) if isinstance(source, AdditionSource) else _reasoning_gym(source)


def _jsonl(source: JsonlSource) -> Iterator[tuple[str, str, str, str | None]]:
    try:
        # not splitlines(): JSON strings may hold the other line separators of Unicode
        lines = source.path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{source.path}: no such file; set the path of that source in data") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{source.path}: not a UTF-8 text file ({error})") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    stop = None if source.count is None else source.first + source.count
    if source.count and len(numbered) < stop:
        raise UserError(f"{source.path}: has {len(numbered)} prompts, but first + count ask for {stop}")
    for number, line in numbered[source.first : stop]:
        place = f"{source.path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place}: not JSON ({error}); want one object per line, with a text under prompt"
            ) from None
        text = row.get(source.prompt_key) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: no text under {source.prompt_key!r}; set prompt_key or mend the line")
        answer = row.get(source.answer_key)
        if answer is not None and not isinstance(answer, str):
            raise UserError(f"{place}: {source.answer_key!r} is not a text")
        yield place, f"{source.path.stem}:{number}", text, answer


def _addition(source: AdditionSource) -> Iterator[tuple[str, str, str, str]]:
    total = 900 * 900
    if source.first + source.count > total:
        raise UserError(f"addition: first + count = {source.first + source.count}, but there are only {total} sums")
    order = np.random.Generator(np.random.PCG64(20260505)).permutation(total)
    for index in order[source.first : source.first + source.count]:
        a, b = 100 + int(index) // 900, 100 + int(index) % 900
        yield f"{a}+{b}", f"{a}+{b}", f"{a}+{b}", str(a + b)


def _reasoning_gym(source: ReasoningGymSource) -> Iterator[tuple[str, str, str, str | None]]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "reasoning_gym is not installed; pip install -r requirements-rewards.txt, or use another source"
        )
    questions = [_different_rows(source, name) for name in source.datasets]
    for index in range(source.first + source.count):
        turn = index % len(questions)
        name, (number, row) = source.datasets[turn], next(questions[turn], (None, None))
        if row is None:
            raise UserError(
                f"reasoning_gym: {name} has no more than {index // len(questions)} different questions, and first + "
                f"count ask for {source.first + source.count} of all sets; lower them, or set parameters.{name}"
            )
        if index >= source.first:
            yield f"{name}[{number}]", f"{name}:{source.seed}:{number}", row["question"], row["answer"]


def _different_rows(source: ReasoningGymSource, name: str) -> Iterator[tuple[int, dict]]:
    """The rows of a data set, with their numbers, whose question no row before has had."""
    import reasoning_gym

    seen = set()
    try:
        dataset = reasoning_gym.create_dataset(**source.arguments(name))
        for number in range(len(dataset)):
            row = dataset[number]
            if row["question"] not in seen:
                seen.add(row["question"])
                yield number, row
    except Exception as error:  # of the package, of any kind: it has no such set, parameter or value
        raise UserError(
            f"reasoning_gym: {name}: {error} ({type(error).__name__}); mend datasets or parameters of that source"
        ) from None
