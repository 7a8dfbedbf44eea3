"""`megagpt parity` certifies a correct layout, and reports the first differences of a wrong one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megagpt.cluster import Rank, free_port
from megagpt.data.loader import Batch
from megagpt.parity import ParityOptions, _resolve, curve, reference, shrink

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


def parity(tmp_path, config, ranks, program=("launch/parity.py",), *overrides, recipe=RECIPE):
    """Start ranks without a launcher. Returns the exit code, and the console output of rank 0."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *program, "--recipe", str(recipe), "--deepspeed_config", f"ds_configs/{config}.json"]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command += ["--updates", "8", f"run_dir={tmp_path / 'run'}", "precision=fp32", *overrides]
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


def test_the_quickstart_on_four_stages_is_checked_with_its_real_stages(tmp_path):
    """The last stage holds only the head, as in the shrunk model. Then an update of the real model is made."""
    code, console = parity(tmp_path, "pipeline4-zero1", 4, recipe=QUICKSTART)
    lines = console.splitlines()
    assert code == 0, console
    assert "stages   embedding + block | block | block + norm | head; the same in the shrunk model" in lines
    groups = "real shape: built on the meta device: parameter groups 4, 3, 3, 1; even shards, [1, 128, 128] fp32"
    assert f"{groups} from each stage to the next" in lines
    (update,) = (line for line in lines if line.startswith("real shape: one update, 4 × 1 samples per rank: loss 8."))
    assert "; relative difference to one process: loss " in update
    assert "not proven: an update of all 16 micro-batches per rank" in lines
    assert lines[-1] == "the same curve as one process, update by update"


def test_a_fault_of_the_real_shape_alone_is_found(tmp_path):
    code, console = parity(tmp_path, "zero1", 1, ("-c", HALVED_IF_LARGE), recipe=QUICKSTART)
    assert code == 1
    lines = console.splitlines()
    assert lines[-3] == "NOT THE SAME UPDATE of the real shape as one process:"
    assert lines[-2].startswith("  loss of the update: 4.1")


def test_a_hang_is_ended_and_the_stuck_rank_is_named(tmp_path):
    code, console = parity(tmp_path, "zero1", 2, ("-c", STUCK), "log.hang_after=1")
    assert code == 1
    assert "has made no progress for" in console
    assert "  rank 1 on " in console
    assert "in stuck" in (tmp_path / "run/parity/logs/rank-1.log").read_text() + console


def test_initial_fp16_overflows_do_not_change_the_certificate(fp16, tmp_path):
    """Scaling by powers of two does not round, so that 2^32, which overflows, gives the same numbers as 2^16."""
    figures = {}
    for power in (32, 16):
        overrides = ("precision=fp16", f"ds.fp16.initial_scale_power={power}")
        code, console = parity(tmp_path / str(power), "zero2", 1, ("launch/parity.py",), *overrides)
        figures[power] = [code, *(line for line in console.splitlines() if "largest relative difference" in line)]
        assert code == 0, console
    assert len(figures[32]) == 5, console
    assert figures[32] == figures[16]


def test_bf16_weights_may_differ_by_the_error_of_bf16_only():
    options = ParityOptions(RECIPE, ROOT / "ds_configs/zero2.json", ("precision=bf16",), updates=8)
    whole = _resolve(options, Rank(), ())
    recipe = _resolve(options, Rank(), shrink.shrinking_overrides(whole, 8, None)).recipe
    size = recipe.batch.global_size
    updates = [shrink.synthetic_samples(recipe.model, size, first) for first in range(0, 8 * size, size)]
    expected = reference.train(recipe, updates, updates[0])
    tolerance = curve.calibrated_tolerance(recipe, expected, reference.train(recipe, updates, updates[0], exact=True))
    assert tolerance.loss == curve.TOLERANCES["bf16"].loss
    other_sums = [Batch(*(tensor.flip(0) for tensor in batch)) for batch in updates]
    rounded = reference.train(recipe, other_sums, updates[0])
    assert [str(row) for row in curve.compare(recipe, expected, rounded, tolerance) if row.too_far] == []
    late = {name: start + (expected.weights[name] - start) / 2 for name, start in expected.initial.items()}
    found = curve.compare(recipe, expected, replace(expected, weights=late), tolerance)
    assert {row.kind for row in found if row.too_far} == {"weights"}


def test_the_first_differences_of_a_wrong_layout_are_reported(tmp_path):
    code, console = parity(tmp_path, "zero1", 1, ("-c", HALVED))
    assert code == 1
    lines = console.splitlines()
    assert "NOT THE SAME CURVE as one process" in lines[-4]
    assert lines[-3].startswith("  loss of update 1: 2.4")


def test_a_config_that_does_not_fit_is_a_user_error(tmp_path):
    code, console = parity(tmp_path, "zeropp", 2)
    assert code == 2
    assert console.startswith(
        "megagpt: the 2 ranks cannot be divided into groups of 8, each with a copy of the weights\n"
    )


def test_quantized_traffic_is_refused_on_a_cpu(tmp_path):
    overrides = (
        "ds.zero_optimization.zero_hpz_partition_size=1",
        "ds.zero_optimization.zero_quantized_gradients=false",
    )
    code, console = parity(tmp_path, "zeropp", 1, ("launch/parity.py",), *overrides)
    assert code == 2
    assert console == (
        "megagpt: quantized communication of ZeRO is not supported on CPUs\n"
        "  zero_optimization.zero_quantized_weights\n  do: remove this key\n"
    )
