"""rotations.safetensors: round trip, application, and the faults of a broken file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rotrl.checkpoint.rotations import Rotation, open_rotations, save_rotations
from rotrl.errors import CheckpointError

SOURCE = {"source": json.dumps({"model": "base"})}


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "rotations.safetensors"
    left, right = torch.randn(3, 3, dtype=torch.float64), torch.randn(5, 5)
    save_rotations(
        path, {"a.b.weight": Rotation(left, right), "c": Rotation(right=right)}, {**SOURCE, "objective": "kl"}
    )
    file = open_rotations(path)
    assert file.names == ("a.b.weight", "c")
    assert file.sides == {"a.b.weight": {"left": (3, 3), "right": (5, 5)}, "c": {"right": (5, 5)}}
    assert file.metadata["objective"] == "kl"
    assert file.source == {"model": "base"}
    both, one = file.get("a.b.weight"), file.get("c")
    assert torch.equal(both.left, left.float())
    assert torch.equal(both.right, right)
    assert one.left is None
    assert file.get("other") is None
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "rotations.safetensors"
    save_rotations(path, {"a": Rotation(right=torch.eye(2))}, SOURCE)
    before = path.read_bytes()
    with pytest.raises(Exception, match="metadata"):
        save_rotations(path, {"a": Rotation(right=torch.eye(3))}, {"source": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(left=st.booleans(), right=st.booleans(), half=st.booleans())
def test_apply(left, right, half):
    w = torch.randn(3, 5, dtype=torch.bfloat16 if half else torch.float64)
    a, b = torch.randn(3, 3), torch.randn(5, 5)
    actual = Rotation(a if left else None, b if right else None).apply(w)
    expected = (a if left else torch.eye(3)).double() @ w.double() @ (b if right else torch.eye(5)).double()
    assert actual.dtype == (torch.float32 if half else torch.float64)
    torch.testing.assert_close(actual.double(), expected, atol=1e-4 if half else 1e-12, rtol=1e-4 if half else 0)


@pytest.mark.parametrize(
    ("entries", "metadata", "words"),
    [
        ({"a.right": torch.ones(3, 2)}, SOURCE, r"'a\.right' has shape \[3, 2\]"),
        ({"a.left": torch.ones(2, 3)}, SOURCE, r"'a\.left' has shape \[2, 3\], a square matrix or a frame is expected"),
        ({"a.right": torch.ones(2)}, SOURCE, "a square matrix or a frame is expected"),
        ({"a.up": torch.eye(2)}, SOURCE, "does not end in"),
        ({"a.right": torch.eye(2)}, {}, "'source' is absent"),
        ({"a.right": torch.eye(2)}, {"source": "base"}, "not JSON"),
    ],
)
def test_broken_content(tmp_path, entries, metadata, words):
    path = tmp_path / "rotations.safetensors"
    save_file(entries, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_rotations(path)
    assert str(path) in str(caught.value)


def test_absent_truncated_and_not_finite(tmp_path):
    path = tmp_path / "rotations.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        open_rotations(path)
    save_rotations(path, {"a": Rotation(right=torch.full((2, 2), torch.nan))}, SOURCE)
    with pytest.raises(CheckpointError, match=r"'a\.right' holds NaN"):
        open_rotations(path).get("a")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_rotations(path)
