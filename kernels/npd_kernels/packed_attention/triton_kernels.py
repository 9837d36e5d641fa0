"""The Triton kernels behind impl_triton.py, one source for CUDA and triton-ascend.

Dimensions: T tokens, N query heads, G key/value heads, H head size, P the same as a power of two, M query rows and
C key rows of a block. Tensors are contiguous, [T, heads, H]. `tiles` holds (first row, begin, end of its sample).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(tiles, item, HEADS: tl.constexpr):
    """(first row, begin and end of the sample, head) of a work item; the heads of a tile are neighbours."""
    tile = tiles + 3 * (item // HEADS)
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), item % HEADS


@triton.jit
def _load(
    base, rows, limit, head,
    HEADS: tl.constexpr, H: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, P] of one head of a [T, HEADS, H] tensor, zero from column H on and, if MASKED, from row `limit` on."""
    cols = tl.arange(0, P)
    at = base + (rows[:, None].to(tl.int64) * HEADS + head) * H + cols[None, :]
    if MASKED:
        block = tl.load(at, mask=(rows[:, None] < limit) & (cols[None, :] < H), other=0.0)
    elif H < P:
        block = tl.load(at, mask=cols[None, :] < H, other=0.0)
    else:
        block = tl.load(at)
    return block.to(tl.float32) if UPCAST else block


@triton.jit
def _store(base, block, rows, limit, head, HEADS: tl.constexpr, H: tl.constexpr, P: tl.constexpr):
    cols = tl.arange(0, P)
    at = base + (rows[:, None].to(tl.int64) * HEADS + head) * H + cols[None, :]
    tl.store(at, block.to(base.dtype.element_ty), mask=(rows[:, None] < limit) & (cols[None, :] < H))


