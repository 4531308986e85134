"""compo.py on a real model: votes and time against the definition, and how good its directions are.

    python tests/bench/compo_check.py --model data/SmolLM2-135M-Instruct --data data/polite40/noisy \
        --out results/compo_cosine

The definition is a loop, `slow_votes`: it adds r z to the weight of the whole model's head, runs
the model on the chosen and on the rejected response, and compares. Two tables are printed; --out
FOLDER keeps them as time.md and table.md, and draws the second as figure.png.

1. A step on the pair of median length, with m perturbations: by the loop (timed on a few of them)
   and by compo.py, and how many of the same z get the same vote.
2. Mean cosine of u with its own limit, which `exact` computes, against m, for each estimator; in
   brackets, and as a line in the figure, what `expected_cosine` says that it should be.
"""
import argparse
import copy
import dataclasses
import math
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
import compo  # noqa: E402

ESTIMATORS = ["gaussian", "span", "span --baseline"]


@torch.no_grad()
def load(model, data, **flags):
    """What main() of compo.py has before its first step: head, batches, settings, pairs."""
    args = compo.Args(model=str(model), data=str(data), **flags)
    pairs = compo.load_data(args)["train"]["pairs"]
    model, weights = compo.read_model(args.model, args)
    device = torch.device("cpu")
    head = copy.deepcopy(model.get_output_embeddings())
    compo.place_weights(head, weights.get_output_embeddings(), device)
    head.config = model.config.get_text_config()
    head.register_buffer("accepted_steps", torch.tensor(0))
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
    """y (m,) and u = sum of y z by the definition, for an iterable of z (V, h). The weight stays
    as it is."""
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
        logps = compo.mean_logps(head, batch)
        a, b = [torch.autograd.grad(logp, head.weight, retain_graph=True)[0] for logp in logps]
    return a, b, (compo.unit(a) * compo.unit(b)).sum().acos().item()


@torch.no_grad()
def timing(folder, data, m, sample):
    # with this gate no step moves the head
    head, batches, args, pairs = load(folder, data, perturbations=m, gate=0.999)
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
    ways = {"`gaussian`": {}, "`span`": dict(estimator="span"), "`exact`": dict(estimator="exact"),
            "`span`, 99 perturbations, with the baseline":
            dict(estimator="span", perturbations=99, baseline=True)}
    for name, changes in ways.items():
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
    lines = [f"{Path(folder).name}: head {V} x {h}, a pair of {lengths[row]} tokens, "
             f"{len(batch.targets)} of them in responses; k = {len(span)}; angle "
             f"{math.degrees(angle):.0f} degrees; m = {m}. Same votes for the same {len(zs)} z: "
             f"{same}.", "",
             "| way to a step | seconds per pair | times as fast |", "|---|---|---|",
             f"| definition: {m} x two passes of the model (timed on {sample}) | {loop:.0f} | 1 |"]
    lines += [f"| {name} | {value:.2f} | {loop / value:.0f} |" for name, value in seconds.items()]
    return lines


def expected_cosine(m, angle, numbers, constant=0.0):
    """The cosine of u = sum_i (y_i - constant) z_i with its limit, by theory, for a small radius.

    m votes; angle between a and b in radians; numbers: how many each z has. A vote moves u by
    |E[y z]| = |a/|a| - b/|b|| / sqrt(2 pi) towards the limit, and adds noise of variance
    E[(y - constant)^2] to each number; with the baseline, constant = E[y], that is 1 - E[y]^2."""
    signal = m * 2 * math.sin(angle / 2) / math.sqrt(2 * math.pi)
    mean = 1 - angle / math.pi  # E[y] = 1 - 2 E[p]
    noise = m * numbers * (1 - 2 * constant * mean + constant**2)
    return signal / math.sqrt(signal**2 + noise)


def constant_of(estimator, angle):
    """What is subtracted from the votes: E[y] with the baseline, else nothing."""
    return 1 - angle / math.pi if "baseline" in estimator else 0.0


