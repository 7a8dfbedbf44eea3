"""Every branch of saving is taken by its unit tests: measured, not believed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.training import ROOT

HERE = Path(__file__).parent
MEASURED = ("megagpt/checkpoint/store.py", "megagpt/checkpoint/async_saver.py")
# a killed child reports nothing, and one kind of error is as good as another here
LEFT_OUT = "not killed and not EIO and not EACCES and not flipped"


def test_every_branch_of_saving_is_taken(tmp_path):
    env = {**os.environ, "COVERAGE_FILE": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    coverage = [sys.executable, "-m", "coverage"]
    tests = [str(HERE / name) for name in ("test_store.py", "test_async_saver.py")]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "tests"), "-k", LEFT_OUT]
    for arguments in (
        ["run", "--branch", f"--include={','.join(MEASURED)}", *pytest, *tests],
        ["json", "-o", str(tmp_path / "report.json")],
    ):
        done = subprocess.run([*coverage, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {*report["files"]} == {*MEASURED}
    for name, file in report["files"].items():
        assert file["summary"]["num_branches"] >= 10, name
        assert (file["missing_lines"], file["missing_branches"]) == ([], []), name
        assert file["excluded_lines"] == [], name
