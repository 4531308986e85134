"""Claim: tests/gpu_check.py, the one command for a machine with a GPU, runs on a CPU in its tiny size: the pipeline
from text to a trained model in all three layouts, equal layouts, a resumed run equal to the bit, and a step of compo.py."""
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_whole_pipeline_passes_its_checks_in_the_tiny_size(tmp_path):
    command = [sys.executable, str(ROOT / "tests/gpu_check.py"), "--size", "tiny", "--folder", str(tmp_path / "run"),
               "--also", "auxdpo.py,auxdpo full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all checks passed" in done.stdout
    assert "| packed |" in done.stdout and "| auxdpo full |" in done.stdout and "largest difference of a weight 0.0e+00" in done.stdout
    assert "| exact |" in done.stdout
