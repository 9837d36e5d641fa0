"""Disk, ports, clocks and vLLM of this host."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from npd_ascend.doctor.finding import Finding

_WRITTEN_MB, _LITTLE_GB = 64, 10
# stamps in shards and logs of several nodes are compared by eye; HCCL does not care
_SKEW_S = 1.0
_VLLM_TIMEOUT_S = 600


def disk_finding(folder: Path) -> Finding:
    """Room and speed of the disk that will hold `folder`."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    probe = place / f".npd-doctor-{os.getpid()}"
    try:
        started = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(_WRITTEN_MB):
                file.write(os.urandom(2**20))
            os.fsync(file.fileno())
        rate = _WRITTEN_MB * 2**20 / 1e6 / (time.perf_counter() - started)
    except OSError as error:
        return Finding("disk", "failed", f"{place}: {error}; set run.folder to a place that can be written")
    finally:
        probe.unlink(missing_ok=True)
    said = f"{place}: {free:.0f} GB free, {rate:.0f} MB/s"
    if free < _LITTLE_GB:
        return Finding("disk", "warning", f"{said}; `npd run --dry-run` says how much a run needs")
    return Finding("disk", "ok", said)


def port_finding() -> Finding:
    """The ports that ranks would listen on, from the variables that name them."""
    text = ",".join(os.environ.get(name, "") for name in ("MASTER_PORT", "HCCL_HOST_SOCKET_PORT_RANGE"))
    ranges = [tuple(map(int, part.split("-"))) for part in text.split(",") if re.fullmatch(r"\d+(-\d+)?", part)]
    if not ranges:
        return Finding("ports", "not applicable", "none is named; ranks of one host meet in a file")
    ports = [port for first, *last in ranges for port in range(first, (last[0] if last else first) + 1)]
    if taken := [port for port in ports if not _is_free(port)]:
        said = f"{len(taken)} of {len(ports)} are taken, such as {taken[0]}; end what listens there or name others"
        return Finding("ports", "warning" if len(taken) < len(ports) else "failed", said)
    return Finding("ports", "ok", f"all {len(ports)} are free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # what has just ended leaves a port that a server can take
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def clock_finding(folder: Path, host: str | None = None, now=time.time) -> Finding:
    """This node's clock against the file system's, and so against every node that has asked the same.

    Each leaves .npd-clock-<host> in `folder`, which all nodes see.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = host or socket.gethostname()
    own = folder / f".npd-clock-{host}"
    before = now()
    own.write_text("")  # the file system stamps it
    offset = (before + now()) / 2 - own.stat().st_mtime
    own.write_text(json.dumps(offset))
    others = {
        path.name.removeprefix(".npd-clock-"): float(path.read_text())
        for path in folder.glob(".npd-clock-*")
        if path != own and path.read_text()
    }
    late = {name: offset - other for name, other in others.items() if abs(offset - other) > _SKEW_S}
    if late:
        name, skew = next(iter(late.items()))
        return Finding("clocks", "warning", f"{skew:+.1f} s against {name}; let chrony or ntpd set both")
    if not others:
        return Finding("clocks", "ok", f"{offset:+.2f} s against {folder}; no other node has run this there yet")
    return Finding("clocks", "ok", f"within {_SKEW_S:g} s of {len(others)} other nodes that use {folder}")


def vllm_finding(dtype: str) -> Finding:
    """A tiny engine in a process of its own: vLLM changes threads and memory policy of the one it is in."""
    if find_spec("vllm") is None:
        return Finding("vLLM", "not applicable", "the package vllm is not installed; rollout.engine=hf needs none")
    command = [sys.executable, "-m", "npd_ascend.doctor.vllm_start", dtype]
    started = time.perf_counter()
    # a group of its own, so that nothing it has started is left where it hangs
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=_VLLM_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Finding("vLLM", "failed", f"no answer within {_VLLM_TIMEOUT_S} s; look at VLLM_LOGGING_LEVEL=DEBUG")
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        last = (err or out).strip().splitlines()[-1:] or ["no reason given"]
        return Finding("vLLM", "failed", f"{last[0][:240]}; compare vllm and vllm-ascend with the row of versions")
    return Finding("vLLM", "ok", f"{out.split()[-1]} answered, {time.perf_counter() - started:.0f} s in all")
