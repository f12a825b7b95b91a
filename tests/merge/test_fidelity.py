"""Every shipped method in float32 against itself in float64, on updates of the size that RL makes."""

from pathlib import Path

import pytest
import torch

from rotrl.checkpoint.layout import Role

METHODS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "conf" / "merge").glob("*.yaml")
    if "\n_target_:" in path.read_text() and path.stem not in ("learned", "geodesic_aligned", "regmean")
)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 32)])
def test_float32_keeps_the_update_to_a_thousandth(name, shape, method):
    generator = torch.Generator().manual_seed(0)
    base = 0.03 * torch.randn(shape, generator=generator)
    experts = [base + 6e-5 * torch.randn(shape, generator=generator) for _ in range(2)]
    bound, role = method(name), Role(0, "q")

    def merged(dtype):
        w0, ws = base.to(dtype), [expert.to(dtype) for expert in experts]
        statistics = bound.statistics()
        if statistics is not None:
            statistics.add([(w0, ws)])
        below = bound.of("w", role, w0, ws) if bound.of else None
        return bound("w", role, w0, ws, merged=below, statistics=statistics)

    error = (merged(torch.float32).double() - merged(torch.float64)).norm()
    assert error < 1e-3 * (experts[0] - base).norm()
