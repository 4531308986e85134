"""What a step of each algorithm costs beside one of dpo.py, a token of cache_ref.py beside one of training, a token of
prepare_data.py beside one of the bare tokenizer, and a step on several ranks beside one on one rank.

    python tests/bench/rates.py [--dataset FILE] [--model FOLDER] [--pairs 32] [--rounds 5] [--copies 8] [--ranks 1,2] [--out results/rates.md]

All in one process, in turns, so that a noisy machine is noisy to all; medians of CPU seconds, ratios of the same round. Steps are
forward, backward, clipping and AdamW on the same `--pairs` pairs, in one micro-batch and in about four, these with full activation
checkpointing too, where AuxDPO keeps up to four graphs. cache_ref.py is timed with its files, without the start of Python. prepare_data.py is timed as a user runs it, `--copies` copies of the file in one call, less
the same call on 64 rows: wall time, all cores, against the tokenizer's own batch call, all cores, on the same rendered texts. Ranks
have one thread each, and the same pairs per step in all; the tokens/s are those of log.jsonl.
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
SHARED = ROOT.parent / "shared"


def call(script, *flags):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {script}: {done.stderr[-1000:]}")
    return time.perf_counter() - start


def some_rows(dataset, folder, count=None, copies=1):
    """A file with the first rows of another, maybe several times."""
    import prepare_data
    rows = [row for _, row in zip(range(count or 10**9), (row for _, row, _ in prepare_data.file_rows(Path(dataset))))]
    path = folder / f"rows{len(rows)}x{copies}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(copies) for row in rows))
    return path


def stepper(name, model_folder, data, max_tokens, rows, checkpointing="off"):
    """-> a function that takes one optimiser step of an algorithm on these rows."""
    script = importlib.import_module(name)
    args = script.Args(model=str(model_folder), data=str(data), max_tokens=max_tokens, activation_checkpointing=checkpointing)
    splits = script.load_data(args)
    train = splits["train"]
    model, weights = script.read_model(args.model, args)
    content = script.content_hashes(weights, splits, torch.float32, args)
    if name != "simpo":
        reference = script.load_reference(content, splits, args)
    if name == "auxdpo":
        script.prepare_delta(splits, reference, args)
    score = script.token_scores if name == "wpo" else script.token_logps
    policy = script.build_policy(model, weights, score, torch.device("cpu"), torch.float32, args)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-7, fused=True)
    lists = script.micro_batches(rows, train["lengths"], args, 1)

    def step():
        parts = [(part,) for part in lists]
        if name == "auxdpo":
            margins, parts = script.first_pass(policy, lists, train, args)  # with their log-probs, if kept
            script.update_delta(rows, margins, train, args)
        for part, *kept in parts:
            losses, _ = script.pair_losses(policy, part, train, args, *kept)
            (losses.sum() / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step, len(lists)


def cacher(model_folder, data, max_tokens, folder):
    """-> a function that makes the whole cache of the training rows, files included."""
    import cache_ref
    args = cache_ref.Args(model=str(model_folder), data=str(data), max_tokens=max_tokens)
    splits = dict(train=cache_ref.load_data(args)["train"])
    model, weights = cache_ref.read_model(args.model, args)
    cache_ref.choose_attention(model, args)
    policy = cache_ref.Policy(model, cache_ref.token_logps).eval()
    cache_ref.shard(policy, torch.device("cpu"), torch.float32, args)
    cache_ref.place_weights(model, weights, torch.device("cpu"))

    def compute(pairs):
        with torch.no_grad():
            return policy(cache_ref.collate(pairs, args.layout)).T

    def make():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):  # it says how far it is
            cache_ref.fill_folder(folder, splits, "logps", (), "float32", compute, {}, args)
    return make


def in_turns(contenders, rounds):
    """{name: CPU seconds per round}, after a round to warm up."""
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in [*contenders][::1 if turn % 2 else -1]:
            start = time.process_time()
            contenders[name]()
            seconds[name].append(time.process_time() - start)
    return {name: each[1:] for name, each in seconds.items()}


def rank_rate(ranks, model, data, out, pairs):
    """tokens/s of `dpo.py`: the median of the steps after the first two."""
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--model", model, "--data", data, "--out", out, "--batch_size", pairs, "--max_tokens", 1024, "--max_steps", 6,
             "--log_every", 1, "--eval_every", 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, ROOT / "dpo.py", *flags]
    done = subprocess.run(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: dpo.py on {ranks} ranks: {done.stderr[-1000:]}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return median(line["tokens/s"] for line in lines[2:])


def prepare_rate(dataset, model, folder, copies, rounds):
    """(texts, tokens, seconds of prepare_data.py, median of the tokenizer's own to those)"""
    import prepare_data
    many, one = some_rows(dataset, folder, copies=copies), some_rows(dataset, folder, 64)
    flags = ["--model", model, "--max_length", 10**6, "--overwrite", "--out"]
    args = prepare_data.Args(dataset=str(many), model=str(model), out="")
    kit, texts = prepare_data.load_tokenizer(args), []
    render = prepare_data.render

    def keep(*inputs):
        result = render(*inputs)
        texts.extend(result[1])
        return result
    prepare_data.render = keep
    prepare_data.prepare_chunk(args, [(*rest, row) for *rest, row in prepare_data.all_rows(args)])
    prepare_data.render = render
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    ours, bare = [], []
    for _ in range(rounds):
        start = call("prepare_data.py", "--dataset", one, "--val_fraction", 0.3, *flags, folder / "one")
        ours.append(call("prepare_data.py", "--dataset", many, *flags, folder / "many") - start)
        start, tokens = time.perf_counter(), 0
        for first in range(0, len(texts), 1000):
            tokens += sum(map(len, kit.tokenizer(texts[first:first + 1000], add_special_tokens=False).input_ids))
        bare.append(time.perf_counter() - start)
    return len(texts), tokens, median(ours), median(a / b for a, b in zip(bare, ours))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=SHARED / "data/raw/hh_harmless_test.jsonl.gz")
    parser.add_argument("--model", type=Path, default=SHARED / "models/MiniMind2-Small")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=8, help="of the file, for prepare_data.py; 0 = leave it out")
    parser.add_argument("--ranks", default="1,2", help="on how many ranks dpo.py is timed, each with one thread; empty = not")
    parser.add_argument("--steps", default="dpo,dpo_norm,simpo,wpo,auxdpo", help="algorithms; empty = none")
    parser.add_argument("--out", type=Path, default=Path("results/rates.md"))
    args = parser.parse_args()
    for path in (args.dataset, args.model):
        if not path.exists():
            sys.exit(f"error: {path} is not there; name --dataset and --model")
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = []

    def say(line):
        print(line, flush=True)
        out.append(line)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.steps:
            import dpo
            dpo.start_process_group("float32")
            data = folder / "data"
            call("prepare_data.py", "--dataset", some_rows(args.dataset, folder, 3 * args.pairs), "--model", args.model, "--out", data,
                 "--val_fraction", 0.1)
            call("cache_ref.py", "--model", args.model, "--data", data)
            if "auxdpo" in args.steps:
                import auxdpo
                call("cache_ref.py", "--model", args.model, "--data", data, "--sketch_dim", auxdpo.Args.sketch_dim)
            lengths = dpo.load_data(dpo.Args(model=str(args.model), data=str(data)))["train"]["lengths"]
            rows = np.arange(args.pairs)
            whole = int(lengths[rows].sum())
            say("| script | micro-batches | checkpointing | CPU s per step | to dpo.py |\n|---|---:|---|---:|---:|")
            quarter, scripts = max(whole // 4 + lengths.sum(1).max() // 2, lengths.sum(1).max()), args.steps.split(",")
            for tokens, how in (whole, "off"), (quarter, "off"), (quarter, "full"):
                made = {name: stepper(name, args.model, data, int(tokens), rows, how) for name in scripts
                        if how == "off" or name in ("dpo", "auxdpo")}
                seconds = in_turns({name: step for name, (step, _) in made.items()}, args.rounds)
                for name, each in seconds.items():
                    ratio = median(a / b for a, b in zip(each, seconds["dpo"]))
                    say(f"| {name}.py | {made[name][1]} | {how} | {median(each):.2f} | {ratio:.2f} |")
                del made
            train, _ = stepper("dpo", args.model, data, 2048, np.arange(len(lengths)))
            seconds = in_turns(dict(train=train, cache=cacher(args.model, data, 2048, folder / "cache")), 3)
            ratio = median(a / b for a, b in zip(seconds["train"], seconds["cache"]))
            say(f"\ncache_ref.py: {lengths.sum() / median(seconds['cache']):.0f} tokens per CPU second, {ratio:.2f} times the "
                f"{lengths.sum() / median(seconds['train']):.0f} of training, 2048 tokens per forward pass")
            dist.destroy_process_group()
            counts = [int(part) for part in args.ranks.split(",") if part]
            rates = {ranks: [] for ranks in counts}
            for _ in range(args.rounds if counts else 0):
                for ranks in counts:
                    rates[ranks].append(rank_rate(ranks, args.model, data, folder / "run", args.pairs))
            for ranks in counts[1:]:
                ratio = median(b / a for a, b in zip(rates[counts[0]], rates[ranks]))
                say(f"\ndpo.py on {ranks} ranks: {median(rates[ranks]):.0f} tokens/s, {ratio:.2f} times those of {counts[0]}, "
                    f"{args.pairs} pairs per step, one thread per rank, {os.cpu_count()} cores")
        if args.copies:
            texts, tokens, ours, share = prepare_rate(args.dataset, args.model, folder, args.copies, args.rounds)
            say(f"\nprepare_data.py: {tokens / ours:,.0f} tokens/s after its start, {share:.0%} of the rate of the tokenizer alone "
                f"({texts:,} texts, {tokens:,} tokens, {os.cpu_count()} cores)")
    say(f"\n{args.dataset.name}, {args.model.name}, {args.rounds} rounds, float32, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
