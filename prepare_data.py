"""Raw preference pairs -> cleaned, templated, tokenised and split into a folder all scripts read.

    python prepare_data.py --dataset a.jsonl.gz,b.parquet --model MODEL --out data/NAME
    python prepare_data.py --dataset HuggingFaceH4/ultrafeedback_binarized --split train_prefs \\
        --val test_prefs --model MODEL --out data/ultrafeedback

Input: .jsonl .json .csv .tsv .parquet (also .gz, .zst), a folder, or a hub name. The format of each
row is recognised by the columns that have a value; any other layout goes through --convert.

    plain            prompt (or question, query, input), chosen, rejected: text
    conversation     chosen, rejected: lists of {role, content}, whose common start is the prompt;
                     a column prompt or messages may hold the start of it, or all of it
    ShareGPT         conversations: list of {from, value}; chosen, rejected: one message each
    Alpaca           instruction, input, history, chosen, rejected: text
    hh-rlhf          chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ...", or a prompt like that
    RewardBench-2    prompt: text; chosen, rejected: lists of text; a pair per chosen x rejected
    multiple choice  question, options or choices, answer (letter, or index from 0); the prompt is
                     "question\\nA. option\\nB. option\\nAnswer:" and a response is "B. option"

Columns of any format: `system` or `system_prompt` opens the conversation; `tools` and
`chat_template_kwargs` go to the template; `initial_reason_steps` begins the answer and is not
scored; `subset`, `category` or `subject` names the subset; `weight` is kept.

Without a chat template, or with --plain, prompt and response are joined as they are; a prompt of
several turns becomes "\\n\\nHuman: ...\\n\\nAssistant:". What a template writes to open the
assistant's turn belongs to the prompt, or with --score_header to the response.

Output: train/ and val/ (datasets.load_from_disk: token ids prompt, chosen, rejected; source,
subset, id, weight if any is not 1), meta.json, dropped.jsonl. Pairs in = pairs out + dropped; a row
that cannot be read counts as one pair. A response ends in exactly one end token, which is scored:
the special token that the template puts after an answer, else the tokenizer's EOS, or --eos_token.

Read to line 000: settings, formats, what happens to a row, main. Below the rule stand the helpers:
files, messages, rendering, tokens, the folder and the summary.
"""
import bisect, csv, dataclasses, functools, gzip, hashlib, importlib.util, inspect, io, itertools
import json, math, multiprocessing, os, pickle, platform, random, re, shutil, sys, tempfile, time
import types, zlib
from ast import literal_eval
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, process
from pathlib import Path
from typing import Literal

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
    dataset: str  # files, separated by commas ("a,b.csv" in quotes is one), a folder, a hub name
    model: str  # folder or hub name of the model whose tokenizer and chat template are used
    out: str  # folder to make, such as data/NAME
    subset: str = ""  # configuration of a hub dataset
    split: str = "train"  # split of a hub dataset, of a folder, or of a .json that holds several
    val: str = ""  # files, or a split of --dataset, for validation; empty = part of the prompts
    convert: str = ""  # FILE.py:FUNCTION, from a row to one of a known format, a list, or None
    overwrite: bool = False  # replace an earlier result in --out
    # what a pair is
    plain: bool = False  # no chat template; the text may be rendered already
    system: Literal["turn", "first_user"] = "turn"  # first_user: written before the first question
    score_header: bool = False  # score what opens the assistant's turn too, as SimPO's authors do
    eos_token: str = ""  # ends a response (default: as the template does, else the EOS)
    max_length: int = 2048  # tokens of prompt and response; longer is dropped, never cut
    wrong_options: Literal["all", "one"] = "all"  # of multiple choice, set against the right one
    ties: bool = False  # keep the subset Ties of RewardBench-2, in which several answers are right
    drop_ties: bool = False  # leave out pairs whose own scores tie or contradict their order
    # split and speed
    val_fraction: float = 0.05  # fraction of the prompts, chosen by hash, that go to val
    seed: int = 0  # of the split and of --wrong_options one
    num_proc: int = 0  # worker processes; 0 = one per core

# ---- formats: to add one, write a function and give it a line in FORMATS ----
# A function takes the columns that it uses out of the row (pop); those that stay are reported as
# not used. It returns None if the row has another format, else
#     prompt    a text, or the messages before the answer
#     chosen    a list of answers: each a text, a message, or messages that end with the answer
#     rejected  the same; a row makes a pair of every chosen and every rejected answer
# A column whose value is null is not in the row. drop(reason, value) leaves the row out.

