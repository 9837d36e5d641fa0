"""`npd ...` as tests call it: in a process of its own, or here, where all is imported that takes it four seconds.

What starts, kills or watches processes, and what reads a log from stderr, wants the former.
"""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from npd_ascend.__main__ import main


def npd(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "npd_ascend", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def npd_here(*words: str | Path) -> subprocess.CompletedProcess:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
