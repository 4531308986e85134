"""Claim: preemption changes nothing. A run that is killed at four to ten random moments, or told to stop by SIGTERM,
ends with the bits of the run that was left alone, over more than two epochs, with every algorithm; a killed
cache_ref.py ends with the bytes of an unkilled one, log-probs and sketches, on any number of ranks. What a kill leaves behind is never taken for a finished
checkpoint or cache."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, random_pairs
from safetensors.torch import load_file

STEPS = 144  # 8 epochs of 18 steps
SCRIPTS = ["simpo.py", "dpo.py", "dpo_norm.py", "wpo.py", "auxdpo.py"]  # the first runs while there is no cache
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data):
    rng = np.random.default_rng(1)
    model = tiny_model("llama-tied")
    pairs = random_pairs(rng.integers(1, 24, (71, 3)).tolist())
    data = tiny_data(model, pairs, random_pairs(rng.integers(1, 24, (9, 3)).tolist(), seed=1))
    return model, data


def start(script, *flags):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(script, *flags):
    process = start(script, *flags)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def train_flags(script, world, out):
    model, data = world
    own = ["--sketch_dim", 32, "--penalty_weight", 0.001] if script == "auxdpo.py" else []
    return [*own, "--model", model, "--data", data, "--out", out, "--batch_size", 4, "--epochs", 8, "--log_every", 5,
            "--learning_rate", 1e-3, "--max_tokens", 200, "--eval_every", 20, "--save_every", 1, "--resume"]


def weights(out):
    return load_file(out / "final" / "model.safetensors")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(script, world, tmp_path_factory):
    model, data = world
    if script != "simpo.py":  # which neither needs the reference nor makes it
        finish("cache_ref.py", "--model", model, "--data", data, *(["--sketch_dim", 32] if script == "auxdpo.py" else []))
    assert bool(list(Path(data).glob("ref-*"))) == (script != "simpo.py")
    out = tmp_path_factory.mktemp("uninterrupted")
    output = finish(script, *train_flags(script, world, out))
    assert ("= ln 2" in output) == (script != "simpo.py")
    base = load_file(Path(model) / "model.safetensors")
    assert any(not torch.equal(base[key], tensor) for key, tensor in weights(out).items() if key in base)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in weights(out).items())
    if script == "auxdpo.py":  # delta starts at 0, moves far, and stays outside the model
        delta = np.load(out / f"delta-{STEPS:06d}.npz")["delta"][:, :2]
        assert delta.shape == (71, 2) and (np.abs(delta) > 1e-3).mean() > 0.9 and np.abs(delta).max() > 0.1
        assert weights(out).keys() == base.keys()
    return out


def training_lines(out):
    """log.jsonl without what depends on the clock or on where the run was cut."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.startswith("eval/") or key == "step"}
            for line in lines if "eval/loss" in line]


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_same_bits(script, world, uninterrupted, tmp_path):
    rng, kills = random.Random(0), 0
    wanted = 10 if script in ("dpo.py", "auxdpo.py") else 4  # the others have no state of their own
    while kills < wanted:
        before = set(tmp_path.glob("step-*"))
        process = start(script, *train_flags(script, world, tmp_path))
        while process.poll() is None and set(tmp_path.glob("step-*")) <= before:
            time.sleep(0.005)  # until this run has written a checkpoint of its own
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills == wanted, "the run ended before it was killed so often"
    finish(script, *train_flags(script, world, tmp_path))
    assert_same_bits(weights(uninterrupted), weights(tmp_path))
    assert training_lines(uninterrupted) == training_lines(tmp_path)
    assert len(list(tmp_path.glob("step-*"))) == 2  # --keep