@torch.no_grad()
def cosines(folder, data, counts, number):
    """{(estimator, m): array with a row for each of the first pairs: the cosine measured, the
    expected one, how many numbers a z has, p, angle / 2 pi}."""
    head, batches, args, _ = load(folder, data)
    found = {(estimator, m): [] for estimator in ESTIMATORS for m in counts}
    for step, batch in enumerate(batches[:number]):
        a, b, angle = gradients(head, batch)
        limit = compo.unit(compo.unit(b) - compo.unit(a))
        k = len(compo.changes_by(head, batch, args)[1])
        for estimator, m in found:
            constant = constant_of(estimator, angle)
            numbers = head.weight.numel() if estimator == "gaussian" else len(head.weight) * k
            each = dataclasses.replace(args, perturbations=m, estimator=estimator.split()[0])
            u, p = compo.estimate(head, batch, constant, step, each)
            cosine = (compo.unit(u) * limit).sum().item()
            expected = expected_cosine(m, angle, numbers, constant)
            found[estimator, m].append((cosine, expected, numbers, p, angle / 2 / math.pi))
    return {key: np.array(rows) for key, rows in found.items()}


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def cosine_table(name, found, counts):
    """Lines of Markdown: a row for each estimator, a column for each m."""
    number = len(found["gaussian", counts[0]])
    lines = [f"{name}: mean cosine with the limit in %, {number} pairs (in brackets: theory)", "",
             f"| estimator | numbers drawn per perturbation | {' | '.join(f'm = {m}' for m in counts)} |",
             "|---|---|" + "---|" * len(counts)]
    for estimator in ESTIMATORS:
        cells = []
        for m in counts:
            measured, expected = 100 * found[estimator, m][:, 0], 100 * found[estimator, m][:, 1]
            error = standard_error(measured)
            cells.append(f"{measured.mean():.2f} ± {error:.2f} ({expected.mean():.2f})")
        numbers = found[estimator, counts[0]][:, 2].mean()
        lines.append(f"| `{estimator}` | {numbers:,.0f} | {' | '.join(cells)} |")
    last = found["span", counts[-1]]
    return [*lines, "", f"p over {counts[-1]} votes: mean {last[:, 3].mean():.4f}; angle / 2 pi: "
                        f"{last[:, 4].mean():.4f}"]


def theory_line(estimator, rows, grid):
    """expected_cosine for each m of the grid, a mean over the pairs of the rows."""
    values = np.zeros(len(grid))
    for _, _, numbers, _, share in rows:
        angle = 2 * math.pi * share
        constant = constant_of(estimator, angle)
        values += [expected_cosine(m, angle, numbers, constant) for m in grid]
    return values / len(rows)


def draw(path, found, counts, title):
    """Points with error bars are measured, lines are theory. It can be read in black and white."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    styles = {"gaussian": ("o", "-", "gaussian, as published"),
              "span": ("s", "--", "span"),
              "span --baseline": ("^", ":", "span --baseline")}
    grid = np.geomspace(counts[0] / 2, 1e9, 100)
    for estimator, (marker, style, label) in styles.items():
        rows = [found[estimator, m] for m in counts]
        means = [row[:, 0].mean() for row in rows]
        errors = [standard_error(row[:, 0]) for row in rows]
        fill = "black" if estimator == "gaussian" else "white"
        axes.plot(grid, theory_line(estimator, rows[0], grid), style, color="black", linewidth=1,
                  label=f"{label}: theory")
        axes.errorbar(counts, means, errors, fmt=marker, color="black", markerfacecolor=fill,
                      markersize=5, capsize=3, label=f"{label}: measured")
    axes.axhline(1, color="grey", linewidth=2, label="exact, one backward pass")
    axes.axvline(1800, color="grey", linewidth=0.8, linestyle="-.", label="the paper's m = 1800")
    axes.set(xscale="log", yscale="log", xlabel="perturbations m per pair",
             ylabel="cosine of the direction with its limit", title=title)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def hardware():
    """One line: where these figures were measured."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # Linux
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    return (f"{cpu}, {torch.get_num_threads()} thread(s), float32, Python "
            f"{platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}")


def keep(folder, name, lines):
    """Print the lines, and write them to a file of the folder, below the command that made them."""
    lines = [*lines, "", hardware()]
    print("\n".join(lines), flush=True)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join([f"<!-- {' '.join(sys.argv)} -->", "", *lines]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with noisy pairs")
    parser.add_argument("--m", type=int, default=1800)
    parser.add_argument("--sample", type=int, default=40,
                        help="perturbations of the loop that are timed; 0 = no first table")
    parser.add_argument("--pairs", type=int, default=10,
                        help="of the second table; 0 = no such table")
    parser.add_argument("--counts", default="100,450,1800,3300")
    parser.add_argument("--out", type=Path, help="folder for the tables and the figure")
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_flush_denormal(True)
    if args.sample:
        keep(args.out, "time.md", timing(args.model, args.data, args.m, args.sample))
    if not args.pairs:
        return
    counts = [int(m) for m in args.counts.split(",")]
    found, name = cosines(args.model, args.data, counts, args.pairs), Path(args.model).name
    keep(args.out, "table.md", cosine_table(name, found, counts))
    if args.out:
        numbers = found["gaussian", counts[0]][0, 2]
        draw(args.out / "figure.png", found, counts, f"{name}, a head of {numbers:,.0f} numbers")


if __name__ == "__main__":
    main()
