"""What is merged where: on a GPU only what takes longer than its way there. "cpu:0" stands for one, being not "cpu"."""

import pytest
import torch

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.merge.engine import merge
from rotrl.merge.merger import Merger

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def halves(tensors, save):
    """Base and experts in bfloat16: the dtype of the merge is judged by a first merge of a few tensors."""
    base = tensors(0)
    weights = {"base": base, "math": tensors(1, base=base), "code": tensors(2, base=base)}
    models = {name: open_checkpoint(save(name, found, dtype=torch.bfloat16)) for name, found in weights.items()}
    return models.pop("base"), models


@pytest.mark.parametrize(
    ("name", "changes", "away"),
    [
        ("linear", {}, ()),
        ("task_arithmetic", {"scale": "norm_global"}, ()),
        ("ties", {"threshold": "model"}, ()),
        ("tsv_m", {"scope": "matrices"}, ("proj.weight",)),
        ("lie_sum", {"scope": "all", "scale": "retention_global"}, ("proj.weight", EMBEDDING)),
    ],
)
def test_vectors_and_work_by_rows_never_leave_the_processor(name, changes, away, halves, method, tmp_path, monkeypatch):
    monkeypatch.setattr("rotrl.merge.method.TALL", 2)  # that of the tiny embedding is 2
    places, pieces = dict[str, set[str]](), Merger._pieces

    def note(self, tensor, device="cpu"):
        places.setdefault(tensor, set()).add(device)
        return pieces(self, tensor, device)

    chosen = method(name, **changes)
    merge(*halves, chosen, tmp_path / "cpu")
    monkeypatch.setattr(Merger, "_pieces", note)
    monkeypatch.setattr("rotrl.merge.engine.devices", lambda _: ["cpu:0"] * 2)
    merge(*halves, chosen, tmp_path / "gpu")
    weights = [open_checkpoint(tmp_path / where).sha256 for where in ("cpu", "gpu")]
    assert weights[0] == weights[1]
    assert places == {tensor: {"cpu:0" if tensor.endswith(away) else "cpu"} for tensor in halves[0].tensors}