@triton.jit
def _dot(a, b):
    """float32 sums; float32 inputs are multiplied as such and not as TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    top_M, sum_M, acc_MP, q_MP, k, v, rows, start, last, group, scale,
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The running softmax of a query tile, one key block further."""
    cols = start + tl.arange(0, C)
    k_CP = _load(k, cols, last, group, G, H, P, MASKED, UPCAST)
    scores_MC = _dot(q_MP, tl.trans(k_CP)) * (scale * LOG2E)
    if MASKED:
        scores_MC = tl.where((cols[None, :] <= rows[:, None]) & (cols[None, :] < last), scores_MC, float("-inf"))
    # finite from the first block on: every row sees the first key of its sample
    new_top_M = tl.maximum(top_M, tl.max(scores_MC, 1))
    p_MC = tl.exp2(scores_MC - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    v_CP = _load(v, cols, last, group, G, H, P, MASKED, UPCAST)
    acc_MP = acc_MP * shrink_M[:, None] + _dot(p_MC.to(v_CP.dtype), v_CP)
    return new_top_M, sum_M * shrink_M + tl.sum(p_MC, 1), acc_MP


@triton.jit
def forward(
    q, k, v, out, lse, tiles, items, scale,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        first, begin, end, head = _tile(tiles, item, N)
        group = head // (N // G)
        rows = first + tl.arange(0, M)
        q_MP = _load(q, rows, end, head, N, H, P, True, UPCAST)
        top_M = tl.full([M], float("-inf"), tl.float32)
        sum_M = tl.zeros([M], tl.float32)
        acc_MP = tl.zeros([M, P], tl.float32)
        last = tl.minimum(first + M, end)
        seam = begin + (first + 1 - begin) // C * C  # before it every row sees every key
        for start in range(begin, seam, C):
            top_M, sum_M, acc_MP = _attend(
                top_M, sum_M, acc_MP, q_MP, k, v, rows, start, last, group, scale, G, H, P, C, False, UPCAST
            )
        for start in range(seam, last, C):
            top_M, sum_M, acc_MP = _attend(
                top_M, sum_M, acc_MP, q_MP, k, v, rows, start, last, group, scale, G, H, P, C, True, UPCAST
            )
        _store(out, acc_MP / sum_M[:, None], rows, end, head, N, H, P)
        tl.store(lse + rows.to(tl.int64) * N + head, top_M + tl.log2(sum_M), mask=rows < end)


@triton.jit
def _d_q(
    acc_MP, q_MP, d_out_MP, lse_M, delta_M, k, v, rows, start, last, group, scale,
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one key block adds to dq of a query tile."""
    cols = start + tl.arange(0, C)
    k_CP = _load(k, cols, last, group, G, H, P, MASKED, UPCAST)
    v_CP = _load(v, cols, last, group, G, H, P, MASKED, UPCAST)
    p_MC = tl.exp2(_dot(q_MP, tl.trans(k_CP)) * (scale * LOG2E) - lse_M[:, None])
    if MASKED:
        p_MC = tl.where((cols[None, :] <= rows[:, None]) & (cols[None, :] < last), p_MC, 0.0)
    d_scores_MC = p_MC * (_dot(d_out_MP, tl.trans(v_CP)) - delta_M[:, None])
    return acc_MP + _dot(d_scores_MC.to(k_CP.dtype), k_CP)


@triton.jit
def backward_q(
    q, k, v, out, d_out, lse, delta, d_q, tiles, items, scale,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum_H(d_out * out), which the kernel for dk and dv needs too."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        first, begin, end, head = _tile(tiles, item, N)
        group = head // (N // G)
        rows = first + tl.arange(0, M)
        q_MP = _load(q, rows, end, head, N, H, P, True, UPCAST)
        d_out_MP = _load(d_out, rows, end, head, N, H, P, True, UPCAST)
        out_MP = _load(out, rows, end, head, N, H, P, True, UPCAST)
        delta_M = tl.sum(d_out_MP.to(tl.float32) * out_MP.to(tl.float32), 1)
        at = rows.to(tl.int64) * N + head
        tl.store(delta + at, delta_M, mask=rows < end)
        lse_M = tl.load(lse + at, mask=rows < end, other=0.0)
        acc_MP = tl.zeros([M, P], tl.float32)
        last = tl.minimum(first + M, end)
        seam = begin + (first + 1 - begin) // C * C  # before it every row sees every key
        for start in range(begin, seam, C):
            acc_MP = _d_q(
                acc_MP, q_MP, d_out_MP, lse_M, delta_M, k, v, rows, start, last, group, scale,
                G, H, P, C, False, UPCAST,
            )  # fmt: skip
        for start in range(seam, last, C):
            acc_MP = _d_q(
                acc_MP, q_MP, d_out_MP, lse_M, delta_M, k, v, rows, start, last, group, scale,
                G, H, P, C, True, UPCAST,
            )  # fmt: skip
        _store(d_q, acc_MP * scale, rows, end, head, N, H, P)


@triton.jit
def _d_kv(
    d_k_CP, d_v_CP, k_CP, v_CP, q, d_out, lse, delta, cols, start, end, head, scale,
    N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What a query block of one head adds to dk and dv of a key tile; rows from `end` on are zeros and add nothing."""
    rows = start + tl.arange(0, M)
    q_MP = _load(q, rows, end, head, N, H, P, True, UPCAST)
    d_out_MP = _load(d_out, rows, end, head, N, H, P, True, UPCAST)
    at = rows.to(tl.int64) * N + head
    lse_M = tl.load(lse + at, mask=rows < end, other=0.0)
    delta_M = tl.load(delta + at, mask=rows < end, other=0.0)
    p_MC = tl.exp2(_dot(q_MP, tl.trans(k_CP)) * (scale * LOG2E) - lse_M[:, None])
    if CAUSAL:
        p_MC = tl.where(cols[None, :] <= rows[:, None], p_MC, 0.0)
    d_v_CP += _dot(tl.trans(p_MC).to(d_out_MP.dtype), d_out_MP)
    d_scores_MC = p_MC * (_dot(d_out_MP, tl.trans(v_CP)) - delta_M[:, None])
    return d_k_CP + _dot(tl.trans(d_scores_MC).to(q_MP.dtype), q_MP), d_v_CP


@triton.jit
def backward_kv(
    q, k, v, d_out, lse, delta, d_k, d_v, tiles, items, scale,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        first, _, end, group = _tile(tiles, item, G)
        cols = first + tl.arange(0, C)
        k_CP = _load(k, cols, end, group, G, H, P, True, UPCAST)
        v_CP = _load(v, cols, end, group, G, H, P, True, UPCAST)
        d_k_CP, d_v_CP = tl.zeros([C, P], tl.float32), tl.zeros([C, P], tl.float32)
        seam = tl.minimum(first + (C + M - 1) // M * M, end)  # from it on every row sees every key
        for head in range(group * (N // G), (group + 1) * (N // G)):
            for start in range(first, seam, M):
                d_k_CP, d_v_CP = _d_kv(
                    d_k_CP, d_v_CP, k_CP, v_CP, q, d_out, lse, delta, cols, start, end, head, scale,
                    N, H, P, M, True, UPCAST,
                )  # fmt: skip
            for start in range(seam, end, M):
                d_k_CP, d_v_CP = _d_kv(
                    d_k_CP, d_v_CP, k_CP, v_CP, q, d_out, lse, delta, cols, start, end, head, scale,
                    N, H, P, M, False, UPCAST,
                )  # fmt: skip
        _store(d_k, d_k_CP * scale, cols, end, group, G, H, P)
        _store(d_v, d_v_CP, cols, end, group, G, H, P)
