"""The configuration: where `conf/` is, what each key may hold, and what a wrong key means in one line."""

import difflib
import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from rotrl.errors import ConfigError, RotrlError
from rotrl.evaluate.sampling import Sampling
from rotrl.values import Count, Dtype, LmHead, Nonfinite, NonNegative, Positive, Rounding, Rule, Seed, Share, Vocab

MANY = 50  # options that are too many for a line, where the nearest is known
DISK = (  # faults that the user can mend
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
)
Maps = Mapping[str, Any]


@dataclass
class Config:
    """The top level: Hydra refuses other names. A `hint` says of the values what OmegaConf's types can't."""

    name: str = "demo"
    models: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    align: Any = None  # one `_target_`, or null
    merge: Any = None  # one `_target_`, a suite {label: `_target_`}, or null
    evaluation: Any = None
    protocol: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: Any = field(default=None, metadata={"hint": Maps | None})
    job: Any = field(default=None, metadata={"hint": Maps | None})  # stands alone, in place of the stages (build_zoo)
    merge_scale: Any = field(default=1.0, metadata={"hint": float | Rule})
    dtype: str = field(default="auto", metadata={"hint": Dtype})
    rounding: str = field(default="nearest", metadata={"hint": Rounding})
    device: str = "auto"
    tokenizer_from: str | None = None
    vocab: str = field(default="error", metadata={"hint": Vocab})
    lm_head: str = field(default="error", metadata={"hint": LmHead})
    nonfinite: str = field(default="error", metadata={"hint": Nonfinite})
    output: str | None = field(default=None, metadata={"hint": Path | None})
    run_dir: str | None = field(default=None, metadata={"hint": Path | None})
    cache_dir: str = field(default="outputs/cache", metadata={"hint": Path})
    seed: int = field(default=0, metadata={"hint": Seed})
    plan_only: bool = False
    overwrite: bool = False
    debug: bool = False
    regrade: str | None = field(default=None, metadata={"hint": Path | None})
    verify: str | None = field(default=None, metadata={"hint": Path | None})
    doctor: bool = False


class Models:
    base: str | Maps | None
    experts: Mapping[str, str | Maps | None] | None
    controls: Mapping[str, str | Maps | None] | None
    prompts: Mapping[str, Path | Maps] | None
    root: Path | None
    rebase: Any  # app.prepare.check_rebase
    canonicalize: bool | None
    known_as: Mapping[str, str] | None


class Evidence:
    lineage: bool | None
    geometry: Maps | None
    function: Maps | None


class Evaluation:
    tasks: Mapping[str, Maps]
    sandbox: Maps
    path: Path | None
    completions: Path | Mapping[str, Path] | None
    select: Sequence[str] | None
    margin: Share


class Protocol(Sampling):
    name: str
    n: Count | Mapping[str, Count]
    ks: Sequence[Count] | None
    grader: str | None
    prompts: Mapping[str, str | None] | None
    system: str | None
    chat_template_kwargs: Maps | None


class Trainer:
    """What Lightning's own types leave open."""

    accumulate_grad_batches: Count
    gradient_clip_val: NonNegative | None
    log_every_n_steps: Count | None


class Logger:
    mode: Literal["none", "disabled", "offline", "online"]
    project: str | None
    entity: str | None
    group: str | None
    tags: Sequence[str] | None
    timeout: Positive | None


GROUPS: dict[str, type] = {
    "models": Models,
    "evidence": Evidence,
    "evaluation": Evaluation,
    "protocol": Protocol,
    "logger": Logger,
}


def hints(group: str = "") -> dict[str, Any]:
    """{key: type hint} of a group, or of the top level."""
    if group:
        return get_type_hints(GROUPS[group], include_extras=True)
    return {each.name: each.metadata.get("hint", each.type) for each in fields(Config)}


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


def flags_first(arguments: Sequence[str]) -> list[str]:
    """`merge=a,b -m` as `-m merge=a,b`, the order that Hydra reads; ConfigError for a flag that it does not have."""
    from hydra._internal.utils import get_args_parser

    known, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    if unknown:
        raise ConfigError(f"unknown flag {unknown[0]!r}; keys are given as KEY=VALUE, and --help shows the flags")
    keys = known.overrides or []
    return [argument for argument in arguments if argument not in keys] + keys


