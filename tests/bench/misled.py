"""Pair frequencies that mislead DPO, as text: python tests/bench/misled.py [--labels bradley_terry] [--seeds 5] ...

For each seed: a demo world of its own, and orders with gloves, each with one answer in three versions: wool gloves (reward 2),
cotton (1), odd (0). Each pair of the three is compared 1 : 1 : 10 times, the most often cotton with odd. Labels are

    hard           the better one is chosen; the rows are copies                                        30 orders
    bradley_terry  both orders of a pair are there, weighted by sigmoid(difference of the rewards)      60 orders

The policy has little capacity: only the parameters that --train_modules matches are trained. Every method gets the same steps.
Then, for all orders that were not trained on, the probabilities that the policy gives to the four glove sentences (exactly, no
samples) make the expected true reward of the gloves. Prints it against the untrained policy's, per seed, and writes a table of
mean ± standard error over the seeds, with paired differences to DPO, and a figure to --out. IPO and DPOP are
tests/losses/fork.py's; "not centred" is auxdpo.py without the line that takes off the mean, "orthogonal" has in place of each
score g - mean of g a direction of its own with the same norm, and "to 0.1" frees all directions in which the scores are weak."""

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests/demo", "tests/losses")]
os.environ["OMP_NUM_THREADS"] = "1"  # a process that has used more must not fork
import demo_world
import fork

COUNTS = {("wool", "cotton"): 1, ("wool", "odd"): 1, ("cotton", "odd"): 10}
REWARDS = dict(wool=2, cotton=1, odd=0)
CENTRED = "        scores = scores - means[group]  # g - mean of g\n"
EDITS = {  # forks of auxdpo.py: what stands there, and what is put in its place
    "not_centred": {CENTRED: ""},
    "orthogonal": {  # the scores keep their norms and lose their directions
        CENTRED: "        scores, columns = (scores - means[group]).norm(dim=1).diag(), whole\n",
        "train[\"sketch\"], size = find_sketch(reference, args), args.sketch_dim": "train[\"sketch\"] = find_sketch(reference, args)"},
    "loose": {"values < 1e-5 * values[-1]": "values < 0.1 * values[-1]"},
}
METHODS = {
    "DPO": ["dpo.py"],
    "IPO": ["ipo"],
    "DPOP": ["dpop"],
    "per pair": ["auxdpo.py", "--delta", "per_pair"],
    **{f"shared, λ = {value}": ["auxdpo.py", "--penalty_weight", value] for value in ("1", "10", "100")},
    "shared, not centred, λ = 1": ["not_centred"],
    "shared, exact null space": ["auxdpo.py", "--null", "exact"],
    "shared, null space to 0.1": ["loose", "--null", "exact"],
    **{f"shared, orthogonal, λ = {value}": ["orthogonal", "--penalty_weight", value] for value in ("10", "1000")},
    **{f"ridge, λ = {value}": ["auxdpo.py", "--geometry", "ridge", "--penalty_weight", value]
       for value in ("0.01", "0.1", "1", "10", "100")},
}


def orders():
    """All (prompt, the answer's first sentence) with gloves."""
    for greeting, number, thing in itertools.product(demo_world.GREETINGS, demo_world.NUMBERS, demo_world.GOODS):
        yield greeting.format(f"{number} {thing} and a pair of gloves"), f"Here are {number} {thing}."


def answer(start, kind):
    """The answer with gloves of this kind."""
    pair = dict(wool=("wool", "wool"), cotton=("cotton", "cotton"), odd=("wool", "cotton")).get(kind, kind)
    return f"{start} {demo_world.glove_sentence(*pair)}"


def make_rows(labels, seed):
    """-> the rows for prepare_data.py, and the orders that are in none of them."""
    everything = list(orders())
    random.Random(seed).shuffle(everything)
    count, rows = dict(hard=30, bradley_terry=60)[labels], []
    for prompt, start in everything[:count]:
        for (better, worse), times in COUNTS.items():
            gap = REWARDS[better] - REWARDS[worse]
            one = dict(prompt=prompt, chosen=answer(start, better), rejected=answer(start, worse))
            if labels == "hard":
                rows += [one] * times
                continue
            right = 1 / (1 + math.exp(-gap))
            rows.append(one | dict(weight=times * right))
            rows.append(dict(prompt=prompt, chosen=one["rejected"], rejected=one["chosen"], weight=times * (1 - right)))
    return rows, everything[count:]


