"""What a demo has shown: one table of seven columns, and five sentences that its numbers make.

    python tests/demo/demo_summary.py out/demo

Reads evaluation.json, and curves/evaluation.json for the best of n answers of the untrained model. All figures are of
held-out prompts; ± is one standard error over prompts of one seed. `./launch.sh demo` ends with this.
"""
import json
import sys
from pathlib import Path

from world_seeds import NAMES, short

HEADS = ["algorithm", "true reward", "win %", "equal length %", "answer, tokens", "KL", "right pairs %"]
METRICS = [("reward", 1, 2), ("win", 100, 0), ("win/length", 100, 0), ("length", 1, 1), ("kl", 1, 2), ("accuracy", 100, 0)]
LEGEND = """\
true reward: what an answer is worth in this world, in which that is known. win: how often it beats the untrained
model's answer to the same prompt; equal length: the same if both were equally long. KL: how far the policy has moved,
in nats per answer. right pairs: held-out pairs whose better answer is the likelier one."""


def read(folder):
    """{model: {metric: (mean, error)}} of all pairs, the untrained model first."""
    rows = json.loads(Path(folder, "evaluation.json").read_text())["results"]
    return {short(row["model"]): row["metrics"] for row in rows if "win" in row["metrics"]}


def name_of(model):
    return NAMES.get(model, model)


def table(results):
    lines = [HEADS]
    for model, metrics in results.items():
        cells = [name_of(model)]
        for key, factor, digits in METRICS:
            mean, error = metrics[key]
            cells.append(f"{factor * mean:.{digits}f} ± {factor * error:.{digits}f}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def distance(one, two):
    """How many standard errors lie between two (mean, error)."""
    return (one[0] - two[0]) / max(1e-9, (one[1] ** 2 + two[1] ** 2) ** 0.5)


def sentences(results, best):
    """best: the untrained model's best of n answers, {n: (mean reward, KL bound)}."""
    base, *trained = results
    reward = {model: metrics["reward"] for model, metrics in results.items()}
    order = sorted(trained, key=lambda model: -reward[model][0])
    winner = order[0]
    better = [model for model in trained if distance(reward[model], reward[base]) > 2]
    equal = [name_of(model) for model in order[1:] if distance(reward[winner], reward[model]) < 2]
    longest = max(trained, key=lambda model: results[model]["length"][0])
    honest = [model for model in trained if distance(results[model]["win/length"], (0.5, 0.0)) > 2]
    found = [f"{name_of(winner)} has the highest true reward, {reward[winner][0]:.2f} ± {reward[winner][1]:.2f}; "
             f"untrained, the model has {reward[base][0]:.2f}.",
             f"{len(better)} of {len(trained)} are above the untrained model by more than two standard errors.",
             f"Not to be told apart from the winner in this one run: {', '.join(equal)}." if equal else
             "All others are more than two standard errors below the winner.",
             f"The longest answers come from {name_of(longest)} ({results[longest]['length'][0]:.1f} tokens, untrained "
             f"{results[base]['length'][0]:.1f}); at equal length {len(honest)} of {len(trained)} still win."]
    if best:
        n = min(best, key=lambda n: abs(best[n][1] - results[winner]["kl"][0]))
        verdict = "so sampling more beats training here" if best[n][0] > reward[winner][0] else "so training paid"
        found.append(f"The best of {n} answers of the untrained model has a reward of {best[n][0]:.2f} at a KL of "
                     f"{best[n][1]:.2f}, the winner's KL is {results[winner]['kl'][0]:.2f}: {verdict}.")
    return found


def best_of(folder):
    file, found = Path(folder, "curves/evaluation.json"), {}
    for row in json.loads(file.read_text())["results"] if file.exists() else []:
        if row["model"].startswith("best of "):
            found[int(row["model"].split()[-1])] = row["metrics"]["reward"][0], row["metrics"]["kl"][0]
    found.pop(1, None)
    return found


def on_delta(folder):
    """What AuxDPO can do with these pairs, by the numbers of distinct prompts and responses."""
    data = json.loads(Path(folder, "evaluation.json").read_text())["args"]["data"]
    meta = json.loads(Path(data, "meta.json").read_text())
    pairs, distinct = meta["counts"]["train"], meta["distinct"]["train"]
    acts = max(0, pairs - (distinct["responses"] - distinct["prompts"]))
    return (f"AuxDPO's delta can act on {acts:,} of {pairs:,} margins, those of pairs that repeat or close a cycle; "
            "python tests/bench/misled.py makes a world of such pairs.")


def main():
    results = read(sys.argv[1])
    print(f"{table(results)}\n\n{LEGEND}\n\nWhat you just saw:")
    for sentence in sentences(results, best_of(sys.argv[1])):
        print(f"- {sentence}")
    if "auxdpo" in results:
        print(on_delta(sys.argv[1]))
    print("One seed is one draw: ./launch.sh demo --seed 1 is another.")


if __name__ == "__main__":
    main()
