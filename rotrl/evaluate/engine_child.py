"""The process that holds vLLM: `python -P -m rotrl.evaluate.engine_child FD`, started by `engine.Engine` alone.

It speaks over one socket. In: the order to start, then ("load", model) and ("add", sampling, requests).
Out: ("ready", facts), ("loaded",), ("done", [(index, token_ids, text, finish_reason)]), ("failed", line).
When the socket closes, because the parent is gone or wants no more, the process ends at once.
"""

import os
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    inbox: SimpleQueue[tuple] = SimpleQueue()
    order = connection.recv()
    print(f"engine {os.getpid()} starts on {order['model']}", flush=True)
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        llm, facts = _start(**order)
    except Exception as error:
        connection.send(("failed", " ".join(f"{type(error).__name__}: {error}".split())))
        raise
    connection.send(("ready", facts))
    _serve(llm, connection, inbox)


def _listen(connection: Connection, inbox: "SimpleQueue[tuple]") -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _start(model: str, arguments: dict[str, Any], engines: int) -> tuple[Any, dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # 15 s to start in this process, 32 s with one more
        arguments = _on_cpu(model, arguments, engines)
    import vllm
    from vllm.platforms import current_platform

    llm = vllm.LLM(model, disable_log_stats=True, **arguments)
    config = llm.llm_engine.vllm_config
    facts = {
        "vllm": vllm.__version__,
        "device": current_platform.get_device_name(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
    }
    return llm, facts


def _on_cpu(model: str, arguments: dict[str, Any], engines: int) -> dict[str, Any]:
    cache = _cache_bytes(model, arguments, engines)
    given = {"kv_cache_memory_bytes": cache, "max_num_batched_tokens": 8192, **arguments}
    # With a seed per request vLLM winds the generator back after a part of a prompt; CPU generators can't be.
    whole_prompts = max(given["max_num_batched_tokens"], given["max_model_len"])
    return {**given, "enable_chunked_prefill": False, "max_num_batched_tokens": whole_prompts}


def _cache_bytes(model: str, arguments: dict[str, Any], engines: int) -> int:
    """Room for all sequences at full length, at most half of the free memory for all engines. By default vLLM takes
    92 % of the machine's, or refuses to start where others use some."""
    import psutil
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = arguments.get("max_num_seqs", 256) * (arguments["max_model_len"] // 128 + 1)
    needed = blocks * 128 * config.num_hidden_layers * 2 * heads * width * 4  # float32 keys and values
    return min(needed, psutil.virtual_memory().available // 2 // engines)


def _serve(llm: Any, connection: Connection, inbox: "SimpleQueue[tuple]") -> None:
    engine, live = llm.llm_engine, 0
    while True:
        while not (live and inbox.empty()):
            kind, *content = inbox.get()
            if kind == "load":
                _load(llm, *content)
                connection.send(("loaded",))
            else:
                live += _add(engine, connection, *content)
        finished = [output for output in engine.step() if output.finished]
        if finished:
            live -= len(finished)
            best = [(int(output.request_id), output.outputs[0]) for output in finished]
            connection.send(("done", [(index, list(c.token_ids), c.text, c.finish_reason) for index, c in best]))


def _load(llm: Any, model: str) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache still holds the other model's prompts")


def _add(engine: Any, connection: Connection, sampling: dict[str, Any], requests: list[tuple]) -> int:
    """Queue (index, prompt_ids, seed); what vLLM refuses is answered at once, the others go on."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    queued = 0
    for index, prompt_ids, seed in requests:
        parameters = SamplingParams(**sampling, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)
        try:
            engine.add_request(str(index), {"prompt_token_ids": prompt_ids}, parameters)
            queued += 1
        except Exception as error:  # vLLM has several kinds of refusal, and they concern this prompt alone
            connection.send(("done", [(index, [], str(error), "failed")]))
    return queued


if __name__ == "__main__":
    main()
