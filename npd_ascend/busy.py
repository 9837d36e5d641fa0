"""Who worked and who waited for whom, and what new weights cost, in a run with npd.stream or grpo."""

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


# metric -> what the time goes to
_SYNC = {
    "publish/busy_s": "trainer: checkpoint, canary, gathering, writing",
    "sync/gather_s": "… of it, the copy in memory",
    "rollout/load_s": "generator stands still",
    "sync/wait_s": "… of it, until the trainer sends",
    "sync/transfer_s": "… transfer, checksums",
    "sync/load_s": "… into the model",
    "sync/reset_s": "… prefix cache reset",
}


def sync_split(rows: Sequence[Mapping]) -> list[dict]:
    """Seconds that a new version took: {"what", "count", "mean", "most"} of every part that was measured.

    The first weights of a process are left out: its engine started with them.
    """
    found: dict[str, list[float]] = {name: [] for name in _SYNC}
    started: set[str] = set()
    for row in rows:
        for name in _SYNC.keys() & row.keys():
            if name != "rollout/load_s" or (row[name] and row["stage"] in started):
                found[name].append(row[name])
        if row.get("rollout/load_s"):
            started.add(row["stage"])
    return [
        {"what": _SYNC[name], "count": len(values), "mean": sum(values) / len(values), "most": max(values)}
        for name, values in found.items()
        if values
    ]