def read_choice(row, kit):
    """A question with options: the right option is preferred to each wrong one."""
    if "options" not in row and "choices" not in row:
        return None
    options = row.pop("options") if "options" in row else row.pop("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        drop("malformed", f"options are {options}, not a list of 2 to 26 texts")
    letters = [chr(65 + i) for i in range(len(options))]
    answer = row.pop("answer")
    right = letters.index(answer) if answer in letters else answer
    if type(right) is not int or not 0 <= right < len(options):
        drop("malformed", f"answer {answer!r} is no letter or index of {len(options)} options")
    lines = [f"{a}. {text_of(text, 'option')}" for a, text in zip(letters, options, strict=True)]
    passages = [text_of(row.pop(name), name) for name in PASSAGES if name in row]
    passages = [passage + "\n\n" for passage in passages if passage.strip()]
    question = "".join(passages) + text_of(row.pop("question"), "question")
    prompt = "\n".join([question, *lines, "Answer:"])
    replies = lines if kit.template else [" " + line for line in lines]
    return prompt, [replies[right]], replies[:right] + replies[right + 1:]

def read_sharegpt(row, kit):
    if is_blank(row["conversations"]):
        return None
    return row.pop("conversations"), *pop_answers(row)

def read_alpaca(row, kit):
    """instruction and input are one question, history the turns before it: [[question, answer]]."""
    if is_blank(row["instruction"]) and prompt_column(row):
        return None
    prompt, extra = row.pop("instruction"), text_of(row.pop("input", ""), "input")
    if extra.strip():
        prompt = f"{text_of(prompt, 'instruction')}\n\n{extra}"
    turns = []
    for said in from_json(row.pop("history", []), "history"):
        if not isinstance(said, list) or len(said) != 2:
            drop("malformed", f"history has {said}, not [question, answer]")
        turns += [user_turn(said[0]), {"role": "assistant", "content": said[1]}]
    return turns + [user_turn(prompt)] if turns else prompt, *pop_answers(row)

def read_dialogue(row, kit):
    """Both answers are dialogues, or the prompt is one."""
    column = prompt_column(row)
    prompt, sides = row.get(column), [row["chosen"], row["rejected"]]
    if not all(isinstance(side, str) for side in sides):
        return None
    if is_dialogue(sides[0]) and (prompt is None or str(prompt).strip() in sides[0]):
        row.pop(column, None)  # it stands in the dialogues
        chosen, rejected = pop_answers(row)
        return [], [dialogue(chosen[0], "chosen", kit)], [dialogue(rejected[0], "rejected", kit)]
    if not kit.template or not is_dialogue(prompt):
        return None
    *turns, opened = dialogue(row.pop(column), column, kit)
    if opened["content"].strip():
        drop("malformed", f"the dialogue in {column} does not end with 'Assistant:': {prompt}")
    chosen, rejected = pop_answers(row)
    return turns, [chosen[0].strip()], [rejected[0].strip()]

def read_several(row, kit):
    column = prompt_column(row)
    if not column or not (is_several(row["chosen"]) or is_several(row["rejected"])):
        return None
    return row.pop(column), *pop_answers(row)

def read_conversation(row, kit):
    column = prompt_column(row)
    values = [as_messages(row.get(name)) for name in (column, "chosen", "rejected")]
    if not any(isinstance(value, (list, dict)) for value in values):
        return None
    return row.pop(column, []), *pop_answers(row)

def read_plain(row, kit):
    column = prompt_column(row)
    if not column:
        return None
    return row.pop(column), *pop_answers(row)

ANSWERS = {"chosen", "rejected"}
FORMATS = {  # name: (columns that must have a value, function); the first that fits reads the row
    "multiple choice": ({"question", "answer"}, read_choice),
    "ShareGPT": ({"conversations"} | ANSWERS, read_sharegpt),
    "Alpaca": ({"instruction"} | ANSWERS, read_alpaca),
    "hh-rlhf": (ANSWERS, read_dialogue),
    "RewardBench-2": (ANSWERS, read_several),
    "conversation": (ANSWERS, read_conversation),
    "plain": (ANSWERS, read_plain),
}
PROMPTS = ("prompt", "messages", "question", "query", "input", "conversations", "instruction")
PASSAGES = ("context", "passage", "article", "hint")  # before a multiple-choice question
SUBSETS = ("subset", "category", "subject")  # the first that has a value names the subset
PAIRS_OF_A_ROW = 1000  # of many chosen and many rejected answers

# ---- what happens to a row ----

def prepare_chunk(args, chunk):
    """Entries of all_rows -> the Arrow batch of each split, the records of dropped.jsonl, what is
    counted for the summary, and the place in the input that is reached."""
    kit, pairs, dropped, counts = load_tokenizer(args), {"train": [], "val": []}, [], Counter()
    hashes = {"train": [], "val": []}
    for split, source, key, number, place, row in chunk:
        for one, result in prepare_row(kit, args, key, row, counts):
            if isinstance(result, Exception):
                reason, value = reason_of(result)
                record = dict(file=source, line=number, id=one, reason=reason, value=value)
                dropped.append(record)
                continue
            point, columns, both = result
            part = split or ("val" if point < args.val_fraction else "train")
            pairs[part].append(columns | {"source": source, "id": one})
            hashes[part].append(both)
    batches = {part: pa.RecordBatch.from_pylist(rows, SCHEMA) for part, rows in pairs.items()}
    hashes = {part: np.array(rows, "u8").reshape(-1, 2) for part, rows in hashes.items()}
    return types.SimpleNamespace(rows=len(chunk), batches=batches, hashes=hashes, dropped=dropped,
                                 counts=counts, place=place)

def prepare_row(kit, args, key, row, counts):
    """A raw row -> [(id, a pair as prepare_pair gives it, or the exception that dropped it)]."""
    rows, results = attempt(convert_row, args, row), []
    if isinstance(rows, Exception):
        return [(key, rows)]
    for i, row in enumerate(rows):
        name = key if len(rows) == 1 else f"{key}-{i}"
        found = attempt(read_row, kit, args, row, key, counts)
        if isinstance(found, Exception):
            results.append((name, found))
            continue
        if found.ties:  # ref:5 and tied:5 belong together; evaluate.py asks
            name += f":{found.ties}"
        pairs = list(itertools.product(found.chosen, found.rejected))
        for k, pair in enumerate(pairs):
            one = f"{name}-{k}" if len(pairs) > 1 else name
            results.append((one, attempt(prepare_pair, kit, args, found, pair)))
        if found.beyond:
            results.append((f"{name}-more", found.beyond))
    return results

def read_row(kit, args, row, key, counts):
    """A row -> what its pairs share, and its chosen and rejected answers."""
    if not isinstance(row, dict):
        drop("malformed", f"no row: {row}")
    values = {name: value for name, value in row.items() if value is not None}
    seen = [name for name, value in values.items() if is_media(name) and not is_blank(value)]
    if seen:
        drop("images", f"column {seen[0]}: {values[seen[0]]}")
    name, (prompt, chosen, rejected) = read_format(values, row, kit)
    if name == "multiple choice" and args.wrong_options == "one":
        rejected = [random.Random(f"{args.seed} {key}").choice(rejected)]
    beyond = None
    if len(chosen) * len(rejected) > PAIRS_OF_A_ROW:  # every chosen answer keeps some of its pairs
        value = f"{len(chosen)} chosen x {len(rejected)} rejected answers, {PAIRS_OF_A_ROW} pairs"
        chosen = chosen[:PAIRS_OF_A_ROW]
        rejected = rejected[:PAIRS_OF_A_ROW // len(chosen)]
        beyond = ValueError("more pairs than a row may make", f"{value} of them at most are made")
    order = own_order(values)
    if args.drop_ties and order in ("tie", "contradict"):
        drop(f"scores {order}", {name: row[name] for name in row if name not in values})
    label = next((name for name in SUBSETS if values.get(name)), None)
    label = text_of(str(values.pop(label, "")), "subset")
    ties = name == "RewardBench-2" and label == "Ties"
    found = types.SimpleNamespace(
        format=name, prompt=prompt, chosen=chosen, rejected=rejected, beyond=beyond, label=label,
        ties=ties and text_of(str(values.pop("id", None)), "id"), weight=weight_of(values, row),
        system=pop_system(values), options=pop_options(values),
        start=text_of(values.pop("initial_reason_steps", ""), "initial_reason_steps"))
    counts["format", name] += 1
    counts["order", order] += 1
    counts["rendered", isinstance(prompt, str) and bool(RENDERED.search(prompt))] += 1
    counts.update(("unused", name) for name, value in values.items() if not is_blank(value))
    return found

def read_format(values, row, kit):
    """-> name of the first format that reads the row, its (prompt, chosen, rejected)"""
    for name, (columns, function) in FORMATS.items():
        found = function(values, kit) if columns <= values.keys() else None
        if found:
            return name, found
    missing = [side for side in ("chosen", "rejected") if side not in values]
    if "chosen" in row and "rejected" in row and missing:
        drop("malformed", f"{missing[0]} is not valid text: None")
    if missing:
        drop("malformed", f"columns of no known format: {', '.join(map(str, row))}")
    drop("malformed", "prompt is not valid text: None, and chosen is no Human/Assistant dialogue: "
         f"{row['chosen']}")

def prepare_pair(kit, args, found, pair):
    """-> a number from 0 to 1 that decides the split, the columns, two hashes for the summary."""
    if found.ties and not args.ties:
        drop("ties", pair[0])
    messages, answers = read_pair(args, found, pair)
    prompt, *ids = encode(kit, args, messages, answers, found)
    # Prompts that differ only in white space or Unicode form may have equal tokens: one split.
    same = f"{args.seed} {' '.join(canonical(kit, prompt).split())}"
    same = int.from_bytes(hashlib.sha256(same.encode()).digest()[:8], "big")
    whole = hash(tuple(map(tuple, ids))) % 2**64
    columns = dict(zip(SIDES, ids), subset=found.label, weight=found.weight)
    return same / 2**64, columns, (same, whole)

def main():
    args = parse_args(Args)
    out = Path(args.out)  # without the slash at the end
    part = out.with_name(f"{out.name}.partial")
    if args.val_fraction >= 1:
        fail(f"--val_fraction {args.val_fraction} must be below 1")
    check_out(args, out, part)
    kit = load_tokenizer(args)
    load_converter(args.convert)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        summary = write_pairs(args, kit, out, part)
        meta, pair = save(args, kit, part, summary)
        replace(out, part)
    except OSError as error:
        fail(f"cannot write {part}: {error}; make room or choose another --out")
    except process.BrokenProcessPool:
        fail("a worker process was killed, probably for memory: lower --num_proc")
    finally:  # a result that is not whole is none
        shutil.rmtree(part, ignore_errors=True)
    report(args, kit, meta, pair)

# ---- helpers, which a new format does not touch ----

# -- command line, errors
def parse_args(cls):
    """Command line -> dataclass `cls`; --help shows its source, comments and all. A number must be
    above 0; it may be 0 where that is the default, or where its comment says what "0 =" means."""
    source = inspect.getsource(cls)
    parser = transformers.HfArgumentParser(cls, allow_abbrev=False)
    parser.format_help = lambda: source
    parser.error = fail
    args = cls(**vars(parser.parse_args()))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    for name, value in vars(args).items():
        may_be_0 = getattr(cls, name, None) == 0 or "0 =" in comments.get(name, "")
        least = 0 if may_be_0 else sys.float_info.min
        if type(value) in (int, float) and not least <= value < math.inf:
            fail(f"--{name} {value} must be finite and {'not below' if may_be_0 else 'above'} 0")
    return args

def fail(message):
    """End the program with one line on stderr and exit status 1."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)  # rank 0 says it too, and torchrun ends the others before they repeat it
    raise SystemExit("error: " + " ".join(message.split()))

def drop(reason, value):
    """Leave a row or a pair out; `reason` is counted, `value` shows what is wrong."""
    raise ValueError(reason, short(value))

def attempt(step, *inputs):
    """What a step returns, or the exception that it raised: no row may end the run."""
    try:
        return step(*inputs)
    except Exception as error:
        return error

def reason_of(error):
    """Exception of a row -> its (reason, value): those of drop(), or for any other its type."""
    if type(error) is ValueError and len(error.args) == 2:
        return error.args
    return "error", short(f"{type(error).__name__}: {error}")

def visible(text):
    """Text for a terminal: control characters, which could move its cursor, as \\x1b or the like."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)

def short(value):
    text = visible(" ".join(str(value).split()))
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"

@functools.cache
def load_converter(spec):
    """The function that --convert FILE.py:FUNCTION names, once per process; None without it."""
    if not spec:
        return None
    path, _, name = spec.rpartition(":")
    try:
        place = importlib.util.spec_from_file_location("convert", path)
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # whatever the user's file raises
        fail(f"--convert {spec}: {type(error).__name__}: {short(error)}; give FILE.py:FUNCTION")

def convert_row(args, row):
    """A raw row -> the rows that --convert makes of it, or the row itself."""
    function = load_converter(args.convert)
    if function is None or not isinstance(row, dict):
        return [row]
    try:
        made = function(row)
    except Exception as error:
        drop("convert", f"{type(error).__name__}: {error}")
    if not made:
        drop("convert", f"--convert returned {made}")
    return made if isinstance(made, list) else [made]

# -- files and rows
FILE = re.compile(r"(.+)\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz|\.zst)?")
CHUNK_ROWS, CHUNK_BYTES = 200, 2**23  # a chunk of rows ends at either; few are in memory

def file_names(text):
    """"a.jsonl,'b'" -> paths, or [] if the text is a folder or a hub name; quotes protect commas."""
    if Path(text).is_dir() and not FILE.fullmatch(text):
        return []
    names = [text] if Path(text).exists() else next(csv.reader([text], skipinitialspace=True), [])
    names = [Path(name.strip()) for name in names if name.strip()]
    return names if all(FILE.fullmatch(name.name) for name in names) else []

@functools.cache
def find_sources(args):
    """Everything to read, --dataset first and then --val: [split that its rows go to, or "" if the
    prompt decides; a path or a dataset; name for the records; start of the ids; size; --split]"""
    wanted = [("train" if args.val else "", args.dataset, args.split)]
    if args.val and (file_names(args.val) or Path(args.val).exists()):
        wanted.append(("val", args.val, args.split))
    elif args.val:
        wanted.append(("val", args.dataset, args.val))
    paths = [path for _, text, _ in wanted for path in file_names(text)]
    stems = Counter(FILE.fullmatch(path.name)[1] for path in paths)
    found = []
    for target, text, split in wanted:
        for path in file_names(text):
            stem = FILE.fullmatch(path.name)[1]
            stem = stem if stems[stem] == 1 else str(path)  # ids are unique over all files
            stem = f"{stem}:{split}" if split != args.split else stem
            try:
                found.append((target, path, path.name, stem, path.stat().st_size, split))
            except OSError as error:
                fail(f"cannot read {path}: {error}; check --dataset")
        if not file_names(text):
            rows = load_rows(args, text, split)
            name = text if split == args.split else f"{text}:{split}"
            found.append((target, rows, text, name, len(rows), split))
    if len({(path, split) for _, path, *_, split in found if isinstance(path, Path)}) < len(paths):
        fail(f"--dataset {args.dataset} names a file twice, or --val {args.val} names it again")
    return found

def load_rows(args, name, split):
    """A split of a hub dataset, of a folder of files, or of a folder of save_to_disk."""
    try:
        if Path(name, "dataset_dict.json").exists() or Path(name, "state.json").exists():
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, args.subset or None, split=split)
        return rows.with_format("arrow")  # which decodes no images
    except Exception as error:  # hub, network, name, split, folder: each raises its own errors
        fail(f"--dataset {name} --subset '{args.subset}' --split {split}: {type(error).__name__}: "
             f"{short(error)}; a file ends in .jsonl, .json, .csv, .tsv or .parquet (.gz, .zst); "
             "quote a name that has a comma; convert other files with pandas")

def all_rows(args):
    """(split or "", source, id, line or row number from 1, place in the whole input, row)"""
    start = 0
    for target, source, name, stem, size, split in find_sources(args):
        is_file = isinstance(source, Path)
        rows = file_rows(source, split) if is_file else arrow_rows(source, len(source))
        for number, row, share in rows:
            yield target, name, f"{stem}:{number:06d}", number, start + share * size, row
        start += size

def file_rows(path, split="train"):
    """-> (number, row or the text of what is no row, share of the file that is read)"""
    _, kind, zipped = FILE.fullmatch(path.name).groups()
    number, size = 0, max(1, path.stat().st_size)
    try:
        with open(path, "rb") as raw:
            if kind == "parquet":  # its index is at the end, to which one cannot seek in .gz
                source = pa.BufferReader(unzip(raw, zipped).read()) if zipped else raw
                file = pq.ParquetFile(source)
                for number, row, share in arrow_rows(file, file.metadata.num_rows):
                    yield number, row, share
                return
            stream = unzip(raw, zipped)
            encoding = json.detect_encoding(stream.peek(4)[:4])  # of UTF-8, 16, 32, for .csv too
            wrong = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
            text = io.TextIOWrapper(stream, encoding, wrong, newline="\n")
            rows = csv_rows(text, kind) if kind in ("csv", "tsv") else json_rows(text, path, split)
            for number, row in enumerate(rows, 1):
                if row is not None:  # a blank line
                    yield number, row, (1 if raw.closed else raw.tell() / size)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pa.ArrowException) as error:
        fail(f"cannot read {path} after row {number}: {short(error)}; check --dataset or the file")