@pytest.mark.slow
def test_sigterm_saves_the_step_it_is_in_and_the_resumed_run_ends_with_the_same_bits(
        script, world, uninterrupted, tmp_path):
    flags = [flag if flag != 1 else 1000 for flag in train_flags(script, world, tmp_path)]  # no other checkpoints
    process = start(script, *flags)
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "--resume" in output and "Traceback" not in output, output[-2000:]
    saved = [int(path.name[5:]) for path in tmp_path.glob("step-*")]
    assert len(saved) == 1 and 0 < saved[0] < STEPS
    finish(script, *flags)
    assert_same_bits(weights(uninterrupted), weights(tmp_path))
    assert training_lines(uninterrupted) == training_lines(tmp_path)


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_checkpoint_of_one_rank_continues_on_two_to_rounding(script, world, uninterrupted, tmp_path):
    flags = train_flags(script, world, tmp_path)
    process = start(script, *flags)
    while process.poll() is None and len(list(tmp_path.glob("step-*"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / script), *map(str, flags)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    for key, tensor in weights(uninterrupted).items():
        torch.testing.assert_close(weights(tmp_path)[key], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_killed_cache_continues_and_its_file_is_equal_to_the_byte(tiny_model, tiny_data):
    rng = np.random.default_rng(2)
    model = tiny_model("llama")
    sizes = rng.integers(1, 40, (600, 3)).tolist()
    data = Path(tiny_data(model, random_pairs(sizes[:500]), random_pairs(sizes[500:], seed=1)))
    flags = ["--model", model, "--data", data, "--max_tokens", 150, "--save_seconds", 0.01]
    finish("cache_ref.py", *flags)
    folder, = data.glob("ref-*")
    truth = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    folder.rename(data / "truth")
    for attempt in range(10):
        parts = len(list(data.glob("ref-*.partial/part-*.npz")))
        process = start("cache_ref.py", *flags)
        while process.poll() is None and len(list(data.glob("ref-*.partial/part-*"))) < parts + 3:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (folder / "meta.json").exists()
    output = finish("cache_ref.py", *flags)
    assert "already done" in output and "damaged" not in output
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == truth
    assert not list(data.glob("*.partial"))
    assert "is complete" in finish("cache_ref.py", *flags)


@pytest.mark.slow
def test_killed_sketches_continue_and_their_file_is_equal_to_the_byte(tiny_model, tiny_data):
    rng = np.random.default_rng(3)
    model = tiny_model("llama")
    data = Path(tiny_data(model, random_pairs(rng.integers(1, 40, (400, 3)).tolist()), random_pairs([(3, 3, 3)], seed=1)))
    flags = ["--model", model, "--data", data, "--max_tokens", 200, "--save_seconds", 0.01, "--sketch_dim", 48]
    finish("cache_ref.py", *flags)
    folder, = data.glob("ref-*/sketch-*")
    truth = (folder / "train-sketch.npy").read_bytes()
    folder.rename(data / "truth")
    for attempt in range(4):
        parts = len(list(folder.parent.glob("sketch-*.partial/part-*.npz")))
        process = start("cache_ref.py", *flags)
        while process.poll() is None and len(list(folder.parent.glob("sketch-*.partial/part-*"))) < parts + 3:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (folder / "meta.json").exists()
    assert "already done" in finish("cache_ref.py", *flags)
    assert (folder / "train-sketch.npy").read_bytes() == truth and not list(data.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.torchrun
def test_any_number_of_ranks_makes_the_same_cache_and_sketches(tiny_model, tiny_data):
    rng = np.random.default_rng(4)
    model = tiny_model("llama-tied")
    data = Path(tiny_data(model, random_pairs(rng.integers(1, 30, (53, 3)).tolist()), random_pairs([(3, 3, 3)], seed=1)))
    flags = ["--model", model, "--data", str(data), "--max_tokens", "200", "--sketch_dim", "48", "--sketch_dtype", "float32"]
    finish("cache_ref.py", *flags)
    folder, = data.glob("ref-*")
    folder.rename(data / "truth")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
               str(ROOT / "cache_ref.py"), *flags]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.npy"))
    assert len(files) == 3
    for path in files:
        assert np.array_equal(np.load(folder / path), np.load(data / "truth" / path)), path
