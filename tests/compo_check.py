"""compo.py on a real model: votes and time against the definition, and how good the estimated directions are.

    python tests/compo_check.py --model data/SmolLM2-135M-Instruct --data data/polite/noisy

The definition is a loop, `slow_votes`: it adds r z to the weight of the whole model's head, runs the model on the
chosen and on the rejected response, and compares. Prints two Markdown tables; --out FOLDER keeps them as time.md and
cosine.md, and draws the second as cosine.png.

1. m perturbations of one pair of median length by the loop (timed on a few of them) and by compo.py, and how many
   of the same z get the same vote.
2. Mean cosine of g with the exact direction, before entries are dropped, against m, for each estimator, and what
   the variance of u says it should be: signal s = |E[y z]| = |a/|a| - b/|b|| / sqrt(2 pi) in each of m votes,
   against D numbers of variance 1 (3/4 with the baseline), D = V h, or (C + q) k of `span`.
"""
import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import compo  # noqa: E402


@torch.no_grad()
def load(model, data, names=("train",), **flags):
    """What main() of compo.py has before its first step -> tail, parameters, splits, args, tokenizer."""
    args = compo.Args(model=str(model), data=str(data), **flags)
    splits, tokenizer = compo.load_data(args, names)
    model, weights, _ = compo.build_model(args)
    tail = compo.copy.deepcopy(model).eval().requires_grad_(False)
    policy = compo.shard(compo.Policy(model), weights, torch.float32, torch.device("cpu"))
    parameters = compo.make_tail(policy, tail, torch.device("cpu"), args)
    compo.cache_entries(policy, splits, args)
    return tail, parameters, splits, args, tokenizer


def whole_model(folder, dtype=torch.float32):
    """The model of transformers with a head of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def whole_logps(model, pair):
    """log pi (2,) of chosen and rejected by the model's own forward, two passes."""
    sums = []
    for side in ("chosen", "rejected"):
        ids = torch.tensor([pair["prompt"] + pair[side]])
        start, answer = len(pair["prompt"]), torch.tensor(pair[side])
        logits = model(ids, use_cache=False).logits[0, start - 1:-1].float()
        sums.append(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum())
    return torch.stack(sums)


@torch.no_grad()
def slow_votes(model, pair, noise, radius):
    """y (m,) and u = sum of y z by the definition, for an iterable of z (V, h); the weight stays as it is."""
    weight = model.get_output_embeddings().weight
    start, before, votes, u = weight.clone(), whole_logps(model, pair), [], torch.zeros_like(weight)
    for z in noise:
        torch.add(start, z, alpha=radius, out=weight)
        after = whole_logps(model, pair)
        votes.append(-1.0 if after[0] > before[0] and after[1] < before[1] else 1.0)
        u.add_(z, alpha=votes[-1])
    weight.copy_(start)
    return torch.tensor(votes), u


def exact_directions(tail, parameters, split, rows, args):
    """Gradients a, b of both sides, their angle, and what view_of needs."""
    with torch.enable_grad():
        before, *where = compo.mean_logps(tail, split, rows, args)
        a, b = (torch.autograd.grad(each, parameters, retain_graph=True) for each in before)
    sizes = [math.sqrt(compo.inner(x, x)) for x in (a, b)]
    return a, b, math.acos(compo.inner(a, b) / (sizes[0] * sizes[1])), [x.detach() for x in where]


