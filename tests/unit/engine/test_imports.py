"""Importing the engine is quick, and leaves torch.compile available."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
import megagpt.engine.build, torch
print(os.environ.get("TORCHDYNAMO_DISABLE"), "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.parametrize("value", [None, "1"])
def test_deepspeed_is_imported_without_inductor_and_the_variable_stays_as_it_was(value):
    environment = {name: text for name, text in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    if value is not None:
        environment["TORCHDYNAMO_DISABLE"] = value
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    variable, has_inductor = run.stdout.split()
    assert variable == str(value)
    assert has_inductor == "False"
