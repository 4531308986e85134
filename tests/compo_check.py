"""compo.py on a real model: votes and time against the definition, and how good the estimated directions are.

    python tests/compo_check.py --model data/SmolLM2-135M-Instruct --data data/polite/noisy

The definition is a loop, `slow_votes`: it adds r z to the weight of the whole model's head, runs the model on the
chosen and on the rejected response, and compares. Prints two Markdown tables; --out FOLDER keeps them as time.md and
cosine.md, and draws the second as cosine.png.

1. A step on the pair of median length, with m perturbations: by the loop (timed on a few of them) and by compo.py, and
   how many of the same z get the same vote.
2. Mean cosine of u with the exact direction against m, for each estimator, and what the variance of u says it should
   be: signal s = |E[y z]| = |a/|a| - b/|b|| / sqrt(2 pi) in each of m votes, against D numbers of variance 1, or
   1 - E[y]^2 with the baseline. D is V h, the size of the head, or V k for `span`.
"""
import argparse
import copy
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
def load(model, data, **flags):
    """What main() of compo.py has before its first step -> head, batches, the settings, the training pairs."""
    args = compo.Args(model=str(model), data=str(data), **flags)
    pairs = compo.load_data(args)["train"]["pairs"]
    model, weights = compo.read_model(args.model, args)
    device = torch.device("cpu")
    head = copy.deepcopy(model.get_output_embeddings())
    compo.place_weights(head, weights.get_output_embeddings(), device)
    head.config = model.config.get_text_config()
    head.register_buffer("moved", torch.zeros(3))
    compo.choose_attention(model, args)
    policy = compo.Policy(model, compo.token_logps).eval()
    compo.shard(policy, device, torch.float32, args)
    compo.place_weights(model, weights, device)
    return head, compo.run_trunk(policy, pairs, args.pairs_per_step, args), args, pairs


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
        logits = model(ids, use_cache=False).logits[0, start - 1:-1]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
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


def gradients(head, batch):
    """a and b (V, h), of the mean log-probs of both sides, and the angle between them."""
    with torch.enable_grad():
        a, b = [torch.autograd.grad(logp, head.weight, retain_graph=True)[0] for logp in compo.mean_logps(head, batch)]
    return a, b, (compo.unit(a) * compo.unit(b)).sum().acos().item()


@torch.no_grad()
def timing(folder, data, m, sample):
    head, batches, args, pairs = load(folder, data, perturbations=m, gate=0.999)  # no step moves the head
    lengths = [len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs]
    row = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    pair, batch, model = pairs[row], batches[row], whole_model(folder)
    rng = torch.Generator().manual_seed(0)

    def drawn(count):
        for _ in range(count):
            yield torch.empty_like(head.weight).normal_(generator=rng)
    slow_votes(model, pair, drawn(2), args.radius)  # warm up
    clock = time.time()
    slow_votes(model, pair, drawn(sample), args.radius)
    loop = (time.time() - clock) / sample * m
    seconds = {}
    for name, changes in {"`gaussian`": {}, "`span`": dict(estimator="span"), "`exact`": dict(estimator="exact"),
                          "`span`, 99 perturbations, with the baseline":
                          dict(estimator="span", perturbations=99, baseline=True)}.items():
        times = []
        for turn in range(3):
            clock = time.time()
            compo.update(head, batch, turn, dataclasses.replace(args, **changes))
            times.append(time.time() - clock)
        seconds[name] = float(np.median(times))
    zs = list(drawn(min(sample, 40)))
    truth, _ = slow_votes(model, pair, zs, args.radius)
    changes, span = compo.changes_by(head, batch, args)
    same = (compo.oracle(changes(torch.stack([z @ span.T for z in zs]))) == truth).sum().item()
    (V, h), (_, _, angle) = head.weight.shape, gradients(head, batch)
    lines = [f"{Path(folder).name}: head {V} x {h}, a pair of {lengths[row]} tokens, {len(batch.targets)} of them in "
             f"responses; k = {len(span)}; angle {math.degrees(angle):.0f} degrees; m = {m}. Same votes for the same "
             f"{len(zs)} z: {same}.", "",
             "| way to a step | seconds per pair | times as fast |", "|---|---|---|",
             f"| definition: {m} x two passes of the model (timed on {sample}) | {loop:.0f} | 1 |"]
    lines += [f"| {name} | {value:.2f} | {loop / value:.0f} |" for name, value in seconds.items()]
    return lines