def call(script, *flags):
    """Run a script in a process of its own, which does not wait for the packages, as this one has them."""
    for name in ("datasets", "peft", "torch", "transformers"):
        importlib.import_module(name)

    def child():
        sys.argv = [str(script), *map(str, flags)]
        with open("/dev/null", "w") as nothing:
            sys.stdout = nothing
            runpy.run_path(str(script), run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{script} {' '.join(map(str, flags))} failed")


def script_of(name, folder):
    """The path of a script, or of a fork that is written to `folder`."""
    path = folder / f"{name}.py"
    if name in EDITS:
        text = (ROOT / "auxdpo.py").read_text()
        for old, new in EDITS[name].items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path.write_text(text)
    elif not name.endswith(".py"):
        path.write_text(fork.with_loss(name))
    else:
        path = ROOT / name
    return path


def expected_reward(folder, unseen):
    """Mean over the orders of the expected reward of the gloves, by the model's own log-probs of the four sentences."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kinds, total = list(demo_world.GLOVE_REWARDS), 0.0
    values = torch.tensor([demo_world.GLOVE_REWARDS[kind] for kind in kinds]).float()
    for prompt, start in unseen:
        asked = [{"role": "user", "content": prompt}]
        texts = []
        for kind in kinds:
            said = asked + [{"role": "assistant", "content": answer(start, kind)}]
            texts.append(tokenizer.apply_chat_template(said, tokenize=False))
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]  # the prompt's is the same in all four
        total += (logps.sum(1).softmax(0) @ values).item()
    return total / len(unseen)


def run_world(world, seed, args):
    """-> {method: expected reward} of one world."""
    if not (world / "meta.json").exists():
        call(ROOT / "tests/demo/demo_world.py", "--out", world, "--seed", seed)
    rows, unseen = make_rows(args.labels, seed)
    folder = world / args.labels
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, data = world / "base", folder / "pairs"
    call(ROOT / "prepare_data.py", "--dataset", folder / "rows.jsonl", "--model", base, "--out", data, "--val_fraction", 0.1,
         "--overwrite", "--num_proc", 1)
    sketch = ["--sketch_dim", args.sketch_dim]
    call(ROOT / "cache_ref.py", "--model", base, "--data", data, "--train_modules", args.train_modules, *sketch)
    found = {"untrained": expected_reward(base, unseen)}
    for name, (script, *flags) in METHODS.items():
        out = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
        common = ["--model", base, "--data", data, "--out", out, "--train_modules", args.train_modules, "--seed", seed,
                  "--learning_rate", args.learning_rate, "--epochs", args.epochs, "--beta", args.beta, "--eval_every", 0]
        own = sketch if script == "auxdpo.py" or script in EDITS else []
        began = time.time()
        if not (out / "final").exists():
            call(script_of(script, folder), *common, *own, *flags)
        found[name] = expected_reward(out / "final", unseen)
        print(f"seed {seed}  {name:28s} expected reward {found[name]:.3f}, untrained {found['untrained']:.3f}  "
              f"({time.time() - began:.0f} s)", flush=True)
    return found


def mean_and_error(values):
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def write_table(found, args):
    """found: [{method: expected reward}] of the worlds -> {method: (mean gain, its error)}; writes the table."""
    lines, gains = ["| method | gain in expected reward | to DPO |", "|---|---|---|"], {}
    for name in METHODS:
        gains[name] = mean_and_error([world[name] - world["untrained"] for world in found])
        to_dpo = mean_and_error([world[name] - world["DPO"] for world in found])
        lines.append(f"| {name} | {gains[name][0]:+.3f} ± {gains[name][1]:.3f} | {to_dpo[0]:+.3f} ± {to_dpo[1]:.3f} |")
    untrained = mean_and_error([world["untrained"] for world in found])
    import torch, transformers
    lines.append(f"\nThe untrained policy's expected reward is {untrained[0]:.3f} ± {untrained[1]:.3f}; mean ± standard error over "
                 f"{len(found)} worlds, differences paired. Labels: {args.labels}. {args.epochs} epochs at {args.learning_rate}, "
                 f"beta {args.beta}, trained: `{args.train_modules}`. CPU, torch {torch.__version__}, transformers "
                 f"{transformers.__version__}. Made by `python tests/bench/misled.py --labels {args.labels} --seeds {args.seeds}`.")
    text = "\n".join(lines) + "\n"
    (args.out / f"{args.labels}.md").write_text(text)
    (args.out / f"{args.labels}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{text}")
    return gains


def draw(out):
    """A figure of the tables that stand in `out`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = [path for path in (out / "hard.json", out / "bradley_terry.json") if path.exists()]
    figure, axes = plt.subplots(1, len(paths), figsize=(5.2 * len(paths), 4.2), sharey=True, squeeze=False)
    for axis, path in zip(axes[0], paths):
        found = json.loads(path.read_text())
        names = [name for name in METHODS if name in found[0]]
        for place, name in enumerate(names):
            mean, error = mean_and_error([world[name] - world["untrained"] for world in found])
            shared = name.startswith(("shared", "ridge"))
            axis.errorbar(mean, -place, xerr=error, fmt="s" if shared else "o", color="black", capsize=3,
                          fillstyle="full" if shared else "none")
        axis.axvline(0, color="gray", ls=":")
        axis.set_yticks([-place for place in range(len(names))], names)
        axis.set(title=f"labels: {path.stem.replace('_', ' ')}", xlabel="expected reward less the untrained policy's")
    figure.suptitle("Misleading pair counts 1 : 1 : 10. Filled: one delta per response", fontsize=10)
    figure.tight_layout()
    figure.savefig(out / "misled.png", dpi=120)
    print(f"wrote {out / 'misled.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--labels", choices=["hard", "bradley_terry"], default="hard")
    parser.add_argument("--seeds", type=int, default=5, help="number of worlds")
    parser.add_argument("--train_modules", default=r"^model\.norm")
    parser.add_argument("--learning_rate", default="0.005")
    parser.add_argument("--epochs", default="20")
    parser.add_argument("--beta", default="0.5")
    parser.add_argument("--sketch_dim", default="1024")
    parser.add_argument("--out", type=Path, default=Path("out/misled"))
    args = parser.parse_args()
    args.out = args.out.absolute()
    found = [run_world(args.out / f"world{seed}", seed, args) for seed in range(args.seeds)]
    write_table(found, args)
    draw(args.out)


if __name__ == "__main__":
    main()
