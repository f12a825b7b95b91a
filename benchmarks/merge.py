"""Merges of Qwen2-1.5B shapes against mergekit: python benchmarks/merge.py FOLDER [--mergekit PYTHON] [--layers 28] ...

Makes a base and two experts (untied head, bfloat16, random, updates of .08 % of the norm; 3 x 3.55 GB at 28 layers) in
FOLDER if they are absent. Every merge is a process of its own with one thread, whose CPU seconds, wall seconds and peak
anonymous memory count from start to exit. The error is that of two tensors over their update, against the method in
float64; the peer's random masks differ, there it tells nothing.
"""

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.config import compose
from rotrl.merge.bind import bind
from rotrl.merge.chunks import Chunks
from rotrl.merge.engine import merge
from rotrl.merge.method import Method

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 1536, 8960, 256, 151936
UPDATE = 8e-4
EXPERTS = ("math", "code")
TENSORS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
CONF = Path(__file__).parents[1] / "conf" / "merge"
PEERS = {
    "linear": {},
    "task_arithmetic": {},
    "nuslerp": {},
    "model_stock": {},
    "karcher": {},
    "slerp": {"t": 0.5},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.2},
    "della": {"density": 0.5, "epsilon": 0.15},
}
WITH_BASE = ("task_arithmetic", "nuslerp", "model_stock", "dare_ties", "ties", "della")
STAGED = ("learned", "geodesic_aligned", "regmean")  # need rotations or Gram matrices
WHOLE = ("wudi",)  # have no scope=all


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    block = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (KV, HIDDEN),
        "self_attn.k_proj.bias": (KV,),
        "self_attn.v_proj.weight": (KV, HIDDEN),
        "self_attn.v_proj.bias": (KV,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path, layers: int) -> None:
    """Base and experts; a model that is whole has its config.json, which is written last."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for index, name in enumerate(("base", *EXPERTS)):
        target = folder / name
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        weights = {}
        for number, (tensor, shape) in enumerate(shapes(layers).items()):
            base = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
            base = base.bfloat16()
            if index:
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(number + 10_000 * index))
                base = (base + 0.02 * UPDATE * noise).bfloat16()
            weights[tensor] = base
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))


def method_of(name: str, scope: str | None = None) -> Method:
    """As shipped, with the peer's parameters; `scope` takes the place of its own."""
    config: Any = OmegaConf.to_container(compose([f"merge={name}"]).merge, resolve=True)
    return bind({**config, **PEERS.get(name, {}), **({"scope": scope} if scope else {})}, EXPERTS)


def every_method() -> list[str]:
    """All shipped ones that need no stage before."""
    found = {path.stem: path.read_text() for path in sorted(CONF.glob("*.yaml"))}
    return [name for name, text in found.items() if "\n_target_:" in text and name not in STAGED]


def models(folder: Path) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    return open_checkpoint(folder / "base"), {name: open_checkpoint(folder / name) for name in EXPERTS}


def peer_config(name: str, folder: Path, file: Path, dtype: str) -> None:
    """mergekit's configuration for the same merge; its slerp takes one expert as the base."""
    base, experts = str(folder / "base"), [{"model": str(folder / name)} for name in EXPERTS]
    parameters = dict(PEERS[name])
    if "density" in parameters:
        experts = [{**expert, "parameters": {**parameters, "weight": 1.0}} for expert in experts]
        parameters = {}
    elif name != "slerp":
        experts = [{**expert, "parameters": {"weight": 1.0}} for expert in experts]
    content = {"merge_method": name, "models": experts, "parameters": parameters, "dtype": dtype}
    if name in WITH_BASE:
        content["base_model"] = base
    if name == "slerp":
        content["base_model"] = experts[0]["model"]
    file.write_text(json.dumps(content))


def timed(command: Sequence[str], log: Path) -> tuple[float, float, float]:
    """CPU seconds, wall seconds, and peak anonymous gigabytes of a process."""
    begun, peak = time.monotonic(), 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                continue
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.02)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - begun, peak / 1e6


def error(name: str, folder: Path, merged: Path) -> tuple[float, float]:
    """|merged - oracle| / |oracle - W0| on a few tensors, the oracle the method in float64.

    And the same of the oracle itself once it is stored in that dtype: no engine can do better.
    """
    base, experts = models(folder)
    stored, method, wrong, floor, size = open_checkpoint(merged), method_of(name), 0.0, 0.0, 0.0
    for tensor in TENSORS:
        w0, ws = base.read(tensor).double(), [expert.read(tensor).double() for expert in experts.values()]
        role = role_of(tensor, w0.shape)
        rows = Chunks(w0, ws, rows=method.rows(tensor, role, w0.shape)).rows
        pieces = list(zip(w0.split(rows), zip(*(w.split(rows) for w in ws), strict=True), strict=True))
        below = [merged for *_, merged in method.of.merge(tensor, role, pieces)] if method.of else None
        oracle = torch.cat([merged for *_, merged in method.merge(tensor, role, pieces, merged=below)])
        found = stored.read(tensor)
        wrong += float((found.double() - oracle).square().sum())
        floor += float((oracle.to(found.dtype).double() - oracle).square().sum())
        size += float((oracle - w0).square().sum())
    return (wrong / size) ** 0.5, (floor / size) ** 0.5


