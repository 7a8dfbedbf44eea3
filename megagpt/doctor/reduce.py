"""One rank of the doctor's all-reduce: over gloo, which checkpoints and stops are agreed by, and over NCCL on GPUs."""

from __future__ import annotations

import time
from datetime import timedelta

from megagpt.doctor.children import begin

_BYTES = {"gloo": 32 << 20, "nccl": 256 << 20}
_TIMES = 3


def main() -> None:
    """Join the other ranks, reduce, and say how fast that was: each backend's bytes a second.

    As nccl-tests counts it (doc/PERFORMANCE.md, bus bandwidth): 2 (n - 1) / n times the size by the time, so that the
    figure is that of the slowest link, whatever the number of ranks.
    """
    words, say = begin()
    say({"doing": "import torch"})
    import torch
    from torch import distributed

    rank, world, limit = words["rank"], words["world"], timedelta(seconds=words["limit"])
    say({"doing": f"joining the other ranks at {words['address']}:{words['port']}"})
    place = f"tcp://{words['address']}:{words['port']}"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world, timeout=limit)
    speeds = {}
    for backend in words["backends"]:
        say({"doing": f"all-reduce over {backend}"})
        # one device alone is this rank's own, as `srun --gpus-per-task=1` shows them
        device = "cpu" if backend == "gloo" else f"cuda:{words['local_rank'] % torch.cuda.device_count()}"
        group = distributed.new_group(backend=backend, timeout=limit)
        tensor = torch.empty(_BYTES[backend] // 4, device=device)
        seconds = []
        for _ in range(1 + _TIMES):  # the first makes the connections
            tensor.fill_(rank + 1)
            begun = time.perf_counter()
            distributed.all_reduce(tensor, group=group)
            if backend == "nccl":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
            if not bool((tensor == world * (world + 1) // 2).all()):
                raise ArithmeticError(f"the sum over {world} ranks came out wrong over {backend}")
        speeds[backend] = 2 * (world - 1) / world * _BYTES[backend] * _TIMES / sum(seconds[1:])
        say({"speeds": speeds})
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
