"""AuxDPO on real text whose pairs close cycles: python tests/bench/cycles.py MODEL QUESTIONS.jsonl [--seeds 3] ...

The layout is that of UltraFeedback, four responses per prompt and all six pairs, made of multiple-choice questions with four
options (ARC): the right option is better than every wrong one, and of two wrong ones that is better which has more words in
common with the question (then the one that comes first). Each seed draws other questions. DPO and AuxDPO, with two delta per
pair, one per response, and a ridge, train the blocks that --train_modules matches. On held-out questions: how often the better
one of a pair has the higher log-prob, and the higher log-ratio to the reference, and how often the right option is the
likeliest of the four. Writes a table of mean ± standard error over the seeds, differences to DPO paired, to --out."""

import argparse
import itertools
import json
import os
import random
import re
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
os.environ["OMP_NUM_THREADS"] = "1"  # a process that has used more must not fork
from misled import call, mean_and_error

METHODS = {
    "DPO": ["dpo.py"],
    "AuxDPO, per pair": ["auxdpo.py", "--delta", "per_pair"],
    "AuxDPO, shared": ["auxdpo.py"],
    "AuxDPO, ridge": ["auxdpo.py", "--geometry", "ridge"],
}
MEASURES = ["pairs in order %", "log-ratios in order %", "right option first %"]


def ranked(row):
    """The options of a question, the best one first."""
    asked = set(re.findall(r"\w+", row["question"].lower()))
    common = [len(asked & set(re.findall(r"\w+", option.lower()))) for option in row["choices"]]
    order = sorted(range(4), key=lambda i: (i != row["answer"], -common[i], i))
    return [row["choices"][i] for i in order]


def make_rows(rows):
    """All six pairs of every question."""
    for row in rows:
        prompt = f"{row['question']} Answer in a few words."
        for better, worse in itertools.combinations(ranked(row), 2):
            yield dict(prompt=prompt, chosen=better, rejected=worse)


def option_logps(folder, rows):
    """log-probs (questions, 4) of the options, the best one first, by the model's own forward pass."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        prompt = [{"role": "user", "content": f"{row['question']} Answer in a few words."}]
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        texts = [start + option + tokenizer.eos_token for option in ranked(row)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"][:, 1:].clone()
        mask[:, :len(tokenizer(start, add_special_tokens=False)["input_ids"]) - 1] = 0
        with torch.no_grad():
            logps = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        found.append((logps.gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1).tolist())
    return np.array(found)


def measure(logps, reference):
    """The MEASURES in per cent; both (questions, 4), the best option first."""
    import numpy as np

    def in_order(values):
        pairs = [values[:, i] > values[:, j] for i, j in itertools.combinations(range(4), 2)]
        return 100 * np.mean(pairs)

    ratios = in_order(logps - reference) if logps is not reference else 50.0
    return [in_order(logps), ratios, 100 * np.mean(logps.argmax(1) == 0)]


def run_seed(seed, questions, args):
    """-> {method: measures} for other questions than those of the training."""
    folder = args.out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(seed).sample(questions, args.train + args.held_out)
    train, held_out = drawn[:args.train], drawn[args.train:]
    for name, rows in dict(train=train, val=held_out[:4]).items():  # val is not used
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(rows)))
    data = folder / "pairs"
    if not data.exists():
        call(ROOT / "prepare_data.py", "--dataset", folder / "train.jsonl", "--val", folder / "val.jsonl", "--model", args.model,
             "--out", data, "--num_proc", 1)
    common = ["--model", args.model, "--data", data, "--train_modules", args.train_modules, "--max_tokens", 2048]
    sketch = ["--sketch_dim", args.sketch_dim]
    call(ROOT / "cache_ref.py", *common, *sketch)
    reference = option_logps(args.model, held_out)
    found = {"untrained": measure(reference, reference)}
    for name, (script, *flags) in METHODS.items():
        out, began = folder / re.sub(r"\W+", "-", name), time.time()
        own = sketch if script == "auxdpo.py" else []
        if not (out / "final").exists():
            call(ROOT / script, *common, *own, *flags, "--out", out, "--seed", seed, "--eval_every", 0,
                 "--learning_rate", args.learning_rate, "--epochs", args.epochs, "--log_every", 2, "--resume")
        found[name] = measure(option_logps(out / "final", held_out), reference)
        print(f"seed {seed}  {name:18s} {'  '.join(f'{value:.1f}' for value in found[name])}  ({time.time() - began:.0f} s)",
              flush=True)
    return found


def write_table(found, args):
    """found: [{method: measures}] of the seeds."""
    import torch
    import transformers

    lines = ["| model | " + " | ".join(f"{name} | to DPO" for name in MEASURES) + " |", "|---" * 7 + "|"]
    for name in found[0]:
        cells = []
        for i in range(len(MEASURES)):
            mean, error = mean_and_error([seed[name][i] for seed in found])
            gain, gain_error = mean_and_error([seed[name][i] - seed["DPO"][i] for seed in found])
            cells += [f"{mean:.1f} ± {error:.1f}", f"{gain:+.1f} ± {gain_error:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\n{Path(args.model).name}, {args.train} questions with all six pairs of four options to train on, "
                 f"{args.held_out} held out; {args.epochs} epochs at {args.learning_rate}, beta 0.1, trained: "
                 f"`{args.train_modules}`, K = {args.sketch_dim}; mean ± standard error over {len(found)} seeds, each with other "
                 f"questions. CPU, torch {torch.__version__}, transformers {transformers.__version__}. Made by "
                 f"`python tests/bench/cycles.py MODEL {Path(args.questions).name} --learning_rate {args.learning_rate}`.")
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
    print(f"\n{text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("questions", help="rows of question, choices and answer, an index")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=32, help="questions to train on")
    parser.add_argument("--held_out", type=int, default=60, help="other questions to measure on")
    parser.add_argument("--train_modules", default=r"layers\.(26|27|28|29)\.")
    parser.add_argument("--learning_rate", default="5e-4")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--sketch_dim", default="1024")
    parser.add_argument("--out", type=Path, default=Path("out/cycles"))
    args = parser.parse_args()
    args.out = args.out.absolute()
    rows = [json.loads(line) for line in open(args.questions)]
    questions = [row for row in rows if len(row["choices"]) == 4 and len(set(row["choices"])) == 4]
    write_table([run_seed(seed, questions, args) for seed in range(args.seeds)], args)


if __name__ == "__main__":
    main()
