"""What all rows of vs_on_policy.py share: prompts, held-out answers, their divergence, and what the machine can do.

    python benchmarks/on_policy/ground.py prepare|evaluate|rates JOB.json

Dimensions: A answer tokens, E the teacher's hidden size.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from generators import request_seed

from npd_ascend.config import load_config
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.families import read_config
from npd_ascend.model.load import load_decoder
from npd_ascend.packing import PackLayout, lay_out, pack_samples
from npd_ascend.prompts import read_prompts
from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.tokenizer import ChatTokenizer
from npd_kernels.dense_divergence import dense_divergence

CPU = torch.device("cpu")


def prepare(job: dict) -> dict:
    """Prompts as token ids, and held-out prompts answered by the teacher and by the student before the comparison.

    Half and half, so that neither who trains on the student's first answers nor who trains on later ones is at home.
    """
    config = load_config(Path(job["config"]))
    tokenizer = ChatTokenizer(Path(job["student"]))
    limit = read_config(Path(job["student"])).max_position - job["max_new_tokens"]
    training, heldout = (read_prompts(config.data, role, tokenizer, max_prompt_tokens=limit) for role in _ROLES)
    rows = [{"text": p.text, "token_ids": p.token_ids, "answer": p.answer} for p in training]
    Path(job["prompts"]).write_text(json.dumps(rows))
    answered = []
    for i, folder in enumerate((job["teacher"], job["student"])):
        engine = HfEngine(
            dtype=torch.float32,
            device=CPU,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
        )
        engine.load_weights(Path(folder))
        asked = enumerate(heldout[i::2], 10**6)
        requests = [Request(p.token_ids, job["max_new_tokens"], request_seed(job, j)) for j, p in asked]
        answers = in_order(engine.generate(requests, Sampling(1.0)))
        answered += [(r.token_ids + a.token_ids, len(r.token_ids)) for r, a in zip(requests, answers, strict=True)]
    Path(job["heldout"]).write_text(json.dumps(answered))
    return {"prompt_tokens": max(len(row["token_ids"]) for row in rows)}


_ROLES = ("prompts", "heldout")


@torch.no_grad()
def evaluate(job: dict) -> dict:
    """KL(teacher || student) over the whole vocabulary in float32, token mean of the held-out answers, per weights."""
    rows = json.loads(Path(job["heldout"]).read_text())
    lengths = {f"{i:09d}": len(ids) for i, (ids, _) in enumerate(rows)}
    packs = pack_samples(lengths, max([4096, *lengths.values()]))
    layouts = [lay_out([rows[int(name)] for name in pack], CPU) for pack in packs]
    teacher = _load(Path(job["teacher"]))
    hidden = [_answers(teacher, layout) for layout in layouts]
    found = []
    for name in job["weights"]:
        if not (Path(name) / "config.json").exists():
            shutil.copy(Path(job["student"]) / "config.json", name)
        student, total = _load(Path(name)), 0.0
        for layout, teacher_AE in zip(layouts, hidden, strict=True):
            heads, ones = (student.head_weight_VD, teacher.head_weight_VD), torch.ones(len(teacher_AE))
            student_AD = _answers(student, layout)
            total += float(
                dense_divergence(student_AD, heads[0], teacher_AE, heads[1], ones, beta=0.0, impl="chunked")[0]
            )
        found.append(total / sum(len(layout.answer_ids_A) for layout in layouts))
    return {"kl": found}


def _load(folder: Path) -> Decoder:
    return load_decoder(folder, dtype=torch.float32, device=CPU)


def _answers(model: Decoder, layout: PackLayout) -> torch.Tensor:
    return model(layout.token_ids_T, layout.cu_seqlens)[layout.predict_A]


def rates(job: dict) -> dict:
    """What bounds are made of: best GEMM rates, memory bandwidth, multiplied weights, updates that bfloat16 can see."""
    row: dict = {"processors": job["threads"]}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(2048, 2048).to(getattr(torch, name)) for _ in range(2))
        row[f"{name}_gflops"] = 2 * 2048**3 / _best_seconds(lambda a=a, b=b: a @ b) / 1e9
    source, target = torch.empty(2**26), torch.empty(2**26)
    row["read_gb_s"] = 4 * 2**26 / _best_seconds(source.sum) / 1e9
    row["copy_gb_s"] = 8 * 2**26 / _best_seconds(lambda: target.copy_(source)) / 1e9
    for role in ("teacher", "student"):
        model = _load(Path(job[role]))
        body = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith(("embed", "head"))]
        row[role] = {"body": sum(p.numel() for p in body), "head": model.head_weight_VD.numel()}
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    row["seen_in_bf16"] = {str(lr): _seen(weights, lr) for lr in (1e-5, job["lr"])}
    return row


def _seen(weights: torch.Tensor, step: float) -> float:
    """Expected share of weights that change in bfloat16 when each float32 master moves by `step`."""
    spacing = 2.0 ** (weights.abs().clamp(min=math.ldexp(1, -126)).log2().floor() - 7)
    return float((step / spacing).clamp(max=1).mean())


def _best_seconds(work, repeats: int = 10) -> float:
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    job = json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    result = {"prepare": prepare, "evaluate": evaluate, "rates": rates}[sys.argv[1]](job)
    (Path(job["folder"]) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
