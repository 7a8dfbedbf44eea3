"""Properties that could not be tested on a machine are reported, and are a failure unless that is allowed."""

import subprocess
import sys

import pytest

from tests.training import ROOT

TESTS = """
import pytest

def test_good():
    pass

@pytest.mark.parametrize("_", "ab")
def test_disk(_):
    pytest.skip("a full disk: only root can mount one")
"""
SAID = "NOT PROVEN (2 tests): a full disk: only root can mount one"


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ([], 1, [SAID, "Nothing may be left unproven, unless --allow-missing is given.", "1 passed, 2 skipped"]),
        (["--allow-missing"], 0, [SAID, "1 passed, 2 skipped"]),
        (
            ["-n", "2"],
            1,
            [SAID, "Nothing may be left unproven, unless --allow-missing is given.", "1 passed, 2 skipped"],
        ),
    ],
)
def test_skipped_tests_are_reported_and_fail_the_run(tmp_path, options, code, expected):
    (tmp_path / "test_it.py").write_text(TESTS)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", *options, tmp_path]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stdout
    _, _, rest = ended.stdout.partition("[100%]\n")
    lines = [line.partition(" in ")[0] for line in rest.splitlines()]
    assert lines == expected
