"""Real SLURM: srun tasks prepare text together, and a stranger on the network is rejected."""

import json
import sys

import pytest

from megagpt.prepare.command import PrepareOptions, prepare_command, train_tokenizer_command
from megagpt.prepare.readers.default_corpus import default_corpus


def test_tasks_on_two_hosts_prepare_the_bytes_of_one_process(slurm, tmp_path):
    source = tmp_path / "text.jsonl"  # 12 MB are three chunks
    source.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in default_corpus().documents))
    model = train_tokenizer_command([str(source)], 500, tmp_path / "t", 0.0).path
    prepare_command([str(source)], model, tmp_path / "alone", PrepareOptions(0.2, workers=1))
    printed = slurm.run(
        1, "srun", "-N", 2, "-n", 3, "megagpt", "prepare", source, "--tokenizer", model, "--output",
        tmp_path / "c", "--validation-fraction", 0.2,
    )  # fmt: skip
    assert printed.count("prepared in") == 1, printed
    for part in ("train", "validation"):
        for suffix in (".bin", ".idx", ".json"):
            one, three = (tmp_path / f"{name}.{part}{suffix}" for name in ("alone", "c"))
            assert three.read_bytes() == one.read_bytes()


# A stranger on the other host, who connects before task 1: some connections claim to be task 1 and send a pickle of a
# command, framed as multiprocessing.connection does it, and others stay open and send nothing.
ATTACK = """\
import os, pickle, socket, struct, sys, time
from megagpt.cluster.launch_env import job_port

class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + sys.argv[1],)

def connect():
    for _ in range(600):
        try:
            return socket.create_connection(("node1", job_port(os.environ["SLURM_JOB_ID"])))
        except ConnectionRefusedError:
            time.sleep(0.1)
    sys.exit("nobody listens")

bomb = pickle.dumps(Bomb())
silent = [connect() for _ in range(100)]
for message in (b"".join(struct.pack("!i", len(part)) + part for part in (b"1", bomb)), bomb):
    connect().sendall(message)
open(sys.argv[2], "w").close()
time.sleep(3)
"""


@pytest.mark.parametrize("given", [False, True])
def test_a_stranger_who_connects_first_and_sends_a_pickle_runs_nothing_and_the_job_completes(slurm, tmp_path, given):
    source, owned, attacked = (tmp_path / name for name in ("text.txt", "owned", "attacked"))
    source.write_text("".join(one.text for one in default_corpus().documents)[:200_000])
    (tmp_path / "attack.py").write_text(ATTACK)
    model = train_tokenizer_command([str(source)], 400, tmp_path / "t", 0.0).path
    task = f"""
        if [ $SLURM_PROCID = 1 ]; then
            {sys.executable} {tmp_path}/attack.py {owned} {attacked} &
            until [ -e {attacked} ]; do sleep 0.1; done
        fi
        megagpt prepare {source} --tokenizer {model} --output {tmp_path}/c --validation-fraction 0
    """
    secret = {"MEGAGPT_JOB_SECRET": "0123456789abcdef" * 4} if given else {}
    printed = slurm.run(1, "srun", "-N", 2, "-n", 2, "sh", "-c", task, **secret)
    assert printed.count("prepared in") == 1, printed
    assert attacked.exists()
    assert not owned.exists()
    assert not list(tmp_path.glob("*.key"))
