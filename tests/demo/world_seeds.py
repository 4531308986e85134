"""One table and one figure of several runs of the demo: worlds of the same flags, different seeds.

    for s in 0 1 2; do ./launch.sh demo --seed $s; done
    python tests/demo/world_seeds.py out/demo-seed-* --out results/demo

Reads each folder's evaluation.json, samples.jsonl, curves/ and logs. A seed makes another base model, other pairs and
another order of training, so that a mean over seeds ± its standard error says what would come again. `to DPO` is paired:
the difference to DPO of the same seed; a star marks more than two standard errors.
"""
import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import demo_world
import numpy as np

NAMES = dict(base="untrained", dpo="DPO", dpo_norm="DPO-norm", simpo="SimPO", wpo="WPO", auxdpo="AuxDPO",
             clean="DPO, clean pairs", compo="+ ComPO, noisy pairs")
COLUMNS = {"reward": "true reward", "goods": "reward from goods", "gloves": "from gloves", "rude": "from rudeness",
           "length": "tokens", "kl": "KL", "accuracy": "accuracy %", "accuracy/ref": "to ref %", "chosen/ref": "chosen, nats", "win": "win %",
           "win/length": "equal length %", "seconds": "training s"}


def short(model: str) -> str:
    """out/demo-seed-1/clean/final -> clean, .../base -> base."""
    return Path(model.removesuffix("/final")).name


def read(folder: Path) -> dict:
    """{algorithm: {metric: mean}} of one run, with the parts of the true reward and the seconds of training."""
    found = {}
    for row in json.loads((folder / "evaluation.json").read_text())["results"]:
        if not row["subset"] and short(row["model"]) in NAMES:
            found[short(row["model"])] = {key: value[0] for key, value in row["metrics"].items()}
    parts = defaultdict(list)
    for line in (folder / "samples.jsonl").read_text().splitlines():
        answer = json.loads(line)
        parts[short(answer["model"])].append(demo_world.reward_parts(answer["prompt"], answer["response"]))
    for name, rows in parts.items():
        found[name] |= {key: np.mean([row[key] for row in rows]) for key in ("goods", "gloves", "rude")}
    for name in found:
        if (folder / name / "log.jsonl").exists():
            lines = map(json.loads, (folder / name / "log.jsonl").read_text().splitlines())
            seconds = [line.get("seconds") or line["tokens"] / line["tokens/s"] for line in lines
                       if line.get("seconds") or line.get("tokens/s")]  # compo.py logs the first, the others the second
            found[name]["seconds"] = sum(seconds)
    return found


def over_seeds(values) -> tuple[float, float]:
    return np.mean(values) + 0.0, np.std(values, ddof=1) / len(values) ** 0.5


def table(runs: list[dict]) -> str:
    columns = [key for key in COLUMNS if any(key in metrics for run in runs for metrics in run.values())]
    lines = ["| algorithm | " + " | ".join(COLUMNS[key] for key in columns) + " | reward to DPO |",
             "|---" + "|---:" * (len(columns) + 1) + "|"]
    for name in NAMES:
        cells = []
        for key in columns:
            values = [run[name].get(key) for run in runs]
            values = [None if value is None else round(value, 6) + 0.0 for value in values]  # no -0.00
            factor, digits = (100, 1) if "%" in COLUMNS[key] else (1, 0 if key == "seconds" else 2)
            cells.append("" if None in values else "{:.{d}f} ± {:.{d}f}".format(*(factor * x for x in over_seeds(values)), d=digits))
        mean, error = over_seeds([run[name]["reward"] - run["dpo"]["reward"] for run in runs])
        cells.append("" if name == "dpo" else f"{mean:+.2f} ± {error:.2f}" + " *" * bool(abs(mean) > 2 * error))
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(folders: list[Path], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    points = defaultdict(lambda: defaultdict(list))  # algorithm or best of n: step: [(kl, reward, length) of each seed]
    for folder in folders:
        for row in json.loads((folder / "curves/evaluation.json").read_text())["results"]:
            path_of, metrics = Path(row["model"]), row["metrics"]
            if row["subset"] or "reward" not in metrics:
                continue
            step = re.fullmatch(r"step-(\d+)", path_of.name)
            name = path_of.parent.name if step else short(row["model"]).split(",")[0]
            step = int(step[1]) if step else 10**9
            if name.startswith("best of"):
                name, step = "best of n", int(name.split()[-1])
            elif name == "base":
                for each in NAMES:
                    points[each][0].append((0.0, metrics["reward"][0], metrics["length"][0]))
            points[name][step].append([metrics[key][0] for key in ("kl", "reward", "length") if key in metrics])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for k, name in enumerate(list(NAMES)[1:]):
        curve = np.array([np.mean(values, 0) for _, values in sorted(points[name].items())])
        error = over_seeds([value[1] for value in points[name][10**9]])[1]
        for ax, column in zip(axes, (0, 2)):
            if name == "compo":  # it begins where `clean` ends
                curve = curve[-1:]
            ax.plot(curve[:, column], curve[:, 1], color=f"C{k}", marker=".", alpha=0.9)
            ax.errorbar(curve[-1, column], curve[-1, 1], error, color=f"C{k}", marker="o" if name != "compo" else "*", capsize=3,
                        label=NAMES[name])
    line = np.array([np.mean(values, 0) for _, values in sorted(points["best of n"].items())])
    axes[0].plot(*line.T, "k--", label="best of n of the untrained model")
    for (kl, reward), n in zip(line, sorted(points["best of n"])):
        axes[0].annotate(f"n = {n}", (kl, reward), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axes[0].set(xlabel="KL to the reference, nats per answer", ylabel="true reward of sampled answers")
    axes[1].set(xlabel="length of sampled answers, tokens")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="out folders of the demo, each with another --seed")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.md and NAME.png")
    parser.add_argument("--name", default="seeds", help="name of the two files")
    args = parser.parse_args()
    if len(args.folders) < 2:
        parser.error(f"{args.folders[0]} is one seed: an error over seeds needs two")
    for folder in args.folders:
        if not (folder / "evaluation.json").exists():
            parser.error(f"{folder} is no finished demo; make it: ./launch.sh demo --seed N")
    runs = [read(folder) for folder in args.folders]
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(runs) + f"\n{len(runs)} seeds, mean ± standard error over seeds: {', '.join(map(str, args.folders))}\n"
    (args.out / f"{args.name}.md").write_text(text)
    if all((folder / "curves/evaluation.json").exists() for folder in args.folders):
        draw(args.folders, args.out / f"{args.name}.png")
    print(text)


if __name__ == "__main__":
    main()
