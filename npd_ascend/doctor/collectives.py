"""Sums over the groups of ranks that a run would have, in processes like its own, on all of its nodes.

python -m npd_ascend.doctor.collectives KIND TP DP SECONDS      one rank; prints JSON
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from npd_ascend.device import open_device
from npd_ascend.doctor.finding import Finding
from npd_ascend.errors import UserError
from npd_ascend.parallel.launch import die_with_parent, ranks_of
from npd_ascend.parallel.mesh import open_mesh, sum_over
from npd_ascend.ranks import Node, node_rank_environment, rank_environment, this_node

MEGABYTES, ROUNDS, TIMEOUT_S = 16, 5, 120
NODES_S = 600  # for the others to come as far


def collective_findings(kind: str, tp: int, dp: int) -> list[Finding]:
    """One finding per kind of group, of all the ranks of this node; a group that cannot be made is one for all.

    tp, dp: of the whole run. With several nodes all of them have to ask.
    """
    if tp * dp == 1:
        return [Finding("collectives", "not applicable", "a single rank (parallel.tp x parallel.dp = 1)")]
    node = this_node()
    patience_s = TIMEOUT_S if node.count == 1 else NODES_S
    command = [sys.executable, "-m", "npd_ascend.doctor.collectives", kind, str(tp), str(dp), str(patience_s)]
    try:
        of_ranks = _ask_ranks(command, node, tp * dp, patience_s + TIMEOUT_S)
    except UserError as error:
        return [Finding("collectives", "failed", str(error))]
    # of every kind of group the first that failed, else that of the first rank
    return [min(findings, key=lambda finding: finding.status != "failed") for findings in zip(*of_ranks, strict=True)]


def _ask_ranks(command: list[str], node: Node, world_size: int, timeout_s: int) -> list[list[Finding]]:
    """What the ranks of this node found; UserError if one of them did not come to an end."""
    pipe, found = subprocess.PIPE, []
    with tempfile.TemporaryDirectory(prefix="npd-doctor-") as folder:
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | _environment(node, rank, world_size, folder),
                stdout=pipe,
                stderr=pipe,
                text=True,
                preexec_fn=die_with_parent,
            )
            for rank in ranks_of(node, world_size)
        ]
        try:
            for rank in ranks:
                out, error = rank.communicate(timeout=timeout_s)
                if rank.returncode:
                    raise UserError(_why(error, node, world_size))
                found.append([Finding(**finding) for finding in json.loads(out.splitlines()[-1])])
        except subprocess.TimeoutExpired:
            raise UserError(_why(f"no answer within {timeout_s} s", node, world_size)) from None
        finally:
            for rank in ranks:
                rank.kill()
    return found


def _why(error: str, node: Node, world_size: int) -> str:
    last = (error.strip().splitlines() or ["no reason given"])[-1][:200]
    together = "start it on every node at about the same time, " if node.count > 1 else ""
    return f"{world_size} ranks: {last}; {together}free the ports and NPUs of older runs, then docs/ascend.md"


def _environment(node: Node, rank: int, world_size: int, folder: str) -> dict[str, str]:
    if node.count == 1:
        return rank_environment(rank, world_size, f"file://{folder}/store")
    # where `npd run` would keep its meeting place, which is not there yet
    return node_rank_environment(node, rank, world_size, 0) | {"NPD_RENDEZVOUS": f"tcp://{node.address}:{node.port}"}


def _rank(kind: str, tp: int, dp: int, timeout_s: int) -> None:
    device = open_device(kind, 1)
    with open_mesh(tp, dp, sequence_parallel=False, device=device, timeout_s=timeout_s) as mesh:
        groups = [("tp", mesh.tp_group, tp), ("dp", mesh.dp_group, dp)]
        findings = [_measure(name, group, size, device) for name, group, size in groups if group]
        print(json.dumps(findings))


def _measure(name: str, group, size: int, device: torch.device) -> dict[str, str]:
    """A ring moves 2 (n-1)/n of the bytes of an all-reduce over each link."""
    check = f"all_reduce over {name}={size}"
    sent = torch.arange(MEGABYTES * 2**18, device=device, dtype=torch.float32) % 251
    seconds = []
    for _ in range(ROUNDS):
        values = sent.clone()
        values[0].item()  # the device is done
        started = time.perf_counter()
        sum_over(values, group)
        values[0].item()
        seconds.append(time.perf_counter() - started)
    if not torch.equal(values, size * sent):
        detail = f"wrong sums of {MEGABYTES} MiB; check the links with hccn_tool, then the row of versions"
        return {"check": check, "status": "failed", "detail": detail}
    rate = 2 * (size - 1) / size * MEGABYTES * 2**20 / min(seconds) / 1e9
    return {"check": check, "status": "ok", "detail": f"{MEGABYTES} MiB, {rate:.1f} GB/s over each link"}


if __name__ == "__main__":
    _rank(sys.argv[1], *map(int, sys.argv[2:]))
