"""Progress of long stages: a bar on a terminal, a line every ten seconds in a log."""

import sys

from tqdm import tqdm


def progress(description: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> tqdm:
    """A tqdm bar on stderr; `done` of `total` were finished by an earlier process, `shown` by one rank only."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=f" {unit}",
        file=sys.stderr,
        ncols=100,
        disable=not shown,
        mininterval=0.2 if terminal else 10,
        maxinterval=1 if terminal else 20,
    )
