"""The bandit of the AuxDPO paper (Proposition 3), solved: python tests/bench/bandit.py [FIGURE.png]

One state, three responses, pi_theta proportional to [e^theta, e^-theta, 1], reference theta = 0, true reward r* = [1, 2, 0],
preferences of Bradley and Terry, and pair counts n12 : n23 : n31. The policy class is one-dimensional, so it cannot
express r*, and DPO's answer depends on the counts. Every loss is minimised to its end by the solver of auxdpo.py,
whose unknowns here are theta and the delta of the three responses. Prints tables; with a path, writes the first beside the figure that it draws."""

import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import auxdpo

REWARD = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
FEATURES = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)  # logits are theta times these
SCORES = FEATURES / 3  # A: grad log pi at theta = 0, which is FEATURES, times pi = 1/3
PAIRS = [(0, 1), (1, 2), (2, 0)]


def comparisons(counts):
    """-> signs (6, 3): winner - loser of every pair and its opposite; weights (6,), how often, summing to 1."""
    rows, weights = [], []
    for (i, j), count in zip(PAIRS, counts):
        for a, b in ((i, j), (j, i)):
            row = torch.zeros(3, dtype=torch.float64)
            row[a], row[b] = 1, -1
            rows.append(row)
            weights.append(count * torch.sigmoid(REWARD[a] - REWARD[b]))
    return torch.stack(rows), torch.stack(weights) / sum(counts)


def minimise(counts, beta, directions, gram, steps=3000):
    """Unknowns z (q,): theta first, then what `directions` (3, q - 1) make of the rest is delta. -> theta, delta (3,)"""
    signs, weights = comparisons(counts)
    args = types.SimpleNamespace(delta_steps=steps, label_smoothing=0)
    signs = signs @ torch.cat([beta * FEATURES[:, None], directions], 1)
    none = torch.zeros(signs.shape[1], dtype=torch.float64)
    z = auxdpo.minimise(none, 0 * weights, weights, signs, gram, none, args)
    return z[0].item(), directions @ z[1:]


def dpo(counts, beta=1.0):
    return minimise(counts, beta, torch.zeros(3, 0, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))[0]


def exact(counts, beta=1.0):
    """delta in the null space of A."""
    basis = torch.linalg.svd(SCORES[None])[2][1:].T  # (3, 2)
    return minimise(counts, beta, basis, torch.zeros(3, 3, dtype=torch.float64))


def soft(counts, penalty, beta=1.0, ridge=False, steps=3000):
    """The penalty lambda |A delta|^2, or lambda |delta|^2 / 9, which knows nothing of the policy."""
    gram = torch.zeros(4, 4, dtype=torch.float64)
    gram[1:, 1:] = 2 * penalty * (torch.eye(3) / 9 if ridge else SCORES[:, None] * SCORES)
    return minimise(counts, beta, torch.eye(3, dtype=torch.float64), gram, steps)


def shared(counts, penalty=1.0, beta=1.0, often=False):
    """One delta per response, which has its part in c as centred_scores of auxdpo.py gives it, each once. With `often`
    each counts as often as it is compared, in c and in the mean."""
    pairs = [each for i, j in PAIRS for each in ((i, j), (j, i))]
    split = dict(index=np.array(pairs), groups=np.zeros(3, int), source=np.arange(3), sketch=FEATURES[:, None].numpy())
    args = types.SimpleNamespace(geometry="scores", delta="shared")
    scores, _ = auxdpo.centred_scores(np.arange(3), split, args)  # (3, 1)
    if often:
        a, b, c = counts
        times = torch.tensor([a + c, a + b, b + c])
        scores = (times * (FEATURES - (times * FEATURES).sum() / times.sum()))[:, None]
    gram = torch.zeros(4, 4, dtype=torch.float64)
    gram[1:, 1:] = penalty * scores @ scores.T
    return minimise(counts, beta, torch.eye(3, dtype=torch.float64), gram)[0]


def ipo(counts, tau=1.0):
    """Least squares to the margin 1 / 2 tau, in closed form."""
    signs, weights = comparisons(counts)
    d = signs @ FEATURES
    return ((weights * d).sum() / (2 * tau) / (weights * d * d).sum()).item()


def expected_reward(theta):
    return (torch.softmax(theta * FEATURES, 0) @ REWARD).item()


def main():
    counts = (1, 1, 10)
    found = {"base": 0.0, "DPO": dpo(counts), "IPO, tau = 1": ipo(counts), "AuxDPO, exact null space": exact(counts)[0]}
    published = dict(zip(found, (1.0, 0.895, 0.969, 1.199)))
    table = "| bandit | θ at the minimum | E[r*] | published E[r*] |\n|---|---|---|---|\n"
    for name, theta in found.items():
        table += f"| {name} | {theta:.5f} | {expected_reward(theta):.5f} | {published[name]} |\n"
    print(table)
    print("\n| n12 : n23 : n31 | DPO | IPO | AuxDPO, each response once | as often as it is compared |\n|---|---|---|---|---|")
    for other in [(1, 1, 10), (1, 1, 1), (10, 1, 1), (1, 10, 1), (1, 10, 10)]:
        values = (dpo(other), ipo(other), shared(other), shared(other, often=True))
        print(f"| {other[0]} : {other[1]} : {other[2]} | " + " | ".join(f"{t:.4f} ({expected_reward(t):.4f})" for t in values) + " |")
    grid = [0.0, *np.logspace(-3, 5, 17)]
    curves = {name: [soft(counts, value, ridge=name == "ridge", steps=1500)[0] for value in grid] for name in ("scores", "ridge")}
    print("\n| lambda | scores | ridge |\n|---|---|---|")
    for i, value in enumerate(grid):
        print(f"| {value:.3g} | {curves['scores'][i]:.4f} | {curves['ridge'][i]:.4f} |")
    if len(sys.argv) > 1:
        draw(sys.argv[1], counts, grid, curves)
        Path(sys.argv[1]).with_suffix(".md").write_text(table)


def draw(path, counts, grid, curves):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    shares = np.logspace(-1.5, 1.5, 25)
    for name, method in {"DPO": dpo, "IPO": ipo, "AuxDPO (exact null space)": lambda c: exact(c)[0]}.items():
        left.plot(shares, [expected_reward(method((1, 1, share))) for share in shares], label=name)
    left.axhline(1.0, color="gray", ls=":", label="untrained")
    left.set(xscale="log", xlabel="count of (a3, a1) to that of the other pairs", ylabel="E[r*] of the policy")
    for name, style in {"scores": "-", "ridge": "--"}.items():
        right.plot(grid[1:], curves[name][1:], style, label=f"penalty by {name}")
    right.axhline(dpo(counts), color="gray", ls=":", label="DPO")
    right.set(xscale="log", xlabel="penalty weight lambda", ylabel="theta, counts 1 : 1 : 10")
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
