"""All checks as one table."""

from pathlib import Path
from typing import Literal

import torch

from npd_ascend.config import Config
from npd_ascend.device import NPU, open_device
from npd_ascend.doctor.collectives import collective_findings
from npd_ascend.doctor.compute import compute_findings
from npd_ascend.doctor.device import NO_NPU, device_findings, import_finding, run_npu_smi
from npd_ascend.doctor.finding import Finding
from npd_ascend.doctor.host import clock_finding, disk_finding, port_finding, vllm_finding
from npd_ascend.doctor.versions import driver_of_row, version_finding
from npd_ascend.errors import UserError
from npd_ascend.ranks import this_node


def run_doctor(config: Config | None) -> int:
    """Print what was found; 0, or 2 if something failed. config: whose layout, device and folder are looked at."""
    text = run_npu_smi()
    findings = examine(config, text)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print(f"{finding.check:{width}}  {finding.status:14}  {finding.detail}")
    return 2 if any(finding.status == "failed" for finding in findings) else 0


def examine(config: Config | None, npu_smi: str | None) -> list[Finding]:
    """npu_smi: of run_npu_smi. Later checks go on where earlier ones failed."""
    kind = config.device.kind if config else ("cpu" if npu_smi is None else NPU)
    folder = config.run.folder if config else Path("runs") / "doctor"
    # a run is about to take the cards; else they may well be at work
    if_busy: Literal["warning", "failed"] = "failed" if config and kind != "cpu" else "warning"
    findings = device_findings(npu_smi, if_busy, driver_of_row(f"requirements-{NPU}.txt"))
    if kind != NPU:
        # pyproject.toml allows other versions than those that the numbers were made with
        findings.append(version_finding("requirements.txt", "warning"))
    elif npu_smi is not None:
        findings.append(version_finding(f"requirements-{kind}.txt", "failed"))
    findings += _device_at_work(config, kind, npu_smi is None)
    # float32 is what tests compare with; on a card vLLM's attention wants half of it
    findings += [vllm_finding("float32" if kind == "cpu" else "bfloat16"), port_finding(), disk_finding(folder)]
    return [*findings, clock_finding(folder.parent)]


def _device_at_work(config: Config | None, kind: str, no_card: bool) -> list[Finding]:
    if kind == NPU and no_card:
        wanted = f"{config.run.name} wants device.kind={kind}; set it to cpu, or go to a machine that has one"
        return [
            Finding("device", "failed", wanted),
            *(
                Finding(check, "not applicable", NO_NPU)
                for check in ("versions", "product", "attention", "collectives")
            ),
        ]
    if kind == NPU and (failed := import_finding(f"torch_{kind}")):
        return [failed]
    try:
        device = open_device(kind, config.device.threads if config else 0)
    except UserError as error:
        return [Finding("device", "failed", str(error))]
    impls = ["sdpa", NPU] if kind == NPU else ["sdpa"]  # the fused one has the device's name
    if config and config.kernels.attention != "reference":
        impls.append(config.kernels.attention)
    tp, dp = (config.parallel.tp, config.parallel.dp) if config else (1, _all_ranks(device))
    return [*compute_findings(device, impls), *collective_findings(kind, tp, dp)]


def _all_ranks(device: torch.device) -> int:
    """Every card of every node, or two processes on CPU."""
    return this_node().count * (2 if device.type == "cpu" else torch.get_device_module(device).device_count())
