"""Where models are: a local folder, `models.root`, or the hub (offline: one line that says how to give a folder)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotrl.checkpoint.family import open_family
from rotrl.checkpoint.reader import Checkpoint
from rotrl.errors import CheckpointError, ConfigError, NoModel

WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def locate(name: str, spec: Any, root: str | None = None) -> Path:
    """The folder of a model given as a path, a hub id `ORG/NAME[@REVISION]`, or a `_target_` that gives a path.

    Order: an existing folder; `root/NAME` or `root/ORG/NAME`; the hub's cache; a download.
    Raises CheckpointError where none of them has it, and where a folder of `root` would stand for a revision.
    """
    if spec is None:
        raise CheckpointError(f"models.{name} is not set; give a folder or a hub id: models.{name}=DIR")
    if isinstance(spec, Mapping):
        from hydra.utils import instantiate

        spec = instantiate(dict(spec))
    text = str(spec)
    repo, _, revision = text.partition("@")
    if (given := Path(text).expanduser()).is_dir():
        return given.resolve()
    for folder in (Path(root) / repo.rsplit("/", 1)[-1], Path(root) / repo) if root is not None else ():
        if folder.is_dir() and revision:
            raise CheckpointError(
                f"{name}: {folder} stands for {repo} whatever its revision, and {revision} is asked; leave out "
                f"@{revision} or give the folder of that revision"
            )
        if folder.is_dir():
            return folder.resolve()
    looks_like_id = repo.count("/") == 1 and not repo.startswith((".", "/", "~"))
    if not looks_like_id:
        raise CheckpointError(f"{name}: no folder {text!r}; give one that holds config.json and *.safetensors")
    return _from_hub(name, repo, revision or None)


def _from_hub(name: str, repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(repo, revision=revision, allow_patterns=WEIGHT_FILES)
    except Exception as error:  # huggingface_hub raises many kinds for "no network", "no such repo", "gated"
        last = repo.rsplit("/", 1)[-1]
        key = name if name.startswith("evidence.") else f"models.{name}"
        override = f"'{key}=DIR'" if "." in name else f"{key}=DIR"
        raise NoModel(
            f"{name}: {repo} is neither in the hub's cache nor reachable ({type(error).__name__}); "
            f"give a local folder: models.root=DIR (holding {last}/) or {override}"
        ) from error
    return Path(path)


def locate_all(cfg: Mapping[str, Any]) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Folders of the base, the experts and the controls; every model that is missing is named at once."""
    problems: list[CheckpointError] = []
    if cfg.get("root") and not Path(cfg["root"]).is_dir():
        problems.append(CheckpointError(f"models.root={cfg['root']}: no such folder; give one that holds the models"))

    def find(name: str, spec: Any) -> Path:
        try:
            return locate(name, spec, cfg.get("root"))
        except CheckpointError as error:
            problems.append(error)
            return Path()

    base = find("base", cfg.get("base"))
    experts = {name: find(f"experts.{name}", spec) for name, spec in (cfg.get("experts") or {}).items()}
    controls = {name: find(f"controls.{name}", spec) for name, spec in (cfg.get("controls") or {}).items()}
    if problems:
        kind = NoModel if all(isinstance(problem, NoModel) for problem in problems) else CheckpointError
        raise kind("; ".join(map(str, problems)))
    return base, experts, controls


def open_others(cfg: Mapping[str, Any]) -> dict[str, tuple[Checkpoint, Checkpoint]]:
    """{name: (base, tuned)} of evidence.geometry.others: models of other bases that geometry measures beside."""
    given, models = (cfg["evidence"].get("geometry") or {}).get("others") or {}, cfg["models"]
    taken = {*(models.get("experts") or {}), *(models.get("controls") or {})}
    choices = {key: cfg[key] for key in ("tokenizer_from", "vocab", "lm_head", "nonfinite")}
    if not isinstance(given, Mapping):
        raise ConfigError(f"evidence.geometry.others is {given!r}; give {{NAME: {{base: DIR, tuned: DIR}}}}")
    found = {}
    for name, pair in given.items():
        where = f"evidence.geometry.others.{name}"
        if not isinstance(pair, Mapping) or set(pair) != {"base", "tuned"}:
            raise ConfigError(f"{where} is {pair!r}; give {{base: DIR, tuned: DIR}}")
        if name in taken:
            raise ConfigError(f"{where} has the name of an expert or a control; rename it")
        base, tuned = (locate(f"{where}.{key}", pair[key], models.get("root")) for key in ("base", "tuned"))
        root, own = open_family(base, {name: tuned}, **choices)
        found[name] = root, own[name]
    return found


def open_models(cfg: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, Checkpoint]]:
    """The base, the experts and the controls of a configuration, by their headers and as its choices want them."""
    base, experts, controls = locate_all(cfg["models"])
    if twice := experts.keys() & controls.keys():
        raise CheckpointError(f"models.controls.{min(twice)} has an expert's name; rename it")
    choices = {key: cfg[key] for key in ("tokenizer_from", "vocab", "lm_head", "nonfinite")}
    root, tuned = open_family(base, {**experts, **controls}, **choices)
    return root, {name: tuned[name] for name in experts}, {name: tuned[name] for name in controls}
