"""Memory of GPUs that this process holds without need."""

import gc
import sys


def free_gpu_memory() -> None:
    """Gives back what torch keeps of freed tensors, and models that reference cycles keep alive after their use.

    Another process may then have it: an engine takes a share of all memory and refuses where less is free.
    """
    torch = sys.modules.get("torch")  # where it is not loaded it holds nothing
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