def unzip(raw, zipped):
    if zipped == ".gz":
        return gzip.open(raw)
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd")) if zipped else raw

def arrow_rows(table, rows):
    """Of a parquet file or a dataset, in batches that are small if their rows are large."""
    if isinstance(table, pq.ParquetFile):
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        size = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1)
    else:
        size = table.data.nbytes / max(1, rows)
    count = int(max(1, min(CHUNK_ROWS, CHUNK_BYTES / max(1, size))))
    if isinstance(table, pq.ParquetFile):
        batches = table.iter_batches(batch_size=count)
    else:
        batches = table.iter(batch_size=count)
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, without_nulls(row), number / rows

def without_nulls(value):
    """Arrow gives every struct the keys of all rows, null where a row has none: take them out."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if each is not None}
        return {name: without_nulls(each) for name, each in kept.items()}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value

def csv_rows(text, kind):
    """Rows of .csv or .tsv; an empty cell is an absent column."""
    csv.field_size_limit(2**31 - 1)
    header = text.readline()
    delimiter = "\t" if kind == "tsv" else max(",;\t", key=header.count)
    for row in csv.DictReader(itertools.chain([header], text), delimiter=delimiter):
        if None in row:
            yield f"{len(row[None])} cells more than the header has columns: {row}"
        else:
            yield {name: cell for name, cell in row.items() if cell}

def parse(text):
    """JSON -> its value, or a text that says what is wrong, which is no row and dropped as such."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}: ...{text[-60:]!r}"

