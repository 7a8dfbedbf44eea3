"""Real SLURM: the job scripts are stopped, hit and left alone, and each run ends with the curve that never was."""

import re
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagpt.training import status
from tests import training
from tests.cluster.conftest import LENGTH
from tests.cluster.faults import SlowDisk, power_on, until, without_controller

CONFIG = training.ROOT / "ds_configs/zero1.json"
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=20")
PATIENCE = 180  # seconds for a start, of which several may be under way on a busy machine
TWO = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture
def runs(slurm, data, tmp_path):
    """Recipes of several runs of this test, by name."""
    yield lambda name: training.write_recipe(tmp_path / name, data)
    slurm.run(1, "scancel", "--user=root")  # what a test that failed has left


class Job:
    """A job in SLURM's queue, submitted or only known by its number."""

    def __init__(self, slurm, number):
        self.slurm, self.number = slurm, number

    @classmethod
    def submit(cls, slurm, script, recipe, *words, options=ONE, **env):
        """Submit one of our job scripts; its log lies beside the recipe."""
        options = (*options, f"--output={recipe.with_suffix('.log')}")
        command = ("sbatch", "--parsable", *options, f"launch/slurm/{script}.sbatch", recipe, CONFIG, *words)
        return cls(slurm, slurm.run(1, *command, **env).strip())

    def shown(self):
        """What SLURM says of the job, by name."""
        text = self.slurm.run(1, "scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, name, *values, seconds=480):
        """Until SLURM says one of these values; all that it says then."""
        end = time.monotonic() + seconds
        while (shown := self.shown())[name] not in values:
            if time.monotonic() > end:
                raise TimeoutError(f"{name} is none of {values}: {shown}")
            time.sleep(0.5)
        return shown

    def ends(self):
        """Its state, exit code and number of restarts, when it has ended for good."""
        shown = self.wait("JobState", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        return shown["JobState"], shown["ExitCode"], shown["Restarts"]

    def signal(self):
        """What SLURM itself does some time before the time limit."""
        self.slurm.run(1, "scancel", "--batch", "--signal=USR1", self.number)

    def update(self, *values):
        """Change the job."""
        self.slurm.run(1, "scontrol", "update", f"JobId={self.number}", *values)


def resumes(recipe):
    return [event["update"] for event in training.events(recipe.with_suffix("")) if event["event"] == "resume"]


def test_two_jobs_on_the_same_hosts_come_back_from_their_time_limits(slurm, runs, same, tmp_path):
    disk, recipes = SlowDisk(tmp_path), {script: runs(script) for script in ("srun", "deepspeed")}
    limit = ("--time=2", "--signal=B:USR1@85")  # SLURM looks twice a minute: 5 to 35 s after the start
    jobs = [
        Job.submit(slurm, script, recipe, *LENGTH, options=(*TWO, *limit), **disk.env)
        for script, recipe in recipes.items()
    ]
    for job in jobs:
        job.wait("Restarts", "1")
        job.update("TimeLimit=20")  # on a busy machine a start alone takes long: one limit is enough
    disk.quick()
    assert [job.ends() for job in jobs] == [("COMPLETED", "0:0", "1")] * 2
    for recipe in recipes.values():
        log = recipe.with_suffix(".log").read_text()
        assert log.count("stopped: checkpoint saved after megagpt stop; run the same command to resume\n") == 1, log
        assert log.endswith("done: the last checkpoint was saved and verified\n")
        assert len(resumes(recipe)) == 1
        same(recipe)


@contextmanager
def no_requeue_exit(slurm):
    """A cluster whose administrator has not named 75 as a code after which a job is started again."""
    file = Path(slurm.env["SLURM_CONF"])
    before = file.read_text()
    file.write_text(before.replace("RequeueExit=75\n", ""))
    slurm.run(1, "scontrol", "reconfigure")
    try:
        yield
    finally:
        file.write_text(before)
        slurm.run(1, "scontrol", "reconfigure")


def test_a_job_ends_as_its_run_stands(slurm, runs, same, tmp_path):
    disk, here = SlowDisk(tmp_path), (*ONE, "--nodelist=node1")
    recipes = mistaken, killed, lost = [runs(name) for name in ("mistaken", "killed", "lost")]
    with no_requeue_exit(slurm):
        jobs = [
            Job.submit(slurm, "srun", mistaken, "data.train=nowhere"),
            Job.submit(slurm, "srun", killed, *LENGTH, options=here, **disk.env),
            Job.submit(slurm, "deepspeed", lost, *LENGTH, options=here, **disk.env),
        ]
        for recipe in (killed, lost):
            training.wait_for_update(recipe.with_suffix(""), 2, PATIENCE)
        slurm.run(1, "pkill", "-9", "-f", f"^[^ ]*python launch/[p]retrain.py --recipe {killed}")
        slurm.run(1, "pkill", "-9", "-f", f"^[^ ]*python[^ ]* [^ ]*bin/[d]eepspeed .*--recipe {lost}")  # its rank lives
        jobs[2].signal()
        jobs[2].wait("Restarts", "1")
        disk.quick()
        ended = [job.ends() for job in jobs]
    logs = [recipe.with_suffix(".log").read_text() for recipe in recipes]
    assert ended == [("FAILED", "2:0", "0"), ("FAILED", "1:0", "0"), ("COMPLETED", "0:0", "1")], logs
    assert "the launcher exited with 137\n" in logs[2], logs[2]
    assert "Stopped by megagpt stop" in logs[2]
    same(lost)


def test_jobs_of_a_lost_host_go_on_with_what_is_left_or_when_it_is_back(slurm, runs, same, tmp_path):
    disk, smaller, waiting = SlowDisk(tmp_path), runs("smaller"), runs("waiting")
    options = (*TWO, "--time=20")
    jobs = [Job.submit(slurm, "srun", recipe, *LENGTH, options=options, **disk.env) for recipe in (smaller, waiting)]
    for recipe in (smaller, waiting):
        training.wait_for_update(recipe.with_suffix(""), 2, PATIENCE)
    slurm.make("off", "2")
    try:
        for job in jobs:
            job.wait("Restarts", "1")
        disk.quick()
        jobs[0].update("NumNodes=1", "NumTasks=1", "NumCPUs=1")
        assert jobs[0].ends() == ("COMPLETED", "0:0", "1"), smaller.with_suffix(".log").read_text()
        assert status.read(waiting.with_suffix("")).state != "done"
    finally:
        power_on(slurm, 2)
    assert jobs[1].ends() == ("COMPLETED", "0:0", "1"), waiting.with_suffix(".log").read_text()
    assert re.findall(r"(\d) × CPU", smaller.with_suffix(".log").read_text()) == ["2", "1"]
    assert re.findall(r"(\d) × CPU", waiting.with_suffix(".log").read_text()) == ["2", "2"]
    same(smaller)
    same(waiting)


def test_a_chain_of_jobs_ends_when_the_run_is_done(slurm, runs, same, tmp_path):
    disk, recipe = SlowDisk(tmp_path), runs("run")
    options = (*ONE, "--open-mode=append", f"--output={recipe.with_suffix('.log')}")
    chain = ("bash", "launch/slurm/chain.sh", 4, *options, "launch/slurm/srun.sbatch", recipe, CONFIG, *LENGTH)
    jobs = [Job(slurm, number) for number in slurm.run(1, *chain, **disk.env).split()]
    run = recipe.with_suffix("")
    until(lambda: (run / "status.json").exists() and status.read(run).state == "running", PATIENCE)
    jobs[0].signal()  # while the ranks still start: they make an update, and save
    until(lambda: (run / "STOP").exists() or status.read(run).state == "requeue", PATIENCE)  # SLURM has passed it on
    with without_controller(slurm):
        until(lambda: status.read(run).state == "requeue", PATIENCE)
    assert jobs[0].ends() == ("FAILED", "1:0", "0")  # RequeueExit does not look at --no-requeue
    disk.quick()
    assert [job.ends() for job in jobs[1:]] == [("COMPLETED", "0:0", "0"), *[("CANCELLED", "0:0", "0")] * 2]
    assert len(resumes(recipe)) == 1
    same(recipe)
