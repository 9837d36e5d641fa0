"""The process in which reward functions run: `python -m npd_ascend.rewards.child REWARD ...` (see sandbox.py)."""

import importlib
import json
import math
import os
import sys
from collections.abc import Sequence

from npd_ascend.rewards.functions import Answer, reward_of


def main(rewards: Sequence[str]) -> None:
    """The child: answers in, rewards out, until the parent closes the pipe."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a reward function prints must not be taken for a reward
    for package in {"math_verify", "reasoning_gym"} & set(rewards):
        importlib.import_module(package)
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        out.write(json.dumps(_all_rewards(rewards, Answer(**json.loads(line)))).encode() + b"\n")
        out.flush()


def _all_rewards(rewards: Sequence[str], answer: Answer) -> dict:
    values: dict[str, float] = {}
    for name in rewards:
        try:
            values[name] = reward_of(name, answer)
            if not math.isfinite(values[name]):
                raise ValueError(f"the reward is {values[name]}")
        except Exception as error:  # any of them is a result here: counted, named, and the answer leaves its group
            return {"rewards": None, "why": f"raised: {name}: {type(error).__name__}: {error}"[:500]}
    return {"rewards": values, "why": ""}


if __name__ == "__main__":
    main(sys.argv[1:])
