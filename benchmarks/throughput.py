"""Evaluation against raw `LLM.generate` on the same requests: python benchmarks/throughput.py [problems] [n]

Base, math and code expert answer both tiny tasks. Raw: one vLLM process, weights swapped in place, texts and nothing
else. Here: `evaluate`, from rendering prompts to comparisons, with the store and both graders. Prints the ratio of the
two rates, the engine's start apart, and what a further model costs beside its generation.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.evaluate.engine_process import child_environment
from rotrl.evaluate.prompts import render
from rotrl.evaluate.run import evaluate
from rotrl.evaluate.sampling import Sampling, sample_seed
from rotrl.zoo import zoo_path
from rotrl.zoo.tasks import code_task, math_task

MODELS = ("base", "math", "code")
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 512, "max_model_len": 256, "threads": 1}
PROTOCOL = {"name": "tiny", "ks": [1], "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 64}


def raw(order: dict[str, Any]) -> None:
    """In a process of its own: {model: [seconds of two rounds of LLM.generate]} as JSON on the last line."""
    from vllm import LLM, SamplingParams

    arguments = {key: value for key, value in ENGINE.items() if key != "threads"}
    cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 1 << 28}
    llm = LLM(order["models"]["base"], disable_log_stats=True, **arguments, **cpu)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    seconds: dict[str, list[float]] = {}
    for name, folder in [*order["models"].items()] * 2:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        llm.reset_prefix_cache()
        start = time.monotonic()
        llm.generate(prompts, [SamplingParams(**order["sampling"], seed=s) for s in order["seeds"]], use_tqdm=False)
        seconds.setdefault(name, []).append(time.monotonic() - start)
    print(json.dumps(seconds))


def main(problems: int = 300, n: int = 8) -> None:
    tasks = [math_task(split="test", limit=problems), code_task(split="test", limit=problems)]
    models = {name: zoo_path(name) for name in MODELS}
    prompts = render(models["base"], tasks, protocol=PROTOCOL)
    asked = [(key, i) for key in prompts for i in range(n)]
    order = {
        "models": {name: str(path) for name, path in models.items()},
        "prompts": [prompts[key].ids for key, _ in asked],
        "seeds": [sample_seed(0, key[1], i) for key, i in asked],
        "sampling": Sampling.of(PROTOCOL).parameters() | {"detokenize": True},
    }
    environment = child_environment(ENGINE["threads"]) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "raw"], input=json.dumps(order), env=environment, text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    best = sum(min(rounds) for rounds in json.loads(done.stdout.splitlines()[-1]).values())

    weights = {name: open_checkpoint(path).sha256 for name, path in models.items()}
    roles = {"base": "base", "math": "expert", "code": "expert"}
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for number in range(3):  # the first starts the engine
            result = evaluate(
                models,
                tasks,
                protocol=PROTOCOL | {"n": n if number else 1},
                engine=ENGINE,
                sandbox={},
                roles=roles,
                weights=weights,
                cache=Path(folder) / str(number),
                out=Path(folder) / "run",
                seed=0,
            )
            seconds.append(result["seconds"])
    requests, ours = len(asked) * len(models), min(seconds[1:])
    print(f"{requests} requests to {len(models)} models, sandbox {result['sandbox_level']}")
    print(f"raw LLM.generate   {best:6.1f} s   {requests / best:6.0f} a second")
    print(f"evaluate           {ours:6.1f} s   {requests / ours:6.0f} a second, grading and statistics included")
    print(f"ratio              {best / ours:6.2f}     engine start {seconds[0]:.1f} s")


if __name__ == "__main__":
    if sys.argv[1:] == ["raw"]:
        raw(json.load(sys.stdin))
    else:
        main(*map(int, sys.argv[1:]))
