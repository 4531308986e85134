"""Claim: preemption changes nothing. A run that is killed at four to ten random moments, or told to stop by SIGTERM,
ends with the bits of the run that was left alone, over more than two epochs, with every algorithm. What a kill leaves
behind is never taken for a finished checkpoint or cache.

cache_ref.py keeps every row that it has written: killed at ten random moments it ends with the bytes of an unkilled
one, log-probs and sketches, and does not compute a known row again; any number of ranks makes the same files, and two
jobs may fill one folder at once."""
import hashlib
import json
import random
import re
import signal
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from conftest import Program, random_pairs, run_ranks
from safetensors.torch import load_file

STEPS = 144  # 8 epochs of 18 steps
SCRIPTS = ["simpo.py", "dpo.py", "dpo_norm.py", "wpo.py", "auxdpo.py"]  # the first runs while there is no cache


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data):
    rng = np.random.default_rng(1)
    model = tiny_model("llama-tied")
    pairs = random_pairs(rng.integers(1, 24, (71, 3)).tolist())
    data = tiny_data(model, pairs, random_pairs(rng.integers(1, 24, (9, 3)).tolist(), seed=1))
    return model, data


def finish(script, *flags):
    process = Program(script, *flags)
    output = process.wait()
    assert process.returncode == 0, output[-3000:]
    return output


def train_flags(script, world, out):
    model, data = world
    own = ["--sketch_dim", 32, "--penalty_weight", 0.001] if script == "auxdpo.py" else []
    return [*own, "--model", model, "--data", data, "--out", out, "--batch_size", 4, "--epochs", 8, "--log_every", 5,
            "--learning_rate", 1e-3, "--max_tokens", 200, "--eval_every", 20, "--save_every", 1, "--resume"]


def weights(out):
    return load_file(out / "final" / "model.safetensors")


def delta_of(out):
    """What the last checkpoint of auxdpo.py has."""
    folder = out / f"step-{STEPS:06d}"
    size = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata["model.delta"].size
    state = {"model.delta": torch.zeros(size, dtype=torch.float64)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model.delta"].numpy()


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
    assert f"steps: {STEPS}\nfinal: {out}/final" in output
    base = load_file(Path(model) / "model.safetensors")
    assert any(not torch.equal(base[key], tensor) for key, tensor in weights(out).items() if key in base)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in weights(out).items())
    if script == "auxdpo.py":  # delta starts at 0, moves far, and stays outside the model
        delta = delta_of(out)
        assert 71 < len(delta) <= 142 and (np.abs(delta) > 1e-3).mean() > 0.9 and np.abs(delta).max() > 0.1
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
        process = Program(script, *train_flags(script, world, tmp_path))
        while process.poll() is None and set(tmp_path.glob("step-*")) <= before:
            time.sleep(0.005)  # until this run has written a checkpoint of its own
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills == wanted, "the run ended before it was killed so often"
    finish(script, *train_flags(script, world, tmp_path))
    assert_same_bits(weights(uninterrupted), weights(tmp_path))
    assert training_lines(uninterrupted) == training_lines(tmp_path)
    assert len(list(tmp_path.glob("step-*"))) == 2  # --keep
    if script == "auxdpo.py":
        assert np.array_equal(delta_of(uninterrupted), delta_of(tmp_path))


