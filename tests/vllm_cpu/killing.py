"""Killing a process that generates, in the middle of a shard."""

import subprocess
import time
from pathlib import Path

from npd_ascend.rollout.journal import read_journal


def kill_in_shard(command: list[str], journal: Path, answers: int, said: Path) -> None:
    """Run `command` until `journal` has so many answers, then SIGKILL. said: for what it prints."""
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None and len(read_journal(journal)[1]) < answers:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9, said.read_text()
