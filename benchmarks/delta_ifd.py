"""What the Δ-IFD filter has to go by in a recorded stream: how sure both models are of the answers.

    python benchmarks/delta_ifd.py [RUN]            default: runs/addition_cpu

For every set of answers but the held-out ones: mean losses of both models on the answers alone; the shares with Δ < 0
and Δ > 0.8; the share that the teacher is sure of (below 0.05 nats per token), and of those the share with Δ < 0; what
the stated rule 0 ≤ Δ ≤ 0.8 keeps of all, and of those.
"""

import sys

import numpy as np

from npd_ascend.stream import read_table

SURE = 0.05
LOSSES = ("teacher_loss", "teacher_loss_alone", "student_loss", "student_loss_alone")


def main() -> None:
    table = read_table(sys.argv[1] if len(sys.argv) > 1 else "runs/addition_cpu")
    trained = ~table["heldout"].to_numpy(zero_copy_only=False).astype(bool)
    versions = table["weight_version"].to_numpy()
    for version in np.unique(versions[trained]):
        rows = trained & (versions == version)
        _print(version, {name: table[name].to_numpy()[rows] for name in LOSSES})


def _print(version: int, answers: dict[str, np.ndarray]) -> None:
    delta = answers["teacher_loss"] / answers["teacher_loss_alone"]
    delta = delta - answers["student_loss"] / answers["student_loss_alone"]
    sure, kept = answers["teacher_loss"] < SURE, (delta >= 0) & (delta <= 0.8)
    print(f"answers of version {version}: {len(delta):,}")
    for role in ("teacher", "student"):
        print(f"  {role}, without the question: {answers[role + '_loss_alone'].mean():.2f} nats per token")
    print(f"  Δ < 0: {(delta < 0).mean():.1%}, Δ > 0.8: {(delta > 0.8).mean():.1%}")
    print(f"  the teacher is sure of {sure.mean():.1%}; of these {(delta[sure] < 0).mean():.1%} have Δ < 0")
    print(f"  0 ≤ Δ ≤ 0.8 keeps {kept.mean():.1%}, of those that the teacher is sure of {kept[sure].mean():.1%}")


if __name__ == "__main__":
    main()
