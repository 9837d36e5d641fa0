"""What the row-wise Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def row_logsumexp(row, valid, BLOCK: tl.constexpr):
    """Log-sum-exp of the first `valid` values at `row` in two float32 [1]: the largest value, the rest."""
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, valid, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(row + cols, mask=cols < valid, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    return top, tl.log(total)
