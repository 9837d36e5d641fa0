"""Who worked and who waited for whom, in a run with npd.stream or grpo."""

from collections.abc import Mapping, Sequence

# role -> (seconds of work, of bringing weights over, of waiting), each a sum over metrics, and whom it waits for
_ROLES = {
    "grpo": (("train/busy_s",), ("publish/busy_s",), ("train/wait_s",), "rollouts and rewards"),
    "grpo-reward": (("reward/busy_s",), (), ("reward/wait_s",), "rollouts"),
    "grpo-rollout": (
        ("rollout/busy_s",),
        ("rollout/load_s",),
        ("rollout/wait_s",),
        "trainer: rollouts would be too old",
    ),
    "rollout": (("rollout/busy_s",), ("rollout/load_s",), ("rollout/wait_s",), "trainer: rollouts would be too old"),
    "score": (("score/busy_s",), (), ("score/wait_s",), "rollouts"),
    "npd": (("train/busy_s",), ("publish/busy_s",), ("train/wait_s",), "rollouts and teacher"),
}


def busy_shares(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Process -> {"busy", "weights", "waited"} in seconds, and "waits_for". Empty where nothing ran side by side.

    Seconds that fit nowhere (starting, measuring held-out rollouts) are not in it.
    """
    if not any("train/wait_s" in row for row in rows):
        return {}
    found: dict[str, dict] = {}
    for row in rows:
        role = _ROLES.get(row["stage"].rstrip("0123456789").rstrip("-"))
        if role is None:
            continue
        busy, weights, waited, waits_for = role
        seconds = found.setdefault(row["stage"], {"busy": 0.0, "weights": 0.0, "waited": 0.0, "waits_for": waits_for})
        for key, names in (("busy", busy), ("weights", weights), ("waited", waited)):
            seconds[key] += sum(row.get(name, 0.0) for name in names)
    return found
