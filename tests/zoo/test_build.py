"""A rebuild in miniature: it learns, it continues where it was stopped, and it keeps what is done."""

import json
import shutil

import pytest

from rotrl.errors import ConfigError
from rotrl.zoo import CHECKPOINTS
from rotrl.zoo.build import MANIFEST, build

pytest.importorskip("trl", reason="rebuilding wants the extra `zoo`")

TINY = {
    "base": {"method": "supervised", "families": ["math", "code"], "steps": 6, "batch": 4, "rate": 1e-3},
    "code": {"method": "grpo", "families": ["code"], "steps": 5, "prompts": 2, "samples": 2, "rate": 1e-3},
}
SMALL = {"problems": 3, "samples": 2, "save_every": 2}


def stop_at(stage, number):
    def progress(name, step, steps, value):
        if (name, step) == (stage, number):
            raise KeyboardInterrupt

    return progress


def silent(*_):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, build(out, stages=TINY, **SMALL, progress=silent)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TINY)
def test_resumed_equals_uninterrupted(whole, tmp_path, stage):
    _, manifest = whole
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, stages=TINY, **SMALL, progress=stop_at(stage, 4))
    assert not (tmp_path / stage).exists()
    seen = []
    resumed = build(tmp_path, stages=TINY, **SMALL, progress=lambda *a: seen.append(a[:2]))
    assert (stage, 1) not in seen
    assert (stage, TINY[stage]["steps"]) in seen
    for name in TINY:
        for key in ("files", "accuracy", "curve", "recipe"):
            assert resumed["checkpoints"][name][key] == manifest["checkpoints"][name][key]


@pytest.mark.slow
def test_done_stages_are_kept_and_broken_or_changed_ones_made_again(whole):
    out, manifest = whole

    def trained(stages):
        seen = set()
        made = build(out, stages=stages, **SMALL, progress=lambda *a: seen.add(a[0]))
        return seen, made

    assert trained(TINY) == (set(), manifest)
    (out / "code" / "model.safetensors").write_bytes(b"torn")
    seen, made = trained(TINY)
    assert seen == {"code"}
    assert made["checkpoints"]["code"]["files"] == manifest["checkpoints"]["code"]["files"]
    assert trained({**TINY, "code": {**TINY["code"], "rate": 2e-3}})[0] == {"code"}


@pytest.mark.slow
def test_reward_rises_from_the_packaged_base(tmp_path):
    shutil.copytree(CHECKPOINTS / "base", tmp_path / "base")
    entry = json.loads((CHECKPOINTS / MANIFEST).read_text())["checkpoints"]["base"]
    (tmp_path / MANIFEST).write_text(json.dumps({"checkpoints": {"base": entry}}))
    recipe = entry["recipe"]
    common = {k: recipe[k] for k in ("seed", "problems")} | {"samples": recipe["samples_measured"]}
    base = {k: v for k, v in recipe.items() if k not in ("seed", "problems", "samples_measured")}
    stage = {"method": "grpo", "families": ["code"], "steps": 24, "prompts": 12, "samples": 8, "rate": 7e-4}
    made = build(tmp_path, stages={"base": base, "code": stage}, **common, progress=silent)["checkpoints"]
    curve = made["code"]["curve"]["reward"]
    assert sum(curve[-8:]) / 8 > sum(curve[:8]) / 8 + 0.1
    assert made["code"]["accuracy"]["code"]["accuracy"] > entry["accuracy"]["code"]["accuracy"] + 0.1


def test_recipe_errors(tmp_path):
    with pytest.raises(ConfigError, match="no 'base'"):
        build(tmp_path, stages={"math": TINY["code"]})
    with pytest.raises(ConfigError, match=r"stages.base.method: found 'ppo'; choose one of supervised, grpo"):
        build(tmp_path, stages={"base": {"method": "ppo"}})
