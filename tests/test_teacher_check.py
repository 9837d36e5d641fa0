"""What the teacher says of reference answers and of rollouts, looked at before it is trained on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFIGS

from npd_ascend.errors import UserError
from npd_ascend.model.load import load_decoder
from npd_ascend.records import Prompt, Score
from npd_ascend.teacher.check import check_scores, check_teacher
from npd_ascend.teacher.local import LocalScorer
from npd_ascend.tokenizer import ChatTokenizer

TEACHER = CONFIGS / "addition" / "teacher"


def _score(number: int, **changed: object) -> Score:
    fields: dict = {
        "sample_id": f"s{number}",
        "weight_version": 0,
        "teacher_topk_ids": np.zeros((3, 2), np.int32),
        "teacher_topk_logprobs": np.full((3, 2), -1.0, np.float32),
        "teacher_logprob": np.full(3, -1.0, np.float32),
        "teacher_entropy": 0.5,
        "teacher_loss": 1.0,
        "teacher_loss_alone": 2.0,
        "student_loss": 1.0,
        "student_loss_alone": 2.0,
    }
    return Score(**fields | changed)


def test_a_sound_teacher_passes():
    check_scores([_score(0), _score(1)], 100, "teacher")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["teacher_logprob", "teacher_topk_logprobs"])
def test_one_token_that_is_no_number_is_named_with_its_sample(field, value):
    damaged = getattr(_score(1), field).copy()
    damaged[1] = value
    with pytest.raises(UserError, match="teacher: s1: the teacher's log-probs are not numbers at 1 of 3 tokens"):
        check_scores([_score(0), _score(1, **{field: damaged})], 100, "teacher")


def test_an_entropy_that_is_no_number_is_named_with_its_sample():
    with pytest.raises(UserError, match="teacher: s1: the teacher's log-probs are not numbers"):
        check_scores([_score(0), _score(1, teacher_entropy=float("nan"))], 100, "teacher")


def test_a_teacher_near_uniform_is_refused():
    check_scores([_score(0, teacher_entropy=4.1)], 100, "teacher")  # ln(100) is 4.605
    with pytest.raises(UserError, match=r"entropy on 1 rollouts is 4\.20 nats/token"):
        check_scores([_score(0, teacher_entropy=4.2)], 100, "teacher")


class Mixing(LocalScorer):
    """Samples of one pack see each other: what a forgotten boundary would do, in one number."""

    def score(self, rows, *, top_k, pack_tokens):
        together = pack_tokens > 1
        scores = super().score(rows, top_k=top_k, pack_tokens=pack_tokens)
        return [
            replace(score, logprob_A=score.logprob_A - 0.01 * (i > 0 and together)) for i, score in enumerate(scores)
        ]


def ask(kind: type[LocalScorer]) -> str:
    tokenizer = ChatTokenizer(TEACHER)
    sums = [(a, 1000 - a - 7) for a in range(100, 110)]
    prompts = [
        Prompt(prompt_id=f"{a}", text="", token_ids=tokenizer.encode_prompt(f"{a}+{b}"), answer=str(a + b))
        for a, b in sums
    ]
    scorer = kind(load_decoder(TEACHER, dtype=torch.float32, device=torch.device("cpu")), tokenizer.vocab_size)
    return check_teacher(
        scorer, prompts, tokenizer, dtype="float32", vocab_size=tokenizer.vocab_size, pack_tokens=256, name="teacher"
    )


def test_a_teacher_that_disagrees_with_itself_is_refused():
    assert "nats/token on 10 reference answers" in ask(LocalScorer)
    with pytest.raises(UserError, match=r"disagrees with itself by 0\.01 nats between two packings"):
        ask(Mixing)