@torch.no_grad()
def cosines(folder, data, counts, number):
    """-> {(estimator, m): array of (cosine, expected, D, seconds, p, angle / 2 pi) of each pair}"""
    head, batches, args, _ = load(folder, data)
    found = {}
    for step, batch in enumerate(batches[:number]):
        a, b, angle = gradients(head, batch)
        limit = compo.unit(b) - compo.unit(a)
        size = limit.norm().item()
        k = len(compo.changes_by(head, batch, args)[1])
        for estimator in ("gaussian", "span", "span --baseline"):
            constant = 1 - angle / math.pi if "baseline" in estimator else 0.0
            numbers = head.weight.numel() if estimator == "gaussian" else len(head.weight) * k
            noise = 1 - constant**2  # variance of y - c, per number
            for m in counts:
                each = dataclasses.replace(args, perturbations=m, estimator=estimator.split()[0])
                clock = time.time()
                u, p = compo.estimate(head, batch, constant, step, each)
                clock = time.time() - clock
                cosine = (compo.unit(u) * compo.unit(limit)).sum().item()
                signal = m * size / math.sqrt(2 * math.pi)
                expected = signal / math.sqrt(signal**2 + m * numbers * noise)
                found.setdefault((estimator, m), []).append((cosine, expected, numbers, clock, p, angle / 2 / math.pi))
    return {key: np.array(values) for key, values in found.items()}


def draw(path, found, counts, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4))
    for estimator in ("gaussian", "span", "span --baseline"):
        rows = np.stack([found[estimator, m] for m in counts])
        line, = axes.plot(counts, rows[:, :, 0].mean(1), "o-", label=estimator)
        axes.plot(counts, rows[:, :, 1].mean(1), ":", color=line.get_color())
    axes.axhline(1, color="grey", label="exact")
    axes.set(xscale="log", yscale="log", xlabel="perturbations m", ylabel="cosine with the exact direction", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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
    parser.add_argument("--sample", type=int, default=40, help="perturbations of the loop that are timed; 0 = no table 1")
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
    found, name = cosines(args.model, args.data, counts, args.pairs), Path(args.model).name
    lines = [f"{name}: mean cosine with the exact direction in %, {args.pairs} pairs (in brackets: theory)", "",
             f"| estimator | numbers of noise | {' | '.join(f'm = {m}' for m in counts)} |",
             "|---|---|" + "---|" * len(counts)]
    for estimator in ("gaussian", "span", "span --baseline"):
        cells = []
        for m in counts:
            cosine, expected, numbers = 100 * found[estimator, m][:, 0], 100 * found[estimator, m][:, 1].mean(), \
                found[estimator, m][:, 2].mean()
            error = cosine.std(ddof=1) / math.sqrt(len(cosine)) if len(cosine) > 1 else 0.0
            cells.append(f"{cosine.mean():.2f} ± {error:.2f} ({expected:.2f})")
        lines.append(f"| `{estimator}` | {numbers:,.0f} | {' | '.join(cells)} |")
    last = found["span", counts[-1]]
    lines += ["", f"p over m = {counts[-1]} votes: mean {last[:, 4].mean():.4f}; angle / 2 pi: {last[:, 5].mean():.4f}"]
    keep(args.out, "cosine.md", lines)
    if args.out:
        draw(args.out / "cosine.png", found, counts, f"{name}, head of {found['gaussian', counts[0]][0, 2]:,.0f} numbers")


if __name__ == "__main__":
    main()
