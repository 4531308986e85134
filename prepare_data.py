"""Raw preference pairs -> cleaned, templated, tokenised, split: one folder that every script reads.

    python prepare_data.py --dataset pairs.jsonl.gz --tokenizer MODEL --out data/pairs
    python prepare_data.py --dataset HuggingFaceH4/ultrafeedback_binarized --split train_prefs \\
        --tokenizer MODEL --out data/ultrafeedback

Input: comma separated .jsonl, .json or .parquet files (each also .gz), a Hugging Face dataset name
or a folder that `load_dataset` reads. Every row's format is recognised by its columns:

    plain            prompt, chosen, rejected: text
    conversation     chosen, rejected: lists of {role, content}; prompt text, list, or their prefix
    ShareGPT         conversations: list of {from, value}; chosen, rejected: one message each
    Alpaca           instruction, input; chosen, rejected: text (`output` is ignored)
    hh-rlhf          chosen, rejected: "\\n\\nHuman: ... \\n\\nAssistant: ..." (cut at the last one)
    RewardBench-2    prompt; chosen, rejected: lists of texts -> one pair per chosen x rejected
    multiple choice  question, options | choices, answer (letter or index) -> correct against wrong:
                     "question\\nA. option\\nB. option\\nAnswer:" is answered by "B. option"

A text `system` column opens the conversation; `subset`, `category` or `subject` names the subset;
a `weight` column is kept. Without a chat template (or with --plain) prompt and response are
concatenated as they are; only a prompt of several turns is written out in the hh-rlhf form.

Output: train/ and val/ (`load_from_disk`: prompt, chosen, rejected token ids; source, subset, id,
weight), meta.json, and dropped.jsonl with place and reason: pairs in = pairs out + dropped.
A response ends in exactly one end-of-turn token, which is scored: the first special token that the
template puts after an answer, else the tokenizer's EOS, unless --eos_token names another.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import sys
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import transformers
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    dataset: str  # comma separated .jsonl, .json, .parquet (.gz) files, a folder or a hub name
    tokenizer: str  # folder or hub name of the model whose tokenizer and chat template are used
    out: str  # folder to make, e.g. data/NAME
    subset: str = ""  # configuration of a hub dataset
    split: str = "train"  # split of a hub dataset
    overwrite: bool = False  # replace --out if it is an earlier result of this script
    # what a pair is
    plain: bool = False  # no chat template: prompt + response text, which may be rendered already
    eos_token: str = ""  # token that ends a response (default: the template's, else tokenizer's)
    max_length: int = 2048  # longest prompt + response in tokens; longer pairs are dropped, not cut
    wrong_options: str = "all"  # multiple choice: pairs against `all` wrong options or a random `one`
    ties: bool = False  # keep RewardBench-2's Ties subset, whose chosen are all equally right
    # split and speed
    val_fraction: float = 0.05  # fraction of the prompts, chosen by hash, that go to val
    seed: int = 0  # of the split and of --wrong_options one
    num_proc: int = 0  # worker processes (0: one per core)


# ---- copied from dpo.py, byte for byte ----


def fail(message: str):
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def parse_args(cls):
    """Command line -> frozen dataclass `cls`; the trailing comment of each field is its --help."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see {parser.prog} --help")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        note = notes[field.name].replace("%", "%%") + ("" if required else f" [{field.default}]")
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        default = None if required else field.default
        parser.add_argument(f"--{field.name}", required=required, default=default, help=note, **kind)
    return cls(**vars(parser.parse_args()))


