"""Numeric bodies that run on any device: an operation there against float64 on the CPU.

Each returns a Judged per output and gradient. The bar is the error of plain torch code of the same dtype on the CPU, as
in the kernels' own tests; tests/test_npu_bodies.py runs all of it on CPU and plants mistakes.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from npd_ascend.config import OptimizerConfig
from npd_ascend.model.decoder import PLAIN, Decoder, Kernels, initialise
from npd_ascend.model.families import DecoderConfig
from npd_ascend.packing import lay_out
from npd_ascend.trainer.objectives import Batch, Objective, batch_loss
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_kernels import dense_divergence as divergence_operation
from npd_kernels import layer_ops
from npd_kernels import packed_attention as attention_operation
from npd_kernels import token_loss as loss_operation

CPU = torch.device("cpu")
# a device adds in another order and rounds its own transcendental functions
SLACK, FLOOR_EPS = 2.0, 8
ADDITION = Path(__file__).parent.parent.parent / "configs" / "addition_cpu.yaml"
SOME_STEPS = ["data.gold.count=100", "sft.epochs=3", "sft.packs_per_step=2", "npd=null"]
STUDENTS_APART = 1e-2  # after six steps in float32; ranks on a CPU are 4e-5 apart, a tenth more learning rate 9e-2
LENGTHS = [1, 17, 17, 64, 3, 3, 3, 29, 300]
SHAPE = DecoderConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=2048,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    qkv_bias=True,
    o_bias=True,
    qk_norm=False,
    tie_embeddings=True,
    init_std=0.05,
)


@dataclass(frozen=True, slots=True)
class Judged:
    """Largest absolute error against float64, and what it may be."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a nan is not


def judge(names: Sequence[str], got, plain, truth, dtype: torch.dtype) -> list[Judged]:
    rows = []
    for name, value, have, want in zip(names, got, plain, truth, strict=True):
        want = want.double()
        error, bar = (float((x.detach().cpu().double() - want).abs().max()) for x in (value, have))
        floor = FLOOR_EPS * torch.finfo(dtype).eps * float(want.abs().max())
        rows.append(Judged(name, error, max(SLACK * bar, floor)))
    return rows


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gradients(fn: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], device, dtype) -> list[torch.Tensor]:
    """[output, gradients of leaves] for an upstream that is the same for all; leaves rounded to `dtype` first."""
    given = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    out = fn(*given)
    upstream = _random(*out.shape, seed=99).to(device)
    return [out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), given)]


def attention(device: torch.device, dtype: torch.dtype, impl: str, heads: tuple[int, int] = (4, 2)) -> list[Judged]:
    cu = [0, *itertools.accumulate(LENGTHS)]
    leaves = [_random(cu[-1], n, 64, seed=seed).to(dtype).float() for seed, n in enumerate((heads[0], *[heads[1]] * 2))]

    def run(impl: str, device: torch.device, dtype: torch.dtype):
        return _gradients(
            lambda q, k, v: attention_operation.packed_attention(q, k, v, cu, 0.125, impl=impl), leaves, device, dtype
        )

    truth, plain = run("reference", CPU, torch.float64), run("sdpa", CPU, dtype)
    return judge(("out", "d_q", "d_k", "d_v"), run(impl, device, dtype), plain, truth, dtype)


