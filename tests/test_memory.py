"""Claim: a training step in the packed layout peaks at no more than half the memory of the plain way
(padded rows, logits for every token), for pairs of 2,000 tokens a side and a vocabulary of 50,000.
tests/bench/memory_check.py measures it, each way in its own process, and fails if that is not so."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_packed_step_peaks_at_no_more_than_half_the_memory_of_the_plain_way():
    script = Path(__file__).with_name("bench") / "memory_check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("| computation | peak memory")
