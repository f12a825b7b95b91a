import importlib
import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rotrl import config
from rotrl.align.learn import learn
from rotrl.align.trainer import check_settings
from rotrl.config import config_dir

CONF = Path(config_dir())
FAMILIES = ["stiefel", "cayley", "low_rank", "lora", "free", "coefficients", "split"]


def hyper_of(function) -> set[str]:
    parameters = inspect.signature(function).parameters
    return {key for key, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", ["procrustes", *FAMILIES])
def test_a_preset_gives_every_hyperparameter_and_no_other(name: str):
    preset = config.compose([f"align={name}"])["align"]
    module, _, function = preset["_target_"].rpartition(".")
    hyper = hyper_of(getattr(importlib.import_module(module), function))
    of_hydra = {"_target_", "_partial_", "_recursive_", "_convert_"}
    of_app = {"samples", "controls", "progress", "vectors"}  # what only the app knows
    shared = hyper_of(learn) if name in FAMILIES else set()
    assert set(preset) - of_hydra - of_app == (hyper | shared) - of_app


def test_families_differ_in_nothing_but_what_may_change():
    shared = hyper_of(learn) - {"progress", "vectors"}
    budgets = [{key: config.compose([f"align={name}"])["align"][key] for key in shared} for name in FAMILIES]
    assert all(budget == budgets[0] for budget in budgets)


def test_another_start_is_an_override():
    start = config.compose(["align=lora", "merge@align.start=ties"])["align"]["start"]
    assert start["_target_"] == "rotrl.merge.sparse.ties"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_trainer_preset_is_what_lightning_takes(name: str):
    check_settings({str(key): value for key, value in OmegaConf.load(CONF / "trainer" / f"{name}.yaml").items()})
