"""Claim: tests/bench/gpu_check.py, the one command for a machine with a GPU, runs on a CPU in its tiny size: every script once, from
text to evaluated models, equal layouts, a resumed run equal to the bit, and a step of compo.py. A script that stops is named."""
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/bench"))
import gpu_check  # noqa: E402


@pytest.mark.slow
def test_every_script_passes_the_checks_in_the_tiny_size(tmp_path):
    names = [name for name in gpu_check.RUNS if name.split()[-1] not in ("concatenated", "separate", "selective", "lora")]
    command = [sys.executable, str(ROOT / "tests/bench/gpu_check.py"), "--size", "tiny", "--folder", str(tmp_path / "run"),
               "--jobs", "2", "--only", ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all checks passed" in done.stdout and "largest difference of a weight 0.0e+00" in done.stdout
    for name in names:
        assert f"\n| {name} |" in done.stdout
    for script in ("prepare_data", "cache_ref", "evaluate", "dpo", "dpo_norm", "simpo", "wpo", "auxdpo", "compo"):
        assert f"\n{script}.py --" in "\n" + done.stdout
    assert "| exact |" in done.stdout


@pytest.mark.slow
def test_a_script_that_stops_is_named_with_its_last_line():
    assert gpu_check.run("dpo.py", "--beta", "none").startswith("dpo.py ended with status 1: error: ")


def test_a_run_that_differs_from_packed_is_named(tmp_path):
    for name, norm in ("packed", 1.0), ("separate", 1.2):
        (tmp_path / name).mkdir()
        lines = '{"eval/logps/chosen": -9.0, "eval/logps/rejected": -8.0}\n{"grad_norm": %s}\n' % norm
        (tmp_path / name / "log.jsonl").write_text(lines)
    assert gpu_check.differences(tmp_path, ["packed", "separate"], True) == ["separate differs from packed in grad_norm: 1.2"]
