"""Each kernel's error against float64, as a multiple of plain code's own error.

    TRITON_INTERPRET=1 python benchmarks/kernel_errors.py [--device cpu|cuda]

Errors are root mean squares over output and gradients together, averaged over four draws; small sizes, so that Triton's
interpreter can take part. Prints one JSON object: operation -> dtype -> contestant -> multiple (and plain's error).
"""

import argparse
import json

import torch
from kernel_contestants import ATTENTION, DIVERGENCE, LOSS, Heads, Pack, make_heads, make_pack

from npd_kernels.dense_divergence import dense_divergence
from npd_kernels.packed_attention import packed_attention
from npd_kernels.token_loss import token_loss

LENGTHS = [1, 17, 40, 3, 33]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = torch.device(parser.parse_args().device)
    cases = {
        "packed_attention": (ATTENTION, lambda dtype, seed: make_pack(LENGTHS, device, dtype, seed), _true_attention),
        "token_loss": (LOSS, lambda dtype, seed: make_heads(64, 500, device, dtype, 48, seed), _true_loss),
        "dense_divergence": (DIVERGENCE, lambda dtype, seed: make_heads(64, 500, device, dtype, 48, seed), _true_kl),
    }
    print(json.dumps({name: multiples(*case) for name, case in cases.items()}, indent=2))


def multiples(contestants: dict, make, truth) -> dict:
    table: dict = {}
    for dtype in (torch.float32, torch.bfloat16):
        errors: dict[str, list[float]] = {}
        for seed in range(4):
            inputs = make(dtype, seed)
            wanted = truth(inputs)
            for name, build in contestants.items():
                if name.startswith(("plain", "npd")):
                    try:
                        errors.setdefault(name, []).append(_error(build(inputs)(), wanted))
                    except RuntimeError as error:  # ours, on a device that it does not run on
                        if "cannot run here" not in str(error):
                            raise
        mean = {name: sum(values) / len(values) for name, values in errors.items()}
        plain = next(iter(mean.values()))
        table[str(dtype)] = {name: f"{error / plain:.2f}" for name, error in mean.items() if error is not plain}
        table[str(dtype)]["plain's error"] = f"{plain:.1e}"
    return table


def _error(values: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    squares = [((v.double() - t).norm() / t.norm()) ** 2 for v, t in zip(values, truth, strict=True)]
    return float(torch.stack(squares).mean().sqrt())


def _double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def _true_attention(pack: Pack) -> list[torch.Tensor]:
    q, k, v = _double(pack.q, pack.k, pack.v)
    out = packed_attention(q, k, v, pack.cu_seqlens, 128**-0.5, impl="reference")
    return [out.detach(), *torch.autograd.grad(out, [q, k, v], pack.upstream.double())]


def _true_loss(x: Heads) -> list[torch.Tensor]:
    leaves = _double(x.hidden, x.weight)
    value, _ = token_loss(*leaves, x.ids, x.weights, x.ones, impl="reference")
    return [value.detach()[None], *torch.autograd.grad(value, leaves)]


def _true_kl(x: Heads) -> list[torch.Tensor]:
    leaves, teacher = _double(x.hidden, x.weight), [y.double() for y in (x.teacher_hidden, x.teacher_weight)]
    value, _ = dense_divergence(*leaves, *teacher, x.ones, beta=0.0, impl="reference")
    return [value.detach()[None], *torch.autograd.grad(value, leaves)]


if __name__ == "__main__":
    main()
