import subprocess
import sys

import pytest

from ogpstream.learner.threads import SPIN, TURNS, spin_briefly


@pytest.mark.parametrize("given,want", [
    ({}, {SPIN: TURNS}), ({SPIN: "7"}, {SPIN: "7"}), ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"})])
def test_threads_sleep_soon_unless_the_user_says_how_they_wait(given, want):
    spin_briefly(given)
    assert given == want


def test_the_commands_say_so_before_torch_reads_it():
    check = ("import os, sys; from ogpstream.learner import cli; cli.main(['--help']); "
             f"assert os.environ['{SPIN}'] == '{TURNS}' and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
