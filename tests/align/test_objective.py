import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotrl.align.objective import head_kl


def case(tokens: int, hidden: int, vocabulary: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, hidden), (vocabulary, hidden), (tokens, hidden), (vocabulary, hidden)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def reference(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """Straight from the definition, every logit at once."""
    q, p = (student @ student_head.T).softmax(-1), (teacher @ teacher_head.T).softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 12), st.integers(1, 60), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_in_chunks_are_those_of_the_definition(tokens, hidden, vocabulary, chunk, seed):
    student, *rest = case(tokens, hidden, vocabulary, seed)
    ours, truth = student.clone().requires_grad_(), student.clone().requires_grad_()
    value, expected = 3 * head_kl(ours, *rest, chunk=chunk), 3 * reference(truth, *rest)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-10, atol=1e-12)


def test_gradient_against_finite_differences():
    student, *rest = case(4, 3, 6, 0)
    assert torch.autograd.gradcheck(lambda h: head_kl(h, *rest, chunk=12), (student.requires_grad_(),))


def test_zero_with_zero_gradient_where_both_agree():
    hidden, head, *_ = case(5, 4, 7, 1)
    student = hidden.clone().requires_grad_()
    value = head_kl(student, head, hidden, head)
    value.backward()
    assert value.abs() < 1e-15
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15


def test_no_logits_are_kept_for_the_backward_pass():
    student, *rest = case(6, 4, 50, 2)
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head_kl(student.requires_grad_(), *rest)
    assert kept == [student.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_sums_in_float32(dtype: torch.dtype):
    exact = case(64, 8, 30, 3)
    rounded = [part.to(dtype) for part in exact]
    value = head_kl(*rounded)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(reference(*[part.double() for part in rounded])), rel=2e-2)
