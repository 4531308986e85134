"""Do the scripts give the numbers that those of another commit gave?

    git worktree add /tmp/old 937b6ad
    python tests/bench/against_old.py --old /tmp/old --model MODEL --pairs PAIRS.jsonl [--ranks 1,2]

Runs every algorithm of both checkouts on the same pairs, in the three layouts and on one and two ranks, and prints a
table of the largest differences: of the reference's log-probs (nats), of losses and gradient norms of all steps
(relative), and of the trained weights (relative to how far they moved, in the norm of each tensor). Then, in one
process, the gradient of every parameter for one batch (relative to the norm of each). MODEL in float32, as rounding of
final/ to bfloat16 would hide what is compared.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

NEW = Path(__file__).parents[2]
LAYOUTS = ["packed", "concatenated", "separate"]
SCRIPTS = ["dpo", "dpo_norm", "simpo", "wpo", "auxdpo", "compo"]
STEPS = 4


def run(folder, ranks, script, **flags):
    """One script of a checkout, with an error if it fails."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command.append(str(folder / f"{script}.py"))
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"


def train(folder, ranks, script, layout, model, data, out):
    flags = dict(model=model, data=data, out=out, layout=layout, max_tokens=900, eval_every=0)
    if script == "compo":
        flags |= dict(max_pairs=STEPS, estimator="exact", gate=0, keep_fraction=0.5)
    else:
        flags |= dict(batch_size=6, max_steps=STEPS, learning_rate=1e-3, log_every=1)
    if script == "auxdpo":
        flags |= dict(sketch_dim=64) | (dict(delta="per_pair") if folder == NEW else {})
    run(folder, ranks, script, **flags)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return lines, load_file(out / "final/model.safetensors")


def log_difference(one, other, names):
    """Largest relative difference of some entries over all lines of two logs."""
    largest = 0.0
    for old, new in zip(one, other, strict=True):
        for name in names:
            if name in old:
                largest = max(largest, abs(new[name] - old[name]) / max(abs(old[name]), 1e-6))
    return largest


def weight_difference(start, one, other):
    """Largest |new - old| / |old - start| over the tensors that moved."""
    largest = 0.0
    assert one.keys() >= other.keys()  # 937b6ad stored a tied head twice when it ran on several ranks
    for name in other:
        old = one[name]
        source = start.get(name, start["model.embed_tokens.weight"])  # of an untied head
        moved = (old.float() - source.float()).norm()
        if moved > 0:
            largest = max(largest, ((other[name].float() - old.float()).norm() / moved).item())
    return largest


def whole_runs(args, work):
    """The table's rows: (script, layout, ranks, log-probs, losses, gradient norms, weights)."""
    rows, start = [], load_file(Path(args.model, "model.safetensors"))
    for ranks in args.ranks:
        for layout in LAYOUTS:
            caches, data = {}, {}
            for name, folder in dict(old=args.old, new=NEW).items():
                data[name] = work / f"{name}-data-{layout}-{ranks}"
                shutil.copytree(work / "data", data[name])
                flags = dict(model=args.model, data=data[name], max_tokens=900)
                run(folder, ranks, "cache_ref", layout=layout, **flags)
                path, = data[name].glob("ref-*/train-logps.npy")
                caches[name] = np.load(path)
                if name == "new":  # it has each distinct response once
                    pairs = datasets.load_from_disk(data[name] / "train")
                    caches[name] = caches[name][np.stack([pairs["chosen_id"], pairs["rejected_id"]], 1)]
                # Sketches need a row for each text, and then so do the log-probs beside them.
                run(folder, ranks, "cache_ref", layout=layout, sketch_dim=64, **flags)
            logps = np.abs(caches["new"] - caches["old"]).max()
            for script in SCRIPTS:
                results = []
                for name, folder in dict(old=args.old, new=NEW).items():
                    out = work / f"{name}-{script}-{layout}-{ranks}"
                    results.append(train(folder, ranks, script, layout, args.model, data[name], out))
                (old_log, old), (new_log, new) = results
                if script == "compo":  # it has no loss, but changes of log-probs
                    old_log, new_log = old_log[:STEPS], new_log[:STEPS]
                losses = log_difference(old_log, new_log, ["loss", "realised/chosen", "realised/rejected"])
                norms = log_difference(old_log, new_log, ["grad_norm", "angle"])
                row = script, layout, ranks, logps, losses, norms, weight_difference(start, old, new)
                print("| " + " | ".join(str(x) if isinstance(x, (str, int)) else f"{x:.1e}" for x in row) + " |", flush=True)
                rows.append(row)
    return rows