def json_rows(text, path, split):
    """A row per line, None for a blank one, is streamed; any other layout is read as a whole."""
    start, first = [], ""
    for line in text:
        start.append(line)
        if first and line.strip():  # a second line that is not blank
            break
        first = first or line.strip()
    by_line = ".json." not in f"{path.name}." and first not in ("[", "{", "[{")
    if by_line or (len(start) > 1 and isinstance(parse(first), dict)):
        for line in itertools.chain(start, text):
            yield parse(line) if line.strip() else None
        return
    whole = "".join(start) + text.read()
    value = parse(whole)
    if isinstance(value, str) and first.startswith("{"):
        yield from objects_in(whole)
        return
    if not isinstance(value, (dict, list)):
        fail(f"{path}: {short(value)}; give a list of rows, or .jsonl")
    yield from rows_in(value, path, split)

def objects_in(whole):
    """Pretty-printed objects one after another; after a broken one, from the next line with {."""
    decoder, at = json.JSONDecoder(), whole.index("{")
    while at >= 0:
        try:
            row, end = decoder.raw_decode(whole, at)
        except (ValueError, RecursionError) as error:
            row, end = f"not JSON: {error}: {whole[at:at + 60]!r}", at + 1
            at = whole.find("\n{", end) + 1 or -1
        else:
            at = whole.find("{", end)
        yield row

def rows_in(value, path, split):
    """The rows of one JSON value: a list, a list under a key, columns, or a single row."""
    if isinstance(value, list):
        return value
    if split in value and isinstance(value[split], (list, dict)):
        return rows_in(value[split], path, split)
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):  # of pandas
        return [dict(zip(value["columns"], row)) for row in value["data"]]
    columns = list(value.values())
    if columns and all(isinstance(column, dict) for column in columns):  # {"prompt": {"0": "...
        if all(column.keys() == columns[0].keys() for column in columns):
            columns = [list(column.values()) for column in columns]
    lists = all(isinstance(column, list) and column for column in columns)
    turns = lists and all(is_message(column[0]) for column in columns)  # one row, a conversation
    if lists and not turns and len({len(column) for column in columns}) == 1 and len(columns) > 1:
        return [dict(zip(value, row)) for row in zip(*columns)]
    keys = [key for key, each in value.items()
            if isinstance(each, list) and each and isinstance(each[0], dict)]
    if ANSWERS & value.keys() or not keys:
        return [value]
    if len(keys) > 1:
        fail(f"{path} has rows under {', '.join(keys)}: choose one with --split")
    return rows_in(value[keys[0]], path, split)

# -- columns and messages
ROLES = dict(user="user", human="user", assistant="assistant", gpt="assistant", model="assistant",
             chatgpt="assistant", bot="assistant", system="system", developer="system", tool="tool",
             function="tool", observation="tool", function_call="assistant")
HEADINGS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message
RENDERED = re.compile(
    r"<\|(im_start|start_header_id|start|user|assistant|system)\|>|<start_of_turn>|\[/?INST\]|"
    r"<<SYS>>|<｜(User|Assistant)｜>|###\s*(Instruction|Input|Human|User|Assistant|Response)\b|"
    r"(^|\n)(Human|USER|User): ")
VERDICTS = dict(chosen=1, tie=0, tied=0, equal=0, same=0, draw=0, both=0, neither=0, rejected=-1)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

def is_blank(value):
    return value in ("", [], {}) or (isinstance(value, str) and not value.strip())

def text_of(value, name):
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):  # half a surrogate pair
        drop("malformed", f"{name} is not valid text: {value!r}")
    return value

def from_json(value, name):
    """A list or dict that may be given as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        drop("malformed", f"{name} is not JSON: {error}: {value}")

def is_message(value):
    return isinstance(value, dict) and ({"role", "content"} <= value.keys()
                                        or {"from", "value"} <= value.keys())

def as_messages(value):
    """A text that is a message or a list of messages, as JSON or Python writes it -> these."""
    if not isinstance(value, str) or not re.match(r"\s*\[?\s*\{", value):
        return value
    if not re.search(r"""["'](role|from)["']\s*:""", value):
        return value
    for read in (json.loads, literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        listed = found if isinstance(found, list) else [found]
        return found if all(is_message(each) for each in listed) else value
    if re.match(r"""\s*\[?\s*\{\s*["'](role|from)["']\s*:""", value):
        drop("malformed", f"messages that are not JSON: {value}")
    return value

def prompt_column(row):
    """The column of the prompt, if possible one that is not empty; None if there is none."""
    there = [name for name in PROMPTS if name in row]
    filled = [name for name in there if not is_blank(row[name])]
    return next(iter(filled + there), None)

def is_several(answer):
    return isinstance(answer, list) and bool(answer) and not isinstance(answer[0], dict)

def pop_answers(row):
    """-> list of the chosen answers, list of the rejected ones"""
    sides = [as_messages(row.pop("chosen")), as_messages(row.pop("rejected"))]
    if [] in sides:
        drop("malformed", f"chosen or rejected is an empty list: {sides}")
    return [side if is_several(side) else [side] for side in sides]

def user_turn(text):
    return {"role": "user", "content": text}

def is_dialogue(text):
    return (isinstance(text, str) and text.lstrip().startswith("Human:")
            and "\n\nAssistant:" in text)

def dialogue(text, name, kit):
    """Text of Human and Assistant -> messages that end with the last answer. Without a template
    all before that answer is one message, as it is."""
    if not text.startswith("\n\nHuman:"):
        text = "\n\n" + text.lstrip()
    prompt, turn, answer = text_of(text, name).rpartition("\n\nAssistant:")
    if "\n\nHuman:" in answer and name not in ANSWERS:
        prompt, turn, answer = text, "\n\nAssistant:", ""
    if not turn or not prompt.startswith("\n\nHuman:") or "\n\nHuman:" in answer:
        drop("malformed", f"no prompt, and {name} is no Human/Assistant dialogue: {text}")
    if not kit.template:
        return [user_turn(prompt + turn), {"role": "assistant", "content": answer}]
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:] + ["Assistant", answer]
    return [{"role": ROLES[who.lower()], "content": said.strip()}
            for who, said in zip(parts[::2], parts[1::2], strict=True)]

def read_message(value, name):
    """A message in the form of OpenAI or ShareGPT -> {role, content, and its other keys}."""
    if not isinstance(value, dict):
        drop("malformed", f"{name} has a message of role none: {value!r}")
    role = str(value.get("role") or value.get("from"))
    if role.lower() not in ROLES:
        drop("malformed", f"{name} has a message of role {role}")
    content = value.get("value") if value.get("content") is None else value["content"]
    known = ("role", "from", "content", "value", "function_call", "tool_calls")
    more = {key: each for key, each in value.items() if key not in known and each is not None}
    seen = [key for key in more if is_media(key) and not is_blank(more[key])]
    if seen:
        drop("images", f"{name} has a message with {seen[0]}")
    calls = from_json(value.get("tool_calls") or value.get("function_call") or [], "tool_calls")
    if role == "function_call":
        calls, content = from_json(content, "function_call"), ""
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        more["tool_calls"] = [read_call(call) for call in calls]
    if content is None and (calls or any(more.get(key) for key in REASONING)):
        content = ""
    content = join_parts(content, name) if isinstance(content, list) else content
    return {"role": ROLES[role.lower()], "content": text_of(content, f"content in {name}")} | more

def read_call(call):
    """A call of a tool, in the form that templates expect: arguments are a dict if they can be."""
    if not isinstance(call, dict):
        drop("malformed", f"a tool call is {call!r}")
    function = dict(call["function"] if isinstance(call.get("function"), dict) else call)
    text_of(function.get("name"), "the name of a tool call")
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            pass  # the template gets the text
    outer = call if isinstance(call.get("function"), dict) else {"type": "function"}
    return outer | {"function": function}

def join_parts(parts, name):
    """Content that is a list of text parts -> one text."""
    texts = []
    for part in parts:
        part = part if isinstance(part, dict) else {"text": part}
        kind = part.get("type", "text")
        if is_media(str(kind).removeprefix("input_")):
            drop("images", f"{name} has a part of type {kind}")
        if kind not in ("text", "input_text", "output_text"):
            drop("malformed", f"{name} has a part of type {kind}, which is no text")
        texts.append(text_of(part.get("text"), f"a part of {name}"))
    return "\n".join(texts)

@functools.lru_cache(4096)
def is_media(column):
    return bool(re.fullmatch(r"(image|img|video|audio)s?(_(path|file|url|id|name|bytes)s?)?",
                             str(column).lower()))

def read_answer(value, name):
    """One side of a pair -> messages before the answer, the answer as a message."""
    value = as_messages(value)
    if not isinstance(value, (list, dict)):
        return [], {"role": "assistant", "content": text_of(value, name)}
    messages = [read_message(each, name) for each in (value if isinstance(value, list) else [value])]
    if not messages or messages[-1]["role"] != "assistant":
        drop("malformed", f"{name} does not end with an assistant turn: {value}")
    return messages[:-1], messages[-1]

def read_pair(args, found, pair):
    """Raw chosen and rejected answer of a row -> messages before the answer, [the two answers]."""
    before, chosen = read_answer(pair[0], "chosen")
    other, rejected = read_answer(pair[1], "rejected")
    if before != other:
        both = zip(before, other)
        drop("prompts differ", next((f"{a} / {b}" for a, b in both if a != b), before or other))
    prompt = as_messages(found.prompt)
    if isinstance(prompt, (list, dict)):
        prompt = prompt if isinstance(prompt, list) else [prompt]
        turns = [read_message(each, "prompt") for each in prompt]
        if turns and [turns[-1]] in ([chosen], [rejected]):  # the conversation with its answer
            turns = turns[:-1]
        messages = overlap(turns, before)
    elif before:  # beside a conversation, the text of a prompt only repeats its first question
        messages = before
    else:
        messages = [user_turn(text_of(prompt, "prompt"))]
    if found.system and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": found.system}, *messages]
    check_order(messages, found.format)
    if args.system == "first_user" and messages[0]["role"] == "system":
        messages = system_to_first_user(messages)
    return messages, [chosen, rejected]

def overlap(turns, before):
    """Messages of the prompt and those before the answer, which may repeat some -> each once."""
    def same(left, right):
        left = [message | {"content": message["content"].strip()} for message in left]
        return left == [message | {"content": message["content"].strip()} for message in right]
    for start in range(len(before) - len(turns) + 1):
        if same(before[start:start + len(turns)], turns):
            return before
    for size in range(min(len(turns), len(before)), 0, -1):
        if same(turns[-size:], before[:size]):
            return turns[:-size] + before
    if before and same(turns[:len(before)], before):
        drop("prompts differ", f"prompt goes on after the messages of chosen: {turns[-1]}")
    return turns + before

def check_order(messages, format):
    """The order of a conversation that is put together from several columns."""
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] not in ("user", "tool"):
        drop("malformed", f"the prompt does not end with a user turn: {messages}")
    if "system" in roles[1:]:
        drop("malformed", f"a system turn that is not the first: {messages}")
    repeats = ["user", "user"] in [list(two) for two in zip(roles, roles[1:])]
    if repeats and format != "hh-rlhf":  # whose text has such turns
        drop("malformed", f"two user turns in a row: {messages}")

