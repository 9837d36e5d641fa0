"""The student as a Hugging Face folder, a weight version or the final one."""

import json
from collections.abc import Sequence
from pathlib import Path

from npd_ascend.durable import commit_folder, sha256
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.load import save_decoder
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.weights.canary import Probe, write_probes
from npd_ascend.weights.gather import whole_tensors


def export(
    folder: Path,
    model: Decoder,
    source: Path,
    mesh: Mesh = ALONE,
    *,
    stamp: dict | None = None,
    probes: Sequence[Probe] = (),
) -> None:
    """`folder` as a Hugging Face folder, whole or not at all; called by all ranks, written by rank 0.

    source: the model folder whose config, tokenizer and licence belong to the weights.
    stamp: if given, written with the weights' checksum as version.json, and the probes as canary.json.
    """
    if mesh.rank == 0:
        with commit_folder(folder) as draft:
            save_decoder(model, source, draft, whole_tensors(model, mesh))
            if stamp is not None:
                stamp = stamp | {"sha256": sha256(draft / "model.safetensors")}
                (draft / "version.json").write_text(json.dumps(stamp) + "\n")
                write_probes(probes, draft)
    elif mesh.dp_rank == 0:
        for _ in whole_tensors(model, mesh):
            pass
    mesh.barrier()
