"""Prompts: one rendering for all models, and what is refused before an engine starts."""

import json
import shutil
from pathlib import Path

import pytest

from rotrl.errors import EvaluationError
from rotrl.evaluate.folder import architecture, context_length
from rotrl.evaluate.prompts import check_models, combined_sha256, engine_length, load_tokenizer, needed_length, render
from rotrl.evaluate.task import Problem, Task
from rotrl.zoo import zoo_path

TASK = Task("sums", tuple(Problem(f"p{i}", f"math:{i}+1-2*3=", answer="1") for i in range(4)), "math")


@pytest.fixture
def model(tmp_path):
    """A copy of the base's tokenizer and configuration, with changes."""

    def make(name: str, template: str | None = None, **config) -> Path:
        folder = tmp_path / name
        shutil.copytree(zoo_path("base"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return make


def test_ids_are_those_of_the_template(model):
    base = model("base")
    tokenizer = load_tokenizer(base)
    for problem in TASK.problems:
        chat = [{"role": "user", "content": problem.prompt}]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert list(render(base, [TASK], protocol={})["sums", problem.id].ids) == expected


def test_digests_follow_the_ids_alone(model):
    base, renamed = model("base"), model("other", clean_up_tokenization_spaces=True)
    first, second = render(base, [TASK], protocol={}), render(renamed, [TASK], protocol={})
    assert combined_sha256(first) == combined_sha256(second)
    systemic = render(base, [TASK], protocol={"system": "math:"})
    assert combined_sha256(systemic) != combined_sha256(first)
    assert len({prompt.sha256 for prompt in first.values()}) == 4


def test_a_template_that_opens_the_thought_is_noticed(model):
    folder = model("thinking", "{{ messages[0].content }}<think>\n")
    assert all(prompt.thinks for prompt in render(folder, [TASK], protocol={}).values())


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}{{ bos_token }}"]
)
def test_two_bos_tokens_or_a_late_one_are_refused(model, template):
    folder = model("bos", template, bos_token="<|endoftext|>")
    with pytest.raises(EvaluationError, match=r"problem 'p0': the prompt has . BOS tokens"):
        render(folder, [TASK], protocol={})


def test_one_bos_token_is_fine(model):
    folder = model("bos", "{{ bos_token }}{{ messages[0].content }}", bos_token="<|endoftext|>")
    assert render(folder, [TASK], protocol={})["sums", "p0"].ids[0] == load_tokenizer(folder).bos_token_id


def test_a_missing_or_broken_template_is_refused(model):
    missing = model("missing")
    (missing / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="no chat template"):
        render(missing, [TASK], protocol={})
    with pytest.raises(EvaluationError, match="can't render"):
        render(model("broken", "{{ raise_exception('no system role') }}"), [TASK], protocol={})
    with pytest.raises(EvaluationError, match="no tokenizer"):
        render(missing / "absent", [TASK], protocol={})


def test_another_tokenizer_is_refused_and_named(model):
    base, other, twin = model("base"), model("permuted"), model("twin")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    file.write_text(json.dumps(tokenizer))
    prompts = render(base, [TASK], protocol={})
    assert check_models(base, {"base": base, "twin": twin}, [TASK], prompts, protocol={}) == []
    with pytest.raises(EvaluationError, match=r"expert \(.*permuted\): its tokenizer gives other ids .* only models"):
        check_models(base, {"twin": twin, "expert": other}, [TASK], prompts, protocol={})


def test_a_template_of_its_own_is_said(model):
    base, own = model("base"), model("own", "{{ messages[0].content }}")
    prompts = render(base, [TASK], protocol={})
    (alarm,) = check_models(base, {"expert": own}, [TASK], prompts, protocol={})
    assert alarm.startswith("expert has a chat template of its own")


def test_a_prompt_that_does_not_fit_is_refused_with_what_would(model):
    base = model("base")
    long = Task("long", (*TASK.problems, Problem("longest", "math:" + "1+" * 100 + "1=", answer="1")), "math")
    prompts = render(base, [long], protocol={})
    size = len(prompts["long", "longest"].ids)
    assert needed_length(prompts, 256 - size, {"base": base}) == 256
    with pytest.raises(
        EvaluationError, match=rf"base has a context of 256 .*'longest' .*max_tokens={256 - size} or less"
    ):
        needed_length(prompts, 257 - size, {"base": base})
    endless = Task("endless", (Problem("p", "math:" + "1+" * 200, answer="1"),), "math")
    with pytest.raises(EvaluationError, match="leave the problem out"):
        needed_length(render(base, [endless], protocol={}), 1, {"base": base})


def test_an_architecture_is_the_same_however_it_is_written(model):
    base, other = model("base"), model("other")
    config = json.loads((base / "config.json").read_text())
    shorter = {key: value for key, value in config.items() if key not in ("layer_types", "attention_dropout", "dtype")}
    (other / "config.json").write_text(
        json.dumps(shorter | {"transformers_version": "4.40.0", "torch_dtype": "bfloat16"})
    )
    assert architecture(base) == architecture(other)
    for change in ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"tie_word_embeddings": False}):
        (other / "config.json").write_text(json.dumps(config | change))
        assert architecture(base) != architecture(other)


def test_a_folder_without_a_context_is_refused(model):
    base = model("base")
    (base / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="max_position_embeddings is missing"):
        context_length(base)
    (base / "config.json").unlink()
    with pytest.raises(EvaluationError, match=r"config.json: can't be read"):
        context_length(base)


def test_the_engine_gets_room_for_the_next_stage_but_no_more_than_the_context(model):
    base = model("base")
    assert engine_length(40, base, None) == 256
    (base / "config.json").write_text('{"max_position_embeddings": 131072}')
    assert engine_length(33000, base, None) == 33792
    assert engine_length(33000, base, 40000) == 40000
    with pytest.raises(EvaluationError, match=r"engine.max_model_len is 32768, but .* need 33000"):
        engine_length(33000, base, 32768)
