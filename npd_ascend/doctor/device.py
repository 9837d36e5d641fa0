"""Driver, CANN and NPUs, before anything of them is imported. Names devices, as npd_ascend/device.py does.

`npu-smi info` prints two lines per chip between bars. They were read from vllm-project/vllm-ascend issues #1767
(910B2, driver 24.1), #2035 and #12980 (A3, 24.1 and 26.0), #1047 (910ProB with two kinds of memory):

    | NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
    | Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |

Phy-ID is only there on machines with several chips per NPU, and power is `-` for all but the first of them.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from npd_ascend.doctor.finding import Finding

NO_NPU = "no NPU here (npu-smi not found)"
CHECKS = ("driver", "NPU health", "NPU memory", "visible NPUs", "CANN")
# what the driver itself holds; vllm-ascend#1767 and #2035 show up to 3,419 MB on idle chips
_IDLE_MB = 4000
_IMPORT_S = 300  # a cold disk and a large build
_BUS_ID = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")


@dataclass(frozen=True, slots=True)
class Chip:
    number: int  # as ASCEND_RT_VISIBLE_DEVICES counts
    name: str
    health: str
    used_mb: int
    total_mb: int


@dataclass(frozen=True, slots=True)
class Table:
    """What `npu-smi info` says."""

    driver: str
    chips: list[Chip]
    processes: list[tuple[int, str]]  # (process id, name)


def run_npu_smi() -> str | None:
    """The output of `npu-smi info`, its error where it failed, None where there is none."""
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return "npu-smi info did not answer within 60 s"
    return done.stdout or done.stderr


def import_finding(module: str) -> Finding | None:
    """None if a process of its own can import it: beside a build of torch that does not fit, it ends that process."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("device", "failed", f"`import {module}` did not come to an end within {_IMPORT_S} s")
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    how = f"`import {module}` ended with exit code {done.returncode}: {said}"
    return Finding("device", "failed", f"{how}; the traps in docs/ascend.md name the builds that do not go together")


def parse_npu_smi(text: str) -> Table:
    """ValueError if no chip is in it."""
    version = re.search(r"Version:\s*(\S+)", text)
    chips: list[Chip] = []
    processes: list[tuple[int, str]] = []
    before: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) >= 3 and _BUS_ID.fullmatch(cells[1]):
            chips.append(_chip(before, cells, len(chips)))
        elif len(cells) >= 4 and cells[1].isdigit():
            processes.append((int(cells[1]), cells[2]))
        before = cells
    if not chips:
        raise ValueError(" ".join(text.split())[:200] or "nothing")
    return Table(version.group(1) if version else "unknown", chips, processes)


def _chip(above: list[str], cells: list[str], index: int) -> Chip:
    used, total = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])[-1]
    return Chip(index, above[0].split()[-1], above[1], int(used), int(total))


def device_findings(
    text: str | None, if_busy: Literal["warning", "failed"] = "warning", row_driver: str | None = None
) -> list[Finding]:
    """text: of run_npu_smi. if_busy: what a visible card is with memory in use. row_driver: an older one is told."""
    if text is None:
        return [Finding(check, "not applicable", NO_NPU) for check in CHECKS]
    try:
        table = parse_npu_smi(text)
    except ValueError as error:
        said = f"npu-smi info shows no chip ({error}); install driver and firmware, or give the container its devices"
        return [Finding("driver", "failed", said)]
    return [
        _driver(table, row_driver),
        _health(_seen(table.chips)),
        _memory(table, if_busy),
        _visible(len(table.chips)),
        _cann(),
    ]


def _driver(table: Table, row_driver: str | None) -> Finding:
    said = f"{table.driver}, {len(table.chips)} chips, {table.chips[0].name}"
    if row_driver and _release(table.driver) < _release(row_driver):
        older = f"older than {row_driver}, on which others run the row of requirements-npu.txt"
        return Finding("driver", "warning", f"{said}; {older}; CANN's release note names the drivers it goes with")
    return Finding("driver", "ok", said)


def _release(version: str) -> list[int]:
    """24.1.rc2 and 24.1.0.3 are of one release."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def _health(chips: list[Chip]) -> Finding:
    ill = [f"chip {chip.number} {chip.health}" for chip in chips if chip.health != "OK"]
    if ill:
        said = f"{', '.join(ill)}; `npu-smi info -t health -i N` says why, ASCEND_RT_VISIBLE_DEVICES leaves it out"
        return Finding("NPU health", "failed", said)
    return Finding("NPU health", "ok", f"OK on all {len(chips)}")


def _seen(chips: list[Chip]) -> list[Chip]:
    """Those that a run would see; all where the variable names none of them, which is another finding."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return [chip for chip in chips if visible is None or chip.number in _numbers(visible)] or chips


def _memory(table: Table, if_busy: Literal["warning", "failed"]) -> Finding:
    chips = _seen(table.chips)
    busy = [chip for chip in chips if chip.used_mb > _IDLE_MB]
    if busy:
        who = ", ".join(f"{name} {pid}" for pid, name in table.processes) or "no process is named"
        said = (
            f"chip {busy[0].number} has {busy[0].used_mb} of {busy[0].total_mb} MB in use ({who}); end that first, or "
            f"leave the chip out with ASCEND_RT_VISIBLE_DEVICES"
        )
        return Finding("NPU memory", if_busy, said)
    free = min(chip.total_mb - chip.used_mb for chip in chips)
    return Finding("NPU memory", "ok", f"at least {free} of {chips[0].total_mb} MB free")


def _numbers(visible: str) -> list[int]:
    return [int(part) for part in visible.split(",") if part.isdigit()]


def _visible(count: int) -> Finding:
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is None:
        return Finding("visible NPUs", "ok", f"all {count}")
    numbers = _numbers(visible)
    if ",".join(map(str, numbers)) != visible or numbers != sorted(set(numbers)) or max(numbers, default=-1) >= count:
        said = (
            f"ASCEND_RT_VISIBLE_DEVICES={visible!r}: want rising numbers below {count} with commas and no blanks "
            f"between; what follows a mistake is not seen"
        )
        return Finding("visible NPUs", "failed", said)
    return Finding("visible NPUs", "ok", f"{len(numbers)} of {count}: {visible}")


def cann_version() -> str | None:
    """Of the installation that ASCEND_HOME_PATH names; found as torch_npu/utils/collect_env.py finds it."""
    home = os.environ.get("ASCEND_HOME_PATH")
    for path in sorted(Path(home).rglob("ascend_*_install.info")) if home else []:
        if found := re.search(r"^version=(\S+)", path.read_text(), re.MULTILINE):
            return found.group(1)
    return None


def _cann() -> Finding:
    if version := cann_version():
        return Finding("CANN", "ok", f"{version}, {os.environ['ASCEND_HOME_PATH']}")
    home = os.environ.get("ASCEND_HOME_PATH", "not set")
    return Finding("CANN", "failed", f"not found (ASCEND_HOME_PATH is {home}); `. launch/env_ascend.sh` in this shell")
