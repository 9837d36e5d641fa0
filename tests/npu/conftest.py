"""Tests that need an NPU. `bash tests/npu/run.sh` runs them and writes what to send back; see docs/ascend.md.

Without a card they are skipped with the reason. What each test measured goes into a JSON file.
"""

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from npd_ascend.device import NPU, open_device
from npd_ascend.doctor.device import NO_NPU, cann_version, parse_npu_smi, run_npu_smi
from npd_ascend.doctor.versions import ROOT, read_row
from npd_ascend.errors import UserError

RESULTS = pytest.StashKey[dict]()


def _why_not() -> str | None:
    if run_npu_smi() is None:
        return NO_NPU
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1, as the other tests set it; run `bash tests/npu/run.sh`"
    try:
        open_device(NPU, 0)
    except UserError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if Path(__file__).parent in Path(item.path).parents]
    reason = _why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.npu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config):
    config.stash[RESULTS] = {}


@pytest.fixture(scope="session")
def card() -> torch.device:
    return open_device(NPU, 0)


@pytest.fixture
def check(request):
    """Record every row of a body and fail for those that are too far off."""
    started = time.perf_counter()

    def judge(rows):
        found = {row.name: {"error": row.error, "allowed": row.allowed} for row in rows}
        request.config.stash[RESULTS][request.node.name] = {
            "seconds": time.perf_counter() - started,
            "passed": all(row.passed for row in rows),
            "errors": found,
        }
        bad = [f"{row.name}: {row.error:.2e} > {row.allowed:.2e}" for row in rows if not row.passed]
        assert not bad, "; ".join(bad)

    return judge


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that raised has no errors to record, but a reason."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.failed and "npu" in item.keywords:
        said = " ".join(str(call.excinfo.value).split())[:500]
        item.config.stash[RESULTS].setdefault(item.name, {"passed": False, "raised": said})


def pytest_sessionfinish(session):
    path = os.environ.get("NPD_NPU_RESULTS")
    if path and session.config.stash[RESULTS]:
        Path(path).write_text(json.dumps(_about_this_machine() | {"tests": session.config.stash[RESULTS]}, indent=1))


_VARIABLES = ("HCCL_", "ASCEND_RT_", "PYTORCH_NPU", "TASK_QUEUE", "CPU_AFFINITY")


def _about_this_machine() -> dict:
    table = parse_npu_smi(run_npu_smi())
    versions: dict[str, str | None] = {}
    for name, _, _ in read_row(ROOT / "requirements-npu.txt"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "card": table.chips[0].name,
        "chips": len(table.chips),
        "driver": table.driver,
        "cann": cann_version(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    }
