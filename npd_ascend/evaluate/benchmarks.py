"""The paper's eleven benchmarks as tasks of lm-eval, and the scores that others have published on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npd_ascend.evaluate.drop import better_reading

TASKS = Path(__file__).parent / "tasks"  # definitions of our own, for what lm-eval lacks


@dataclass(frozen=True, slots=True)
class Benchmark:
    """task, metric and filter: as lm-eval 0.4.13 names them; metric is a mean over questions, in 0..1. folder: where it
    is defined, among lm-eval's tasks or our own.

    split: which one is asked, for data in a single file. fields: what every row must have. grouped: the
    task is a group of many, one per subject, and its data are a folder. own_shots: the examples stand in the task, so
    they need no data. runs_code: answers are executed on this machine. changes: of the task's definition, where that of
    lm-eval misses right answers; usable with its own command in a file that includes the task.
    """

    title: str
    task: str
    folder: Path | str
    metric: str
    filter: str
    named: str  # the metric as the model cards name it
    split: str
    fields: tuple[str, ...]
    grouped: bool = False
    own_shots: bool = False
    runs_code: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named_changes(self) -> dict[str, Any]:
        """JSON; functions as a file for lm-eval's own command names them."""
        return {
            key: f"!function {value.__module__}.{value.__qualname__}" if callable(value) else value
            for key, value in self.changes.items()
        }


def _extract(name: str, kind: str, pattern: str, **more: Any) -> list[dict]:
    found = {"function": kind, "regex_pattern": pattern, **more}
    return [{"name": name, "filter": [found, {"function": "take_first"}]}]


# lm-eval puts ``` before the answer and takes its first word for the language of the block, so that `def f` becomes
# ` f`: of the reference solutions 1 in 500 passes (its issue 3447). Here the program ends where the block does, and may
# open one itself, after words too if it names Python: a ``` without a name ends the block that the prompt has opened.
_MBPP = {
    "filter_list": _extract(
        "program",
        "regex",
        r"(?s)\A(?:\s*```[^\n`]*\n|(?:(?!```).)*```[ \t]*(?i:py)[^\n`]*\n)?(.*?)(?:```|\Z)",
    ),
    # one test in a hundred needs what is set up before it
    "doc_to_target": "{% if is_fewshot is defined %}{{code}}\n```{% else %}"
    "{{test_setup_code|default('')}}\n{{test_list|join('\n')}}{% endif %}",
}
# lm-eval stops at the first full stop, also that of 3.5 or of J. P. Losman, and its examples answer with the names of
# the data's columns (its issue 2137). Here the first line counts, without what introduces it and without its full stop,
# and may name several spans.
_DROP = {
    "doc_to_target": "{{answers[0]|join(', ')}}",
    "generation_kwargs": {"until": [], "do_sample": False},
    "filter_list": _extract("line", "regex", r"\A\s*(?i:the answer is:?|answer:)?\s*(.*?)\.?[ \t]*(?:\n|\Z)"),
    "process_results": better_reading,
}
# lm-eval takes the last letter in brackets, also one that was ruled out, and its prompt asks for no form: **B** and
# \boxed{B} are lost. Here a letter that is said to be the answer counts above one in bold, and that above one in
# brackets or in "option B is correct", of which the last counts. Neither D-type nor the word in "A value" is a letter.
_LETTER = r"(?i:(?:option|choice) )?\(?(A(?! (?!(?:because|since|as|and|for|with)\b)[a-z])|[B-D])(?![\w-])"
# "it is not true that the answer is A" says no letter; "statement 2 is false, the answer is A" does
_DENIALS = (
    *(f"{words} that" for words in ("not true", "n't true", "false", "not the case", "not sure", "n't sure")),
    *(f"{no} {verb}{that}" for no in ("not", "n't") for verb in ("think", "believe") for that in (" that", "")),
)
_DENIED = "".join(
    f"(?<!{denial}{words})" for denial in _DENIALS for words in (" ", " the ", " the correct ", " the right ")
)
_SAID = rf"(?:\\boxed\{{|{_DENIED}(?i:answer(?: is|\W*:)|(?:option|choice) is))(?:\\(?:text|math)\w*\{{|\W)*" + _LETTER
_LAST_LINE = r"^[^\w\n]*([A-D])\W*\Z"
# not where it is correct "only if"
_CORRECT = (
    _DENIED + r"(?i:option|choice|answer) \(?([A-D])\)? is (?:the )?"
    r"(?:correct|right|best|answer)(?: (?:answer|option|choice|one))?(?=[.!]|\s*(?:\n|\Z)|,? (?:because|since|as)\b)"
)
_GPQA = {
    "filter_list": _extract(
        "letter",
        "multi_choice_regex",
        rf"(?ms)\A(?:.*(?:{_SAID}|{_LAST_LINE})|.*\*\*{_LETTER}|.*(?:{_CORRECT}|\(([A-D])\)))",
        ignore_case=True,  # of the choices' texts, where no letter is found
        ignore_punctuation=True,
    ),
}


