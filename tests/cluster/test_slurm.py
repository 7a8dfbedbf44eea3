"""Real SLURM: both job scripts are signalled, save, requeue their job and end with the curve that was never stopped.

And tasks of srun prepare text together.
"""

import json
import time

import pytest

from megagpt.data.default_corpus import default_corpus
from megagpt.prepare import Options, prepare_command, train_tokenizer_command
from megagpt.run import status
from tests import training
from tests.cluster.conftest import LENGTH


def wait(slurm, job, seconds=240):
    """Until SLURM says that the job has completed; between two starts it is in other states, or in none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if "JobState=COMPLETED " in slurm.start(1, "scontrol", "show", "job", job).communicate()[0]:
            return
        time.sleep(0.5)
    raise TimeoutError(slurm.run(1, "scontrol", "show", "job", job))


@pytest.mark.parametrize(("script", "signal"), [("srun", "--signal=USR1"), ("deepspeed", "--batch --signal=USR1")])
def test_a_job_that_is_signalled_comes_back_by_itself_and_ends(slurm, recipe, same, script, signal):
    run, log = recipe.with_suffix(""), recipe.with_suffix(".log")
    config = training.ROOT / "ds_configs/zero1.json"
    job = slurm.run(
        1, "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=9",
        f"--output={log}", f"launch/slurm/{script}.sbatch", recipe, config, *LENGTH,
    ).strip()  # fmt: skip
    training.wait_for_update(run, 2)
    slurm.run(1, "scancel", *signal.split(), job)
    wait(slurm, job)
    text = log.read_text()
    assert text.count("requeue: stopped and saved") == 1, text
    assert status.read(run).code == 0, text
    same()


def test_tasks_on_two_hosts_prepare_the_bytes_of_one_process(slurm, tmp_path):
    source = tmp_path / "text.jsonl"  # 12 MB are three pieces of work
    source.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in default_corpus().documents))
    model = train_tokenizer_command([str(source)], 500, tmp_path / "t", 0.0).path
    prepare_command([str(source)], model, tmp_path / "alone", Options(0.2, workers=1))
    printed = slurm.run(
        1, "srun", "-N", 2, "-n", 3, "megagpt", "prepare", source, "--tokenizer", model, "--output",
        tmp_path / "c", "--validation-fraction", 0.2,
    )  # fmt: skip
    assert printed.count("prepared in") == 1, printed
    for part in ("train", "validation"):
        for suffix in (".bin", ".idx", ".json"):
            one, three = (tmp_path / f"{name}.{part}{suffix}" for name in ("alone", "c"))
            assert three.read_bytes() == one.read_bytes()