def system_to_first_user(messages):
    system, *rest = messages
    first = next(i for i, message in enumerate(rest) if message["role"] == "user")
    text = f"{system['content']}\n\n{rest[first]['content']}"
    return rest[:first] + [rest[first] | {"content": text}] + rest[first + 1:]

def weight_of(values, row):
    weight = values.pop("weight", None if "weight" in row else 1.0)
    weight = number(weight)
    if weight is None or not 0 <= weight < 1e30:
        drop("malformed", f"weight is {row['weight']!r}, not a number from 0")
    return weight

def number(value):
    """A number, maybe as text, as a float; None if it is none or not finite."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    return found if math.isfinite(found) else None

def pop_system(values):
    for name in ("system", "system_prompt"):
        if values.get(name):
            return text_of(values.pop(name), name)

def pop_options(values):
    """What goes to the template beside the messages: its keyword arguments."""
    options = from_json(values.pop("chat_template_kwargs", None) or {}, "chat_template_kwargs")
    tools = from_json(values.pop("tools", None) or [], "tools")
    if not isinstance(options, dict) or not isinstance(tools, list):
        drop("malformed", f"tools or chat_template_kwargs are {tools!r}, {options!r}")
    return options | {"tools": tools} if tools else options

@functools.lru_cache(4096)
def score_columns(columns):
    """Those that compare the two answers -> [(column, column of the rejected answer or "")]"""
    found = []
    for name in columns:
        other = str(name).replace("chosen", "rejected")
        if other != name and other in columns and re.search("score|rating|reward", other):
            found.append((name, other))
        elif name in ("margin", "score_margin", "rating", "preference", "label"):
            found.append((name, ""))
    return found

def own_order(values):
    """agree, tie or contradict: what a row's own scores say of its chosen and rejected answer."""
    gaps = []
    for name, other in score_columns(tuple(values)):
        value = values[name]
        two = [value, values[other]] if other else value
        if isinstance(two, list) and len(two) == 2 and None not in map(number, two):
            gap = number(two[0]) - number(two[1])
        elif isinstance(value, str) and value.lower() in VERDICTS:
            gap = VERDICTS[value.lower()]
        elif number(value) is None or (name == "label" and number(value) not in (-1, 0, 0.5, 1)):
            continue
        else:
            gap = number(value) - (0.5 if name == "label" else 0)
        gaps.append(gap)
        values.pop(name)
        values.pop(other, None)
    if not gaps:
        return "none"
    return "contradict" if min(gaps) < 0 else "tie" if min(gaps) == 0 else "agree"


# -- rendering: messages -> text
@functools.cache
def load_tokenizer(args):
    """What rendering needs, once per process. `tail` is what the template writes after an answer,
    from its end token on; it is cut off, and the end token comes back as the id `end`."""
    probe = [user_turn("Q"), {"role": "assistant", "content": "An answer."}]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        has_template = tokenizer.chat_template and not args.plain
        template = tokenizer.get_chat_template() if has_template else ""
        text = tokenizer.apply_chat_template(probe, tokenize=False) if template else ""
    except Exception as error:  # a wrong name, no network, a broken file or template: all differ
        fail(f"tokenizer or template of --model {args.model}: {short(error)}; check the name, "
             "or --plain if the template is at fault")
    if args.score_header and not template:
        fail(f"--score_header needs a chat template, and --model {args.model} has none"
             + ", as --plain is set" * args.plain)
    tokens, tail = tokenizer.added_tokens_decoder.values(), text.rpartition("An answer.")[2]
    added = one_of(t.content for t in tokens)
    special = one_of(t.content for t in tokens if t.special)
    alone = [t.content for t in tokens if not (t.normalized or t.lstrip or t.single_word)]
    named = re.escape(args.eos_token) if args.eos_token and args.eos_token in tail else special
    found = re.search(named, tail)
    end = args.eos_token or (found[0] if found else tokenizer.eos_token)
    if not tokenizer.is_fast or end not in tokenizer.get_vocab():
        fail(f"--model {args.model} needs a tokenizer.json, for character offsets, and the end "
             f"token {end!r} in its vocabulary; set --eos_token")
    bos = [] if template else tokenizer("a").input_ids[:1]
    backend = tokenizer.backend_tokenizer  # 1.3 x as fast as through the wrapper
    backend.no_truncation()  # --max_length decides
    backend.no_padding()
    kit = types.SimpleNamespace(
        tokenizer=tokenizer, backend=backend, template=template,
        end=tokenizer.get_vocab()[end], end_token=end, score_header=args.score_header,
        tail=tail[found.start():] if found else tail[len(tail.rstrip()):],
        bos=bos if bos == [tokenizer.bos_token_id] else [], special=re.compile(special),
        breaks=re.compile(one_of(sorted(alone, key=len)[::-1])),
        seams=re.compile(rf"\s*({added})\s*"), normalizer=backend.normalizer)
    probe_template(kit)
    kit.rows = embedding_rows(args, kit)
    return kit

