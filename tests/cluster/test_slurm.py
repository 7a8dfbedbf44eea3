"""Real SLURM: tasks of srun prepare text together."""

import json

from megagpt.data.default_corpus import default_corpus
from megagpt.prepare import PrepareOptions, prepare_command, train_tokenizer_command


def test_tasks_on_two_hosts_prepare_the_bytes_of_one_process(slurm, tmp_path):
    source = tmp_path / "text.jsonl"  # 12 MB are three pieces of work
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
