"""Effective coefficients, norm ratio and storage loss against closed forms and brute force."""

import numpy as np
import pytest
import torch

from rotrl.merge.measure import Measure


def measure(base, experts, merged, dtype=torch.float32):
    result = Measure([str(i) for i in range(len(experts))])
    result.add(base, experts, merged, merged.to(dtype))
    return result


def test_orthogonal_experts_of_equal_norm():
    base = torch.ones(2, 2)
    experts = [base + torch.eye(2), base + torch.eye(2).flip(0)]
    total = sum(experts) - 2 * base
    for scale in (0.5, 0.5**0.5, 1.0):
        found = measure(base, experts, base + scale * total)
        assert found.effective_coefficient == pytest.approx(scale)
        assert found.norm_ratio == pytest.approx(scale * 2**0.5)
        assert list(found.coefficients.values()) == pytest.approx([scale, scale])


def test_coefficients_are_least_squares_pooled_over_tensors():
    generator = torch.Generator().manual_seed(0)
    result, rows = Measure(["a", "b", "c"]), []
    for shape in ((4, 5), (7,)):
        base, *models = torch.randn(5, *shape, generator=generator)
        result.add(base, models[:3], models[3], models[3])
        rows.append(np.stack([(m - base).flatten().numpy() for m in models], axis=1))
    d = np.concatenate(rows).astype(float)
    expected = np.linalg.lstsq(d[:, :3], d[:, 3], rcond=None)[0]
    assert list(result.coefficients.values()) == pytest.approx(expected, rel=1e-4)
    assert result.norm_ratio == pytest.approx(np.linalg.norm(d[:, 3]) / np.linalg.norm(d[:, :3], axis=0).mean())
    assert result.norm_of("b") == pytest.approx(np.linalg.norm(d[:, 1]))


def test_equal_experts_share_the_coefficient():
    base, expert = torch.zeros(3), torch.ones(3)
    assert list(measure(base, [expert, expert], expert).coefficients.values()) == pytest.approx([0.5, 0.5])


def test_storage_loss_is_the_share_of_the_update():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 300, generator=generator)
    d = 1e-3 * torch.randn(300, 300, generator=generator)
    found = measure(base, [base + d], base + d, torch.bfloat16).storage_loss
    expected = ((base + d).bfloat16().float() - (base + d)).norm() / d.norm()
    assert found == pytest.approx(float(expected), rel=1e-3)
    assert found > 1  # at the scale of RL updates bfloat16 noise exceeds the update
    assert measure(base, [base + d], base + d).storage_loss == 0


def test_no_update_at_all():
    base = torch.ones(3)
    found = measure(base, [base, base], base)
    assert (found.effective_coefficient, found.norm_ratio, found.storage_loss) == (0, 0, 0)
