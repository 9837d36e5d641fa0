"""What the teacher says of rollouts, looked at before it is trained on."""

import numpy as np
import pytest

from npd_ascend.errors import UserError
from npd_ascend.records import Score
from npd_ascend.teacher.check import check_scores


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
