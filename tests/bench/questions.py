"""Questions from files: answers by a letter, counted, and answers for an outside judge.

    python tests/bench/questions.py --models MODEL,out/dpo --choices mmlu_pro.jsonl
    python tests/bench/questions.py --models out/dpo --prompts alpaca_eval.json

--choices: a JSON list or JSON lines in the layout of MMLU-Pro or ARC: question, options or choices, answer (a letter or
a number), maybe category or subject. Every model answers greedily; out/choices.md gets, per subject, how many named the
right option, and how many named one at all.

--prompts: AlpacaEval's questions (objects with instruction) are answered into out/answers/NAME.json, its model outputs;
Arena-Hard's (question_id or uid, and prompt or turns) into out/answers/NAME.jsonl, its model answers.

Models are those of evaluate.py, whose functions load them and generate; it runs under torchrun too.
"""
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch.distributed as dist

import evaluate
from evaluate import explain, fail


@dataclasses.dataclass(frozen=True)
class Args:
    models: str  # folders, hub names, runs or checkpoints, separated by commas
    choices: str = ""  # file of multiple-choice questions
    prompts: str = ""  # file of AlpacaEval's or Arena-Hard's questions
    out: str = "results"  # folder for everything that is written
    limit: int = 0  # only the first so many questions; 0 = all
    max_new_tokens: int = 256  # an answer is cut off there
    temperature: float = 1.0  # of the answers to --prompts; 0 = greedy
    seed: int = 0  # of sampling
    max_tokens: int = 8192  # bound on the tokens of one batch
    trust_remote_code: bool = False  # run the Python files that come with some models
    spread: bool = False  # spread each model over the GPUs of a single process (needs accelerate)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


def read_items(path, what):
    """The objects of a JSON list or of JSON lines."""
    with explain(f"{what} {path} is no list or lines of JSON objects"):
        text = Path(path).read_text().strip()
        lines = [line for line in text.splitlines() if line.strip()]
        items = json.loads(text if text[:1] == "[" else f"[{','.join(lines)}]")
        assert items and all(isinstance(item, dict) for item in items), "no objects"
    return items


def ask(model, tokenizer, texts, name, args):
    """Each text becomes one turn of the user -> records of evaluate.answer."""
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                               add_generation_prompt=True) for text in texts]
    prompts = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return evaluate.answer(model, tokenizer, prompts, None, name, args)


# ---- answers by a letter


def read_choices(args):
    """-> list of dict(text, right: number of the right option, count: of options, subject)."""
    questions = []
    for item in read_items(args.choices, "--choices")[:args.limit or None]:
        with explain(f"--choices {args.choices}: {str(item)[:80]} lacks question, options and an answer among them"):
            options = item.get("options") or item["choices"]
            letters = [chr(65 + i) for i in range(len(options))]
            key = item["answer"]
            right = letters.index(key) if key in letters else int(key)
            assert 0 <= right < len(options), f"{key}"
            lines = [f"{letter}. {option}" for letter, option in zip(letters, options)]
            lines = [item["question"], *lines, "Answer with the letter of the right option."]
            subject = str(item.get("category") or item.get("subject") or "")
        questions.append(dict(text="\n".join(lines), right=right, count=len(options), subject=subject))
    return questions


def letter_of(text, count):
    """The option that an answer names, 0 to count - 1; None if it names none, or several. In this order: what the last
    "answer is (B)", "Answer: B" and the like says; "B", "B." or "(B)" at the beginning, which "A good question" is not;
    the only "(B)" in the text."""
    last = chr(64 + count)
    said = re.findall(rf"(?i:answer)(?i:\s+is|\s*:)*\s*[*(\[]*([A-{last}])\b(?!')", text)
    first = re.match(rf"\W*([A-{last}])(?:[.):\]*]|\s*$|\s*\n)", text)
    in_brackets = set(re.findall(rf"\(([A-{last}])\)", text))
    if said:
        return ord(said[-1]) - 65
    if len(in_brackets) > 1:
        return None
    if first:
        return ord(first[1]) - 65
    return ord(in_brackets.pop()) - 65 if in_brackets else None


def answer_choices(model, tokenizer, questions, name, args):
    """-> rows of choices.md, for all subjects and for each."""
    greedy = dataclasses.replace(args, temperature=0.0)
    records = ask(model, tokenizer, [question["text"] for question in questions], name, greedy)
    right, named = [], []
    for question, record in zip(questions, records):
        letter = letter_of(record["response"], question["count"])
        right.append(letter == question["right"])
        named.append(letter is not None)
    values = dict(right=np.array(right, float), named=np.array(named, float))
    rows = []
    subjects = np.array([question["subject"] for question in questions])
    for row in evaluate.result_rows(name, values, subjects, np.arange(len(questions))):
        cells = [name, row["subset"] or "all", str(row["pairs"])]
        for numbers in row["metrics"].values():
            cells.append(" ± ".join(f"{100 * x:.1f}" for x in numbers if x is not None))
        rows.append(cells)
    return rows


# ---- answers for a judge


def answer_prompts(model, tokenizer, name, args):
    """Writes out/answers/NAME.json or .jsonl, in the layout that the questions' own benchmark reads."""
    items = read_items(args.prompts, "--prompts")[:args.limit or None]
    texts = []
    with explain(f"--prompts {args.prompts}: an object lacks instruction, prompt or turns"):
        for item in items:
            texts.append(item.get("instruction") or item.get("prompt") or item["turns"][0]["content"])
    answers = []
    for item, record in zip(items, ask(model, tokenizer, texts, name, args)):
        key = "question_id" if "question_id" in item else "uid" if "uid" in item else None
        if key:
            turn = dict(content=record["response"], token_len=record["tokens"])
            answers.append({key: item[key], "answer_id": f"{name}-{item[key]}", "model_id": name,
                            "choices": [dict(index=0, turns=[turn])], "tstamp": time.time()})
        else:
            kept = {k: value for k, value in item.items() if k in ("instruction", "dataset")}
            answers.append(kept | dict(output=record["response"], generator=name))
    if dist.get_rank() > 0:
        return
    path = Path(args.out, "answers", name.replace("/", "_") + (".jsonl" if key else ".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if key:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers))
    else:
        path.write_text(json.dumps(answers, indent=1, ensure_ascii=False))
    print(f"{path}: {len(answers)} answers")


def main():
    args = evaluate.parse_args(Args)
    if not args.choices and not args.prompts:
        fail("nothing to do: give --choices mmlu_pro.jsonl or --prompts alpaca_eval.json")
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    for name in names:
        evaluate.check_model(name)
    questions = read_choices(args) if args.choices else []
    rank, _, device, dtype = evaluate.start_process_group(args.dtype)
    cells = [["model", "subject", "questions", "right %", "named an option %"]]
    for name in names:
        model, tokenizer = evaluate.load_model(name, args, dtype, device)
        if args.prompts:
            answer_prompts(model, tokenizer, name, args)
        if args.choices:
            cells += answer_choices(model, tokenizer, questions, name, args)
        del model
    if args.choices and rank == 0:
        table = evaluate.markdown(cells)
        print(table, end="")
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, "choices.md").write_text(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    with explain("mend the cause and run the same command again", (OSError, ModuleNotFoundError)):
        main()
