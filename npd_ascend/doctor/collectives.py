"""Sums over the groups of ranks that a run would have, in processes like its own, on all of its nodes.

python -m npd_ascend.doctor.collectives KIND TP DP      one rank; prints JSON
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
from npd_ascend.parallel.launch import die_with_parent, ranks_of
from npd_ascend.parallel.mesh import open_mesh, sum_over
from npd_ascend.ranks import Node, node_rank_environment, rank_environment, this_node

MEGABYTES, ROUNDS, TIMEOUT_S = 16, 5, 120
NODES_S = 600  # for the others to come as far


def collective_findings(kind: str, tp: int, dp: int) -> list[Finding]:
    """One finding per group that a rank of this node is in; a group that cannot be made is one finding for all.

    tp, dp: of the whole run. With several nodes all of them have to ask.
    """
    if tp * dp == 1:
        return [Finding("collectives", "not applicable", "a single rank (parallel.tp x parallel.dp = 1)")]
    node, command = this_node(), [sys.executable, "-m", "npd_ascend.doctor.collectives", kind, str(tp), str(dp)]
    patience_s = TIMEOUT_S if node.count == 1 else NODES_S
    with tempfile.TemporaryDirectory(prefix="npd-doctor-") as folder:
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | _environment(node, rank, tp * dp, folder),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=die_with_parent,
            )
            for rank in ranks_of(node, tp * dp)
        ]
        try:
            out, error = ranks[0].communicate(timeout=patience_s)
            failed = next((rank for rank in ranks if rank.wait(timeout=TIMEOUT_S)), None)
        except subprocess.TimeoutExpired:
            failed, out, error = ranks[0], "", f"no answer within {patience_s} s"
        finally:
            for rank in ranks:
                rank.kill()
    if failed:
        last = (error or failed.stderr.read()).strip().splitlines() or ["no reason given"]
        together = "start it on every node at about the same time, " if node.count > 1 else ""
        said = (
            f"{tp} x {dp} ranks: {last[-1][:200]}; {together}free the ports and NPUs of older runs, then docs/ascend.md"
        )
        return [Finding("collectives", "failed", said)]
    return [Finding(**finding) for finding in json.loads(out.splitlines()[-1])]


def _environment(node: Node, rank: int, world_size: int, folder: str) -> dict[str, str]:
    if node.count == 1:
        return rank_environment(rank, world_size, f"file://{folder}/store")
    # where `npd run` would keep its meeting place, which is not there yet
    return node_rank_environment(node, rank, world_size, 0) | {"NPD_RENDEZVOUS": f"tcp://{node.address}:{node.port}"}


def _rank(kind: str, tp: int, dp: int) -> None:
    device = open_device(kind, 1)
    with open_mesh(tp, dp, sequence_parallel=False, device=device, timeout_s=TIMEOUT_S) as mesh:
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
    _rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
