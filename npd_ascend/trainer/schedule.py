"""Learning rate as a function of progress through all epochs, so that a refresh does not restart it."""

import math

from npd_ascend.config import OptimizerConfig


def learning_rate(progress: float, step: int, config: OptimizerConfig) -> float:
    """Cosine from lr to min_lr over progress 0..1, times a linear warm-up over the first steps.

    Progress counts epochs, not steps: after a refresh the number of packs is another one.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return warmup * (config.min_lr + (config.lr - config.min_lr) * cosine)
