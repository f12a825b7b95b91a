"""Every misspelt key and impossible choice, at any level of any group: one line, the nearest name, nothing written."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rotrl import config
from rotrl.app.check import check_keys

QUIET = ("evidence=none", "align=none", "evaluation=none", "logger=none")
KEYS = {  # beside merge=linear and QUIET
    "models": (["+models.bas=1"], "'models.bas', did you mean 'base'?"),
    "a function that gives a model": (["+models.experts.math.nam=x"], "math.nam', did you mean 'name'?"),
    "a function that gives prompts": (["+models.prompts.math.limt=3"], "math.limt', did you mean 'limit'?"),
    "evidence": (["+evidence.linage=true"], "'evidence.linage', did you mean 'lineage'?"),
    "geometry": (["evidence=geometry", "+evidence.geometry.bootstrp=3"], "bootstrp', did you mean 'bootstrap'?"),
    "function": (["evidence=function", "+evidence.function.drws=3"], "drws', did you mean 'draws'?"),
    "samples": (["evidence=function", "+evidence.function.samples.nn=3"], "samples.nn', did you mean 'n'?"),
    "no stage": (["+align.steps=3"], "align is {'steps': 3}, which is no stage"),
    "align": (["align=stiefel", "+align.stepz=3"], "'align.stepz', did you mean 'steps'?"),
    "a control": (["align=stiefel", "+align.controls.lora.rnk=3"], "lora.rnk', did you mean 'rank'?"),
    "sampling": (["align=lora", "+align.samples.sampling.temprature=1"], "did you mean 'temperature'?"),
    "number of samples": (["align=lora", "align.samples.n=0"], "align.samples.n is 0"),
    "of Gram matrices": (["merge=regmean", "+merge.gram.samples.sampling.tempratur=1"], "did you mean 'temperature'?"),
    "evaluation": (["evaluation=tiny", "+evaluation.taks=3"], "'evaluation.taks', did you mean 'tasks'?"),
    "a task": (["evaluation=tiny", "+evaluation.tasks.tiny_math.limt=3"], "tiny_math.limt', did you mean 'limit'?"),
    "sandbox": (["evaluation=tiny", "+evaluation.sandbox.minimun=x"], "minimun', did you mean 'minimum'?"),
    "protocol": (["+protocol.temprature=1"], "'protocol.temprature', did you mean 'temperature'?"),
    "engine": (["+engine.max_num_seq=1"], "'engine.max_num_seq', did you mean 'max_num_seqs'?"),
    "trainer": (["+trainer.acelerator=cpu"], "'trainer.acelerator', did you mean 'accelerator'?"),
    "logger": (["+logger.projet=x"], "'logger.projet', did you mean 'project'?"),
    "method": (["merge=ties", "+merge.denisty=1"], "merge.denisty of ties, did you mean 'density'?"),
    "method under another": (["merge=svc", "+merge.of.scal=1"], "merge.of.scal of task_arithmetic, did you mean"),
    "method of a suite": (["merge=suite", "align=stiefel", "merge.ties.density=30"], "merge.ties.density is 30"),
    "per layer": (["merge=ties", "merge.per_layer={densty: [0.1]}"], "per_layer.densty of the method, did you mean"),
    "pattern": (["merge=ties", "merge.per_layer={density: {qq: 0.1}}"], "'qq' is neither a module (q, k, "),
    "top level": (["dtype=float8", "rounding=up"], "rounding is 'up', one of nearest, stochastic"),
    "device": (["device=cuda:77"], "device is 'cuda:77', one of auto, cpu"),
    "embeddings": (["merge=wudi", "merge.scope=all"], "merge.scope=all: wudi takes matrices whole"),
    "a solver without the form": (
        ["merge=iso_merger", "merge.solver=first_order", "merge.reproject=false"],
        "merge.solver=first_order has no published form",
    ),
    "one scale and others": (
        ["merge=ties", "merge_scale=norm_global", "merge.per_layer={scale: {q: 0.5}}"],
        "merge.scale=norm_global is one factor for all tensors; leave out merge.per_layer.scale",
    ),
    "one scale in a layer": (
        ["merge=ties", "merge.per_layer={scale: {q: retention_global}}"],
        "merge.per_layer.scale.q is retention_global, one factor for all tensors",
    ),
    "density": (["merge=ties", "merge.density=-3"], "merge.density is -3, it must lie in (0, 1]"),
    "weights that cancel": (["merge.weights={math: 0.5, code: -0.5}"], "merge.weights sum to 0"),
    "weights that cancel in a rule": (
        ["merge=task_arithmetic", "merge_scale=mean", "merge.weights={math: 1, code: -1}"],
        "merge.weights sum to 0, by which merge.scale=mean divides",
    ),
    "weights that cancel in the whole model": (
        ["merge=ties", "merge.threshold=model", "merge_scale=mean", "merge.weights={math: 1, code: -1}"],
        "merge.weights sum to 0",
    ),
    "weights in a layer": (["merge.per_layer={weights: {q: {math: 1, code: -1}}}"], "merge.weights sum to 0"),
    "an unknown expert": (["merge.weights={math: 1, cod: 1}"], "merge.weights names 'cod', the experts are math"),
    "output": (["output=files"], "files: holds files that rotrl did not write; choose another output"),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_mistake_is_one_line_before_anything_is_written(case, typed, tmp_path: Path, monkeypatch) -> None:
    given, words = KEYS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/thesis.txt").write_text("years")
    code, line = typed(*QUIET, *([] if any(one.startswith("merge=") for one in given) else ["merge=linear"]), *given)
    assert (code, line.count("\n")) == (2, 1), line
    assert line.startswith("error: ")
    assert words in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["files", "thesis.txt"]


CONF = Path(config.config_dir())
FREE = {"models=custom": ["models.base=x", "models.experts={math: x}"]}


@pytest.mark.parametrize("group", ["align", "engine", "evaluation", "evidence", "logger", "models", "protocol",
                                   "trainer"])  # fmt: skip
def test_what_ships_has_no_unknown_key(group: str) -> None:
    for path in sorted((CONF / group).glob("*.yaml")):
        choice = f"{group}={path.stem}"
        found = config.compose([choice, *FREE.get(choice, [])])
        cfg = OmegaConf.to_container(found, resolve=True)
        assert isinstance(cfg, dict)
        check_keys(cfg)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_no_experiment_has_an_unknown_key(experiment: str) -> None:
    cfg = OmegaConf.to_container(config.compose([f"+experiment={experiment}"]), resolve=True)
    assert isinstance(cfg, dict)
    check_keys(cfg)
