"""Pair frequencies that mislead DPO, in the demo world: python tests/misled.py [--seeds 5] [--train_modules REGEX] ...

For each seed: a demo world of its own, its `frequency` pairs alone (three kinds of gloves, wool 2 > cotton 1 > odd 0, compared
1 : 1 : 10), and a policy of low capacity, as only the parameters that --train_modules finds are trained. Every variant
gets the same steps. Then the true reward of sampled answers to all orders of gloves, and what part of it is the gloves'.
Prints one line per seed and variant, and a table of mean ± standard error over the seeds, with paired differences to DPO."""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import demo_world

VARIANTS = {
    "DPO": ["dpo.py"],
    **{f"AuxDPO, λ = {value}": ["auxdpo.py", "--penalty_weight", value] for value in ("1", "100", "1e4")},
    "AuxDPO, exact null space": ["auxdpo.py", "--null", "exact"],
    **{f"ridge, λ = {value}": ["auxdpo.py", "--penalty_weight", value, "--geometry", "random"] for value in ("1", "100")},
}


def run(*command):
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr[-500:]}")


def rewards(folder, seed, repeat):
    """Mean true reward, and the gloves' part, of sampled answers to every order with gloves."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    orders = itertools.product(demo_world.GREETINGS, demo_world.NUMBERS, demo_world.GOODS)
    prompts = [greeting.format(f"{number} {thing} and a pair of gloves") for greeting, number, thing in orders] * repeat
    parts = [demo_world.reward_parts(p, a) for p, a in zip(prompts, demo_world.sample(model, tokenizer, prompts, seed))]
    return sum(sum(part.values()) for part in parts) / len(parts), sum(part["gloves"] for part in parts) / len(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--train_modules", default=r"^model\.norm")
    parser.add_argument("--learning_rate", default="0.005")
    parser.add_argument("--epochs", default="20")
    parser.add_argument("--beta", default="0.5")
    parser.add_argument("--sketch_dim", default="1024")
    parser.add_argument("--repeat", type=int, default=8, help="samples per prompt, of which there are 144")
    parser.add_argument("--out", type=Path, default=Path("out/misled"))
    args = parser.parse_args()
    found = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        world = args.out.absolute() / f"world{seed}"
        if not (world / "meta.json").exists():
            run("tests/demo_world.py", "--out", world, "--seed", seed)
        lines = [line for line in open(world / "pairs.jsonl") if json.loads(line)["subset"] == "frequency"]
        (world / "frequency.jsonl").write_text("".join(lines))
        base, data = world / "base", world / "pairs"
        run("prepare_data.py", "--dataset", world / "frequency.jsonl", "--model", base, "--out", data, "--val_fraction", 0.1,
            "--overwrite", "--num_proc", 1)
        run("cache_ref.py", "--model", base, "--data", data, "--sketch_dim", args.sketch_dim, "--train_modules", args.train_modules)
        found.setdefault("untrained", []).append(rewards(base, seed, args.repeat))
        for name, (script, *flags) in VARIANTS.items():
            folder = world / "-".join([script, *flags]).replace(".py", "").replace("--", "")
            shutil.rmtree(folder, ignore_errors=True)
            common = ["--model", base, "--data", data, "--out", folder, "--train_modules", args.train_modules, "--seed", seed,
                      "--learning_rate", args.learning_rate, "--epochs", args.epochs, "--beta", args.beta, "--eval_every", 0]
            run(script, *common, *(["--sketch_dim", args.sketch_dim] if script == "auxdpo.py" else []), *flags)
            found.setdefault(name, []).append(rewards(folder / "final", seed, args.repeat))
        for name, values in found.items():
            print(f"seed {seed}  {name:26s} reward {values[-1][0]:.3f}  gloves {values[-1][1]:.3f}", flush=True)

    def cell(values):
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):.3f} ± {error:.3f}"

    table = "| model | true reward | to DPO | of it gloves | to DPO |\n|---|---|---|---|---|\n"
    for name, values in found.items():
        gains = [[a - b for a, b in zip(*pair)] for pair in zip(values, found["DPO"])]
        columns = zip(*[(value[0], gain[0], value[1], gain[1]) for value, gain in zip(values, gains)])
        table += f"| {name} | {' | '.join(map(cell, columns))} |\n"
    print(f"\n{table}\n{args.seeds} worlds, {args.epochs} epochs at {args.learning_rate}, beta {args.beta}, "
          f"trained: {args.train_modules}; mean ± standard error over worlds, differences paired")
    (args.out / "table.md").write_text(table)


if __name__ == "__main__":
    main()
