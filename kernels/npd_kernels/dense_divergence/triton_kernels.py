"""The Triton kernels behind impl_triton.py, one source for CUDA and triton-ascend.

A program takes rows in turn. `student` is contiguous, [rows, width], columns from `valid` on are padding; `teacher` is
contiguous, [rows, valid]. KIND: 0 forward KL, 1 reverse KL, 2 Jensen-Shannon with log_beta and log_rest, the logarithms
of beta and 1 - beta. Offsets are int32: a chunk has less than 2**31 logits.
"""

import triton
import triton.language as tl

from npd_kernels.triton_rows import row_logsumexp


@triton.jit
def logsumexp(logits, tops, rests, rows, valid, width, BLOCK: tl.constexpr):
    """In two numbers a row: (z - top) - rest keeps the digits that z - (top + rest) rounds away."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        top, rest = row_logsumexp(logits + row * width, valid, BLOCK)
        tl.store(tops + row + tl.arange(0, 1), top)
        tl.store(rests + row + tl.arange(0, 1), rest)


@triton.jit
def _log_softmax(row, cols, valid, top, rest):
    # exp makes 0 of what lies beyond the row; finite, so that 0 times it is 0
    z = tl.load(row + cols, mask=cols < valid, other=-1e30).to(tl.float32)
    return (z - top) - rest


@triton.jit
def _log_mixture(s, t, log_beta, log_rest, KIND: tl.constexpr):
    """log m; at the limits the distribution that the other one is measured against."""
    if KIND == 0:
        m = s
    elif KIND == 1:
        m = t
    else:
        a, b = t + log_beta, s + log_rest
        m = tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))
    return m


@triton.jit
def terms(
    student, teacher, student_top, teacher_top, student_rest, teacher_rest, teacher_kl, student_kl,
    rows, valid, width, log_beta, log_rest, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum p_T (log p_T - log m) and sum p_S (log p_S - log m) of every row."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        top_s, rest_s = tl.load(student_top + row), tl.load(student_rest + row)
        top_t, rest_t = tl.load(teacher_top + row), tl.load(teacher_rest + row)
        of_teacher, of_student = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
        for start in range(0, valid, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            s = _log_softmax(student + row * width, cols, valid, top_s, rest_s)
            t = _log_softmax(teacher + row * valid, cols, valid, top_t, rest_t)
            m = _log_mixture(s, t, log_beta, log_rest, KIND)
            if KIND != 1:
                of_teacher += tl.sum(tl.exp(t) * (t - m), 0)
            if KIND != 0:
                of_student += tl.sum(tl.exp(s) * (s - m), 0)
        tl.store(teacher_kl + row + tl.arange(0, 1), of_teacher)
        tl.store(student_kl + row + tl.arange(0, 1), of_student)


@triton.jit
def gradient(
    student, teacher, student_top, teacher_top, student_rest, teacher_rest, student_kl, scale,
    rows, valid, width, log_beta, log_rest, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale (p_S - p_T) for forward KL, scale p_S (log p_S - log m - student_kl) for the others, over `student`."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        top_s, rest_s = tl.load(student_top + row), tl.load(student_rest + row)
        top_t, rest_t = tl.load(teacher_top + row), tl.load(teacher_rest + row)
        kl, factor = tl.load(student_kl + row), tl.load(scale + row)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            s = _log_softmax(student + row * width, cols, valid, top_s, rest_s)
            t = _log_softmax(teacher + row * valid, cols, valid, top_t, rest_t)
            if KIND == 0:
                d_s = tl.exp(s) - tl.exp(t)
            else:
                d_s = tl.exp(s) * (s - _log_mixture(s, t, log_beta, log_rest, KIND) - kl)
            d_s = (d_s * factor).to(student.dtype.element_ty)
            tl.store(student + row * width + cols, d_s, mask=cols < width)
