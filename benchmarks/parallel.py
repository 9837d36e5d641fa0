"""Two ranks on two cores against one process with both, and against a plain transformers loop on padded batches.

    python benchmarks/parallel.py [--rounds N] [--layers N] [--packs N] [--padded-batch N] [CONTESTANT ...]

Model: the proportions of openPangu-Embedded-1B at a tenth of its size (random weights, float32). A step is two packs
of 2,048 tokens with GSM8K-like lengths. Each contestant runs beside `one`, each alive in its own processes and taking
steps in turn, so that both see the same machine; the best step of each counts:

    one     one process, 2 threads, packs one after the other
    tp2     2 ranks x 1 thread, every layer cut
    tp2sp   the same with sequence parallelism
    dp2     2 ranks x 1 thread, one pack each, optimizer state cut
    padded  transformers' LlamaForCausalLM and torch's AdamW, 2 threads, batches of samples padded to the longest

`padded` trains plain cross-entropy, which is less work than the others' top-10 targets. Prints one JSON object a
contestant: tokens/s (padding does not count), the ratio to `one`, the share of the step in collectives when nothing
overlaps, and the peak memory of the largest process.
"""

import argparse
import json
import resource
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from npd_ascend.config import OptimizerConfig
from npd_ascend.model.load import load_decoder
from npd_ascend.packing import share_packs
from npd_ascend.parallel import layers
from npd_ascend.parallel import mesh as mesh_module
from npd_ascend.parallel.mesh import ALONE, make_mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.records import Sample
from npd_ascend.trainer import gradients
from npd_ascend.trainer import optimizer as optimizer_module
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step

