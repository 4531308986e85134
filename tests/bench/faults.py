"""What clusters do to a job, done to a small one: kills at random moments, a full disk, damaged files, NaN, a rank that stalls.
Each ends in recovery with the weights of the run that was left alone, or in one line; nothing else is a success.

    python tests/bench/faults.py [--kills 50] [--out results/faults.md]    (a few minutes on two cores)

It prints a table, and writes it into --out; the exit status is 1 if a row fails. A pair that were lost or repeated
would change the weights, which are compared bit by bit. The full disk is a limit on the size of files, which fails in
the middle of a write as a full disk does.
"""
import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ROOT, random_pairs, tiny_hf_model, tiny_tokenizer, write_tiny_data
from safetensors.torch import load_file, save_file

ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def start(*command, ranks=1, limit=None):
    """A script as a process; limit is in bytes per file."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []

    def bound():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(list(map(str, [sys.executable, *launch, *command])), env=ENVIRONMENT, text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=bound if limit else None)


def finish(*command, **how):
    """-> exit status, the line that says error."""
    process = start(*command, **how)
    output = process.communicate(timeout=600)[0]
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 0 or lines, output[-3000:]  # anything else is a traceback
    return process.returncode, lines[0] if lines else ""


def weights(out):
    return load_file(Path(out) / "final/model.safetensors")


def same(one, other):
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def make_world(folder):
    rng = np.random.default_rng(1)
    tiny_hf_model("llama-tied").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    pairs = [random_pairs(rng.integers(1, 24, (n, 3)).tolist(), seed=n) for n in (400, 30)]
    write_tiny_data(folder / "data", str(folder / "model"), *pairs)
    common = ["--model", folder / "model", "--data", folder / "data", "--max_tokens", 200]
    cache = [ROOT / "cache_ref.py", *common]
    assert finish(*cache)[0] == 0
    train = [ROOT / "dpo.py", *common, "--batch_size", 4, "--epochs", 2, "--log_every", 5, "--learning_rate", 1e-3,
             "--eval_every", 0, "--save_every", 1, "--resume", "--out"]
    assert finish(*train, folder / "alone")[0] == 0
    return cache, train


def kill_until(process, ready, rng):
    """SIGKILL at a random moment after `ready` -> whether it was still running."""
    while process.poll() is None and not ready():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def kills_in_training(folder, train, kills):
    rng, out, done = random.Random(0), folder / "killed", 0
    while done < kills:
        before = max(out.glob("step-*"), default=None)
        done += kill_until(start(*train, out), lambda: max(out.glob("step-*"), default=None) != before, rng)
        if (out / "final").exists():
            break
    steps = max(out.glob("step-*")).name
    assert finish(*train, out)[0] == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    dealt = sum(line["pairs"] for line in lines)
    return (same(folder / "alone", out) and dealt == 800 and done == kills,
            f"{done} kills, the last after {steps}; {dealt} of 800 pairs, weights equal to the bit")


def kills_in_cache(folder, cache, kills):
    truth, = (folder / "data").glob("ref-*")
    files = {path.name: path.read_bytes() for path in truth.glob("*-logps.npy")}
    truth.rename(folder / "truth")
    rng, done, complete, equal, lost = random.Random(1), 0, 0, True, 0

    def known():
        """Rows that are in the file already."""
        path = truth / "train-logps.npy"
        return int((~np.isnan(np.load(path))).sum()) if path.exists() else 0

    while done < kills or not (truth / "meta.json").exists():
        before = known()
        if done < kills:
            done += kill_until(start(*cache), lambda: known() > before or (truth / "meta.json").exists(), rng)
        else:
            assert finish(*cache)[0] == 0
        lost += known() < before
        if (truth / "meta.json").exists():  # and once more from nothing, until there were as many kills as asked for
            complete += 1
            equal &= {path.name: path.read_bytes() for path in truth.glob("*-logps.npy")} == files
            if done < kills:
                shutil.rmtree(truth)
    return equal and not lost, f"{done} kills over {complete} caches; files equal to the byte, no row lost"


def full_disk(folder, train):
    out = folder / "full"
    size = max(path.stat().st_size for path in (folder / "killed").glob("step-*/*"))
    status, line = finish(*train, out, limit=size // 2)
    assert not (out / "final").exists() and not list(out.glob("step-*"))
    return status == 1 and finish(*train, out)[0] == 0 and same(folder / "alone", out), line


def truncated_checkpoint(folder, train):
    out = folder / "cut"
    kill_until(start(*train, out), lambda: len(list(out.glob("step-*"))) > 1, random.Random(2))
    last = max(out.glob("step-*"))
    part = max(last.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(part, part.stat().st_size // 2)
    status, line = finish(*train, out)
    shutil.rmtree(last)  # as the line says
    return status == 1 and str(last) in line and finish(*train, out)[0] == 0 and same(folder / "alone", out), line


def corrupted_cache(folder, cache, train):
    reference, = (folder / "data").glob("ref-*")
    path = reference / "train-logps.npy"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # one bit of the last but one number
    path.write_bytes(data)
    status, line = finish(*train, folder / "corrupted")
    shutil.rmtree(reference)  # as the line says
    assert finish(*cache)[0] == 0
    return (status == 1 and str(reference) in line and finish(*train, folder / "corrupted")[0] == 0
            and same(folder / "alone", folder / "corrupted")), line


def nan_weights(folder, train):
    model = shutil.copytree(folder / "model", folder / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata=dict(format="pt"))
    flags = [model if flag == folder / "model" else flag for flag in train]
    status, line = finish(*[ROOT / "simpo.py", *flags[1:]], folder / "nan_run")  # which needs no cache
    return status == 1 and not (folder / "nan_run/final").exists(), line


def stalled_rank(folder, train):
    out = folder / "stalled"
    assert finish(*train, folder / "two", ranks=2)[0] == 0
    process = start(*train, out, ranks=2)
    while process.poll() is None and len(list(out.glob("step-*"))) < 2:
        time.sleep(0.01)
    pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    pid = next(int(p) for p in pids if "dpo.py" in Path(f"/proc/{p}/cmdline").read_text())
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    before = len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").exists() else 0
    time.sleep(10)
    waited = len((out / "log.jsonl").read_text().splitlines()) - before if before else 0
    os.kill(pid, signal.SIGCONT)
    process.communicate(timeout=600)
    return process.returncode == 0 and waited == 0 and same(folder / "two", out), "the other rank waited"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of the training run, and of cache_ref.py")
    parser.add_argument("--out", help="file for the table, such as results/faults.md")
    args, failed = parser.parse_args(), 0
    kills = args.kills
    lines = [f"`python tests/bench/faults.py --kills {kills} --out results/faults.md`, {os.cpu_count()} CPU cores, "
             f"torch {torch.__version__}, transformers {transformers.__version__}:\n",
             "| fault | ends | how |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache, train = make_world(folder)
        print(*lines, sep="\n", flush=True)
        for fault, check in {
                "SIGKILL in training": lambda: kills_in_training(folder, train, kills),
                "SIGKILL in cache_ref.py": lambda: kills_in_cache(folder, cache, kills),
                "disk full in a checkpoint": lambda: full_disk(folder, train),
                "checkpoint cut off": lambda: truncated_checkpoint(folder, train),
                "one bit of the cache": lambda: corrupted_cache(folder, cache, train),
                "NaN in the weights": lambda: nan_weights(folder, train),
                "a rank stops for 10 s": lambda: stalled_rank(folder, train)}.items():
            good, how = check()
            failed += not good
            how = how.replace(name, "RUN").replace("|", "/")
            lines.append(f"| {fault} | {'as it should' if good else 'FAILED'} | {how} |")
            print(lines[-1], flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