def loss(device: torch.device, dtype: torch.dtype, impl: str, tokens: int = 200, vocab: int = 5003) -> list[Judged]:
    hidden, weight = _random(tokens, 64, seed=0).to(dtype).float(), _random(vocab, 64, seed=1).to(dtype).float() / 8
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(vocab, (tokens, 11), generator=generator)
    weights, token_weight = torch.rand(tokens, 11, generator=generator), torch.rand(tokens, generator=generator)

    def run(impl: str, device: torch.device, dtype: torch.dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        rest = (ids.to(device), weights.to(device), token_weight.to(device))
        loss_sum, loss_T = loss_operation.token_loss(*leaves, *rest, impl=impl)
        return [loss_sum.detach()[None], loss_T, *torch.autograd.grad(loss_sum, leaves)]

    truth, plain = run("reference", CPU, torch.float64), run("chunked", CPU, dtype)
    return judge(("sum", "loss", "d_hidden", "d_weight"), run(impl, device, dtype), plain, truth, dtype)


def divergence(device: torch.device, dtype: torch.dtype, impl: str, beta: float, vocab: int = 3001) -> list[Judged]:
    inputs = [
        _random(100, 64, seed=0),
        _random(vocab, 64, seed=1) / 8,
        _random(100, 96, seed=2),
        _random(vocab, 96, seed=3),
    ]
    inputs = [x.to(dtype).float() for x in inputs]

    def run(impl: str, device: torch.device, dtype: torch.dtype):
        given = [x.to(device, dtype) for x in inputs]
        leaves = [x.requires_grad_() for x in given[:2]]
        ones = torch.ones(100, device=device)
        loss_sum, loss_T = divergence_operation.dense_divergence(*leaves, *given[2:], ones, beta=beta, impl=impl)
        return [loss_sum.detach()[None], loss_T, *torch.autograd.grad(loss_sum, leaves)]

    truth, plain = run("reference", CPU, torch.float64), run("chunked", CPU, dtype)
    return judge(("sum", "divergence", "d_hidden", "d_weight"), run(impl, device, dtype), plain, truth, dtype)


def layers(device: torch.device, dtype: torch.dtype, impl: str) -> list[Judged]:
    x, weight = _random(70, 256, seed=0).to(dtype).float(), _random(256, seed=1).to(dtype).float()
    heads, gate_up = (
        _random(*shape, seed=seed).to(dtype).float() for seed, shape in ((2, (70, 4, 64)), (3, (70, 512)))
    )
    angle = 3 * _random(70, 32, seed=4).repeat(1, 2)

    def run(impl: str, device: torch.device, dtype: torch.dtype):
        tables = layer_ops.rotary_tables(angle.to(device), dtype, impl=impl)
        return [
            *_gradients(lambda a, w: layer_ops.rms_norm(a, w, 1e-5, impl=impl), [x, weight], device, dtype),
            *_gradients(lambda a: layer_ops.rotate(a, tables, impl=impl), [heads], device, dtype),
            *_gradients(lambda a: layer_ops.swiglu(a, impl=impl), [gate_up], device, dtype),
        ]

    names = ["norm", "norm d_x", "norm d_weight", "rotary", "rotary d_x", "swiglu", "swiglu d_x"]
    return judge(names, run(impl, device, dtype), run("torch", CPU, dtype), run("torch", CPU, torch.float64), dtype)


def _model(device: torch.device, dtype: torch.dtype, kernels: Kernels, recompute: str) -> Decoder:
    model = Decoder(SHAPE, PLAIN)
    initialise(model, 0)
    other = Decoder(SHAPE, kernels, recompute)
    other.load_state_dict(model.state_dict())
    return other.to(dtype).to(device)  # float64 too begins with the float32 weights, rounded where the others are


def _batch(device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(5)
    rows = [(torch.randint(1024, (n,), generator=generator).tolist(), n // 3) for n in (300, 200, 64, 9)]
    layout = lay_out(rows, device)
    answers = len(layout.answer_ids_A)
    ids = torch.cat([layout.answer_ids_A.cpu()[:, None], torch.randint(1024, (answers, 10), generator=generator)], 1)
    probs = torch.rand(answers, 10, generator=generator).softmax(-1)
    return Batch(layout, ids.to(device), probs.to(device), torch.ones(answers, device=device))


def step_gradients(
    device: torch.device, dtype: torch.dtype, kernels: Kernels, loss_impl: str, recompute: str = "off"
) -> list[Judged]:
    """The loss and every parameter's gradient of an NPD step of a small decoder."""

    def run(device: torch.device, dtype: torch.dtype, kernels: Kernels, impl: str, recompute: str):
        model, batch = _model(CPU, torch.float32, kernels, recompute), _batch(device)
        model = model.to(weights_dtype).to(device, dtype)
        hidden_TD = model(batch.layout.token_ids_T, batch.layout.cu_seqlens)
        objective = Objective(lambda_=0.9, loss_impl=impl)
        loss_sum, _ = batch_loss(hidden_TD[batch.layout.predict_A], model.head_weight_VD, batch, objective)
        (loss_sum / len(batch.layout.answer_ids_A)).backward()
        names = [name for name, _ in model.named_parameters()]
        return names, [loss_sum.detach()[None], *(parameter.grad for parameter in model.parameters())]

    weights_dtype = dtype
    names, truth = run(CPU, torch.float64, PLAIN, "reference", "off")
    _, plain = run(CPU, dtype, PLAIN, "chunked", "off")
    _, got = run(device, dtype, kernels, loss_impl, recompute)
    return judge(["loss", *names], got, plain, truth, dtype)


def whole_steps(device: torch.device, dtype: torch.dtype, kernels: Kernels, loss_impl: str) -> list[Judged]:
    """Losses of three updates by MasterAdamW against those of the CPU in float32."""

    def run(device: torch.device, dtype: torch.dtype, kernels: Kernels, impl: str):
        model, batch = _model(device, dtype, kernels, "off"), _batch(device)
        optimizer, objective = MasterAdamW(model, OptimizerConfig(lr=1e-3)), Objective(lambda_=0.9, loss_impl=impl)
        answers = float(len(batch.layout.answer_ids_A))
        steps = [train_step(model, [batch], optimizer, objective, weight_sum=answers, lr=1e-3) for _ in range(3)]
        return [torch.tensor(step.loss) for step in steps]

    truth, plain = run(CPU, torch.float32, PLAIN, "chunked"), run(CPU, dtype, PLAIN, "chunked")
    return judge([f"loss of step {i}" for i in range(3)], run(device, dtype, kernels, loss_impl), plain, truth, dtype)


def ranks(words: Sequence[str], folder: Path) -> list[Judged]:
    """How far the student that `npd sft` trains with `words` is from that of one rank on the CPU.

    As a share of the way that the latter has gone, parameter by parameter.
    """

    def student(name: str, *more: str) -> dict[str, torch.Tensor]:
        command = [sys.executable, "-m", "npd_ascend", "sft", "--config", str(ADDITION), f"run.folder={folder / name}"]
        done = subprocess.run([*command, *SOME_STEPS, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(folder / name / "student" / "model.safetensors")

    start = load_file(ADDITION.parent / "addition" / "student" / "model.safetensors")
    wanted, got = student("one"), student("ranks", *words)
    apart = {name: float((got[name] - w).norm() / (w - start[name]).norm()) for name, w in wanted.items()}
    return [Judged(name, share, STUDENTS_APART) for name, share in apart.items()]