def one_of(texts):
    """A regular expression that matches any of the texts."""
    return "|".join(map(re.escape, texts)) or "(?!)"  # which matches nothing

def probe_template(kit):
    """Does the template take a system turn, and how much does it write to open an answer?"""
    kit.takes_system, kit.opening = True, 0
    if not kit.template:
        return
    chat = functools.partial(kit.tokenizer.apply_chat_template, tokenize=False)
    try:
        probe = [user_turn("Q")]
        kit.opening = len(chat(probe, add_generation_prompt=True)) - len(chat(probe))
        kit.takes_system = "Be kind." in chat([{"role": "system", "content": "Be kind."}, *probe])
    except Exception:  # a template raises what it likes
        kit.takes_system = False

def embedding_rows(args, kit):
    """Rows of the model's embedding if the tokenizer has more ids than these, else None."""
    try:
        config = transformers.AutoConfig.from_pretrained(args.model).get_text_config()
        rows = config.vocab_size
    except Exception:  # a folder with a tokenizer and no model, or a model of one's own
        return None
    if kit.end >= rows:
        fail(f"--model {args.model}: the end token {kit.end_token} has the id {kit.end}, and the "
             f"embedding has {rows} rows; set --eos_token, or resize the model's embedding")
    return rows if len(kit.tokenizer) > rows else None

def render_plain(kit, messages, answers, start):
    """-> (text of the prompt, [prompt + answer, without end token], the part that is not scored)"""
    prompt, gap = messages[0]["content"], ""
    if len(messages) > 1:
        prompt = "".join(f"\n\n{HEADINGS[m['role']]}: {m['content']}" for m in messages)
        prompt, gap = prompt + "\n\nAssistant:", " "
    end = re.escape(kit.end_token) + r"\s*\Z"
    begun = prompt + (gap or "\n") + start if start else prompt + gap
    texts = [re.sub(end, "", begun + answer["content"]) for answer in answers]
    return prompt, texts, begun if start else prompt

def render_chat(kit, messages, answers, start, options):
    """The same by the chat template. Templates strip, reorder and leave out, so a response is
    whatever follows the prompt in the rendered conversation; with --score_header it begins where
    the question ends, and after the `start` of an answer where that ends."""
    chat = functools.partial(kit.tokenizer.apply_chat_template, tokenize=False, **options)
    answers = [answer | {"content": start + answer["content"]} for answer in answers]
    try:
        prompt = chat(messages, add_generation_prompt=True)
        texts = chat([[*messages, answer] for answer in answers])
        whole = all(text.startswith(prompt) for text in texts)
        bare = prompt if whole and not kit.score_header else chat(messages)
    except Exception as error:  # a template raises what it likes
        drop("template", f"{type(error).__name__}: {error}")
    if not whole:  # it opens <think> for generation and leaves it out of a conversation
        prompt = os.path.commonprefix([prompt, *texts])
    if not prompt.startswith(bare) or not all(text.endswith(kit.tail) for text in texts):
        drop("template", f"the conversation is not prompt + answer + {kit.tail!r}: {texts[0]}")
    begun = bare if kit.score_header else prompt
    if start:
        at = texts[0].find(start.strip(), max(0, len(prompt) - kit.opening))
        begun = texts[0][:at + len(start.strip())]
        if at < 0 or not texts[1].startswith(begun):
            drop("template leaves out initial_reason_steps", start)
    return prompt, [text.removesuffix(kit.tail) for text in texts], begun

def render(kit, messages, answers, found):
    """A pair as text that has all of its content. The arguments of tool calls are objects, as most
    templates expect; where that fails they are JSON text beside a null content, as OpenAI has it."""
    result = attempt(render_whole, kit, messages, answers, found)
    if isinstance(result, Exception) and any("tool_calls" in m for m in messages + answers):
        second = list(map(as_openai, messages)), list(map(as_openai, answers))
        second = attempt(render_whole, kit, *second, found)
        result = result if isinstance(second, Exception) else second
    if isinstance(result, Exception):
        raise result
    return result

def as_openai(message):
    calls = []
    for call in message.get("tool_calls", []):
        arguments = call["function"].get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls, "content": message["content"] or None} if calls else message

def render_whole(kit, messages, answers, found):
    """Render, and drop the pair if the text lacks some of its content. Only white space may differ,
    and a text may be written as JSON."""
    if kit.template:
        result = render_chat(kit, messages, answers, found.start, found.options)
    else:
        result = render_plain(kit, messages, answers, found.start)
    prompt, texts, begun = result
    if not all(text[max(len(prompt), len(begun)):].strip() for text in texts):
        drop("empty", f"rendering leaves nothing of a response: {answers}")
    opened = max(0, len(prompt) - kit.opening)
    tools = [("tools", text) for text in texts_of_tools(found.options.get("tools", []))]
    for answer, text in zip(answers, texts, strict=True):
        parts = [("tools", tools)]
        parts += [(message["role"], pieces(message)) for message in [*messages, answer]]
        if not kit.template:  # which writes texts as they are, and nothing else
            parts = [(role, [p for p in own if " turn" not in p[0]]) for role, own in parts]
        missing = first_missing(parts, text, len(prompt), opened)
        if missing:
            bare = [(role, [(what, squeeze(p)) for what, p in own]) for role, own in parts]
            places = len(squeeze(text[:len(prompt)])), len(squeeze(text[:opened]))
            missing = first_missing(bare, squeeze(text), *places)
        if missing:
            what, piece = missing
            if "</think>" in piece and squeeze(piece.rpartition("</think>")[2]) in squeeze(text):
                what = "<think>"
            drop(f"{'template' if kit.template else 'plain text'} leaves out {what}", piece)
    return result

def squeeze(text):
    return "".join(text.split())

def pieces(message):
    """[(what it is, text)] of all that a message says"""
    found = [(f"text of the {message['role']} turn", message["content"] or "")]
    found += [("reasoning", text_of(message[key], key)) for key in REASONING if message.get(key)]
    for call in message.get("tool_calls", []):
        said = [call["function"]["name"], *leaves(call["function"].get("arguments"))]
        found += [("tool calls", text) for text in said]
    return [(what, text.strip()) for what, text in found if text.strip()]

