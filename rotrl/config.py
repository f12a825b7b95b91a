"""The configuration: where `conf/` is, the schema that catches typos, and what a wrong key means in one line."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotrl.errors import RotrlError

MANY = 50  # options that are too many for a line, where the nearest is known


@dataclass
class Config:
    """One level of names: a misspelt top-level key is an error, the groups' own keys are checked by struct mode."""

    name: str = "demo"
    models: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    align: Any = None  # one `_target_`, or null
    merge: Any = None  # one `_target_`, a suite {label: `_target_`}, or null
    evaluation: Any = None
    protocol: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: Any = None
    job: Any = None  # a stand-alone `_target_` (build_zoo) in place of the stages
    merge_scale: Any = 1.0  # a number, or a rule (merge.scale.RULES)
    dtype: str = "auto"
    rounding: str = "nearest"
    device: str = "auto"
    tokenizer_from: str | None = None
    vocab: str = "error"
    lm_head: str = "error"
    nonfinite: str = "error"
    output: str | None = None
    run_dir: str | None = None
    cache_dir: str = "outputs/cache"
    seed: int = 0
    plan_only: bool = False
    overwrite: bool = False
    debug: bool = False
    regrade: str | None = None
    verify: str | None = None
    doctor: bool = False


def config_dir() -> str:
    """Absolute path of `conf/`: inside the package in a wheel, beside it in a checkout or editable install."""
    package = Path(__file__).resolve().parent
    return str(next(d for d in (package / "conf", package.parent / "conf") if d.is_dir()))


def register() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="rotrl_schema", node=Config)


def compose(overrides: Sequence[str]) -> Any:
    """The configuration that `python -m rotrl OVERRIDES` runs with (for tests and for the hints below)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def user_error(error: BaseException, arguments: Sequence[str]) -> str | None:
    """The one line for an error that the user can mend; None for a bug."""
    from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, RotrlError):
            return str(cause)
    if any(isinstance(cause, InstantiationException) for cause in chain):
        said = _flat(" ".join(str(cause) for cause in chain))
        wrong_target, wrong_keyword = "Error locating target" in said, "unexpected keyword argument" in said
        return _flat(f"{error} {chain[-1]}") if wrong_target or wrong_keyword else None
    if any(isinstance(cause, HydraException | OmegaConfBaseException) for cause in chain):
        text = _flat(" ".join(dict.fromkeys(str(cause) for cause in chain)))
        if isinstance(error, ConfigCompositionException) and (key := re.search(r"Could not override '([^']+)'", text)):
            return _unknown_key(key[1], arguments)
        return _unknown_choice(text) or text
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _unknown_choice(text: str) -> str | None:
    """`Could not find 'merge/tyes' Available options in 'merge': suite ties Config search path: ...`"""
    found = re.search(
        r"Could not (?:find|load) '([\w/.-]+)/([^'/]+)'.*?Available options in '[^']+': (.*?)(?= Config search|$)", text
    )
    if found is None:
        return None
    group, choice, options = found[1], found[2], found[3].split()
    return f"unknown {group} {choice!r}{_nearest(choice, options)}; one of: {', '.join(options)}"


def _unknown_key(key: str, arguments: Sequence[str]) -> str:
    parent = key.rpartition(".")[0]
    try:
        from omegaconf import OmegaConf

        valid = compose([a for a in arguments if "=" in a and not a.startswith("-") and a.split("=")[0] != key])
        node = OmegaConf.select(valid, parent) if parent else valid
        options = [str(k) for k in node if k not in ("hydra", "_target_", "_partial_")]
    except Exception:  # several mistakes at once: the first is still worth its line
        options = []
    return unknown_key(key, options)


def unknown_key(key: str, options: Sequence[str]) -> str:
    """The line for a key that is not among its options."""
    near = _nearest(key.rpartition(".")[2], options)
    allowed = f"; one of: {', '.join(options)}" if options and not (near and len(options) > MANY) else ""
    return f"unknown key {key!r}{near}{allowed}"


def _nearest(word: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, options, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
