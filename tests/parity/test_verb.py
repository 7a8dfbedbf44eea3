"""`megagpt parity`: a certificate for a right layout, the first difference for a wrong one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megagpt.cluster import Rank, free_port
from megagpt.data.loader import Batch
from megagpt.parity import Options, _resolve, curve, reference, shrink

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch/recipes/gpt2-124m-openwebtext.yaml"
HALVED = """
import sys
from unittest.mock import patch
from megagpt.cli import main
from megagpt.engine.zero import ZeroEngine

forward = ZeroEngine._forward
with patch.object(ZeroEngine, "_forward", lambda *args: forward(*args) / 2):
    sys.exit(main(["parity", *sys.argv[1:]]))
"""


QUICKSTART = ROOT / "launch/recipes/quickstart.yaml"
HALVED_IF_LARGE = HALVED.replace("/ 2", "/ (2 if args[0]._section.vocab_size > 1024 else 1)")
STUCK = """
import sys, time
from unittest.mock import patch
from megagpt.cli import main
from megagpt.engine.zero import ZeroEngine

update = ZeroEngine.train_update
def stuck(self, *args):
    if self._rank.rank == 1:
        time.sleep(600)
    return update(self, *args)
with patch.object(ZeroEngine, "train_update", stuck):
    sys.exit(main(["parity", *sys.argv[1:]]))
"""


def parity(tmp_path, config, ranks, program=("launch/parity.py",), *words, recipe=RECIPE):
    """Exit code and console of rank 0, from ranks started without a launcher."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *program, "--recipe", str(recipe), "--deepspeed_config", f"ds_configs/{config}.json"]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command += ["--updates", "8", f"run_dir={tmp_path / 'run'}", "precision=fp32", *words]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        answers = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert len({process.returncode for process in processes}) == 1
    return processes[0].returncode, answers[0]


@pytest.mark.parametrize(("config", "ranks"), [("zero3", 2), ("small-gpu", 1)])
def test_a_layout_that_trains_the_same_gets_a_certificate(tmp_path, config, ranks):
    code, console = parity(tmp_path, config, ranks)
    assert code == 0
    assert console.splitlines()[0].startswith(f"parity   {ranks} rank{'s' if ranks > 1 else ''}, ZeRO stage ")
    assert console.splitlines()[-1] == "the same curve as one process, update by update"
    assert "real shape: built on the meta device: parameter groups 2; even shards" in console.splitlines()
    (reason,) = (line for line in console.splitlines() if "that an update of the real shape can be made" in line)
    assert reason.startswith("not proven: ")
    assert reason.endswith(" TFLOP, too many for CPUs") or "a rank needs " in reason  # on a small machine
    assert len(console.splitlines()) == 14, console  # no third-party line


def test_the_quickstart_on_four_stages_is_proven_as_it_will_run(tmp_path):
    """The last stage holds the head alone, which the shrunk recipe keeps; the real shape then makes an update."""
    code, console = parity(tmp_path, "pipeline4-zero1", 4, recipe=QUICKSTART)
    lines = console.splitlines()
    assert code == 0, console
    assert "stages   embedding + block | block | block + norm | head; the same in the shrunk model" in lines
    groups = "real shape: built on the meta device: parameter groups 4, 3, 3, 1; even shards, [1, 128, 128] fp32"
    assert f"{groups} from each stage to the next" in lines
    (update,) = (line for line in lines if line.startswith("real shape: one update, 4 × 1 samples per rank: loss 8."))
    assert "; off from one process: loss by " in update
    assert "not proven: an update of all 16 micro-batches per rank" in lines
    assert lines[-1] == "the same curve as one process, update by update"


def test_a_fault_of_the_real_shape_alone_is_found(tmp_path):
    code, console = parity(tmp_path, "zero1", 1, ("-c", HALVED_IF_LARGE), recipe=QUICKSTART)
    assert code == 1
    lines = console.splitlines()
    assert lines[-3] == "ANOTHER UPDATE of the real shape than one process:"
    assert lines[-2].startswith("  loss of the update: 4.1")


def test_a_hang_ends_with_the_rank_that_is_behind(tmp_path):
    code, console = parity(tmp_path, "zero1", 2, ("-c", STUCK), "log.hang_after=1")
    assert code == 1
    assert "has made no progress for" in console
    assert "  rank 1 on " in console
    assert "in stuck" in (tmp_path / "run/parity/logs/rank-1.log").read_text() + console


def test_fp16_overflows_at_the_start_are_no_other_curve(fp16, tmp_path):
    """2^32 overflows, 2^16 does not; powers of two round nothing, and so the same certificate comes out."""
    figures = {}
    for power in (32, 16):
        words = ("precision=fp16", f"ds.fp16.initial_scale_power={power}")
        code, console = parity(tmp_path / str(power), "zero2", 1, ("launch/parity.py",), *words)
        figures[power] = [code, *(line for line in console.splitlines() if "largest relative difference" in line)]
        assert code == 0, console
    assert len(figures[32]) == 5, console
    assert figures[32] == figures[16]


def test_weights_in_bf16_may_differ_as_bf16_itself_does_and_no_more():
    options = Options(RECIPE, ROOT / "ds_configs/zero2.json", ("precision=bf16",), updates=8)
    whole = _resolve(options, Rank(), ())
    recipe = _resolve(options, Rank(), shrink.overrides(whole, 8, None)).recipe
    size = recipe.batch.global_size
    updates = [shrink.samples(recipe.model, size, first) for first in range(0, 8 * size, size)]
    expected = reference.train(recipe, updates, updates[0])
    tolerance = curve.allowed(recipe, expected, reference.train(recipe, updates, updates[0], exact=True))
    assert tolerance.loss == curve.TOLERANCES["bf16"].loss
    other_sums = [Batch(*(tensor.flip(0) for tensor in batch)) for batch in updates]
    rounded = reference.train(recipe, other_sums, updates[0])
    assert [str(row) for row in curve.compare(recipe, expected, rounded, tolerance) if row.too_far] == []
    late = {name: start + (expected.weights[name] - start) / 2 for name, start in expected.initial.items()}
    found = curve.compare(recipe, expected, replace(expected, weights=late), tolerance)
    assert {row.kind for row in found if row.too_far} == {"weights"}


def test_a_layout_that_trains_another_way_is_named_with_what_differs_first(tmp_path):
    code, console = parity(tmp_path, "zero1", 1, ("-c", HALVED))
    assert code == 1
    lines = console.splitlines()
    assert "ANOTHER CURVE than one process" in lines[-4]
    assert lines[-3].startswith("  loss of update 1: 2.4")


def test_a_config_that_does_not_fit_is_a_users_mistake(tmp_path):
    code, console = parity(tmp_path, "zeropp", 2)
    assert code == 2
    assert console.startswith(
        "megagpt: the 2 ranks cannot be divided into groups of 8, each with a copy of the weights\n"
    )


def test_quantized_traffic_is_refused_on_a_cpu(tmp_path):
    words = ("ds.zero_optimization.zero_hpz_partition_size=1", "ds.zero_optimization.zero_quantized_gradients=false")
    code, console = parity(tmp_path, "zeropp", 1, ("launch/parity.py",), *words)
    assert code == 2
    assert console == (
        "megagpt: a CPU does not quantize ZeRO's traffic\n"
        "  zero_optimization.zero_quantized_weights\n  do: take it away\n"
    )
