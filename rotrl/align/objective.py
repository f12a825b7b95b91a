"""The logit objective: how far the rotated model is from an expert on tokens that the expert itself sampled."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 26  # logits held at a time: 256 MB in float32, 441 tokens of a vocabulary of 152k


class _HeadKL(torch.autograd.Function):
    """Loss and its gradient in one pass over the tokens: the heads are frozen, so only `student` needs one."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, count: Tensor, rows: int
    ):
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        gradient = torch.empty_like(student)
        for start in range(0, len(student), rows):
            span = slice(start, start + rows)
            log_p = (teacher[span] @ teacher_head.T).to(total.dtype).log_softmax(-1)
            log_q = (student[span] @ student_head.T).to(total.dtype).log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[span] = (log_q.exp_().sub_(p) / count).to(student.dtype) @ student_head
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream[0].to(gradient.dtype) * gradient, None, None, None, None, None


def head_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    count: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum over tokens of `KL(p || q)`, `p = softmax(teacher teacher_head^T)`, `q = softmax(student student_head^T)`,
    over `count`, by default the number of tokens: their mean.

    The whole vocabulary enters. Logits exist for `chunk // vocabulary` tokens at a time and are not kept for the
    backward pass. Only `student` receives a gradient, `(q - p) student_head / count`.

    student, teacher: (tokens, hidden), last hidden states after the final norm; heads: (vocabulary, hidden).
    """
    rows = max(1, chunk // student_head.shape[0])
    count = torch.tensor(float(len(student)), device=student.device) if count is None else count
    return _HeadKL.apply(student, student_head, teacher.detach(), teacher_head, count, rows)  # type: ignore[return-value]