@pytest.mark.slow
def test_sigterm_saves_the_step_it_is_in_and_the_resumed_run_ends_with_the_same_bits(
        script, world, uninterrupted, tmp_path):
    flags = [flag if flag != 1 else 1000 for flag in train_flags(script, world, tmp_path)]  # no other checkpoints
    process = Program(script, *flags)
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    output = process.wait(60)
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
    process = Program(script, *flags)
    while process.poll() is None and len(list(tmp_path.glob("step-*"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    run_ranks(2, script, *flags)
    for key, tensor in weights(uninterrupted).items():
        torch.testing.assert_close(weights(tmp_path)[key], tensor, rtol=1e-3, atol=1e-3)


# ---- the cache


def make_data(tiny_model, tiny_data, train, val=1, longest=40):
    """Flags of cache_ref.py for random pairs, and the data folder."""
    sizes = np.random.default_rng(2).integers(1, longest, (train + val, 3)).tolist()
    model = tiny_model("llama")
    data = Path(tiny_data(model, random_pairs(sizes[:train]), random_pairs(sizes[train:], seed=1)))
    return ["--model", model, "--data", str(data), "--max_tokens", "160"], data


def known(path):
    """How many rows of a file are not NaN; 0 if there is no file."""
    if not path.exists():
        return 0
    values = np.load(path)
    return int((~np.isnan(values.reshape(len(values), -1)[:, -1])).sum())


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


def kill_at(count, path, *flags):
    """Kill cache_ref.py as soon as so many rows of the file are known -> how many were in the end."""
    process = Program("cache_ref.py", *flags)
    while process.poll() is None and known(path) < count:
        time.sleep(0.001)
    assert process.poll() is None
    process.kill()
    process.wait()
    return known(path)


def assert_killed_ten_times_it_ends_with_the_same_bytes(flags, data, pattern, name):
    """Of the file `name` in the folder that matches `pattern`."""
    finish("cache_ref.py", *flags)
    folder, = data.glob(pattern)
    truth, path, responses = files_of(folder), folder / name, len(np.load(folder / name))
    folder.rename(data / "truth")
    rng, there = random.Random(0), 0
    for count in sorted(rng.sample(range(1, responses - 200), 10)):
        before, there = there, kill_at(count, path, *flags)
        assert there >= before and not (folder / "meta.json").exists()
    output = finish("cache_ref.py", *flags)
    said, = re.findall(rf"{re.escape(str(path))}: (\d+) of {responses} distinct responses are done", output)
    assert int(said) == there and "damaged" not in output
    computed = int(re.findall(rf"{re.escape(name)}: 100%.* (\d+)/\1 ", output)[-1])
    assert 0 <= 2 * computed - (responses - there) <= 40  # some are in a micro-batch that a kill has cut
    assert files_of(folder) == truth
    assert "are done" not in finish("cache_ref.py", *flags)  # nothing is left to do


@pytest.mark.slow
def test_a_cache_killed_ten_times_is_equal_to_the_byte_and_no_known_row_is_computed_again(tiny_model, tiny_data):
    flags, data = make_data(tiny_model, tiny_data, train=500, val=100)
    assert_killed_ten_times_it_ends_with_the_same_bytes(flags, data, "ref-*", "train-logps.npy")


@pytest.mark.slow
def test_sketches_killed_ten_times_are_equal_to_the_byte_and_none_is_computed_again(tiny_model, tiny_data):
    flags, data = make_data(tiny_model, tiny_data, train=400)
    flags += ["--sketch_dim", "48"]
    assert_killed_ten_times_it_ends_with_the_same_bytes(flags, data, "ref-*/sketch-*", "train-sketch.npy")


@pytest.mark.slow
@pytest.mark.torchrun
def test_any_number_of_ranks_makes_the_same_cache_and_sketches_and_completes_that_of_another(tiny_model, tiny_data):
    flags, data = make_data(tiny_model, tiny_data, train=53)
    flags += ["--sketch_dim", "48", "--sketch_dtype", "float32"]
    finish("cache_ref.py", *flags)
    folder, = data.glob("ref-*")
    truth = files_of(folder)
    assert len(truth) == 3
    for ranks, missing in [(3, slice(None)), (2, slice(20, 40))]:  # made from nothing, and half of it
        for path in folder.rglob("*.npy"):
            values = np.load(path)
            values[missing] = np.nan
            np.save(path, values)
        for path in folder.rglob("meta.json"):
            path.unlink()
        run_ranks(ranks, "cache_ref.py", *flags)
        assert files_of(folder) == truth


# ---- two jobs on one folder


def run_two_jobs(first, second, seconds):
    """Run cache_ref.py with two lists of flags, the second some seconds later -> exit statuses."""
    jobs = [Program("cache_ref.py", *first)]
    time.sleep(seconds)
    jobs.append(Program("cache_ref.py", *second))
    for each in jobs:
        each.wait(120)
    return [each.returncode for each in jobs]


def assert_complete(folder):
    """The hashes are those of the files, and nothing else is left."""
    meta = json.loads((folder / "meta.json").read_text())
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((folder / f"{name}-logps.npy").read_bytes()).hexdigest() == digest
    assert sorted(path.name for path in folder.glob("*.*")) == ["meta.json", "train-logps.npy", "val-logps.npy"]


@pytest.mark.slow
def test_two_jobs_that_fill_one_cache_at_once_both_end_well_in_20_of_20_tries(tiny_model, tiny_data):
    """In half of the tries they start at the same moment, in the others at most 2 s after each other."""
    flags, data = make_data(tiny_model, tiny_data, train=80, val=20)
    flags += ["--sketch_dim", "48"]
    finish("cache_ref.py", *flags)
    folder, = data.glob("ref-*")
    truth = files_of(folder)
    assert len(truth) == 3
    rng = random.Random(0)
    for attempt in range(20):
        folder.rename(data / f"old-{attempt}")
        assert run_two_jobs(flags, flags, rng.uniform(0, 2) if attempt % 2 else 0) == [0, 0], attempt
        assert files_of(folder) == truth, attempt
        assert_complete(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.3, 0.6])
def test_two_jobs_with_other_micro_batches_end_well_too(seconds, tiny_model, tiny_data):
    """Their log-probs differ by rounding, so the hashes must be those of what was written last."""
    flags, data = make_data(tiny_model, tiny_data, train=400, val=20)
    assert run_two_jobs(flags, [*flags, "--max_tokens", "400"], seconds) == [0, 0]
    folder, = data.glob("ref-*")
    assert_complete(folder)


def test_rows_that_another_job_has_written_are_not_overwritten_by_a_buffer(tmp_path):
    """What stands between two rows of this job was NaN when the file was opened, but is known by now."""
    import cache_ref

    path = tmp_path / "x.npy"
    np.save(path, np.full((9, 2), np.nan, np.float32))
    values, texts = np.arange(18, dtype=np.float32).reshape(9, 2), types.SimpleNamespace(rows=range(9))

    def rows():
        yield 2
        cache_ref.write_rows(path, [5], values[[5]], texts)
        yield 8

    cache_ref.write_rows(path, rows(), values[[2, 8]], texts)
    made = np.load(path)
    assert np.array_equal(np.flatnonzero(~np.isnan(made[:, 1])), [2, 5, 8])
    assert np.array_equal(made[[2, 5, 8]], values[[2, 5, 8]])