TENTH_OF_PANGU_1B = {
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 8192,
    "rope_theta": 4000000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
PACK_TOKENS = 2048
CONTESTANTS = {  # name -> (tp, dp, sequence parallel, threads per process)
    "one": (1, 1, False, 2),
    "tp2": (2, 1, False, 1),
    "tp2sp": (2, 1, True, 1),
    "dp2": (1, 2, False, 1),
    "padded": (1, 1, False, 2),
}
TIMEOUT = timedelta(seconds=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--packs", type=int, default=2)
    parser.add_argument("--padded-batch", type=int, default=16, help="samples in a batch of `padded`")
    parser.add_argument("contestants", nargs="*", default=list(CONTESTANTS)[1:])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(TENTH_OF_PANGU_1B | {"num_hidden_layers": args.layers}))
        for contestant in args.contestants:
            row = _against_one(contestant, folder, args)
            print(json.dumps({"contestant": contestant, "torch": torch.__version__} | row), flush=True)


def _against_one(contestant: str, folder: Path, args: argparse.Namespace) -> dict:
    teams = [_Team("one", folder, args), _Team(contestant, folder, args)]
    for team in teams:
        team.step()  # the first touch of memory does not count
    seconds = [min(times) for times in zip(*([team.step() for team in teams] for _ in range(args.rounds)), strict=True)]
    tokens = sum(len(sample.token_ids) for pack in packs_of(args.packs) for sample in pack)
    one, other = (team.close() for team in teams)
    return {
        "tokens_per_s": round(tokens / seconds[1]),
        "one_tokens_per_s": round(tokens / seconds[0]),
        "ratio": round(seconds[0] / seconds[1], 3),
        **other,
        "one_peak_gb": one["peak_gb"],
    }


class _Team:
    """The processes of one contestant; all wait while it is not their turn."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace):
        tp, dp, *_ = CONTESTANTS[name]
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(tp * dp):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(name, rank, folder, args, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that died ends the wait for it
            self._pipes.append(ours)
            self._processes.append(process)
        self._ask("ready")

    def _ask(self, what: str) -> list:
        for pipe in self._pipes:
            pipe.send(what)
        return [pipe.recv() for pipe in self._pipes]

    def step(self) -> float:
        return max(self._ask("step"))

    def close(self) -> dict:
        collectives = max(self._ask("collectives"))
        peak = max(self._ask("peak"))
        for pipe in self._pipes:
            pipe.send("end")
        for process in self._processes:
            process.join()
        return {"collectives_share": round(collectives, 3), "peak_gb": round(peak / 2**20, 2)}


def _serve(name: str, rank: int, folder: Path, args: argparse.Namespace, pipe) -> None:
    tp, dp, sequence_parallel, threads = CONTESTANTS[name]
    torch.set_num_threads(threads)
    mesh = ALONE
    if tp * dp > 1:
        store = f"file://{folder}/{name}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=tp * dp, timeout=TIMEOUT)
        mesh = make_mesh(tp, dp, rank, sequence_parallel=sequence_parallel, timeout=TIMEOUT)
    step = _padded_step(folder, args) if name == "padded" else _our_step(folder, args.packs, mesh)
    while (what := pipe.recv()) != "end":
        if what == "step":
            mesh.barrier()
            started = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - started)
        elif what == "collectives":
            pipe.send(_share_in_collectives(step))
        elif what == "peak":
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        else:
            pipe.send(what)


def _our_step(folder: Path, num_packs: int, mesh):
    model = load_decoder(
        folder,
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        cut=partial(cut_model, mesh=mesh),
    )
    optimizer, objective = MasterAdamW(model, OptimizerConfig(), mesh), Objective(lambda_=0.9)
    packs = packs_of(num_packs)
    total = weight_sum([sample for pack in packs for sample in pack], objective)
    mine = share_packs([1.0] * len(packs), mesh.dp)[mesh.dp_rank]
    batches = [make_batch(packs[i], objective, torch.device("cpu"), mesh.row_multiple) for i in mine]
    return lambda: train_step(model, batches, optimizer, objective, weight_sum=total, lr=1e-5, mesh=mesh)


def _padded_step(folder: Path, args: argparse.Namespace):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    samples = [sample for pack in packs_of(args.packs) for sample in pack]
    answers = sum(len(sample.token_ids) - sample.prompt_len for sample in samples)
    batches = []
    for at in range(0, len(samples), args.padded_batch):
        rows = [torch.tensor(sample.token_ids) for sample in samples[at : at + args.padded_batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        for row, sample in zip(labels, samples[at:], strict=False):
            row[: sample.prompt_len] = -100
        mask = (labels.new_zeros(ids.shape) + torch.arange(ids.shape[1])) < torch.tensor([len(r) for r in rows])[
            :, None
        ]
        batches.append((ids, mask.long(), labels))

    def step():
        for ids, mask, labels in batches:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def packs_of(num_packs: int) -> list[list[Sample]]:
    """Packs of samples in random order, as long as GSM8K's questions with their answers (median 167 tokens)."""
    random = np.random.Generator(np.random.PCG64(0))
    packs: list[list[Sample]] = [[] for _ in range(num_packs)]
    for number, pack in enumerate(packs):
        room = PACK_TOKENS
        while room >= 64:
            length = min(room, int(np.clip(random.lognormal(5.12, 0.32), 48, 768)))
            answer_len = length - length // 3
            logprobs = np.log(random.dirichlet(np.ones(10) * 0.3, answer_len) + 1e-6).astype(np.float32)
            pack.append(
                Sample(
                    sample_id=f"p{number}s{len(pack)}",
                    token_ids=tuple(random.integers(0, 32768, length).tolist()),
                    prompt_len=length // 3,
                    teacher_topk_ids=random.integers(0, 32768, (answer_len, 10)).astype(np.int32),
                    teacher_topk_logprobs=logprobs,
                )
            )
            room -= length
    return packs


def _share_in_collectives(step) -> float:
    """Seconds in communication over seconds of a step in which every collective is waited for at once."""
    spent = [0.0]

    def timed(fn):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = fn(*args, **kwargs)
            handle = result[1] if isinstance(result, tuple) else result
            if hasattr(handle, "wait"):
                handle.wait()
            spent[0] += time.perf_counter() - started
            return result

        return call

    for module in (layers, gradients, optimizer_module, mesh_module):
        for name in ("gather_rows", "reduce_scatter_rows", "sum_over"):
            if hasattr(module, name):
                setattr(module, name, timed(getattr(module, name)))
    dist.all_gather, dist.all_reduce = timed(dist.all_gather), timed(dist.all_reduce)
    started = time.perf_counter()
    step()
    return spent[0] / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