def user_error(error: BaseException, arguments: Sequence[str]) -> str | None:
    """The one line for an error that the user can mend; None for a bug."""
    from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, RotrlError):
            return str(cause)
    if any(isinstance(cause, InstantiationException) for cause in chain):
        said = _flat(" ".join(str(cause) for cause in chain))
        wrong_target, wrong_keyword = "Error locating target" in said, "unexpected keyword argument" in said
        return _flat(f"{error} {chain[-1]}") if wrong_target or wrong_keyword else None
    if any(isinstance(cause, HydraException | OmegaConfBaseException) for cause in chain):
        text = _flat(" ".join(dict.fromkeys(str(cause) for cause in chain)))
        if isinstance(error, ConfigCompositionException) and _not_there(text):
            return _unknown_keys(arguments)
        return _unknown_choice(text) or _of_its_key(chain) or text
    if "Config group override must be a string" in str(error):
        groups = [a for a in arguments if a.partition("=")[2] in ("", "null") or not a.partition("=")[0]]
        return f"{' '.join(groups) or 'a group'}: a group takes the name of an option; GROUP=none switches it off"
    if full := next((cause for cause in chain if _is_memory(cause)), None):
        return f"memory ran out ({_flat(str(full))[-120:]}); take smaller batches, or a machine with more"
    refused = next((cause for cause in chain if isinstance(cause, OSError) and cause.errno in DISK), None)
    return refused and f"{refused}; free the disk, or choose another output, run_dir or cache_dir"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_memory(error: BaseException) -> bool:
    """torch has a RuntimeError for main memory and an error of its own for a GPU's."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error)


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _unknown_choice(text: str) -> str | None:
    """`Could not find 'merge/tyes' Available options in 'merge': suite ties Config search path: ...`"""
    found = re.search(
        r"Could not (?:find|load) '([\w/.-]+)/([^'/]*)'.*?Available options in '[^']+': (.*?)(?= Config search|$)", text
    )
    if found is None:
        return None
    group, choice, options = found[1], found[2], found[3].split()
    return f"unknown {group} {choice!r}{_nearest(choice, options)}; one of: {', '.join(options)}"


def _of_its_key(chain: Sequence[BaseException]) -> str | None:
    """OmegaConf names the key at the end: `Value 'a' ... to Integer full_key: seed object_type=Config`."""
    found = next((found for cause in chain if (found := re.match(r"(.*?) full_key: (\S+)", _flat(str(cause))))), None)
    return found and f"{found[2]}: {found[1]}"


def _not_there(text: str) -> tuple[str, str] | None:
    """The key that was typed and the one that no preset has, which may lie within the map that was typed for it."""
    typed, whole = re.search(r"Could not override '([^']+)'", text), re.search(r"full_key: (\S+)", text)
    if typed is None:
        return None
    return typed[1], whole[1] if whole and whole[1].startswith(f"{typed[1]}.") else typed[1]


def _unknown_keys(arguments: Sequence[str]) -> str:
    """The lines of all keys that there are not, found by leaving out one after the other."""
    from omegaconf import OmegaConf

    left = {a: re.split(r"[=@]", a.lstrip("+~"))[0] for a in arguments if "=" in a and not a.startswith("-")}
    keys, valid = [], None
    while valid is None:
        try:
            valid = compose(list(left))
        except Exception as error:
            found = _not_there(_flat(f"{error} {error.__cause__}"))
            if found is None or found[1] in keys:  # a mistake of another kind: those found are still worth their line
                break
            keys.append(found[1])
            left = {argument: key for argument, key in left.items() if key != found[0]}
    lines = []
    for key in keys:
        node = OmegaConf.select(valid, key.rpartition(".")[0]) if valid is not None and "." in key else valid
        lines.append(unknown_key(key, [str(k) for k in node or () if k not in ("hydra", "_target_", "_partial_")]))
    return "; ".join(lines)


def unknown_key(key: str, options: Sequence[str]) -> str:
    """The line for a key that is not among its options."""
    if key in ("experiment", "sweep"):
        return f"{key} is no key of its own; write +{key}=NAME"
    near = _nearest(key.rpartition(".")[2], options)
    allowed = f"; one of: {', '.join(options)}" if options and not (near and len(options) > MANY) else ""
    return f"unknown key {key!r}{near}{allowed}"


def _nearest(word: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, options, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