def load(folder, name, tag):
    spec = importlib.util.spec_from_file_location(f"{tag}_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(policy):
    found = {name: weight.grad.full_tensor().clone() for name, weight in policy.named_parameters()}
    policy.zero_grad()
    return found


def one_batch(args, work):
    """For each script with a loss and each layout: largest relative difference of a parameter's gradient."""
    import datasets

    rows = datasets.load_from_disk(str(work / "data/train")).select(range(12))
    pairs = [dict(row) for row in rows]
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    ref = np.random.default_rng(0).normal(-60, 5, (len(pairs), 2)).astype(np.float32)
    settings = SimpleNamespace(
        model=args.model, beta=0.3, gamma_beta_ratio=0.5, label_smoothing=0.1, sft_weight=0.2, router_aux_coef=0.0,
        max_tokens=10_000, lora_rank=0, train_modules="", seed=0, activation_checkpointing="off", compile=False, shard_group=0,
        trust_remote_code=False, zero="auto")
    device = torch.device("cpu")
    for script in SCRIPTS[:4]:
        old, new = load(args.old, script, "old"), load(NEW, script, "new")
        if not torch.distributed.is_initialized():
            new.start_process_group("float32")
        for layout in LAYOUTS:
            settings.layout = layout
            transformers.AttentionInterface.register("gathered", old.gathered_attention)
            model, weights, _ = old.build_model(settings)
            score = [old.token_scores] if script == "wpo" else []
            policy = old.shard(old.Policy(model, *score), weights, torch.float32, device)
            split, part = dict(rows=pairs, lengths=lengths, ref=ref), np.arange(len(pairs))
            losses = old.pair_losses(policy, part, split, {}, settings)
            losses.mean().backward()
            before = gradients(policy)
            model, weights = new.read_model(settings.model, settings)
            score = new.token_scores if script == "wpo" else new.token_logps
            policy = new.build_policy(model, weights, score, device, torch.float32, settings)
            split = dict(pairs=pairs, lengths=lengths, ref_logps=ref)
            ours = new.pair_losses(policy, part, split, settings)[0]
            ours.mean().backward()
            after = gradients(policy)
            assert before.keys() == after.keys()
            error = max(((after[name] - grad).norm() / grad.norm()).item() for name, grad in before.items())
            loss = ((ours - losses).abs() / losses.abs()).max().item()
            print(f"| {script} | {layout} | {loss:.1e} | {error:.1e} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="checkout of the other commit")
    parser.add_argument("--model", required=True, help="float32 model folder")
    parser.add_argument("--pairs", required=True, help="raw pairs for prepare_data.py")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--out", type=Path, default=Path("/tmp/against_old"))
    args = parser.parse_args()
    args.ranks = [int(ranks) for ranks in args.ranks.split(",")]
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    run(NEW, 1, "prepare_data", dataset=args.pairs, model=args.model, out=args.out / "data", max_length=128, num_proc=1)
    meta = json.loads((args.out / "data/meta.json").read_text())
    meta["content_hash"] = dict(train="0" * 16, val="1" * 16)  # 937b6ad wants it
    (args.out / "data/meta.json").write_text(json.dumps(meta))
    print("| script | layout | largest difference of a loss | of a parameter's gradient |\n|---|---|---|---|")
    one_batch(args, args.out)
    print("\n| script | layout | ranks | log-probs, nats | loss | gradient norm | weights |\n|---|---|---|---|---|---|---|")
    whole_runs(args, args.out)


if __name__ == "__main__":
    main()
