"""What config.json says of the function that the weights compute, in one form for nested and flat configurations."""

from collections.abc import Mapping
from typing import Any

REMEDIES = {
    "vocab_size": "vocab=pad or truncate makes them equal",
    "tie_word_embeddings": "lm_head=tie or untie makes them equal",
}
# Compared where both models say them: versions of transformers differ in which defaults they write.
FUNCTION = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")  # null turns them off
FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULTS = ("rope_theta", "original_max_position_embeddings")  # rotary settings that are left out as defaults


def of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model: those of `text_config`, where there is one, over the top level's."""
    return {**config, **_map(config, "text_config")}


def tied(config: Mapping[str, Any]) -> Any:
    """Whether head and embedding are one; None where not said. transformers 5 reads the outer value."""
    key = "tie_word_embeddings"
    return config.get(key, of_text(config).get(key))


def with_text(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A configuration with another value of the language model's, in `text_config` and wherever else it is said."""
    text = _map(config, "text_config")
    nested = {"text_config": {**text, key: value}} if text else {}
    return {**config, **nested, **({key: value} if key in config or not text else {})}


def config_differences(base: Mapping[str, Any], expert: Mapping[str, Any]) -> list[str]:
    """What two configurations say otherwise, where that changes the function."""
    ours, theirs = _said(base), _said(expert)
    found = [
        f"config {key}={theirs[key]!r}, base has {ours[key]!r}" + (f" ({REMEDIES[key]})" if key in REMEDIES else "")
        for key in FUNCTION
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]
    turned, others = _ropes(base), _ropes(expert)
    return found + [
        f"config rope{'' if kind == FULL else f' of {kind}'} {others[kind]}, base has {turned[kind]}"
        for kind in turned
        if kind in others and _differ(turned[kind], others[kind])
    ]


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {**of_text(config), "model_type": config.get("model_type"), "tie_word_embeddings": tied(config)}
    said = {key: value for key, value in found.items() if value is not None or key in OFF}
    if said.get("use_sliding_window") is False:
        said.pop("sliding_window", None)  # versions of transformers write a number or null there
    return said


def _ropes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rotary settings for each kind of layer: transformers 4 wrote rope_theta, rope_scaling and rope_local_base_freq,
    5 writes rope_parameters, by kind where the kinds differ (Gemma 3)."""
    config = of_text(config)
    found = _map(config, "rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **_map(config, "rope_scaling"),
    }
    kinds = {kind: rope for kind, rope in found.items() if isinstance(rope, Mapping)} or {FULL: found}
    if (local := config.get("rope_local_base_freq")) is not None:
        kinds.setdefault(SLIDING, {"rope_theta": local})
    share = {"partial_rotary_factor": config.get("partial_rotary_factor")}
    return {kind: one for kind, rope in kinds.items() if (one := _rope({**share, **rope}))}


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {("rope_type" if key == "type" else key): value for key, value in settings.items() if value is not None}
    return {"rope_type": "default", **known} if known else {}


def _differ(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    keys = (ours.keys() | theirs.keys()) - {key for key in DEFAULTS if key not in ours or key not in theirs}
    return any(ours.get(key) != theirs.get(key) for key in keys)


def _map(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