def vocab_hash(tokenizer) -> str:
    """16 hex digits that change when any token or its id does."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def content_hash(dataset) -> str:
    """16 hex digits over every id and token of a split, whatever its Arrow chunking."""
    digest = hashlib.sha256()
    for name in ("id", "prompt", "chosen", "rejected"):
        part, sizes = hashlib.sha256(), hashlib.sha256()
        for chunk in dataset.data.column(name).chunks:
            lengths = pc.binary_length(chunk) if name == "id" else pc.list_value_length(chunk)
            sizes.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            part.update("".join(chunk.to_pylist()).encode() if name == "id"
                        else chunk.flatten().to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        digest.update(part.digest() + sizes.digest())
    return digest.hexdigest()[:16]


# ---- end of the copies ----

FORMATS = {".jsonl", ".json", ".parquet"}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them
HH_TURN = "\n\nAssistant:"
HINTS = {"too long": "raise --max_length", "ties": "--ties keeps them",
         "template": "--plain does without the chat template",
         "special token": "--plain takes text that is rendered already"}
TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema({"prompt": TOKENS, "chosen": TOKENS, "rejected": TOKENS, "source": pa.string(),
                    "subset": pa.string(), "id": pa.string(), "weight": pa.float32()})


def short(value) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else f"{text[:160]}... ({len(text)} characters)"


def drop(reason: str, value):
    """Leave this pair out: prepare_chunk counts the reason and records the offending value."""
    raise ValueError(reason, short(value))


# ---- raw rows, streamed: (source, id without pair number, line or row number, row) ----


def parse(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error}): {text[-80:]!r}"  # a str is no row: it is dropped as malformed


def file_rows(path: Path):
    """Yield (number, row) of one file, both counted from 1."""
    kind = [s for s in path.suffixes if s in FORMATS][-1]
    stream = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    number = 0
    try:
        with stream:
            if kind == ".parquet":  # it is read from its end, which gzip cannot seek to
                file = pa.BufferReader(stream.read()) if path.suffix == ".gz" else stream
                batches = pq.ParquetFile(file).iter_batches(batch_size=256)
                yield from enumerate((row for b in batches for row in b.to_pylist()), 1)
            elif kind == ".json" and stream.read(4096).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] != b"{":
                stream.seek(0)  # an array; one that starts with { holds a row per line
                rows = parse(stream.read())
                if not isinstance(rows, list):
                    fail(f"{path}: {short(rows)}; expected a list of rows, or .jsonl with one a line")
                yield from enumerate(rows, 1)
            else:
                stream.seek(0)
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield number, parse(line)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        fail(f"{path} cannot be read after line {number}: {error}; fetch or write it again")


def all_rows(args):
    paths = [Path(p.strip()) for p in args.dataset.split(",")]
    stems = [p.name.split(".")[0] for p in paths]
    if all(set(p.suffixes[-2:]) & FORMATS and not p.is_dir() for p in paths):
        if len(set(paths)) < len(paths):
            fail(f"--dataset {args.dataset} names a file twice")
        for path, stem in zip(paths, stems, strict=True):
            name = stem if stems.count(stem) == 1 else str(path)  # ids must stay unique
            for number, row in file_rows(path):
                yield path.name, f"{name}:{number:06d}", number, row
        return
    try:
        rows = datasets.load_dataset(args.dataset, args.subset or None, split=args.split)
    except Exception as error:  # the hub, the network, a wrong name or an unreadable folder
        fail(f"--dataset {args.dataset} (--subset {args.subset!r}, --split {args.split}): "
             f"{short(str(error).strip().splitlines()[0])}; give .jsonl, .json or .parquet files "
             "or a dataset that load_dataset reads")
    for number, row in enumerate(rows, 1):
        yield args.dataset, f"{args.dataset}:{number:06d}", number, row


# ---- formats: a row -> (format, [(messages, chosen text, rejected text)]) ----


def text_of(value, name: str) -> str:
    if not isinstance(value, str):
        drop("malformed", f"{name} is {value!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        drop("malformed", f"{name} is not valid Unicode: {value!r}")
    return value


def message(value, name: str) -> dict:
    if not isinstance(value, dict):
        drop("malformed", f"{name} holds {value!r}, not a message")
    role = value.get("role") or value.get("from")
    content = value.get("value") if value.get("content") is None else value["content"]
    if role not in ("user", "assistant", "system", "tool", *ROLES):
        drop("malformed", f"{name} holds a message of role {role!r}")
    return {"role": ROLES.get(role, role), "content": text_of(content, f"{name} content")}


def answer_of(value, name: str):
    """One side of a pair -> (messages before the answer, text of the answer)."""
    if not isinstance(value, (list, dict)):
        return [], text_of(value, name)
    messages = [message(m, name) for m in (value if isinstance(value, list) else [value])]
    if not messages or messages[-1]["role"] != "assistant":
        drop("malformed", f"{name} does not end with an assistant turn: {value!r}")
    return messages[:-1], messages[-1]["content"]


def hh_pair(chosen: str, rejected: str, plain: bool):
    (prompt, turn, chosen), (other, _, rejected) = (s.rpartition(HH_TURN) for s in (chosen, rejected))
    if not turn or not prompt.startswith("\n\nHuman:"):
        drop("malformed", f"no prompt column, and chosen is no Human/Assistant dialogue: {prompt}")
    if prompt != other:
        drop("prompts differ", f"...{prompt[-60:]!r} and ...{other[-60:]!r}")
    if "\n\nHuman:" in chosen + rejected:
        drop("malformed", f"the dialogue ends with a Human turn: ...{(chosen + rejected)[-100:]!r}")
    if plain:
        return [{"role": "user", "content": prompt + turn}], chosen, rejected
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
            for who, said in zip(turns[::2], turns[1::2], strict=True)], chosen.strip(), rejected.strip()


def one_pair(row, chosen, rejected, plain: bool):
    """Every format but hh-rlhf and multiple choice -> (messages, chosen text, rejected text)."""
    (before, chosen), (other, rejected) = answer_of(chosen, "chosen"), answer_of(rejected, "rejected")
    if before != other:
        drop("prompts differ", f"{before!r:.70} and {other!r:.70}")
    prompt = row.get("conversations", row.get("prompt"))
    if "instruction" in row:
        extra = text_of(row.get("input") or "", "input")
        prompt = text_of(row["instruction"], "instruction") + (f"\n\n{extra}" if extra.strip() else "")
    if isinstance(prompt, list):
        turns = [message(m, "prompt") for m in prompt]
        messages = before if before[:len(turns)] == turns else turns + before
    elif before:  # the sides hold the whole conversation, a prompt text only repeats a part of it
        messages = before
    else:
        messages = [{"role": "user", "content": text_of(prompt, "prompt")}]
    if row.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": text_of(row["system"], "system")}, *messages]
    if messages[-1]["role"] not in ("user", "tool"):
        drop("malformed", f"the prompt ends with a {messages[-1]['role']} turn")
    return messages, chosen, rejected


def choice_pairs(row, args, plain: bool, key: str) -> list:
    options, answer = row.get("options", row.get("choices")), row["answer"]
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        drop("malformed", f"options are {options!r}, not a list of 2 to 26 texts")
    letters = [chr(65 + i) for i in range(len(options))]
    right = letters.index(answer) if answer in letters else answer
    if type(right) is not int or not 0 <= right < len(options):
        drop("malformed", f"answer {answer!r} is no letter or index of {len(options)} options")
    lines = [f"{a}. {text_of(option, 'option')}" for a, option in zip(letters, options, strict=True)]
    content = "\n".join([text_of(row["question"], "question"), *lines, "Answer:"])
    wrong = [line for line in lines if line != lines[right]]
    if args.wrong_options == "one":
        wrong = [random.Random(f"{args.seed} {key}").choice(wrong)]
    gap = " " if plain else ""
    return [([{"role": "user", "content": content}], gap + lines[right], gap + w) for w in wrong]


def row_pairs(row, args, plain: bool, key: str):
    """-> (name of the format, list of functions that each give one pair or drop it)."""
    if not isinstance(row, dict):
        drop("malformed", row if isinstance(row, str) else f"a row is {row!r}, not an object")
    if "question" in row and "answer" in row and ("options" in row or "choices" in row):
        return "multiple choice", [lambda p=p: p for p in choice_pairs(row, args, plain, key)]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None or not row.keys() & {"prompt", "conversations", "instruction"}:
        if not (isinstance(chosen, str) and isinstance(rejected, str)) and not isinstance(chosen, list):
            drop("malformed", f"no format has these columns, or one is null: {', '.join(row)}")
    ...
