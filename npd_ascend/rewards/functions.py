"""Every reward function: the text of an answer and what is known of the problem in, a number out.

A function may raise or take for ever; who calls it counts that (rewards/sandbox.py). Most rewards are 0 or 1;
reasoning-gym's scorers give shares in between. Imported by a process without torch, which must start quickly.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from npd_ascend.errors import UserError

# reward -> (package, requirements file) that it needs
_PACKAGES = {"math_verify": "math_verify", "reasoning_gym": "reasoning_gym"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a reward function may look at."""

    text: str  # the answer, without special tokens and without the thought before it
    whole_text: str  # with the thought
    reference: str | None  # the problem's reference answer
    prompt_id: str  # role:source:...; of a reasoning-gym problem the row stands at its end
    dataset: dict[str, Any] | None  # of reasoning-gym: arguments of its create_dataset
    format: str | None  # grpo.format


def reward_of(name: str, answer: Answer) -> float:
    """The reward `name` of one answer; raises whatever the function raises."""
    match name:
        case "exact_match":
            return exact_match(answer.text, answer.reference)
        case "math_verify":
            return math_verify_match(answer.text, answer.reference)
        case "reasoning_gym":
            return reasoning_gym_score(answer.text, answer.prompt_id, answer.dataset)
        case "format":
            return format_match(answer.whole_text, answer.format)
    raise ValueError(f"no reward function {name!r}")


def exact_match(text: str, reference: str) -> float:
    """1 for the reference answer, white space around it aside: what evaluate/exact_match.py counts."""
    return float(text.strip() == reference.strip())


def math_verify_match(text: str, reference: str) -> float:
    """1 if math-verify finds the two mathematically equal; `reference` is LaTeX or a number without $ around it.

    Its own time limits are off: they need signals of the main thread, and the caller has one that always works. What
    it stumbles over is raised and not taken for wrong.
    """
    from math_verify import parse, verify

    gold = parse(f"${reference}$", parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
    given = parse(text, parsing_timeout=None, raise_on_error=True)
    return float(verify(gold, given, timeout_seconds=None, raise_on_error=True))


def format_match(whole_text: str, pattern: str) -> float:
    """1 if the regular expression matches the whole answer, thought included; `.` matches line breaks too."""
    return float(re.fullmatch(pattern, whole_text.strip(), re.DOTALL) is not None)


def reasoning_gym_score(text: str, prompt_id: str, arguments: dict[str, Any]) -> float:
    """0 to 1, by the scorer of the data set that the problem is from (npd_ascend/prompts.py makes the id)."""
    dataset, row = _reasoning_gym_dataset(json.dumps(arguments)), int(prompt_id.rpartition(":")[2])
    return float(dataset.score_answer(answer=text.strip(), entry=dataset[row]))


@cache
def _reasoning_gym_dataset(arguments: str):
    """Made once: some read a file of many words."""
    import reasoning_gym

    return reasoning_gym.create_dataset(**json.loads(arguments))


def check_installed(names) -> None:
    """UserError for a reward whose package is not there."""
    for name in names:
        if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"grpo.rewards: {name} is not installed; pip install -r requirements-rewards.txt, "
                f"or choose another reward"
            )
