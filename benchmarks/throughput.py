"""Evaluation against raw `LLM.generate` on the same requests: python benchmarks/throughput.py [problems] [n] [rounds]

Base, math and code expert answer both tiny tasks. Raw: one vLLM process, weights swapped in place, texts and nothing
else. Generation: the same through the engine's process into the store. Evaluation: `evaluate`, from rendering prompts
to comparisons, with the store and both graders. The three alternate, and each is judged by its best round. Prints the
ratios of the rates, what a further model costs beside its generation, and the CPU seconds of generation.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# What is heavy is imported where it is used: the graders' processes import this file too.
MODELS = {"base": "base", "math": "expert", "code": "expert"}
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 512, "max_model_len": 256, "threads": 1}
PROTOCOL = {"name": "tiny", "ks": [1], "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 64}


def raw() -> None:
    """In a process of its own: for every folder that comes in, the seconds of LLM.generate and those of its CPU."""
    from vllm import LLM, SamplingParams

    order = json.loads(sys.stdin.readline())
    arguments = {key: value for key, value in ENGINE.items() if key != "threads"}
    cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 1 << 28}
    llm = LLM(order["model"], disable_log_stats=True, **arguments, **cpu)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": json.loads(line)})
        llm.reset_prefix_cache()
        start, cpu_start = time.monotonic(), time.process_time()
        llm.generate(prompts, [SamplingParams(**order["sampling"], seed=s) for s in order["seeds"]], use_tqdm=False)
        print(json.dumps([time.monotonic() - start, time.process_time() - cpu_start]), flush=True)


class Raw:
    def __init__(self, order: dict[str, Any]) -> None:
        from rotrl.evaluate.engine_process import child_environment

        environment = child_environment(ENGINE["threads"]) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, __file__, "raw"]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=null)
        self.ask(order)

    def ask(self, message: Any) -> Any:
        """The answer is the next line of JSON; vLLM prints others."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(("[", '"ready"')) and line.rstrip().endswith(("]", '"')):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
        sys.exit("LLM.generate failed")


class Ours:
    """The same requests through the program, into a new cache each time."""

    def __init__(self, problems: int, n: int, folder: Path) -> None:
        from rotrl.checkpoint.reader import open_checkpoint
        from rotrl.evaluate.prompts import render
        from rotrl.evaluate.samples import Wanted
        from rotrl.zoo import zoo_path
        from rotrl.zoo.tasks import code_task, math_task

        self.n, self.folder = n, folder
        self.tasks = [math_task(split="test", limit=problems), code_task(split="test", limit=problems)]
        self.models = {name: zoo_path(name) for name in MODELS}
        self.weights = {name: open_checkpoint(path).sha256 for name, path in self.models.items()}
        prompts = render(self.models["base"], self.tasks, protocol=PROTOCOL)
        self.wanted = [Wanted(*key, i, prompt) for key, prompt in prompts.items() for i in range(n)]

    def order(self) -> dict[str, Any]:
        """What `raw` needs."""
        from rotrl.evaluate.sampling import Sampling, sample_seed

        return {
            "model": str(self.models["base"]),
            "prompts": [each.prompt.ids for each in self.wanted],
            "seeds": [sample_seed(0, each.problem, each.index) for each in self.wanted],
            "sampling": Sampling.of(PROTOCOL).parameters() | {"detokenize": True},
        }

    def evaluate(self, *names: str, n: int | None = None) -> float:
        from rotrl.evaluate.run import evaluate

        cache = tempfile.mkdtemp(dir=self.folder)
        shared: dict[str, Any] = {"engine": ENGINE, "sandbox": {}, "roles": MODELS, "weights": self.weights, "seed": 0}
        shared |= {"protocol": PROTOCOL | {"n": n or self.n}, "cache": Path(cache), "out": self.folder / "run"}
        return evaluate({name: self.models[name] for name in names}, self.tasks, **shared)["seconds"]

    def generate(self) -> float:
        from rotrl.evaluate.samples import Sampler
        from rotrl.evaluate.sampling import Sampling

        start, cache = time.monotonic(), Path(tempfile.mkdtemp(dir=self.folder))
        sampler = Sampler(Sampling.of(PROTOCOL), ENGINE, self.models["base"], cache, seed=0)
        for name, path in self.models.items():
            for _ in sampler.sample(path, self.weights[name], self.wanted):
                pass
        return time.monotonic() - start


def one_round(baseline: Raw, ours: Ours) -> dict[str, float]:
    import psutil

    from rotrl.evaluate.engine import shared_engine

    engine = psutil.Process(shared_engine(ours.models["base"], ENGINE).pids[0])
    seconds, cpu = zip(*(baseline.ask(str(path)) for path in ours.models.values()), strict=True)
    generation, first = ours.generate(), ours.evaluate("base")
    before = sum(engine.cpu_times()[:2])
    whole = ours.evaluate(*MODELS)
    return {
        "raw": sum(seconds),
        "generation": generation,
        "evaluation": whole,
        "further": (whole - first - sum(seconds[1:])) / len(seconds[1:]),
        "raw_cpu": sum(cpu),
        "engine_cpu": sum(engine.cpu_times()[:2]) - before,
    }


def main(problems: int = 300, n: int = 8, rounds: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(problems, n, Path(folder))
        baseline, start = Raw(ours.order()), ours.evaluate(*MODELS, n=1)
        found = [one_round(baseline, ours) for _ in range(rounds)]
    best = {key: min(each[key] for each in found) for key in found[0]}
    requests = len(ours.wanted) * len(MODELS)
    print(f"{requests} requests to {len(MODELS)} models, best of {rounds} rounds; the engine starts in {start:.1f} s")
    for key in ("raw", "generation", "evaluation"):
        seconds = best[key]
        print(f"{key:<12}{seconds:6.1f} s {requests / seconds:7.0f} a second   ratio {best['raw'] / seconds:.2f}")
    print(f"a further model takes {best['further']:+.1f} s beside its generation")
    print(f"CPU seconds of generation: raw {best['raw_cpu']:.1f}, of the engine in evaluation {best['engine_cpu']:.1f}")


if __name__ == "__main__":
    raw() if sys.argv[1:] == ["raw"] else main(*map(int, sys.argv[1:]))