@torch.no_grad()
def timing(folder, data, m, sample):
    tail, parameters, splits, args, _ = load(folder, data, perturbations=m)
    split, weight = splits["train"], parameters[0]
    length = split["lengths"].sum(1)
    row = int(np.argsort(length, kind="stable")[len(length) // 2])
    pair, model = split["rows"][row], whole_model(folder)
    rng = torch.Generator().manual_seed(0)

    def drawn(count):
        for _ in range(count):
            yield torch.empty_like(weight).normal_(generator=rng)
    slow_votes(model, pair, drawn(2), args.radius)  # warm up
    clock = time.time()
    slow_votes(model, pair, drawn(sample), args.radius)
    loop = (time.time() - clock) / sample * m
    lines, seconds = [], {}
    for estimator, rare in (("gaussian", args.rare), ("span", args.rare), ("gaussian", 0.0), ("span", 0.0),
                            ("exact", args.rare)):
        args = dataclasses.replace(args, estimator=estimator, rare=rare)
        best = []
        for turn in range(3 if rare else 1):
            clock = time.time()
            whole_logps(model, pair)  # the trunk runs once
            a, b, angle, where = exact_directions(tail, parameters, split, [row], args)
            if estimator != "exact":
                compo.estimate(weight, compo.view_of(*where, tail, args), 0.0, turn, args)
            best.append(time.time() - clock)
        seconds[estimator, rare] = float(np.median(best))
    view = {rare: compo.view_of(*where, tail, dataclasses.replace(args, rare=rare)) for rare in (0.0, 1e-4)}
    zs = list(drawn(min(sample, 40)))
    truth, _ = slow_votes(model, pair, zs, args.radius)
    same = {rare: sum(int(compo.oracle(compo.changes(compo.narrow(z, each)[None], each))[0] == y)
                      for z, y in zip(zs, truth)) for rare, each in view.items()}
    fine = torch.stack([compo.changes(compo.narrow(z, view[0.0])[None], view[0.0])[0] for z in zs])
    rough = torch.stack([compo.changes(compo.narrow(z, view[1e-4])[None], view[1e-4])[0] for z in zs])
    error = ((rough - fine).norm() / fine.norm()).item()
    V, h = weight.shape
    seen = view[1e-4]
    lines += [f"{Path(folder).name}: head {V} x {h}, a pair of {length[row]} tokens, {len(where[1])} of them responses; "
              f"k = {len(seen.span)}, C + q = {len(seen.probs)} + {len(seen.bundles)}; angle {math.degrees(angle):.0f} "
              f"degrees; m = {m}. Same votes for the same {len(zs)} z: {same[0.0]} (every token), {same[1e-4]} (--rare "
              f"1e-4, which changes the log-prob changes by {100 * error:.3f} %).", "",
              "| way to u | seconds per pair | times as fast |", "|---|---|---|",
              f"| definition: {m} x two passes of the model (timed on {sample}) | {loop:.0f} | 1 |"]
    for (estimator, rare), value in seconds.items():
        note = "" if estimator == "exact" or rare else ", --rare 0"
        lines.append(f"| `{estimator}`{note} | {value:.2f} | {loop / value:.0f} |")
    return lines


@torch.no_grad()
def cosines(folder, data, counts, pairs):
    """-> [(label, m, mean cosine, its standard error, expected, D, seconds)]"""
    tail, parameters, splits, args, _ = load(folder, data)
    split, weight, found = splits["train"], parameters[0], {}
    for row in range(min(pairs, len(split["rows"]))):
        a, b, angle, where = exact_directions(tail, parameters, split, [row], args)
        view = compo.view_of(*where, tail, args)
        exact = [y / math.sqrt(compo.inner(b, b)) - x / math.sqrt(compo.inner(a, a)) for x, y in zip(a, b)]
        size = math.sqrt(compo.inner(exact, exact))
        for estimator in ("gaussian", "span", "span --baseline"):
            constant = 1 - angle / math.pi if "baseline" in estimator else 0.0
            numbers = weight.numel() if estimator == "gaussian" else (
                len(view.probs) + len(view.bundles)) * len(view.span)
            noise = 1 - constant**2  # variance of y - c, per number
            for m in counts:
                each = dataclasses.replace(args, perturbations=m, estimator=estimator.split()[0])
                clock = time.time()
                u, p = compo.estimate(weight, view, constant, row, each)
                clock = time.time() - clock
                cosine = compo.inner(u, exact) / math.sqrt(compo.inner(u, u)) / size
                signal = m * size / math.sqrt(2 * math.pi)
                expected = signal / math.sqrt(signal**2 + m * numbers * noise)
                found.setdefault((estimator, m), []).append((cosine, expected, numbers, clock, p, angle / 2 / math.pi))
    return {key: np.array(values) for key, values in found.items()}


def keep(folder, name, lines):
    print("\n".join(lines), flush=True)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join([f"<!-- {' '.join(sys.argv)} -->", "", *lines]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with noisy pairs")
    parser.add_argument("--m", type=int, default=1800)
    parser.add_argument("--sample", type=int, default=40, help="perturbations of the loop that are timed")
    parser.add_argument("--pairs", type=int, default=10, help="for the second table; 0 = leave it out")
    parser.add_argument("--counts", default="100,450,1800,7200,28800")
    parser.add_argument("--out", type=Path, help="folder for the tables and the plot")
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_flush_denormal(True)
    if args.sample:
        keep(args.out, "time.md", timing(args.model, args.data, args.m, args.sample))
    if not args.pairs:
        return
    counts = [int(m) for m in args.counts.split(",")]
    found = cosines(args.model, args.data, counts, args.pairs)
    lines = [f"{Path(args.model).name}: mean cosine with the exact direction in %, {args.pairs} pairs (in brackets: theory)",
             "", f"| estimator | numbers of noise | {' | '.join(f'm = {m}' for m in counts)} |",
             "|---|---|" + "---|" * len(counts)]
    for estimator in ("gaussian", "span", "span --baseline"):
        rows = [found[estimator, m] for m in counts]
        cells = [f"{100 * r[:, 0].mean():.2f} ± {100 * r[:, 0].std(ddof=1) / math.sqrt(len(r)):.2f} "
                 f"({100 * r[:, 1].mean():.2f})" for r in rows]
        lines.append(f"| `{estimator}` | {rows[0][:, 2].mean():,.0f} | {' | '.join(cells)} |")
    last = found["span", counts[-1]]
    lines += ["", f"p over m = {counts[-1]} votes: mean {last[:, 4].mean():.4f}; angle / 2 pi: {last[:, 5].mean():.4f}"]
    keep(args.out, "cosine.md", lines)
    if args.out:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(6, 4))
        for estimator in ("gaussian", "span", "span --baseline"):
            rows = np.stack([found[estimator, m] for m in counts])
            line, = axes.plot(counts, rows[:, :, 0].mean(1), "o-", label=estimator)
            axes.plot(counts, rows[:, :, 1].mean(1), ":", color=line.get_color())
        axes.axhline(1, color="grey", label="exact")
        axes.set(xscale="log", yscale="log", xlabel="perturbations m", ylabel="cosine with the exact direction",
                 title=f"{Path(args.model).name}, head of {last[0, 2]:,.0f} visible numbers")
        axes.legend()
        figure.tight_layout()
        figure.savefig(args.out / "cosine.png", dpi=110)


if __name__ == "__main__":
    main()
