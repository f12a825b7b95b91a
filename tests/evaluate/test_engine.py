"""The real engine on the tiny pair, against transformers: one vLLM process serves all tests of this file."""

import os
import signal
import time

import pytest
import torch

from rotrl.evaluate.engine import Engine, Request, Sampling, shared_engine
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.prompts import load_tokenizer, render
from rotrl.evaluate.sampling import sample_seed
from rotrl.zoo import zoo_path
from rotrl.zoo.tasks import math_task

pytestmark = pytest.mark.slow
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 256, "threads": 1}
GREEDY, FREE = Sampling(0.0, 1.0, 0, 48), Sampling(1.0, 1.0, 0, 48)
TASK = math_task(split="test", limit=60)
PROMPTS = render(zoo_path("base"), [TASK], protocol={})


def requests(n: int = 1) -> list[Request]:
    return [
        Request((problem.id, i), PROMPTS[TASK.name, problem.id].ids, sample_seed(0, problem.id, i))
        for problem in TASK.problems
        for i in range(n)
    ]


@pytest.fixture
def engine():
    return shared_engine(zoo_path("base"), SETTINGS)


def ids(engine, chosen: list[Request], sampling: Sampling) -> dict:
    return {c.key: list(c.token_ids) for c in engine.generate(chosen, sampling)}


def by_transformers(name: str, n: int, sampling: Sampling) -> dict[str, list[list[int]]]:
    """A plain loop: left-padded prompts, `generate` in float32; ids up to and with the end token."""
    from transformers import AutoModelForCausalLM

    folder = zoo_path(name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    rows = [PROMPTS[TASK.name, problem.id].ids for problem in TASK.problems]
    width = max(map(len, rows))
    tokens = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    torch.manual_seed(0)
    chosen = {"do_sample": sampling.temperature > 0, "top_k": 0, "max_new_tokens": sampling.max_tokens}
    drawn = model.generate(tokens, attention_mask=mask, num_return_sequences=n, **chosen)[:, width:].tolist()
    end = tokenizer.eos_token_id
    cut = [row[: row.index(end) + 1] if end in row else row for row in drawn]
    return {problem.id: cut[i * n : (i + 1) * n] for i, problem in enumerate(TASK.problems)}


def test_swapped_weights_answer_as_transformers_does(engine):
    """Greedy answers after each swap in place, to an expert, another, and back: no prefix of another model is left."""
    pids = (engine.facts(), engine.pids)[1]
    for name in ("base", "math", "code", "base"):
        start = time.monotonic()
        engine.load(zoo_path(name))
        assert time.monotonic() - start < 2
        found = ids(engine, requests(), GREEDY)
        assert found == {(problem, 0): rows[0] for problem, rows in by_transformers(name, 1, GREEDY).items()}
    assert engine.pids == pids


def test_accuracy_at_temperature_1_is_that_of_a_plain_loop(engine):
    n, tokenizer = 8, load_tokenizer(zoo_path("base"))
    engine.load(zoo_path("base"))
    texts = {
        key: tokenizer.decode(row, skip_special_tokens=True) for key, row in ids(engine, requests(n), FREE).items()
    }
    rates = []
    for drawn in (
        [texts[problem.id, i] for problem in TASK.problems for i in range(n)],
        [
            tokenizer.decode(row, skip_special_tokens=True)
            for r in by_transformers("base", n, FREE).values()
            for row in r
        ],
    ):
        with Grader([TASK]) as grader:
            problems = [problem for problem in TASK.problems for _ in range(n)]
            graded = [grader.submit(TASK, p, text).result().correct for p, text in zip(problems, drawn, strict=True)]
        rates.append(sum(map(bool, graded)) / len(graded))
    error = (2 * 0.25 / (60 * n)) ** 0.5
    assert rates[0] == pytest.approx(rates[1], abs=3 * error)
    assert 0.1 < rates[0] < 0.9


def test_a_sample_follows_from_its_seed_alone(engine):
    """Not from what else is in the batch, nor from the order."""
    engine.load(zoo_path("math"))
    chosen = requests(4)
    whole = ids(engine, chosen, FREE)
    assert ids(engine, chosen[::-5], FREE).items() <= whole.items()
    texts = {c.key: c.text for c in engine.generate(chosen[:8], FREE)}
    tokenizer = load_tokenizer(zoo_path("base"))
    assert texts == {r.key: tokenizer.decode(whole[r.key], skip_special_tokens=True) for r in chosen[:8]}
    assert len({tuple(row) for row in whole.values()}) > len(TASK.problems)


def test_two_engines_of_which_one_is_killed_give_the_samples_of_one(engine, tmp_path):
    engine.load(zoo_path("math"))
    whole, found = ids(engine, requests(8), FREE), {}
    settings = SETTINGS | {"data_parallel_size": 2, "max_num_seqs": 64, "log": str(tmp_path / "engine.log")}
    both = Engine(zoo_path("math"), settings=settings)
    both.facts()
    first = both.pids
    try:
        for completion in both.generate(requests(8), FREE):
            found[completion.key] = list(completion.token_ids)
            if len(found) == 100:
                os.kill(first[1], signal.SIGKILL)
        assert (both.pids[0] == first[0], both.pids[1] == first[1]) == (True, False)
    finally:
        both.close()
    assert found == whole


def test_stop_texts_limits_and_refusals(engine):
    engine.load(zoo_path("math"))
    stopped = list(engine.generate(requests(), Sampling(0.0, 1.0, 0, 48, stop=(";",))))
    assert all(";" not in c.text and c.finish_reason == "stop" for c in stopped)
    short = list(engine.generate(requests(), Sampling(0.0, 1.0, 0, 3)))
    assert {(c.finish_reason, len(c.token_ids)) for c in short} == {("length", 3)}
    bad = Request("too long", [1] * 300, 0)
    found = {c.key: c.finish_reason for c in engine.generate([*requests(), bad], GREEDY)}
    assert found.pop("too long") == "failed"
    assert set(found.values()) == {"stop"}