def copy(folder: Path, out: Path) -> None:
    """What a merge that cost nothing would take: read all inputs, write and flush as much as a merge in float32."""
    out.mkdir()
    buffer = memoryview(bytearray(1 << 22))
    with (out / "copy").open("wb") as target:
        for model in ("base", *EXPERTS):
            with (folder / model / "model.safetensors").open("rb", buffering=0) as source:
                while read := source.readinto(buffer):
                    for _ in range(0 if model == "base" else 1):
                        target.write(buffer[:read])
        target.flush()
        os.fsync(target.fileno())


def warm(folder: Path) -> None:
    """Every page of the inputs in memory and touched: a virtual machine may charge the first touch to who makes it."""
    for model in ("base", *EXPERTS):
        np.memmap(folder / model / "model.safetensors", mode="r")[:: mmap.PAGESIZE].max()


def measure(engine: str, name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    out = folder / f"out-{engine}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, str(folder), "--run", engine, name, "--dtype", options.dtype]
    command += ["--device", options.device, *(["--scope", options.scope] if options.scope else [])]
    if engine == "mergekit":
        peer_config(name, folder, folder / "peer.json", options.peer_dtype)
        script = str(Path(options.mergekit).parent / "mergekit-yaml")
        command = [script, str(folder / "peer.json"), str(out), "--no-copy-tokenizer"]
    warm(folder)
    cpu, wall, memory = timed(command, folder / f"{engine}.log")
    found = {"engine": engine, "method": name, "cpu": cpu, "wall": wall, "memory": memory}
    if engine != "copy":
        found["error"], found["floor"] = error(name, folder, out)
    shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--mergekit", metavar="PYTHON", help="python of an environment that has mergekit")
    parser.add_argument("--dtype", default="float32", help="of rotrl's output")
    parser.add_argument("--peer-dtype", default="bfloat16", help="in which mergekit computes and writes")
    parser.add_argument("--methods", nargs="+", default=["copy", *PEERS], help="or all")
    parser.add_argument("--engines", nargs="+", default=["copy", "rotrl", "mergekit"])
    parser.add_argument("--scope", help="of every method, in place of its own: all merges embeddings too")
    parser.add_argument("--device", default="auto", help="of rotrl's merges: auto (all GPUs, else cpu), cpu, cuda")
    parser.add_argument("--again", action="store_true", help="measure what results.json holds already")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.run:
        engine, name = options.run
        if engine == "copy":
            copy(folder, folder / "out-copy")
        else:
            merge(
                *models(folder),
                method_of(name, options.scope),
                folder / "out-rotrl",
                dtype=options.dtype,
                device=options.device,
                overwrite=True,
            )
        return
    make(folder, options.layers)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    print(
        f"{'method':<22} {'engine':<9} {'CPU s':>7} {'wall s':>7} {'anon GB':>8} {'error':>9} {'floor':>9}", flush=True
    )
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    written = {
        "copy": "",
        "rotrl": "".join(f" {word}" for word in (options.dtype, options.scope, device) if word),
        "mergekit": f" {options.peer_dtype}",
    }
    methods = every_method() if options.methods == ["all"] else options.methods
    for name in [name for name in methods if not (options.scope == "all" and name in WHOLE)]:
        for engine in options.engines:
            if (engine == "mergekit" and not (options.mergekit and name in PEERS)) or (engine == "copy") != (
                name == "copy"
            ):
                continue
            key = f"{name} {engine}{written[engine]}"
            if key not in results or options.again:
                results[key] = measure(engine, name, folder, options)
                file.write_text(json.dumps(results, indent=1))
            r = results[key]
            told = f"{r['error']:>9.2g} {r['floor']:>9.2g}" if "error" in r else ""
            print(f"{name:<22} {engine:<9} {r['cpu']:>7.1f} {r['wall']:>7.1f} {r['memory']:>8.2f} {told}", flush=True)
        ours, peer = (results.get(f"{name} {engine}{written[engine]}") for engine in ("rotrl", "mergekit"))
        if ours and peer:
            print(f"{name:<22} ratio     {ours['cpu'] / peer['cpu']:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
