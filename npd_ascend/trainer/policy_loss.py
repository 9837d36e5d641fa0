"""GRPO's loss of one token, and the advantage of an answer within its group.

DeepSeekMath (arXiv 2402.03300, section 4.1): with r the probability of the sampled token over what it was when it was
generated, Â the advantage, ref the student at the start of the stage,
    L = -min(r·Â, clip(r, 1-clip_low, 1+clip_high)·Â) + kl_weight·k3,   k3 = π_ref/π - log(π_ref/π) - 1
The clip is PPO's (arXiv 1707.06347); limits that differ are DAPO's (arXiv 2503.14476).

Dimensions: A answer tokens of a pack.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from npd_ascend.config import GrpoConfig

# rewards that differ by less are equal: what is left is rounding, and the division would blow it up
_EQUAL = 1e-6


def watched_names(config: GrpoConfig) -> tuple[str, ...]:
    """What policy_loss sums beside the loss, in its order: names in npd_ascend/metrics.py, '/' written as '__'."""
    return ("grpo__clipped", "grpo__entropy", "train__drift", *(["grpo__kl"] if config.kl_weight > 0 else []))


@dataclass(frozen=True, slots=True)
class PolicyTargets:
    """What the loss of a pack needs beside the student's own log-probs; all float32 [A]."""

    advantage_A: torch.Tensor
    generator_logprobs_A: torch.Tensor  # of the sampled tokens, as the generator recorded them
    reference_logprobs_A: torch.Tensor | None = None  # None where kl_weight is 0


def group_advantages(rewards: Sequence[float | None]) -> list[float | None]:
    """(r - mean) / std over the known rewards of one group; std is that of the group (divided by its count).

    None: no reward is known of this answer. All None if fewer than two are known or if all of them are equal: such a
    group says nothing about which answer is better, and is left out.
    """
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2 or max(known) - min(known) < _EQUAL:
        return [None] * len(rewards)
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / len(known))
    return [None if reward is None else (reward - mean) / std for reward in rewards]


def policy_loss(
    logprobs_A: torch.Tensor, targets: PolicyTargets, config: GrpoConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_A, sums_W): each token's loss with its gradient; sums over the tokens by watched_names, detached.

    logprobs_A: the student's, of the sampled tokens, nats, temperature 1, full vocabulary.
    """
    log_ratio_A = logprobs_A - targets.generator_logprobs_A
    ratio_A, advantage_A = log_ratio_A.exp(), targets.advantage_A
    free_A = ratio_A * advantage_A
    clipped_A = ratio_A.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage_A
    loss_A = -torch.minimum(free_A, clipped_A)
    drift_A = ratio_A * log_ratio_A - torch.expm1(log_ratio_A)
    watched = [(clipped_A < free_A).float(), -logprobs_A, drift_A]
    if config.kl_weight > 0:
        log_reference_ratio_A = targets.reference_logprobs_A - logprobs_A
        kl_A = torch.expm1(log_reference_ratio_A) - log_reference_ratio_A
        loss_A = loss_A + config.kl_weight * kl_A
        watched.append(kl_A)
    return loss_A, torch.stack([value_A.detach().sum() for value_A in watched])
