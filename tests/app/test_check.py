"""Every misspelt key and impossible choice, at any level of any group: one line, the nearest name, nothing written."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rotrl import config
from rotrl.app.check import check_keys
from rotrl.zoo import zoo_path

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
    "no map of controls": (["align=stiefel", "align.controls=lora"], "controls is 'lora', a map or null is expected"),
    "no map of others": (
        ["evidence=geometry", "+evidence.geometry.others=DIR"],
        "evidence.geometry.others is 'DIR'; give {NAME: {base: DIR, tuned: DIR}}",
    ),
    "prompts of no function": (
        ["models=custom", "models.base=x", "models.experts={math: x}", "models.prompts={math: {path: x}}"],
        "models.prompts.math is {'path': 'x'}, a map without _target_",
    ),
    "a task of no function": (["evaluation=tiny", "+evaluation.tasks.mine={path: x}"], "a map without _target_"),
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
    "what it is computed in": (
        ["merge=orthomerge", "merge.precision=float16"],
        "precision is 'float16', one of float32, float64",
    ),
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
    "a whole number": (["seed=1.5"], "seed: Value '1.5' of type 'float' could not be converted to Integer"),
    "a flag": (["--multirunn"], "unknown flag '--multirunn'"),
    "a group by null": (["logger=null"], "logger=null: a group takes the name of an option; GROUP=none switches it"),
    "no key": (["+merge.x"], "Error parsing override '+merge.x' missing EQUAL"),
    "an experiment": (["experiment=merge_grid"], "experiment is no key of its own; write +experiment=NAME"),
    "an expert of a preset": (["models.experts={law: x}"], "unknown key 'models.experts.law'; one of: math, code"),
    "keys that there are not": (
        ["merge_scael=1", "merge=ties", "merge.denisty=3", "protcol.n=3"],
        "did you mean 'density'?; one of: density, scale, normalize, threshold, scope, precision, weights, "
        "per_layer; unknown key "
        "'protcol.n'",
    ),
    "a function that is not there": (
        ["evaluation=tiny", "evaluation.tasks.tiny_math._target_=rotrl.zoo.tasks.mth"],
        "evaluation.tasks.tiny_math._target_ is 'rotrl.zoo.tasks.mth', which is nothing of rotrl",
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
    "output in a file": (["output=files/thesis.txt/x"], "thesis.txt is a file; give a folder"),
    "run_dir": (["run_dir=files/thesis.txt"], "run_dir=files/thesis.txt: "),
    "run_dir in a model": (["run_dir=math/run", "models.experts.math=math"], "run_dir=math/run lies in the folder of"),
    "output in a model": (["output=math/out", "models.experts.math=math"], "output=math/out lies in the folder of"),
    "cache_dir in a model": (["cache_dir=math", "models.experts.math=math"], "cache_dir=math lies in the folder of"),
    "no model": (["models.experts.math=files"], "files/config.json: does not exist"),
    "no folder": (["models.experts.math=nowhere"], "experts.math: no folder 'nowhere'"),
    "no root": (["models.root=nowhere"], "models.root=nowhere: no such folder"),
    "source": (["align=stiefel", "align.source=mth"], "align.source='mth'; one of: start, base, math, code"),
    "teachers": (["align=stiefel", "align.teachers=[]"], "align.teachers is empty"),
    "mix": (["align=stiefel", "align.mix={math: 1}"], "align.mix={'math': 1}; give every teacher a weight above 0"),
    "start": (["align=stiefel", "align.start=null"], "align.source=start needs align.start"),
    "answers cut off": (
        ["align=stiefel", "align.max_tokens=1"],
        "align.max_tokens=1 leaves no answer: prompts of math",
    ),
    "a block": (["align=procrustes", "align.block=7"], "align.block=7 does not divide the 96 dimensions"),
    "precision": (["align=stiefel", "trainer.precision=64"], "trainer.precision='64': rotations need float32"),
    "accelerator": (["align=stiefel", "trainer.accelerator=gpux"], "trainer: "),
    "a device": (["device=tpu"], "device is 'tpu', one of auto, cpu"),
    "device of the evidence": (["evidence=geometry", "evidence.geometry.device=x"], "geometry.device: 'x' is not here"),
    "controls": (["evidence=geometry", "evidence.geometry.controls=[isotropc]"], "did you mean 'isotropic'?"),
    "spans": (
        ["evidence=function", "evidence.function.restore={ranks: [[0.2, 0]]}"],
        "restore.ranks: [0.2, 0] is no span of shares",
    ),
    "no tasks": (
        ["evaluation=custom", "~evaluation.tasks.custom"],
        "evaluation has no tasks; choose some, or evaluation=",
    ),
    "a context too long": (["evaluation=tiny", "engine.max_model_len=999"], "has 256 positions"),
}


def refusal(typed, folder: Path, *given: str) -> str:
    """What is said of a command that must be refused, as it must be said."""
    (folder / "files").mkdir()
    (folder / "files/thesis.txt").write_text("years")
    (folder / "math").symlink_to(zoo_path("math"))
    before = sorted(map(str, folder.rglob("*")))
    code, line = typed(*given)
    assert (code, line.count("\n")) == (2, 1), line
    assert line.startswith("error: ")
    assert sorted(map(str, folder.rglob("*"))) == before
    return line


@pytest.mark.parametrize("case", KEYS)
def test_a_mistake_is_one_line_before_anything_is_written(case, typed, tmp_path: Path, monkeypatch) -> None:
    given, words = KEYS[case]
    monkeypatch.chdir(tmp_path)
    method = [] if any(one.startswith("merge=") for one in given) else ["merge=linear"]
    assert words in refusal(typed, tmp_path, *QUIET, *method, *given)


VALUES = {  # key=value -> what is told of it; all of one group in one command
    "align": {
        **{
            f"{key}=0": f"{key} is 0, it must be 1 or more"
            for key in ("steps", "batch", "prompts", "block", "patience")
        },
        "warmup=-1": "warmup is -1, it must be 0 or more",
        "heldout=1.5": "heldout is 1.5, it must lie in (0, 1)",
        "lr=abc": "lr is 'abc', a number is expected",
        "angle_prior=null": "angle_prior is null, a number is expected",
        "validate_every=1.5": "validate_every is 1.5, a whole number is expected",
        "checkpoint_every=[1,2]": "checkpoint_every is [1, 2], a whole number is expected",
        "objective=logit": "objective is 'logit', one of logits, activation, weight is expected",
        "adapter=yes": "adapter is 'yes', true or false is expected",
        "teachers=3": "teachers is 3, a text or a list is expected",
        "samples.n=0": "samples.n is 0, it must be 1 or more",
        "samples.sampling.temperature=-1": "samples.sampling.temperature is -1, it must be 0 or more",
        "controls.lora.rank=0": "controls.lora.rank is 0, it must be 1 or more",
    },
    "evidence.geometry": {
        "controls=isotropic": "controls is 'isotropic', a list is expected",
        "planted=[0,2]": "planted.1 is 2, it must lie in [0, 1]",
        "principal=0": "principal is 0, it must lie in (0, 1]",
        "bootstrap=0": "bootstrap is 0, it must be 1 or more",
        "dtype=float16": "dtype is 'float16', one of float64, float32 is expected",
    },
    "protocol": {
        "n=0": "n is 0, it must be 1 or more",
        "ks=[a,1]": "ks.0 is 'a', a whole number is expected",
        "temperature=abc": "temperature is 'abc', a number is expected",
        "top_p=0": "top_p is 0, it must lie in (0, 1]",
        "top_k=-2": "top_k is -2, it must be -1 or more",
        "max_tokens=0": "max_tokens is 0, it must be 1 or more",
        "prompts.math=[x]": "prompts.math is ['x'], a text or null is expected",
    },
    "evaluation": {
        "margin=2": "margin is 2, it must lie in [0, 1]",
        "select=tiny_math": "select is 'tiny_math', a list or null is expected",
        "tasks.tiny_math.limit=-1": "tasks.tiny_math.limit is -1, it must be 1 or more",
        "tasks.tiny_code=null": "tasks.tiny_code is null, a map is expected",
        "sandbox.minimum=landlok": "sandbox.minimum is 'landlok', one of none, landlock, bubblewrap is expected",
        "sandbox.allow_unsandboxed=3": "sandbox.allow_unsandboxed is 3, true or false is expected",
    },
    "engine": {
        "max_num_seqs=0": "max_num_seqs is 0, it must be 1 or more",
        "enforce_eager=perhaps": "enforce_eager is 'perhaps', true or false is expected",
        "dtype=float99": "dtype is 'float99', one of auto, half, float16, bfloat16, float, float32 is expected",
        "threads=many": "threads is 'many', a whole number or null is expected",
    },
    "logger": {
        "mode=onlin": "mode is 'onlin', one of none, disabled, offline, online is expected",
        "timeout=-1": "timeout is -1, it must be above 0",
        "tags=[1]": "tags.0 is 1, a text is expected",
        "project=": "project is empty, a text is expected",
    },
    "": {
        "seed=-1": "seed is -1, it must lie in [0, 9.22337e+18]",
        "name=": "name is empty, a text is expected",
        "output=": "output is empty, a path is expected",
        "merge_scale=abc": "merge_scale is 'abc', a number or one of mean, norm, sum, retention, norm_global,",
        "vocab=padd": "vocab is 'padd', one of error, pad, truncate is expected",
        "models.base=3": "models.base is 3, a text, a map or null is expected",
        "models.canonicalize=3": "models.canonicalize is 3, true, false or null is expected",
        "+trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches is 0, it must be 1 or more",
        "merge.ties.density=30": "merge.ties.density is 30, it must lie in (0, 1]",
        "merge.slerp.t=abc": "merge.slerp.t is 'abc', a number is expected",
        "models.experts.math=nowhere": "experts.math: no folder 'nowhere'",
        "models.known_as={law: x}": "unknown key 'models.known_as.law'; one of: base, math, code",
    },
}


@pytest.mark.parametrize("group", VALUES)
def test_impossible_values_are_all_told_in_the_plan(group, typed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    prefix = f"{group}." if group else ""
    line = refusal(typed, tmp_path, "plan_only=true", *(prefix + given for given in VALUES[group]))
    missing = [told for told in VALUES[group].values() if prefix + told not in line]
    assert not missing, line


def test_an_output_with_another_merge_is_refused_before_any_stage(typed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(*QUIET, "merge=linear", "output=out", "run_dir=run")[0] == 0
    asked = [*QUIET, "evidence=lineage", "merge=slerp", "output=out", "run_dir=other"]
    code, line = typed(*asked)
    assert code == 2
    assert "out: holds another merge (other merge._target_, merge.normalize, merge.t)" in line
    assert not (tmp_path / "other").exists()
    assert typed(*asked, "overwrite=true")[0] == 0


def test_flags_may_stand_behind_keys(typed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed("merge=linear,slerp", "-m", *QUIET)[0] == 0
    assert len(list(tmp_path.glob("multirun/demo/*/record.json"))) == 2


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
