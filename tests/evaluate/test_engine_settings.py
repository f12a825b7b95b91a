"""Settings of an engine: what vLLM takes, and which GPUs each of several engines gets."""

import pytest

from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate import engine_settings
from rotrl.evaluate.engine_settings import check_settings, device_groups, must_agree, vllm_settings


def test_the_settings_are_the_keywords_of_vllm():
    from vllm.engine.arg_utils import EngineArgs

    fields = set(EngineArgs.__dataclass_fields__)
    assert fields - vllm_settings().keys() == {"model", "disable_log_stats"}
    assert {"kv_cache_memory_bytes", "spec_tokens"} <= vllm_settings().keys()  # the second is LLM's alone


def test_an_unknown_setting_is_refused_with_the_nearest():
    check_settings({"dtype": "float32", "threads": None, "log": None, "enable_prefix_caching": True})
    with pytest.raises(ConfigError, match=r"unknown key 'engine.max_num_seq', did you mean 'max_num_seqs'\?"):
        check_settings({"max_num_seq": 3})
    with pytest.raises(ConfigError, match=r"unknown key 'engine.model'"):
        check_settings({"model": "x"})


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, [None]),
        ({"data_parallel_size": 1, "tensor_parallel_size": 4}, [None]),
        ({"data_parallel_size": None}, ["4", "5", "6", "7"]),
        ({"data_parallel_size": None, "tensor_parallel_size": 2}, ["4,5", "6,7"]),
        ({"data_parallel_size": None, "tensor_parallel_size": 3}, ["4,5,6"]),
        ({"data_parallel_size": None, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}, ["4,5,6,7"]),
        ({"data_parallel_size": 3}, ["4", "5", "6"]),
    ],
)
def test_each_engine_has_gpus_of_its_own(monkeypatch, settings, groups):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert device_groups(settings) == groups


def test_gpus_that_are_not_there_are_not_shared_out(monkeypatch):
    monkeypatch.setattr(engine_settings, "_visible_gpus", lambda: ["0", "1", "2"])
    with pytest.raises(EvaluationError, match=r"data_parallel_size=2 with 2 GPUs each needs 4, but 3 are visible"):
        device_groups({"data_parallel_size": 2, "tensor_parallel_size": 2})
    monkeypatch.setattr(engine_settings, "_visible_gpus", list)
    assert device_groups({"data_parallel_size": 2}) == [None, None]
    assert device_groups({"data_parallel_size": None}) == [None]
    for wrong in (0, -1, True, "two"):
        with pytest.raises(ConfigError, match="give a number of engines, or null"):
            device_groups({"data_parallel_size": wrong})


def test_an_engine_serves_again_whatever_its_log_and_length():
    assert must_agree({"log": "a", "max_model_len": 1, "threads": None, "dtype": "auto"}) == {"dtype": "auto"}
    assert must_agree({"data_parallel_size": 2}) != must_agree({"data_parallel_size": 3})
