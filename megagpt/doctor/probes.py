"""Programs that the doctor runs in separate processes, because torch, DeepSpeed or the network may hang or crash.

The command is `python -m megagpt.doctor.probes torch|all-reduce ARGUMENTS`. Each line that it prints is a JSON object
with a part of the result.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megagpt.files import parse_json

PINNING, BUILDING = "pinning ", "building or loading "
"""Beginnings of the names of steps (`at`). The amount of memory or the name of the operator follows."""

_PINNED_BYTES = 1 << 30
_REDUCED_BYTES = {"gloo": 32 << 20, "nccl": 256 << 20}
_REPETITIONS = 3

Output = Callable[[dict[str, Any]], None]


def start_probe() -> tuple[dict[str, Any], Output]:
    """Return the arguments of this process, and a function that prints a part of the result as a line of JSON.

    Anything else that is written to standard output is redirected to standard error.
    """
    arguments: dict[str, Any] = parse_json(sys.argv[-1])
    # The parent process normally enforces the limit, but it may have died.
    signal.alarm(round(arguments["limit"]) + 5)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return arguments, lambda part: print(json.dumps(part), file=out, flush=True)


def probe_torch(arguments: dict[str, Any], output: Output) -> None:
    """Report devices, pinned memory, and whether DeepSpeed and its operators load. Each part is reported at once.

    Args:
        arguments: Arguments of this process, with the names of the operators to load.
        output: Function that prints a part of the result.
    """
    output({"at": "import torch"})
    has_cuda = _report_devices(output)
    if has_cuda:
        output({"at": f"{PINNING}{_PINNED_BYTES >> 30} GiB of host memory"})
        output({"pinned": {"bytes": _PINNED_BYTES, "error": _error_of(_pin_memory)}})
    output({"at": "import deepspeed"})
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from megagpt.engine import deepspeed_ops

    output({"accelerator": deepspeed_ops.device()})
    results: dict[str, Any] = {}
    for name in [*arguments["operators"], *(arguments["gpu_operators"] if has_cuda else [])]:
        output({"at": f"{BUILDING}{name}"})
        started = time.monotonic()
        error = _error_of(lambda name=name: deepspeed_ops.load(name))  # type: ignore[misc]
        results[name] = {"seconds": time.monotonic() - started, "error": error}
        output({"operators": results})


def all_reduce(arguments: dict[str, Any], output: Output) -> None:
    """Join the other ranks, sum a tensor over each backend, and report the bus bandwidth in bytes per second.

    The bus bandwidth is defined as in nccl-tests (doc/PERFORMANCE.md): 2 (n - 1) / n × size / time. Unlike size / time,
    it does not depend on the number of ranks n. Gloo is used for checkpoints and stop requests, and NCCL for the
    training traffic of GPUs.

    Args:
        arguments: Arguments of this process: rank, world size, address, backends and time limit.
        output: Function that prints a part of the result.
    """
    output({"at": "import torch"})
    import torch
    from torch import distributed

    rank, world_size, limit = arguments["rank"], arguments["world_size"], timedelta(seconds=arguments["limit"])
    at = f"{arguments['address']}:{arguments['port']}"
    output({"at": f"joining the other ranks at {at}"})
    distributed.init_process_group("gloo", init_method=f"tcp://{at}", rank=rank, world_size=world_size, timeout=limit)
    speeds = {}
    for backend in arguments["backends"]:
        output({"at": f"all-reduce over {backend}"})
        # With `srun --gpus-per-task=1`, each rank sees only its own device, as device 0.
        device = "cpu" if backend == "gloo" else f"cuda:{arguments['local_rank'] % torch.cuda.device_count()}"
        group = distributed.new_group(backend=backend, timeout=limit)
        tensor = torch.empty(_REDUCED_BYTES[backend] // 4, device=device)
        seconds = []
        for _ in range(1 + _REPETITIONS):  # The first repetition opens the connections and is not counted.
            tensor.fill_(rank + 1)
            started = time.perf_counter()
            distributed.all_reduce(tensor, group=group)
            if backend == "nccl":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
            if not bool((tensor == world_size * (world_size + 1) // 2).all()):
                raise ArithmeticError(f"the sum over {world_size} ranks is wrong over {backend}")
        speeds[backend] = 2 * (world_size - 1) / world_size * _REDUCED_BYTES[backend] * _REPETITIONS / sum(seconds[1:])
        output({"speeds": speeds})
    distributed.destroy_process_group()


def _report_devices(output: Output) -> bool:
    import torch

    error = _error_of(torch.cuda.init)  # type: ignore[no-untyped-call, unused-ignore]
    count = 0 if error else torch.cuda.device_count()
    devices = [torch.cuda.get_device_properties(number) for number in range(count)]
    output({"torch": {
        "version": torch.__version__, "cuda": torch.version.cuda, "error": error,
        "devices": [one.name for one in devices], "memory": [one.total_memory for one in devices],
    }})  # fmt: skip
    return count > 0


def _pin_memory() -> None:
    import torch

    torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)


def _error_of(function: Callable[[], object]) -> str:
    """Call `function`, and return the first line of the error that it raises, or "" if it succeeds."""
    try:
        function()
    except Exception as error:
        return (str(error).strip() or repr(error)).splitlines()[0]
    return ""


if __name__ == "__main__":
    {"torch": probe_torch, "all-reduce": all_reduce}[sys.argv[1]](*start_probe())
