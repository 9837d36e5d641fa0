"""Δ-IFD and the free filters on numbers worked by hand; every rollout gets exactly one reason."""

import math
import re
from dataclasses import replace

import pytest
from test_stream import rollout, score

from npd_ascend.config import Config, FilterConfig
from npd_ascend.filters import REASONS, decide, free_reasons
from npd_ascend.filters.ifd import ifd, ifd_reason
from npd_ascend.filters.simple import repetition


def test_both_forms_by_hand():
    assert ifd(1.0, 4.0, "loss") == 0.25
    assert ifd(1.0, 4.0, "perplexity") == pytest.approx(math.exp(-3))
    assert math.isnan(ifd(1.0, 0.0, "loss"))
    assert ifd(800.0, 0.0, "perplexity") == math.inf


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (0.0, "kept"),
        (0.8, "kept"),
        (0.8000001, "ifd_above_tau"),
        (-1e-9, "ifd_below_zero"),
        (math.nan, "ifd_undefined"),
        (math.inf, "ifd_undefined"),
    ],
)
def test_both_ends_of_the_interval_are_kept(delta, reason):
    assert ifd_reason(delta, 0.8, drop_below_zero=True) == reason


def test_either_end_may_be_open():
    assert ifd_reason(-3.0, 0.8, drop_below_zero=False) == "kept"
    assert ifd_reason(3.0, 0.8, drop_below_zero=False) == "ifd_above_tau"
    assert ifd_reason(3.0, None, drop_below_zero=True) == "kept"
    assert ifd_reason(-3.0, None, drop_below_zero=True) == "ifd_below_zero"
    assert ifd_reason(math.nan, None, drop_below_zero=False) == "kept"
    assert ifd_reason(math.nan, None, drop_below_zero=True) == "ifd_undefined"


def _decided(teacher_losses, **filters):
    """Decisions for rollouts whose Δ in loss form is teacher_loss / 2 - 0.25."""
    rollouts = [rollout(i) for i in range(len(teacher_losses))]
    scores = {r.sample_id: replace(score(i), teacher_loss=teacher_losses[i]) for i, r in enumerate(rollouts)}
    return decide(rollouts, scores, {}, FilterConfig(**filters))


def test_absolute_and_quantile_limits():
    losses = [0.1, 0.5, 1.0, 1.5, 2.0, 4.0]  # Δ: -0.2, 0, 0.25, 0.5, 0.75, 1.75
    assert [d.reason for d in _decided(losses)] == ["ifd_below_zero", "kept", "kept", "kept", "kept", "ifd_above_tau"]
    lowest = [d.kept for d in _decided(losses, tau_mode="quantile", tau=0.5)]
    assert lowest == [False, True, True, True, False, False]  # 0.5-quantile of 0, 0.25, 0.5, 0.75, 1.75 is 0.5
    assert all(d.kept for d in _decided(losses, drop_below_zero=False, tau=None))
    both = [d.kept for d in _decided(losses, drop_below_zero=False, tau_mode="quantile", tau=0.8)]
    assert both == [True, True, True, True, True, False]


def test_free_filters_name_their_reason_and_spare_the_heldout():
    repeated = rollout(3, token_ids=(0, 1) + (5, 6) * 20, logprobs=score(0, 40).teacher_logprob)
    cases = {
        "truncated": rollout(0, finish_reason="length"),
        "too_short": rollout(1, 1),
        "too_long": rollout(2, 50),
        "repetition": repeated,
    }
    filters = FilterConfig(drop_truncated=True, min_answer_tokens=2, max_tokens=45, max_repetition=0.5)
    again = replace(rollout(4), sample_id="p4/v0/1")
    rows = [*cases.values(), rollout(4), again, rollout(5, 1, heldout=True)]
    dropped = free_reasons(rows, filters, pack_tokens=64)
    assert dropped == {row.sample_id: reason for reason, row in cases.items()} | {"p4/v0/1": "duplicate"}
    assert set(dropped.values()) < REASONS.keys()
    assert free_reasons([rollout(2, 63)], FilterConfig(), pack_tokens=64) == {"p2/v0/0": "too_long"}


def test_every_rollout_gets_one_decision_and_the_heldout_is_never_trained_on():
    rows = [rollout(0), rollout(1, heldout=True), rollout(2)]
    scores = {row.sample_id: score(i) for i, row in enumerate(rows[:2])}
    decisions = decide(rows, scores, {"p2/v0/0": "truncated"}, FilterConfig())
    assert [d.reason for d in decisions] == ["kept", "heldout", "truncated"]
    assert [d.ifd_delta for d in decisions] == [0.25, 0.25, None]


def test_every_reason_names_the_setting_that_another_run_would_change():
    schema = Config.model_json_schema()["$defs"]
    sections = {"filters": "FilterConfig", "npd": "NpdConfig", "rollout": "RolloutConfig"}
    for reason in REASONS.keys() - {"heldout", "kept"}:
        named = re.findall(r"\b(filters|npd|rollout)\.(\w+)", REASONS[reason])
        assert named, reason
        for section, key in named:
            assert key in schema[sections[section]]["properties"], reason


def test_repetition_counts_repeated_eight_grams():
    assert repetition(range(20)) == 0
    assert repetition([1] * 9) == 0.5
    assert repetition([1] * 5) == 0
