"""Prompts as token ids: all models compared get the same ones, rendered with the base's chat template."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.folder import context_length
from rotrl.evaluate.task import Task

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
STEP = 1024  # an engine's context is rounded up, so that the next stage can use it too


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    sha256: str
    thinks: bool  # the template itself opens <think>


Prompts = dict[tuple[str, str], Prompt]  # by task name and problem id


def render(model_dir: Path, tasks: Sequence[Task], *, protocol: Mapping[str, Any]) -> Prompts:
    """Prompts of all problems with the chat template of this model.

    `protocol.system` and `protocol.chat_template_kwargs` go into the template. EvaluationError where the template is
    missing or the rendered ids do not begin with exactly the one BOS token that the tokenizer wants.
    """
    tokenizer = load_tokenizer(model_dir)
    if not tokenizer.chat_template:
        raise EvaluationError(
            f"{model_dir}: no chat template; copy the chat_template.jinja of the model that it was trained from"
        )
    return _render(tokenizer, tokenizer.chat_template, model_dir, tasks, protocol)


def load_tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except (OSError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise EvaluationError(f"{model_dir}: no tokenizer can be read there ({message})") from None


def check_models(
    base_dir: Path, models: Mapping[str, Path], tasks: Sequence[Task], prompts: Prompts, *, protocol: Mapping[str, Any]
) -> list[str]:
    """Refuse a model whose tokenizer gives other ids; say in a sentence whose own chat template would.

    A folder without a tokenizer, or with the base's files, needs no look.
    """
    alarms, different = [], []
    template = load_tokenizer(base_dir).chat_template
    for name, folder in models.items():
        if not (Path(folder) / "tokenizer.json").is_file() or _same_files(base_dir, folder):
            continue
        tokenizer = load_tokenizer(folder)
        try:
            own = _render(tokenizer, template, folder, tasks, protocol)
        except EvaluationError as error:
            different.append(str(error))
            continue
        if other := next((key for key, prompt in prompts.items() if own[key].sha256 != prompt.sha256), None):
            different.append(
                f"{name} ({folder}): its tokenizer gives other ids than the base's for problem {other[1]!r}"
            )
        elif tokenizer.chat_template and tokenizer.chat_template != template:
            alarms.append(f"{name} has a chat template of its own; all models get the base's")
    if different:
        raise EvaluationError("; ".join(different) + "; only models of one tokenizer can be compared")
    return alarms


def needed_length(prompts: Prompts, max_tokens: int, models: Mapping[str, Path]) -> int:
    """Tokens that the longest prompt and its completion take. EvaluationError where a model has no room for them."""
    (task, problem), longest = max(prompts.items(), key=lambda item: len(item[1].ids))
    needed = len(longest.ids) + max_tokens
    for name, folder in models.items():
        context = context_length(folder)
        if needed > context:
            room = context - len(longest.ids)
            remedy = f"set protocol.max_tokens={room} or less" if room > 0 else "leave the problem out"
            raise EvaluationError(
                f"{name} has a context of {context} tokens; problem {problem!r} of {task} takes {len(longest.ids)} "
                f"and protocol.max_tokens is {max_tokens}: {remedy}"
            )
    return needed


def engine_length(needed: int, model_dir: Path, given: int | None) -> int:
    """max_model_len of an engine: what was given, if it is enough, else what is needed, rounded up."""
    if given is None:
        return min(context_length(model_dir), -(-needed // STEP) * STEP)
    if not needed <= given <= context_length(model_dir):
        raise EvaluationError(
            f"engine.max_model_len is {given}, but prompts and completions need {needed} and {model_dir} has "
            f"{context_length(model_dir)} positions"
        )
    return given


def combined_sha256(prompts: Prompts) -> str:
    """One digest of all prompts: equal where two runs asked the same."""
    lines = [f"{task}\n{problem}\n{prompt.sha256}" for (task, problem), prompt in sorted(prompts.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _render(tokenizer: Any, template: str, place: Path, tasks: Sequence[Task], protocol: Mapping[str, Any]) -> Prompts:
    import jinja2

    system = protocol.get("system")
    head = [{"role": "system", "content": system}] if system else []
    keys = [(task.name, problem.id) for task in tasks for problem in task.problems]
    chats = [[*head, {"role": "user", "content": problem.prompt}] for task in tasks for problem in task.problems]
    options = {"chat_template": template, "add_generation_prompt": True, **(protocol.get("chat_template_kwargs") or {})}
    try:
        texts = tokenizer.apply_chat_template(chats, tokenize=False, **options)
    except jinja2.TemplateError as error:
        raise EvaluationError(f"{place}: its chat template can't render the prompts ({error})") from None
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    wants_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    prompts = {}
    for key, text, ids in zip(keys, texts, rows, strict=True):
        if tokenizer.bos_token_id is not None:
            _check_bos(ids, tokenizer.bos_token_id, wants_bos, f"{place}: problem {key[1]!r}")
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        prompts[key] = Prompt(tuple(ids), digest, text.rstrip().endswith("<think>"))
    return prompts


def _check_bos(ids: list[int], bos: int, wanted: bool, place: str) -> None:
    found = ids.count(bos)
    if found > 1 or (found == 1 and ids[0] != bos) or (found == 0 and wanted):
        raise EvaluationError(
            f"{place}: the prompt has {found} BOS tokens (id {bos}), not one at its start; mend the chat template"
        )


def _same_files(a: Path, b: Path) -> bool:
    def content(folder: Path, name: str) -> bytes | None:
        file = Path(folder) / name
        return file.read_bytes() if file.is_file() else None

    return all(content(a, name) == content(b, name) for name in FILES)