def leaves(value):
    """All keys, texts and numbers in the arguments of a tool call, as texts."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if isinstance(value, dict):
        return [text for each in value.items() for text in leaves(list(each))]
    if isinstance(value, list):
        return [text for each in value for text in leaves(each)]
    return [str(value)] if isinstance(value, (str, int, float)) and value not in (True, False) else []

def texts_of_tools(tools):
    """The name of each tool, and the first line of its description."""
    found = []
    for tool in tools:
        tool = tool.get("function", tool)
        lines = str(tool.get("description") or "").strip().splitlines()
        found += [text_of(tool.get("name"), "the name of a tool"), *lines[:1]]
    return found

def first_missing(parts, text, prompt, opened):
    """The first (what, piece) of the (role, pieces) in parts that is not in the text, or None. The
    turns stand in their order before the place `prompt`, the last one behind the place `opened`;
    tools and the system turn may stand anywhere before `prompt`."""
    at = 0
    for i, (role, own) in enumerate(parts):
        begin = 0 if role in ("tools", "system") else at
        begin, end = (opened, len(text)) if i == len(parts) - 1 else (begin, prompt)
        for what, piece in own:
            place = text.find(piece, begin, end)
            if place < 0:
                place = text.find(json.dumps(piece, ensure_ascii=False)[1:-1], begin, end)
            if place < 0:
                return what, piece
            at = at if role in ("tools", "system") else max(at, place)
    return None

# -- tokens
def canonical(kit, text: str) -> str:
    """Text without what tokenizers change on purpose: normal form, spaces around special tokens."""
    text = kit.normalizer.normalize_str(text) if kit.normalizer else text
    return kit.seams.sub(r"\1", text.replace("\u2581", " ")).lstrip(" ")  # SentencePiece's space

def tokenise(kit, prompt: str, texts: list):
    """Two texts that begin with the prompt -> (token ids of the prompt, token ids of the two
    responses, how many of the prompt's last characters are in those).

    The prompt is what both sides share of the tokens that end inside it. A token across the
    boundary belongs to the responses, and so do all tokens of a character that it splits."""
    # Nothing merges with a special token: what is before the prompt's last one is encoded once.
    at = max((found.start() for found in kit.breaks.finditer(prompt)), default=0)
    parts = [prompt[:at], *(text[at:] for text in texts)]
    shared, *coded = kit.backend.encode_batch(parts, add_special_tokens=False)
    sides, size = [(each.ids, each.token_to_chars) for each in coded], len(prompt) - at
    cut = min(bisect.bisect(range(len(ids)), size, key=lambda i: span(i)[1]) for ids, span in sides)
    cut = len(os.path.commonprefix([ids[:cut] for ids, _ in sides]))
    while cut and any(len(ids) > cut and span(cut)[0] < span(cut - 1)[1] for ids, span in sides):
        cut -= 1
    left = size - (sides[0][1](cut - 1)[1] if cut else 0)
    return shared.ids + sides[0][0][:cut], [ids[cut:] for ids, _ in sides], left

def encode(kit, args, messages, answers, found):
    """-> (text of the prompt, its token ids, token ids of the two responses)."""
    asked = list(map(pieces, messages))
    told = list(map(pieces, answers))
    if not all(told) or not any(asked):
        drop("empty", [messages[-1]["content"], *(answer["content"] for answer in answers)])
    for said in [] if args.plain else asked + told:
        for _, text in said:
            special = kit.special.search(text)
            if special:
                drop("special token", text[max(0, special.start() - 40):special.end() + 40])
    question, texts, prompt = render(kit, messages, answers, found)
    start, sides, left = tokenise(kit, prompt, texts)
    if sides[0] == sides[1]:
        drop("identical", answers[0]["content"])
    bos = [i for i in kit.bos if (start + sides[0])[0] != i]
    length = len(bos + start) + max(map(len, sides)) + 1
    if length > args.max_length:
        drop("too long", f"{length} tokens")
    if not bos + start or left > 64:
        drop("boundary", f"no token of the prompt ends near its end: {prompt[-64:]}")
    for ids, text in zip(sides, texts, strict=True):
        check_tokens(kit, start + ids, text)
        if kit.end in ids:
            drop("special token", f"{kit.end_token} inside a response: {text[len(prompt):]}")
    return question, bos + start, *(ids + [kit.end] for ids in sides)

def check_tokens(kit, ids, text):
    """Decoding gives the text back, and the model knows all ids."""
    back = kit.backend.decode(ids, skip_special_tokens=False)
    if back != text and canonical(kit, back) != canonical(kit, text):
        at = max(0, len(os.path.commonprefix([back, text])) - 20)
        drop("decode", f"{text[at:at + 50]!r} comes back as {back[at:at + 50]!r}")
    if kit.rows and max(ids) >= kit.rows:
        token = kit.tokenizer.convert_ids_to_tokens(max(ids))
        drop("beyond the embedding", f"{token!r} has the id {max(ids)}, the model {kit.rows} rows")

# -- the folder and the summary
SIDES = ("prompt", "chosen", "rejected")
SCHEMA = pa.schema({side: pa.list_(pa.int32()) for side in SIDES} | {
    "source": pa.string(), "subset": pa.string(), "id": pa.string(), "weight": pa.float32()})
OWN = re.compile(r"train|val|meta\.json|dropped\.jsonl|(train|val)\.arrow|ref-.*|clean|noisy")
FIRST_USER = "the template has no system turn: --system first_user writes it before the question"
HINTS = {  # reason of a drop: what to do
    "too long": "raise --max_length", "ties": "add --ties",
    "special token": "add --plain if the text is rendered already",
    "images": "this trains on text only", "malformed": "mend the rows, or read them by --convert",
    "template leaves out tools": "choose a --model whose template takes tools",
    "template leaves out tool calls": "choose a --model whose template takes tools",
    "template leaves out text of the system turn": FIRST_USER,
    "beyond the embedding": "resize the model's embedding, or take its own tokenizer"}

def hint(reason, kit):
    if reason == "template" and not kit.takes_system:
        return FIRST_USER
    return HINTS.get(reason, "mend the rows")

def chunks(rows):
    """Lists of entries of all_rows, bounded by rows and by bytes."""
    chunk, size = [], 0
    for *place, row in rows:
        try:
            size += len(pickle.dumps([[[[[row]]]]]))
        except Exception as error:  # too deep for another process
            row = f"{type(error).__name__}: {error}"
        chunk.append((*place, row))
        if len(chunk) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

def in_parallel(args):
    """Results of prepare_chunk in the order of the rows, with few chunks in memory at any time."""
    parts, work = chunks(all_rows(args)), functools.partial(prepare_chunk, args)
    mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)  # cores, if Linux
    workers = args.num_proc or len(mine)
    if workers == 1:
        yield from map(work, parts)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = []  # few: map alone would read all rows
        for chunk in parts:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.pop(0).result()
        yield from (each.result() for each in waiting)

def write_pairs(args, kit, out, folder):
    """All pairs to folder/{train,val}.arrow and all drops to folder/dropped.jsonl -> the counts."""
    sources = find_sources(args)
    unit = "B" if isinstance(sources[0][1], Path) else " rows"
    seen = types.SimpleNamespace(rows=0, counts=Counter(), dropped=Counter(), examples={},
                                 pairs=Counter(train=0, val=0), hashes=dict(train=[], val=[]))
    with (open(folder / "dropped.jsonl", "w") as log,
          tqdm(total=sum(size for *_, size, _ in sources), unit=unit, unit_scale=True) as bar,
          pa.OSFile(f"{folder}/train.arrow", "wb") as train,
          pa.OSFile(f"{folder}/val.arrow", "wb") as val):
        writers = {"train": pa.ipc.new_stream(train, SCHEMA), "val": pa.ipc.new_stream(val, SCHEMA)}
        for found in in_parallel(args):
            for split, batch in found.batches.items():
                writers[split].write_batch(batch)
                seen.pairs[split] += len(batch)
                seen.hashes[split].append(found.hashes[split])
            for record in found.dropped:
                seen.dropped[record["reason"]] += 1
                seen.examples.setdefault(record["reason"], f"{record['id']}: {record['value']}")
                log.write(json.dumps(record) + "\n")
            seen.rows, seen.counts = seen.rows + found.rows, seen.counts + found.counts
            bar.set_postfix_str(f"{seen.rows:,} rows", refresh=False)
            bar.update(found.place - bar.n)
            if not is_recognised(seen):
                break
        for writer in writers.values():
            writer.close()
    check_pairs(args, kit, out, folder, seen)
    return seen

def is_recognised(seen):
    """Had any row a known format, or pictures?"""
    return "images" in seen.dropped or any(kind == "format" for kind, _ in seen.counts)

def check_pairs(args, kit, out, folder, seen):
    """End the program unless both splits have pairs."""
    if not seen.rows:
        fail(f"--dataset {args.dataset} has 0 rows: give others")
    empty = [split for split in ("train", "val") if not seen.pairs[split]]
    if not empty:
        return
    record = f"{out}.dropped.jsonl"
    shutil.copy(folder / "dropped.jsonl", record)
    reason = max(seen.dropped, key=seen.dropped.get, default="none")
    kept, dropped = seen.pairs.total(), seen.dropped.total()
    mostly = f"{dropped} dropped, mostly '{reason}' ({seen.examples.get(reason, '')})"
    if not is_recognised(seen):
        names = [f"{name} ({', '.join(sorted(needs))})" for name, (needs, _) in FORMATS.items()]
        fail(f"--dataset {args.dataset}: no row of the first {seen.rows} has a known format: "
             f"{mostly}; known formats: {', '.join(names)}, a prompt under {', '.join(PROMPTS)}; "
             f"read other layouts by --convert FILE.py:FUNCTION; see {record}")
    prompts = len(np.unique(np.concatenate(sum(seen.hashes.values(), []))[:, 0]))
    way = hint(reason, kit) if dropped else ""
    if kept:
        way = "give more prompts, change --val_fraction or --seed, or give --val"
    fail(f"no pair for {' and '.join(empty)}: of {seen.rows} rows of {args.dataset} {kept} pairs "
         f"with {prompts} distinct prompts are kept and {mostly}; {way}; see {record}")

def save(args, kit, folder, seen):
    """The streamed pairs -> train/, val/ and meta.json -> (meta, first pair of train)."""
    datasets.disable_progress_bars()
    splits, subsets, lengths, ids = {}, Counter(), [], []
    for split in ("train", "val"):
        rows = datasets.Dataset.from_file(f"{folder}/{split}.arrow")
        if pc.all(pc.equal(rows.data.column("weight"), 1)).as_py():
            rows = rows.remove_columns("weight")
        rows.save_to_disk(f"{folder}/{split}")
        os.remove(f"{folder}/{split}.arrow")  # stays readable while it is open
        counted = pc.value_counts(rows.data.column("subset")).to_pylist()
        subsets += Counter({entry["values"]: entry["counts"] for entry in counted})
        lengths.append([pc.list_value_length(rows.data.column(side)).to_numpy() for side in SIDES])
        splits[split] = rows
    lengths = np.concatenate(lengths, 1)  # (3, pairs)
    lengths = dict(zip(SIDES, lengths), pair=lengths.sum(0))
    counts = count(seen) | {"subsets": subsets, "longest": longest(splits, lengths["pair"])}
    meta = dict(
        arguments=dataclasses.asdict(args), tokenizer=args.model,
        vocab_hash=vocab_hash(kit.tokenizer),
        template_hash=kit.template and hashlib.sha256(kit.template.encode()).hexdigest()[:16],
        eos_token=kit.end_token, eos_token_id=kit.end, counts=counts,
        content_hash={split: content_hash(rows) for split, rows in splits.items()},
        lengths={name: {f"p{p}": int(np.percentile(n, p, method="higher"))
                        for p in (0, 10, 50, 90, 99, 100)} for name, n in lengths.items()},
        versions={m.__name__: m.__version__ for m in (datasets, transformers, pa, np)}
        | {"python": platform.python_version()})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta, splits["train"][0]

def count(seen):
    """The counts of meta.json and of the summary."""
    kinds = {kind: Counter() for kind in ("format", "unused", "order", "rendered")}
    for (kind, name), n in seen.counts.items():
        kinds[kind][name] += n
    hashes = {split: np.concatenate(parts) for split, parts in seen.hashes.items()}
    prompts = {split: np.unique(pairs[:, 0]) for split, pairs in hashes.items()}
    both = np.concatenate([hashes["train"], hashes["val"]])
    return dict(
        rows=seen.rows, formats=kinds["format"], pairs_in=seen.pairs.total() + seen.dropped.total(),
        pairs_out=seen.pairs.total(), **seen.pairs, dropped=seen.dropped,
        distinct_prompts=len(np.unique(both[:, 0])), repeats=len(both) - len(np.unique(both[:, 1])),
        prompts_in_both=len(np.intersect1d(prompts["train"], prompts["val"])),
        scores=kinds["order"], looks_rendered=kinds["rendered"][True], unused=kinds["unused"])

def longest(splits, lengths):
    """[id, tokens] of the five longest pairs"""
    ids = [name for rows in splits.values() for name in rows["id"]]
    return [[ids[i], int(lengths[i])] for i in np.argsort(-lengths, kind="stable")[:5]]

def vocab_hash(tokenizer) -> str:
    """16 hex digits that change when any token or its id does."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]

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

def check_out(args, out, part):
    """Nothing may be in the way of the result but an earlier one, and that only if asked for."""
    if out.exists():
        if not (args.overwrite and (out / "meta.json").is_file()):
            fail(f"--out {out} exists: choose another; --overwrite replaces a result of this script")
    for folder in (out, part):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        foreign = [name for name in names if not OWN.fullmatch(name)]
        if foreign:
            fail(f"{folder} holds {foreign[0]}, which this script did not make, and would be lost: "
                 "move it, or choose another --out")

def replace(out, part):
    """The new folder takes the place of an earlier one, which goes only when the new one stands."""
    if not out.exists():
        part.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
    out.rename(aside / out.name)
    try:
        part.rename(out)
    except OSError:
        (aside / out.name).rename(out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)

def report(args, kit, meta, pair):
    """Print what was read, what was not, and a pair."""
    counts, lines = meta["counts"], []
    lines.append("formats   " + ", ".join(f"{k}, {n:,} rows" for k, n in counts["formats"].items()))
    lines.append(
        f"rendering {'chat template' if kit.template else 'plain text'}, "
        f"{'BOS' if kit.bos else 'no BOS'} added; responses end in {kit.end_token} ({kit.end})")
    lines.append(
        f"pairs     {counts['pairs_in']:,} in (of {counts['rows']:,} rows) = {counts['train']:,} "
        f"train + {counts['val']:,} val + {counts['dropped'].total():,} dropped")
    for reason, n in counts["dropped"].most_common():
        lines.append(f"  dropped {n:>7,}  {reason}: {hint(reason, kit)}")
    lines += findings(counts)
    for name, points in meta["lengths"].items():
        lines.append(f"{name:10}" + "  ".join(f"{p} {n:>5,}" for p, n in points.items()) + "  tokens")
    decode = kit.tokenizer.decode
    start = decode(pair["prompt"])
    lines.append(f"pair      {pair['id']}; what is scored stands between [[ and ]]\n{start[-500:]}")
    for side in SIDES[1:]:
        lines.append(f"  {side}: [[{decode(pair['prompt'] + pair[side])[len(start):]}]]")
    lines.append(f"wrote     {args.out}")
    print(visible("\n".join(lines)))

def findings(counts):
    """Lines of the summary about what a user may not expect."""
    lines = [f"prompts   {counts['distinct_prompts']:,} distinct; {counts['repeats']:,} pairs are "
             "exact repeats of others"]
    if counts["prompts_in_both"]:
        lines.append(f"  warning {counts['prompts_in_both']:,} prompts are in both train and val")
    unused = [f"{name} ({n:,} rows)" for name, n in counts["unused"].most_common()]
    if unused:
        lines.append(f"columns   not used: {', '.join(unused)}")
    if counts["looks_rendered"]:
        lines.append(f"  warning {counts['looks_rendered']:,} prompts look rendered already: take "
                     "their markers out by --convert, or use --plain")
    agree, tie, contradict = (counts["scores"][name] for name in ("agree", "tie", "contradict"))
    if agree or tie or contradict:
        lines.append(f"scores    of the rows: {agree:,} agree, {tie:,} tie, {contradict:,} contradict "
                     "chosen and rejected; --drop_ties leaves out what ties or contradicts")
    pairs = [f"{name} {n:,}" for name, n in counts["longest"]]
    return [*lines, f"longest   {', '.join(pairs)} tokens"]


if __name__ == "__main__":
    main()
