import importlib
import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rotrl.align.trainer import check_settings
from rotrl.config import config_dir

CONF = Path(config_dir())


@pytest.mark.parametrize("name", ["procrustes", "stiefel"])
def test_a_preset_gives_every_hyperparameter_and_no_other(name: str):
    preset = OmegaConf.load(CONF / "align" / f"{name}.yaml")
    module, _, function = preset["_target_"].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    hyper = {key for key, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    of_hydra = {"defaults", "_target_", "_partial_", "_recursive_", "_convert_"}
    of_app = {"samples", "progress"}  # what the teachers are asked for, and the bar
    assert set(preset) - of_hydra - of_app == hyper - of_app


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_trainer_preset_is_what_lightning_takes(name: str):
    check_settings({str(key): value for key, value in OmegaConf.load(CONF / "trainer" / f"{name}.yaml").items()})
