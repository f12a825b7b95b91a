"""Evaluation against raw `LLM.generate` on the same requests: python benchmarks/throughput.py [problems] [n] [rounds]

Base, math and code expert answer both tiny tasks. Raw: one vLLM process, weights swapped in place, texts and nothing
else. Generation: the same through the engine's process into the store. Evaluation: `evaluate`, from rendering prompts
to comparisons, with the store and both graders. The three alternate, and each is judged by its best round. Prints the
ratios of the rates, what a further model costs beside its generation, and the CPU seconds of everything.
"""

import json
import resource
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
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
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


def others_cpu() -> float:
    """CPU seconds of this process and of those that it has waited for: the graders, once they are closed."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(problems: int = 300, n: int = 8, rounds: int = 2) -> None:
    import psutil

    from rotrl.checkpoint.reader import open_checkpoint
    from rotrl.evaluate.engine import shared_engine
    from rotrl.evaluate.prompts import render
    from rotrl.evaluate.run import evaluate
    from rotrl.evaluate.samples import Sampler, Wanted
    from rotrl.evaluate.sampling import Sampling, sample_seed
    from rotrl.zoo import zoo_path
    from rotrl.zoo.tasks import code_task, math_task

    tasks = [math_task(split="test", limit=problems), code_task(split="test", limit=problems)]
    models = {name: zoo_path(name) for name in MODELS}
    weights = {name: open_checkpoint(path).sha256 for name, path in models.items()}
    prompts = render(models["base"], tasks, protocol=PROTOCOL)
    wanted = [Wanted(*key, i, prompt) for key, prompt in prompts.items() for i in range(n)]
    chosen = Sampling.of(PROTOCOL)
    baseline = Raw(
        {
            "model": str(models["base"]),
            "prompts": [each.prompt.ids for each in wanted],
            "seeds": [sample_seed(0, each.problem, each.index) for each in wanted],
            "sampling": chosen.parameters() | {"detokenize": True},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "protocol": PROTOCOL | {"n": n},
            "engine": ENGINE,
            "roles": MODELS,
            "seed": 0,
            "out": Path(folder, "run"),
        }

        def run(names: tuple[str, ...], cache: str, **changes: Any) -> float:
            chosen, options = {name: models[name] for name in names}, shared | {"cache": Path(folder, cache)} | changes
            return evaluate(chosen, tasks, sandbox={}, weights=weights, **options)["seconds"]

        def generate(cache: str) -> float:
            start, sampler = time.monotonic(), Sampler(chosen, ENGINE, models["base"], Path(folder, cache), 0)
            for name, path in models.items():
                for _ in sampler.sample(path, weights[name], wanted):
                    pass
            return time.monotonic() - start

        start = run(tuple(models), "start", protocol=PROTOCOL | {"n": 1})
        engine = psutil.Process(shared_engine(models["base"], ENGINE).pids[0])
        found: list[dict[str, Any]] = []
        for number in range(rounds):
            each = {name: baseline.ask(str(path)) for name, path in models.items()}
            generation, one = generate(f"g{number}"), run(("base",), f"o{number}")
            before, engine_before = others_cpu(), sum(engine.cpu_times()[:2])
            whole = run(tuple(models), f"e{number}")
            cpu = [sum(engine.cpu_times()[:2]) - engine_before, others_cpu() - before]
            seconds = {name: raw_seconds for name, (raw_seconds, _) in each.items()}
            found.append({"raw": sum(seconds.values()), "raw_cpu": sum(c for _, c in each.values()), "cpu": cpu})
            found[-1] |= {"generation": generation, "whole": whole, "further": whole - one}
            found[-1]["further"] = (whole - one - seconds["math"] - seconds["code"]) / 2
    requests, best = (
        len(wanted) * len(models),
        {key: min(r[key] for r in found) for key in ("raw", "generation", "whole")},
    )
    print(f"{requests} requests to {len(models)} models, best of {rounds} rounds; the engine starts in {start:.1f} s")
    for key, title in (("raw", "raw LLM.generate"), ("generation", "generation"), ("whole", "evaluation")):
        print(
            f"{title:<17}{best[key]:6.1f} s {requests / best[key]:7.0f} a second   ratio {best['raw'] / best[key]:5.2f}"
        )
    print(f"a further model   {min(r['further'] for r in found):+.1f} s beside its generation")
    raw_cpu, (ours, others) = min(r["raw_cpu"] for r in found), min((r["cpu"] for r in found), key=sum)
    print(
        f"CPU seconds       raw {raw_cpu:.1f}, the engine in evaluation {ours:.1f}, grading and all else {others:.1f}"
    )


if __name__ == "__main__":
    raw() if sys.argv[1:] == ["raw"] else main(*map(int, sys.argv[1:]))