def _choice(
    title: str, task: str, folder: Path | str, *, split: str, fields: tuple[str, ...], grouped: bool = True
) -> Benchmark:
    return Benchmark(title, task, folder, "acc", "none", "Acc", split, fields, grouped)


# The cards and the paper name benchmark and metric; the task and its prompt are our choice (docs/eval.md).
BENCHMARKS = {
    "mmlu": _choice("MMLU", "mmlu", "mmlu/default", split="test", fields=("question", "choices", "answer")),
    "cmmlu": _choice("CMMLU", "cmmlu", "cmmlu", split="test", fields=("Question", *"ABCD", "Answer")),
    "ceval": _choice("C-Eval", "ceval-valid", "ceval", split="val", fields=("question", *"ABCD", "answer")),
    "ifeval": Benchmark(
        "IF-Eval",
        "ifeval",
        "ifeval",
        "prompt_level_strict_acc",
        "none",
        "Prompt Strict",
        "train",
        ("key", "prompt", "instruction_id_list", "kwargs"),
    ),
    "cluewsc": _choice(
        "CLUEWSC", "cluewsc", TASKS, split="validation", fields=("text", "target", "label"), grouped=False
    ),
    "gsm8k": Benchmark(
        "GSM8K", "gsm8k", "gsm8k", "exact_match", "flexible-extract", "Acc", "test", ("question", "answer")
    ),
    "math500": Benchmark(
        "MATH-500",
        "minerva_math500",
        "minerva_math",
        "math_verify",
        "none",
        "Acc",
        "test",
        ("problem", "solution"),
        own_shots=True,
    ),
    "drop": Benchmark(
        "DROP",
        "drop",
        "drop",
        "f1",
        "line",
        "F1",
        "validation",
        ("query_id", "passage", "question", "answer", "validated_answers"),
        changes=_DROP,
    ),
    "gpqa_diamond": Benchmark(
        "GPQA-Diamond",
        "gpqa_diamond_cot_zeroshot",
        "gpqa/cot_zeroshot",
        "exact_match",
        "letter",
        "Pass@1",
        "train",
        ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))),
        changes=_GPQA,
    ),
    "mbpp": Benchmark(
        "MBPP",
        "mbpp_instruct",
        "mbpp",
        "pass_at_1",
        "program",
        "Pass@1",
        "test",
        ("text", "test_list"),
        own_shots=True,
        runs_code=True,
        changes=_MBPP,
    ),
    "humaneval": Benchmark(
        "HumanEval",
        "humaneval_instruct",
        "humaneval",
        "pass@1",
        "create_test",
        "Pass@1",
        "test",
        ("prompt", "test", "entry_point"),
        runs_code=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Published:
    """Scores in percent by benchmark; what was not found is not there. average: of the eleven."""

    name: str
    scores: dict[str, float]
    average: float | None
    source: str


PUBLISHED = (
    Published(
        "1B V1.0",
        {
            "mmlu": 60.72,
            "cmmlu": 51.99,
            "ceval": 60.98,
            "ifeval": 56.56,
            "cluewsc": 68.55,
            "gsm8k": 66.72,
            "math500": 52.00,
            "drop": 50.31,
            "mbpp": 54.09,
            "humaneval": 56.71,
        },
        None,
        "openPangu-Embedded-1B V1.0: its model card, fast thinking; ten benchmarks, no average of eleven",
    ),
    Published(
        "1B V1.1",
        {"gsm8k": 82.76, "math500": 81.83},
        63.90,
        "openPangu-Embedded-1B V1.1: press report of September 2025 on arXiv 2509.26497, second-hand; it says "
        "MATH, not MATH-500, and does not say of which benchmarks 63.90 is the average",
    ),
    Published("SFT", {}, 56.28, "openPangu 1B after SFT: paper (arXiv 2605.05940), main table"),
    Published("NPD", {"math500": 72.60}, 64.37, "openPangu 1B after NPD: paper, main table"),
    Published(
        "NPD+GRPO",
        {
            "math500": 84.76,
            "cmmlu": 56.53,
            "ceval": 67.13,
            "drop": 69.18,
            "ifeval": 65.43,
            "gpqa_diamond": 50.51,
        },
        68.73,
        "openPangu 1B after NPD and 300 steps of GRPO: paper, main table; by benchmark from wizwand.com's page of it",
    ),
    Published("Qwen3-1.7B", {}, 63.69, "Qwen3-1.7B: paper, main table"),
)
