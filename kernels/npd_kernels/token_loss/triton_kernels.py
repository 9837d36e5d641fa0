"""The Triton kernels behind impl_triton.py, one source for CUDA and triton-ascend.

A program takes rows in turn. `logits` is contiguous, [rows, width]; columns from `valid` on are padding. `ids` are
columns, int32 [rows, K], -1 where another rank holds the id. Offsets are int32: a chunk has less than 2**31 logits.
"""

import triton
import triton.language as tl

from npd_kernels.triton_rows import row_logsumexp


@triton.jit
def lse_and_targets(
    logits, ids, lse, targets, rows, valid, width, K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        top, rest = row_logsumexp(logits + row * width, valid, BLOCK)
        tl.store(lse + row + tl.arange(0, 1), top + rest)
        slots = tl.arange(0, SLOTS)
        id_ = tl.load(ids + row * K + slots, mask=slots < K, other=-1)
        z = tl.load(logits + row * width + id_, mask=id_ >= 0, other=0.0).to(tl.float32)
        tl.store(targets + row * K + slots, z, mask=slots < K)


@triton.jit
def gradient(logits, ids, lse, sums, weights, rows, valid, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """softmax times sums[row], minus weights at ids; an id that stands in several slots adds up."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        lse_row, sum_row = tl.load(lse + row), tl.load(sums + row)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)
            d_z = tl.where(cols < valid, tl.exp(z - lse_row) * sum_row, 0.0)
            # compared in registers: a scatter after the store would race with it
            for slot in tl.static_range(K):
                hit = cols == tl.load(ids + row * K + slot)
                d_z -= tl.where(hit, tl.load(weights + row * K + slot), 0.0)
            tl.store(logits + row * width + cols, d_z.to(logits.dtype.element_ty), mask=cols < width)
