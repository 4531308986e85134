"""Raw preference pairs -> cleaned, templated, tokenised and split into a folder all scripts read.

    python prepare_data.py --dataset a.jsonl.gz,b.parquet --model MODEL --out data/NAME

Input: .jsonl .json .csv .tsv .parquet (also .gz, .zst), a folder, or a hub name. The format of each
row is recognised by the columns that have a value (FORMATS, below); --convert reads any other.

Columns of any format: `system` or `system_prompt` opens the conversation; `tools` and
`chat_template_kwargs` go to the template; `initial_reason_steps` ends the prompt; `subset`,
`category` or `subject` names the subset; `weight` is kept. Without a chat template, or with
--plain, prompt and response are joined as they are, and a prompt of several turns becomes
"\\n\\nHuman: ...\\n\\nAssistant:". What a template writes to open the assistant's turn belongs to
the prompt, or with --score_header to the response.

Output: train/ and val/ (datasets.load_from_disk: token ids prompt, chosen, rejected; source,
subset, id, weight if any is not 1; prompt_id, chosen_id, rejected_id, which number the distinct
prompts and the distinct responses to them), meta.json, dropped.jsonl. Pairs in = pairs out +
dropped; a row that cannot be read counts as one pair. A response ends in exactly one end token,
which is scored: the special token that the template puts after an answer, else the tokenizer's EOS,
or --eos_token.

Read to line 290: settings, formats, what happens to a row, main. The helpers stand below.
"""
import csv, dataclasses, functools, gzip, hashlib, inspect, io, itertools, json, math
import multiprocessing, os, platform, random, re, runpy, shutil, signal, sys, time, types
from ast import literal_eval
from collections import Counter, defaultdict
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
    trust_remote_code: bool = False  # run the Python files that come with some models
    subset: str = ""  # configuration of a hub dataset
    split: str = "train"  # of --dataset: of the hub, of a folder, or of a .json that holds several
    val: str = ""  # validation set: files, or a split of --dataset; empty = part of the prompts
    convert: str = ""  # FILE.py:FUNCTION, from a row to one of a known format, a list, or None
    overwrite: bool = False  # replace an earlier result in --out
    # what a pair is
    plain: bool = False  # no chat template; the text may be rendered already
    system: Literal["turn", "first_user"] = "turn"  # first_user: its text opens the first question
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
# A function takes the columns that it uses out of the row (pop); the others are reported as not
# used. It returns None if the row has another format, else the prompt (a text, or the messages
# before the answer), a list of chosen answers and a list of rejected ones (each a text, a message,
# or messages that end with the answer), of which the row makes a pair each. Columns that are null
# are not in the row. drop(reason, value) leaves the row out.

def read_choice(row, kit):
    """The right option (answer: its letter, or index from 0) is preferred to each wrong one."""
    if "options" not in row and "choices" not in row:
        return None
    options = row.pop("options") if "options" in row else row.pop("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        drop("malformed", f"options are {options}, not a list of 2 to 26 texts")
    letters, answer = [chr(65 + i) for i in range(len(options))], row.pop("answer")
    right = letters.index(answer) if answer in letters else answer
    if type(right) is not int or not 0 <= right < len(options):
        drop("malformed", f"answer {answer!r} is no letter or index of {len(options)} options")
    lines = [f"{a}. {text_of(text, 'option')}" for a, text in zip(letters, options, strict=True)]
    passages = [text_of(row.pop(name), name) + "\n\n" for name in PASSAGES if row.get(name)]
    question = "".join(passages) + text_of(row.pop("question"), "question")
    replies = lines if kit.template else [" " + line for line in lines]
    prompt = "\n".join([question, *lines, "Answer:"])
    return prompt, [replies[right]], replies[:right] + replies[right + 1:]

def read_alpaca(row, kit):
    """instruction and input are one question, history the turns before it: pairs or messages."""
    if is_blank(row["instruction"]):
        return None
    prompt, extra = row.pop("instruction"), text_of(row.pop("input", ""), "input")
    if extra.strip():
        prompt = f"{text_of(prompt, 'instruction')}\n\n{extra}"
    turns = []
    for turn in from_json(row.pop("history", []), "history") or []:
        if isinstance(turn, list):  # and no message
            question, answer = turn
            turn = [user_turn(question), {"role": "assistant", "content": answer}]
        turns += as_list(turn)
    return turns + [user_turn(prompt)] if turns else prompt, *pop_answers(row)

def read_dialogue(row, kit):
    """Both answers are "\\n\\nHuman: ...\\n\\nAssistant: ...", or go on with such a prompt."""
    column = prompt_column(row)
    prompt, sides = row.get(column, ""), [row["chosen"], row["rejected"]]
    if all(is_dialogue(side) and str(prompt).strip() in side for side in sides):
        row.pop(column, None)
        return [], *([dialogue(row.pop(name), name, kit)] for name in ("chosen", "rejected"))
    if not kit.template or not is_dialogue(prompt):
        return None
    *turns, opened = dialogue(row.pop(column), column, kit)
    if opened["content"]:
        drop("malformed", f"{column} does not end where an answer begins: {opened['content']}")
    sides = pop_answers(row)
    for side in sides:
        side[:] = [answer.strip() if isinstance(answer, str) else answer for answer in side]
    return turns, *sides

def read_several(row, kit):
    if is_several(row["chosen"]) or is_several(row["rejected"]):
        return read_any(row, kit)

def read_conversation(row, kit):
    values = [row["chosen"], row["rejected"], row.get(prompt_column(row))]
    if any(isinstance(as_messages(value), (list, dict)) for value in values):
        return read_any(row, kit)

def read_any(row, kit):
    return row.pop(prompt_column(row), None), *pop_answers(row)

PAIR = {"chosen", "rejected"}
FORMATS = {  # name: (columns that must have a value, function); the first that fits reads the row
    "multiple choice": ({"question", "answer"}, read_choice),
    "ShareGPT": ({"conversations"} | PAIR, read_any),
    "Alpaca": ({"instruction"} | PAIR, read_alpaca),
    "hh-rlhf": (PAIR, read_dialogue),
    "RewardBench-2": (PAIR, read_several),
    "conversation": (PAIR, read_conversation),
    "plain": (PAIR, read_any),
}
PROMPTS = ("conversations", "prompt", "messages", "question", "query", "input", "instruction")
PASSAGES = ("context", "passage", "article", "hint")  # before a multiple-choice question
SUBSETS = ("subset", "category", "subject")  # the first that has a value names the subset
PAIRS_OF_A_ROW = 1000  # at most, of many chosen and many rejected answers

# ---- what happens to a row ----

def prepare_chunk(args, chunk):
    """Entries of all_rows -> the place in the input that is reached, a batch of pairs for each
    split, the records of what is dropped, and counts for the summary."""
    kit, counts = load_tokenizer(args), defaultdict(Counter)
    pairs, dropped = {"train": [], "val": []}, []
    for target, source, key, number, place, row in chunk:
        counts["rows"][source] += 1
        for name, result in prepare_row(kit, key, row, counts):
            if isinstance(result, ValueError):
                reason, value = result.args
                counts["dropped"][reason] += 1
                dropped.append(dict(file=source, line=number, id=name, reason=reason, value=value))
                continue
            is_val = result["prompt_text"] / 2**64 < args.val_fraction
            split = target or ("val" if is_val else "train")
            pairs[split].append(result | {"source": source, "id": name})
    batches = {split: pa.RecordBatch.from_pylist(rows, SCHEMA) for split, rows in pairs.items()}
    return place, batches, dropped, counts

def prepare_row(kit, key, row, counts):
    """A raw row -> for each of its pairs (id, columns, or the ValueError that dropped it)."""
    rows = as_list(attempt(convert_row, kit, row, counts))
    for i, row in enumerate(rows):
        name = key if len(rows) == 1 else f"{key}-{i}"
        found = attempt(read_row, kit, row, key, counts)
        if isinstance(found, ValueError):
            yield name, found
        else:
            yield from prepare_pairs(kit, name + found.suffix, found)
            counts["unused"].update(found.unused)

def prepare_pairs(kit, name, found):
    """What read_row found -> (id, columns or ValueError) of each chosen with each rejected one."""
    chosen = found.chosen[:PAIRS_OF_A_ROW]
    rejected = found.rejected[:PAIRS_OF_A_ROW // len(chosen)]
    pairs = list(itertools.product(chosen, rejected))
    for i, pair in enumerate(pairs):
        one = name if len(pairs) == 1 else f"{name}-{i}"
        yield one, attempt(prepare_pair, kit, found, *pair)
    if len(pairs) < len(found.chosen) * len(found.rejected):
        product = f"{len(found.chosen)} chosen x {len(found.rejected)} rejected"
        yield f"{name}-more", ValueError("more pairs of a row", product)

def read_row(kit, row, key, counts):
    """A row -> its prompt, its chosen and rejected answers, and what its pairs share."""
    if isinstance(row, ValueError):  # of --convert
        raise row
    if not isinstance(row, dict):
        drop("malformed", f"no row: {row}")
    values = {key: each for key, each in row.items() if isinstance(each, str) or not is_blank(each)}
    media = find_media(values)  # a null, NaN or empty list is no value
    if media:
        counts["formats"]["images"] += 1
        drop("images", f"column {media}: {values[media]}")
    name, (prompt, chosen, rejected) = read_format(values, row, kit, counts)
    if name == "multiple choice" and kit.args.wrong_options == "one":
        rejected = [random.Random(f"{kit.args.seed} {key}").choice(rejected)]
    order = own_order(values)
    if kit.args.drop_ties and order in ("tie", "contradict"):
        drop(f"scores {order}", {name: row[name] for name in row if name not in values})
    named = [column for column in SUBSETS if values.get(column)]
    label = text_of(str(values.pop(named[0])), "subset") if named else ""
    weight = number(values.pop("weight", row.get("weight", 1.0)))  # null is no weight either
    if weight is None or not 0 <= weight < 1e30:
        drop("malformed", f"weight is {row['weight']!r}, not a number from 0")
    ties, suffix = name == "RewardBench-2" and label == "Ties", ""
    if ties:  # evaluate.py groups their pairs by the row's own id
        suffix = ":" + text_of(str(values.pop("id", None)), "id")
    found = types.SimpleNamespace(
        format=name, prompt=prompt, chosen=chosen, rejected=rejected, label=label, ties=ties,
        suffix=suffix, weight=weight, tools=read_tools(values.pop("tools", [])),
        system=text_of(values.pop("system", "") or values.pop("system_prompt", ""), "system"),
        start=text_of(values.pop("initial_reason_steps", ""), "initial_reason_steps"),
        options=from_json(values.pop("chat_template_kwargs", {}), "chat_template_kwargs") or {})
    counts["scores"][order] += 1
    if kit.template and isinstance(prompt, str) and RENDERED.search(prompt):
        counts["rendered"][name] += 1
    found.unused = {name: 1 for name in values if not is_blank(values[name])}
    return found

def read_format(values, row, kit, counts):
    """-> name of the first format that reads the row, its (prompt, chosen, rejected)"""
    for name, (columns, function) in FORMATS.items():
        found = attempt(function, values, kit) if columns <= values.keys() else None
        if found:
            counts["formats"][name] += 1
            if isinstance(found, ValueError):  # a format that is known, and a row that is bad
                raise found
            return name, found
    if PAIR <= row.keys():
        counts["formats"]["no answer"] += 1
        drop("malformed", f"{min(PAIR - values.keys())} is not valid text: None or []")
    drop("malformed", f"columns of no known format: {', '.join(map(str, row))}")

def prepare_pair(kit, found, chosen, rejected):
    """-> columns of a pair. prompt_text numbers the text of the prompt and decides the split. The
    ids are hashes here, which number_texts replaces."""
    if found.ties and not kit.args.ties:
        drop("ties", chosen)
    messages, answers = read_pair(kit, found, chosen, rejected)
    text, *ids = encode(kit, messages, answers, found)
    # Prompts that differ only in white space or Unicode form may have equal tokens: one split.
    text = f"{kit.args.seed} {' '.join(canonical(kit, text).split())}"
    prompt, chosen, rejected = map(tuple, ids)  # of numbers: every process hashes them alike
    return dict(
        zip(SIDES, ids), subset=found.label, weight=found.weight,
        prompt_text=int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"),
        prompt_id=hash(prompt), chosen_id=hash((prompt, chosen)),
        rejected_id=hash((prompt, rejected)))

def main():
    args = parse_args(Args)
    out = Path(args.out)  # without a slash at its end
    part = Path(f"{out}.partial")
    if args.val_fraction >= 1:
        fail(f"--val_fraction {args.val_fraction} must be below 1")
    if sys.argv.count("--dataset") > 1:
        fail("--dataset is given twice: put its files into one, separated by commas")
    check_out(args, out, part)
    kit = load_tokenizer(args)
    if args.convert:
        load_converter(args.convert)  # an error in its file is found here
    sources = find_sources(args)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        counts = write_pairs(args, sources, part)
        splits = {name: datasets.Dataset.from_file(f"{part}/{name}.arrow") for name in SPLITS}
        counts = count(splits, counts)
        check_pairs(args, counts, part)
        meta = save(kit, part, splits, counts)
        replace(out, part)
    except OSError as error:
        fail(f"cannot write {part}: {error}; make room or choose another --out")
    except process.BrokenProcessPool:
        fail("a worker process was killed, probably for memory: lower --num_proc")
    finally:  # a result that is not whole is none
        shutil.rmtree(part, ignore_errors=True)
    report(kit, meta, splits["train"][0])

# ---- helpers, which a new format does not touch ----

# -- command line, errors
def parse_args(cls):
    """Command line -> dataclass `cls`; --help shows its source. Its comments are read: a number
    is above 0, or maybe 0 if "0 =" or the default says so; a share or fraction is at most 1."""
    source = inspect.getsource(cls)
    parser = transformers.HfArgumentParser(cls, allow_abbrev=False)
    parser.format_help = lambda: source
    parser.error = lambda message: fail(f"{message}; see --help")
    values = vars(parser.parse_args())
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    for name, value in values.items():
        if type(value) is str:
            values[name] = value.rstrip("/") or value  # model/ and model are one name
        comment = comments.get(name, "")
        least = 0 if getattr(cls, name, None) == 0 or "0 =" in comment else sys.float_info.min
        most = 1 if re.match("share|fraction|probability", comment) else sys.float_info.max
        if type(value) in (int, float) and not least <= value <= most:
            limit = "at most 1" if most == 1 else "finite"
            fail(f"--{name} {value} must be {'above' if least else 'at least'} 0 and {limit}")
    return cls(**values)

def fail(message):
    """End the program with one line on stderr and exit status 1."""
    if int(os.environ.get("RANK", 0)) > 0:  # mostly rank 0 fails too; then torchrun ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    raise SystemExit("error: " + " ".join(message.split()))

def drop(reason, value):
    """Leave a row or a pair out; the summary counts `reason`, `value` shows what is wrong."""
    raise ValueError(reason, short(value))

def attempt(step, *inputs):
    """What a step returns, or the ValueError(reason, value) that drops a row: that of drop(), or
    for any other exception its type. No row may end the run."""
    try:
        return step(*inputs)
    except Exception as error:
        if type(error) is ValueError and len(error.args) == 2:
            return error
        return ValueError("error", short(f"{type(error).__name__}: {error}"))

def visible(text):
    """Text for a terminal: control characters, which could move its cursor, are escaped."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)

def short(value):
    text = visible(" ".join(str(value).split()))
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"

@functools.cache
def load_converter(spec):
    """The function that --convert FILE.py:FUNCTION names, loaded once per process."""
    path, _, name = spec.rpartition(":")
    sys.path.append(os.path.dirname(path))  # the file may import its neighbours
    try:
        return runpy.run_path(path)[name]
    except Exception as error:  # whatever the user's file raises
        fail(f"--convert {spec}: {type(error).__name__}: {short(error)}; give FILE.py:FUNCTION")

def convert_row(kit, row, counts):
    """A raw row -> the list of rows that --convert makes of it, or of the row itself."""
    row = from_json(row, "the row")
    if not kit.args.convert or not isinstance(row, dict):
        return [row]
    made = attempt(load_converter(kit.args.convert), row)
    if isinstance(made, ValueError):
        drop("convert", made.args[1])
    if not made:
        counts["formats"]["left out by --convert"] += 1
        drop("convert", f"the function gives {made}")
    return as_list(made)

# -- files and rows
FILE = re.compile(r"(.+)\.(jsonl|json|csv|tsv|parquet)(\.gz|\.zst)?")
CHUNK_SIZE = 2**18  # characters of the rows that a process handles at once
ARROW_ROWS = 16  # that are taken out of an Arrow table at once: few, as they may be large

def file_names(text):
    """"a.jsonl, b.csv", or one on a line -> paths; [] if it is a folder or a hub name. Quotes
    protect commas."""
    names = ",".join(text.splitlines())
    parts = [text] if os.path.isfile(text) else next(csv.reader([names], skipinitialspace=True))
    paths = [Path(part.strip()).expanduser() for part in parts if part.strip()]
    are_files = all(FILE.fullmatch(path.name) and not os.path.isdir(path) for path in paths)
    return paths if are_files else []

def kind_of(path):
    return FILE.fullmatch(path.name)[2]

def find_sources(args):
    """Files and data sets to read, each with its rows, the split that these go to ("" if their
    prompts decide), its name, where it is, the stem of its ids, its size in bytes or rows."""
    inputs = [("train" if args.val else "", args.dataset, args.split)]
    if args.val and (file_names(args.val) or os.path.exists(args.val)):
        inputs.append(("val", args.val, "train" if file_names(args.val) else args.split))
    elif args.val:
        inputs.append(("val", args.dataset, args.val))
    sources = []
    for target, text, split in inputs:
        mark = "" if split == args.split else f"{split}/"
        for path in file_names(text):
            if not os.path.exists(path):
                fail(f"{path}: No such file; check --dataset {args.dataset} --val {args.val}")
            if split != "train" and kind_of(path) != "json":
                fail(f"{path} has no split {split}: give --val a file, or leave --split out")
            sources.append(types.SimpleNamespace(
                rows=file_rows(path, split), target=target, name=path.name, place=str(path),
                stem=mark + FILE.fullmatch(path.name)[1], size=path.stat().st_size))
        if not file_names(text):
            table = load_table(args, text, split)
            rows = enumerate(arrow_rows(table.iter(ARROW_ROWS)), 1)
            sources.append(types.SimpleNamespace(
                rows=((number, row, number) for number, row in rows), target=target, name=text,
                place=text, stem=mark + text, size=len(table)))
    stems = Counter(source.stem for source in sources)
    for source in sources:
        if stems[source.stem] > 1:  # ids are unique over all files
            source.stem = source.place
    if len({source.stem for source in sources}) < len(sources):
        fail(f"--dataset {args.dataset} --val {args.val} names a file twice")
    return sources

def load_table(args, name, split):
    """A split of a hub dataset, of a folder of files, or of a folder made by save_to_disk."""
    try:
        if Path(name, "dataset_dict.json").exists() or Path(name, "state.json").exists():
            rows = datasets.load_from_disk(name)
            if isinstance(rows, dict) and split not in rows:
                fail(f"{name} has no split '{split}': choose one of {', '.join(rows)}")
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            kinds = {path.suffix for path in Path(name).glob("**/*")}
            kinds &= {".jsonl", ".csv", ".tsv", ".parquet"}  # .json may describe the data
            if len(kinds) > 1:  # datasets would read the most frequent kind only
                fail(f"{name} has {' and '.join(sorted(kinds))} files: give the files themselves")
            rows = datasets.load_dataset(name, args.subset or None, split=split)
        return rows.with_format("arrow")  # so that no image is decoded
    except Exception as error:  # hub, network, name, split, folder: each raises its own errors
        fail(f"--dataset {name} --subset '{args.subset}' --split {split}: {type(error).__name__}: "
             f"{short(error.__cause__ or error)}; give a hub name, a folder, or .jsonl, .json, "
             ".csv, .tsv or .parquet files (.gz, .zst); quote a name that has a comma")

def all_rows(sources):
    """-> (split or "", source, id, number, place in the whole input, row: a dict or its JSON)"""
    start = 0
    for source in sources:
        number = 0
        try:
            for number, row, place in source.rows:
                key, place = f"{source.stem}:{number:06d}", start + place
                yield source.target, source.name, key, number, place, row
        except Exception as error:  # of the file: gzip, zstd, Arrow and codecs raise their own
            fail(f"cannot read {source.place} after row {number}: {short(error)}; check --dataset "
                 "or the file")
        start += source.size

def file_rows(path, split):
    """-> (line or row number from 1, row, how many bytes of the file are read)"""
    with open(path, "rb") as raw:
        read = parquet_rows if kind_of(path) == "parquet" else text_rows
        rows, total = read(path, raw, split)
        size = path.stat().st_size
        for number, row in enumerate(rows, 1):
            if row != "":  # a blank line
                yield number, row, size * number / total if total else raw.tell()

def unzip(path, raw):
    if path.suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return gzip.open(raw) if path.suffix == ".gz" else raw

def text_rows(path, raw, split):
    """Of .jsonl, .json, .csv or .tsv in UTF-8, 16 or 32; bytes that are no text spoil their row.
    -> (rows, how many, or None if that is not known)"""
    stream = unzip(path, raw)
    encoding = json.detect_encoding(stream.peek(4)[:4])
    errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
    text = io.TextIOWrapper(stream, encoding, errors, newline="\n")
    rows = json_rows(text, path, split) if "json" in kind_of(path) else csv_rows(text, path)
    return rows, len(rows) if isinstance(rows, list) else None

def parquet_rows(path, raw, split):
    """-> (rows, how many). In .gz one cannot seek the index, which is at the end of the file."""
    stream = unzip(path, raw)
    file = pq.ParquetFile(raw if stream is raw else pa.BufferReader(stream.read()))
    return arrow_rows(file.iter_batches(ARROW_ROWS)), file.metadata.num_rows

def arrow_rows(batches):
    for batch in batches:
        for row in batch.to_pylist():
            yield {name: without_nulls(value) for name, value in row.items()}

def without_nulls(value):
    """Arrow gives a dict the keys of all rows, null where a row has none; take them out."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value

def csv_rows(text, path):
    csv.field_size_limit(2**31 - 1)
    header = text.readline()
    delimiter = "\t" if kind_of(path) == "tsv" else max(",;\t", key=header.count)
    rows = csv.DictReader(itertools.chain([header], text), delimiter=delimiter, strict=True)
    return iter(functools.partial(csv_row, rows), None)  # None is the end

def csv_row(rows):
    """The next row, None at the end, or the ValueError that drops it."""
    try:
        row = next(rows, {})
    except csv.Error as error:  # of wrong quotes, which would lose or shift some text
        return ValueError("malformed", str(error))
    if None in row:  # cells without a column
        return ValueError("malformed", short(f"more cells than columns: {row}"))
    return {str(name).strip(): cell or None for name, cell in row.items()} or None

def json_rows(text, path, split):
    """The rows of .json or .jsonl as JSON text, which can be sent to another process however deep
    it is nested: those of one JSON value, or else each object, on a line or pretty-printed."""
    start = [text.readline(), text.readline()]
    first = start[0].strip().rstrip(",")
    if kind_of(path) == "jsonl":
        is_lines = first not in ("[", "{") and not first.startswith("[{")
    else:
        is_lines = start[1].strip() and isinstance(attempt(json.loads, first), dict)
    if is_lines:
        return (line.strip().rstrip(",") for line in itertools.chain(start, text))
    whole = "".join(start) + text.read()
    value = attempt(json.loads, whole)
    if isinstance(value, (dict, list)):
        return [attempt(json.dumps, row) for row in rows_in(value, path, split)]
    if kind_of(path) == "json" and not whole.lstrip().startswith("{"):
        why = value.args[1] if isinstance(value, ValueError) else value
        fail(f"{path} is not JSON, or no list of rows: {why}; give a list of rows, or .jsonl")
    rows = re.split(r"\n(?=\{)", whole.strip())  # one after another, each begins a line
    return [row.strip().rstrip(",") for row in rows]

def rows_in(value, path, split):
    """The rows of one JSON value: a list, a list under a key, columns, rows by id, or one row."""
    if isinstance(value, dict) and isinstance(value.get(split), (list, dict)):
        return rows_in(value[split], path, "train")
    if split != "train":
        fail(f"{path} has no split {split}: give --val a file, or choose another --split")
    if isinstance(value, list):
        return value
    columns = list(value.values())
    pairs = [each for each in columns if isinstance(each, dict) and PAIR <= each.keys()]
    if len(pairs) == len(columns) and not any(is_several(pair["chosen"]) for pair in pairs):
        return pairs
    if all(isinstance(column, dict) and "0" in column for column in columns):  # as pandas writes
        value = {name: list(column.values()) for name, column in value.items()}
    lists = {name: each for name, each in value.items() if isinstance(each, list)}
    keys = [name for name, each in lists.items() if each and isinstance(each[0], dict)]
    is_table = len(lists) == len(value) > 1 and len(set(map(len, lists.values()))) == 1
    if is_table and len(keys) < len(value):
        return [dict(zip(value, cells)) for cells in zip(*lists.values())]
    if not keys or PAIR <= value.keys():
        return [value]
    if len(keys) > 1:
        fail(f"{path} has rows under {', '.join(keys)}: choose one with --split")
    return value[keys[0]]

# -- columns and messages
ROLES = dict(user="user", human="user", assistant="assistant", gpt="assistant", model="assistant",
             system="system", developer="system", tool="tool", function="tool", observation="tool",
             function_call="assistant")
HEADINGS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
SPOKEN = ("reasoning_content", "reasoning", "thinking", "function_calls", "functions")  # texts
MEDIA = re.compile(r"(input_)?(image|img|video|audio)s?(_?(\d+|path|file|url|id|name|bytes)s?)?",
                   re.IGNORECASE)
RENDERED = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<start_of_turn>|\[/?INST\]|"
                      r"### ?(Instruction|Human|User|Response)|(^|\n)Human: |USER: ")
MESSAGES = re.compile(r"""\s*\[?\s*\{\s*(["']\w+["']:\s*["']?[\w.-]*["']?,\s*)*"""  # "id": 7,
                      r"""["'](role|from|content|value)["']\s*:""")  # as text
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SCORE = re.compile(r"(\w+_)?(score|rating|reward)_chosen|chosen[_-](\w+_)?(score|rating|reward)")
VERDICTS = dict(chosen=1, tie=0, tied=0, equal=0, same=0, draw=0, both=0, neither=0, rejected=-1)

def as_list(value):
    return value if isinstance(value, list) else [value]

def is_blank(value):
    """Is it null, NaN, white space, or a list or dict of such?"""
    if isinstance(value, (list, dict)):
        return all(map(is_blank, value.values() if isinstance(value, dict) else value))
    return value is None or value != value or isinstance(value, str) and not value.strip()

def find_media(values):
    """The first key of a dict that stands for an image, a video or a sound and is not blank."""
    media = [name for name in values if MEDIA.fullmatch(str(name)) and not is_blank(values[name])]
    return media[0] if media else None

def text_of(value, name):
    if not isinstance(value, str) or HALF.search(value):
        drop("malformed", f"{name} is not valid text: {value!r}")
    return value

def number(value):
    """A number, maybe as text, as a float; None for anything else."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None

def from_json(value, name):
    """A list or dict that may be given as JSON text, which may be blank."""
    try:
        return json.loads(value.strip() or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        drop("malformed", f"{name} is not JSON: {error}: {value}")

def as_messages(value):
    """A text that is a message or a list of messages, as JSON or Python writes it -> these."""
    if not isinstance(value, str) or not MESSAGES.match(value):
        return value
    found = attempt(json.loads, value)
    if isinstance(found, ValueError):
        found = attempt(literal_eval, value.strip())
    if isinstance(found, ValueError):
        drop("malformed", f"messages that are not JSON: {value}")
    keys = [each.keys() if isinstance(each, dict) else set() for each in as_list(found)]
    said = {"content", "value", "tool_calls", "function_call"}
    return found if all({"role", "from"} & each and said & each for each in keys) else value

def prompt_column(row):
    """The column of the prompt, if possible one that is not empty; None if there is none."""
    there = [name for name in PROMPTS if name in row]
    filled = [name for name in there if not is_blank(row[name])]
    return next(iter(filled + there), None)

def is_several(answer):
    return isinstance(answer, list) and bool(answer) and not isinstance(answer[0], dict)

def pop_answers(row):
    """-> list of the chosen answers, list of the rejected ones"""
    sides = [row.pop("chosen"), row.pop("rejected")]
    return [side if is_several(side) else [side] for side in sides]

def user_turn(text):
    return {"role": "user", "content": text}

def is_dialogue(text):
    opens = isinstance(text, str) and text[:20].lstrip().startswith("Human:")
    return opens and "\n\nAssistant:" in text

def dialogue(text, name, kit):
    """Text of Human and Assistant -> messages that end with the last answer. Without a template
    all before that answer is one message, as it is."""
    text = text_of(text if text.startswith("\n\nHuman:") else "\n\n" + text.lstrip(), name)
    turns = re.findall(r"(?s)\n\n(Human|Assistant):(.*?)(?=\n\nHuman:|\n\nAssistant:|\Z)", text)
    if turns[-1][0] == "Human":  # the answer is empty
        turns.append(("Assistant", ""))
    if not kit.template:
        answer = turns[-1][1]
        return [user_turn(text.removesuffix(answer)), {"role": "assistant", "content": answer}]
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in turns]

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
    calls = from_json(value.get("tool_calls") or value.get("function_call") or [], "tool_calls")
    if role == "function_call":
        calls, content = from_json(content, "function_call"), None
    if calls:
        more["tool_calls"] = [read_call(call) for call in as_list(calls)]
    if content is None and (calls or any(more.get(key) for key in SPOKEN)):
        content = ""
    parts = [part if isinstance(part, dict) else {"text": part} for part in as_list(content)]
    for part in [value, *parts]:
        media = find_media(part)
        if media or MEDIA.fullmatch(str(part.get("type"))):
            drop("images", f"{name} has a message with {media or part['type']}")
    said = [text_of(part.get("text"), f"{part.get('type', 'content')} in {name}") for part in parts]
    return {"role": ROLES[role.lower()], "content": "\n".join(said)} | more

def read_call(call):
    """A tool call as templates expect it: {type, function: {name, arguments as a dict}}."""
    function = call.get("function", call)
    given = [function[name] for name in ("arguments", "parameters", "input") if name in function]
    arguments = from_json(given[0], "arguments") if given else {}
    outer = call if "function" in call else {"type": "function"}
    return outer | {"function": {"name": function.get("name"), "arguments": arguments or {}}}

def read_tools(value):
    """A list of tools, or one, of which all or each may be JSON text -> the list."""
    return [from_json(tool, "a tool") for tool in as_list(from_json(value, "tools") or [])]

def read_turns(value, name, role):
    """A column -> its messages; a text is one, of this role."""
    value = as_messages(value)
    if isinstance(value, (list, dict)):
        return [read_message(each, name) for each in as_list(value)]
    return [{"role": role, "content": text_of(value, name)}]

def read_answer(value, name):
    """One side of a pair -> messages before the answer, the answer as a message."""
    turns = read_turns(value, name, "assistant")
    if not turns or turns[-1]["role"] != "assistant":
        drop("malformed", f"{name} does not end with an assistant turn: {value}")
    return turns[:-1], turns[-1]

def read_prompt(prompt, before, answers):
    """The prompt of a row and the messages before its answers -> all messages, each once."""
    prompt = as_messages(prompt)
    if before and not isinstance(prompt, (list, dict)):  # its text only repeats some of `before`
        text, turns = str(prompt or "").strip(), [turn["content"] for turn in before]
        if text and not any(find_end(text, turn) or find_end(turn, text) for turn in turns):
            drop("prompts differ", f"{prompt} / {before}")
        return before
    if prompt is None:
        drop("malformed", "prompt is not valid text: None, and the answers are no dialogue")
    turns = read_turns(prompt, "prompt", "user")
    if turns and turns[-1] in answers:  # the conversation with its answer
        turns.pop()
    return overlap(turns, before)

def read_pair(kit, found, chosen, rejected):
    """Raw chosen and rejected answer of a row -> messages before the answer, [the two answers]."""
    before, chosen = read_answer(chosen, "chosen")
    other, rejected = read_answer(rejected, "rejected")
    if before != other:
        unequal = (f"{a} / {b}" for a, b in zip(before, other) if a != b)
        drop("prompts differ", next(unequal, before or other))
    messages = read_prompt(found.prompt, before, [chosen, rejected])
    keys = dict(found.options)
    for message in [*messages, chosen, rejected]:
        tools = read_tools(message.pop("tools", []))
        found.tools += [tool for tool in tools if tool not in found.tools]
        keys |= {key: 1 for key in message if key not in ("role", "content")}
    found.unused |= {f"key {key}": 1 for key in keys if str(key) not in kit.template}
    systems = [turn["content"].strip() for turn in messages if turn["role"] == "system"]
    if found.system.strip() not in ["", *systems]:
        messages = [{"role": "system", "content": found.system}, *messages]
    check_order(messages, found.format)
    if kit.args.system == "first_user" and messages[0]["role"] == "system":
        system, *messages = messages
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = f"{system['content']}\n\n{first['content']}"
    return messages, [chosen, rejected]

def overlap(turns, before):
    """Messages of the prompt and those before the answer, which may repeat some -> each once."""
    bare = [message | {"content": message["content"].strip()} for message in turns + before]
    left, right = bare[:len(turns)], bare[len(turns):]
    for start in range(len(before) - len(turns) + 1):
        if right[start:start + len(turns)] == left:
            return before
    for size in range(min(len(turns), len(before)), 0, -1):
        if left[-size:] == right[:size]:
            return turns[:-size] + before
    return turns + before

def check_order(messages, format):
    """Drop what columns that do not belong together would make."""
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] not in ("user", "tool"):
        drop("malformed", f"the prompt does not end with a user turn: {messages}")
    if "system" in roles[1:]:
        drop("malformed", f"a system turn that is not the first: {messages}")
    if ("user", "user") in zip(roles, roles[1:]) and format != "hh-rlhf":  # whose people do so
        drop("malformed", f"two user turns in a row: {messages}")

def own_order(values):
    """agree, tie or contradict: what a row's own scores say of its chosen and rejected answer."""
    gaps = []
    for chosen in [name for name in values if SCORE.fullmatch(str(name))]:
        rejected = chosen.replace("chosen", "rejected")
        scores = [number(values.get(name)) for name in (chosen, rejected)]
        if None not in scores:
            gaps.append(scores[0] - scores[1])
            del values[chosen], values[rejected]
    for name in {"margin", "score_margin", "preference", "label"} & values.keys():
        value = values[name]
        gap = number(VERDICTS.get(str(value).strip().lower(), value))
        if gap is not None:
            is_class = name == "label" and not isinstance(value, str)  # 1 or 0
            gaps.append(gap - 0.5 if is_class else gap)
            del values[name]
    if not gaps:
        return "none"
    if min(gaps) == 0:
        return "tie"
    return "agree" if min(gaps) > 0 else "contradict"

# -- rendering: messages -> text
def tokenizer_folder(name):
    """The folder: final/ of a run, the base of a LoRA adapter that has none; or the hub name."""
    folder = Path(name, "final") if Path(name, "final").is_dir() else Path(name)
    adapter = folder / "adapter_config.json"
    if (folder / "tokenizer_config.json").exists() or not adapter.exists():
        return folder if folder.is_dir() else name
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    return tokenizer_folder(str(folder / base) if (folder / base).is_dir() else base)

@functools.cache
def load_tokenizer(args):
    """What rendering needs, once per process. `tail` is what the template writes after an answer,
    from its end token on; it is cut off, and the end token comes back as the id `end`."""
    probe = [user_turn("Q"), {"role": "assistant", "content": "An answer."}]
    folder, tail = tokenizer_folder(args.model), ""
    trust = dict(trust_remote_code=args.trust_remote_code)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
        has_template = tokenizer.chat_template and not args.plain
        template = tokenizer.get_chat_template() if has_template else ""
        if template:
            text = tokenizer.apply_chat_template(probe, tokenize=False)
            tail = text.rpartition("An answer.")[2]
    except Exception as error:  # a wrong name, no network, a broken file or template: all differ
        fail(f"tokenizer or template of --model {args.model}: {short(error)}; check the name, "
             "or --plain if the template is at fault")
    if args.score_header and not template:
        fail(f"--score_header needs a chat template: leave out --plain, or change {args.model}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **trust)
        rows = config.get_text_config().vocab_size
    except Exception:  # a folder with a tokenizer and no model
        rows = len(tokenizer)
    tokens = tokenizer.added_tokens_decoder.values()
    special = one_of(token.content for token in tokens if token.special)
    found = re.search(re.escape(args.eos_token) or special, tail) or re.search(special, tail)
    end = args.eos_token or (found[0] if found else tokenizer.eos_token)
    end_id = tokenizer.get_vocab().get(end, rows)
    if not tokenizer.is_fast or end_id >= rows:
        fail(f"--model {args.model} needs a tokenizer.json, for character offsets, and the end "
             f"token {end!r} in its vocabulary and its embedding of {rows} rows; set --eos_token")
    backend = tokenizer.backend_tokenizer  # 1.3 x as fast as through the wrapper
    backend.no_truncation()  # --max_length decides
    backend.no_padding()
    first = [] if template else tokenizer("a").input_ids[:1]
    whole = (each for each in tokens if not (each.normalized or each.lstrip or each.single_word))
    return types.SimpleNamespace(
        args=args, tokenizer=tokenizer, backend=backend, template=template, rows=rows,
        bos=first if first == [tokenizer.bos_token_id] else [], end=end_id, end_token=end,
        tail=tail[found.start():] if found else tail[len(tail.rstrip()):],
        special=re.compile(special), breaks=re.compile(one_of(each.content for each in whole)),
        seams=re.compile(rf"\s*({one_of(each.content for each in tokens)})\s*"))

def one_of(texts):
    """A regular expression that matches any of the texts, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"  # which matches nothing

def render(kit, messages, answers, found):
    """-> (text of the prompt, [prompt + answer, without end token], the part that is not scored),
    which goes on to the end of `start`, the beginning of an answer that a row may have."""
    start = found.start if kit.template or not found.start else "\n" + found.start
    if start:
        answers = [answer | {"content": start + answer["content"]} for answer in answers]
    render_all = render_chat if kit.template else render_plain
    prompt, texts, bare = render_all(kit, messages, answers, found)
    if start:
        end = texts[0].index(start.strip(), len(prompt)) + len(start.strip())
        bare = os.path.commonprefix([texts[0][:end], texts[1]])
    return prompt, [text_of(text, "the rendered text") for text in texts], bare

def render_plain(kit, messages, answers, found):
    """Prompt and answer as they are; several turns as Human: and Assistant:."""
    prompt, gap = messages[0]["content"], ""
    if len(messages) > 1:
        prompt = "".join(f"\n\n{HEADINGS[m['role']]}: {m['content']}" for m in messages)
        prompt, gap = prompt + "\n\nAssistant:", " "
    end = re.escape(kit.end_token) + r"\s*\Z"
    texts = [re.sub(end, "", prompt + gap + answer["content"]) for answer in answers]
    return prompt, texts, prompt

def render_chat(kit, messages, answers, found):
    """By the chat template. Templates strip, reorder and leave out, so a response is whatever
    follows the prompt in the rendered conversation; with --score_header it begins where the
    question ends."""
    options = {"tools": found.tools or None} | found.options | {"tokenize": False}
    chat = functools.partial(kit.tokenizer.apply_chat_template, **options)
    try:
        prompt = chat(messages, add_generation_prompt=True)
        texts = chat([[*messages, answer] for answer in answers])
        whole = all(text.startswith(prompt) for text in texts)
        bare = prompt if whole and not kit.args.score_header else chat(messages)
    except Exception as error:  # a template raises what it likes
        drop("template", f"{type(error).__name__}: {error}")
    if not whole:  # it opens <think> for generation and leaves it out of a conversation
        prompt = os.path.commonprefix([prompt, *texts])
    if not prompt.startswith(bare) or not all(text.endswith(kit.tail) for text in texts):
        drop("template", f"the conversation is not prompt + answer + {kit.tail!r}: {texts[0]}")
    texts = [text.removesuffix(kit.tail) for text in texts]
    return prompt, texts, bare if kit.args.score_header else prompt

def check_content(said, text, size):
    """Drop a pair unless its text, whose first `size` characters are the prompt, has all that the
    messages say: `said`, the pieces of each. Templates leave out thoughts, tools, system turns.
    The pieces stand in their order, but tools and a system turn may be anywhere in the prompt."""
    at = 0
    for i, own in enumerate(said):
        begin, end = at, size if i < len(said) - 1 else len(text)
        for what, piece in own:
            anywhere = what in ("tools", "functions", "text of system turn")
            found = find_end(piece, text, 0 if anywhere else begin, end)
            if found is None:
                drop(f"{what} left out by the template", piece)
            at = at if anywhere else max(at, found)

def find_end(piece, text, begin=0, end=sys.maxsize):
    """Where a piece ends in the text, maybe with other white space or escaped as in JSON."""
    place = text.find(piece, begin, end)
    if place >= 0:
        return place + len(piece)
    forms = [piece.split(), json.dumps(piece, ensure_ascii=False)[1:-1].split()]
    pattern = "|".join(r"\s*".join(map(re.escape, words)) for words in forms)
    found = re.compile(pattern).search(text, begin, end)
    return found.end() if found else None

def pieces(message):
    """[(what it is, text)] of all that a message says; of the arguments of a call every word."""
    found = [(f"text of {message['role']} turn", message["content"])]
    if message["content"][:20].lstrip().startswith("<think>"):
        thought, _, rest = message["content"].partition("</think>")
        found = [("<think>", thought), (f"text of {message['role']} turn", rest)]
    found += [(key, text_of(message[key], key)) for key in SPOKEN if message.get(key)]
    for call in message.get("tool_calls", []):
        said = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        said = re.sub(r"\\(u....|.)", " ", said)  # \n and the like, which a template may not escape
        words = [text_of(call["function"].get("name"), "name of a call"), *re.findall(r"\w+", said)]
        found += [("tool calls", w) for w in words if w not in ("true", "false", "null")]
    return [(what, text.strip()) for what, text in found if text.strip()]

def pieces_of_tools(tools):
    """The name of each tool, and the first line of what it does, as pieces() gives them."""
    found = []
    for tool in tools:
        function = tool.get("function", tool)
        about = str(function.get("description") or "").strip()
        lines = [text_of(function.get("name"), "the name of a tool"), *about.splitlines()[:1]]
        found += [("tools", line) for line in lines]
    return found

# -- tokens
def canonical(kit, text: str) -> str:
    """Text without what tokenizers change on purpose: normal form, spaces around special tokens."""
    normalizer = kit.backend.normalizer
    text = normalizer.normalize_str(text) if normalizer else text
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
    sides, size = [each.ids for each in coded], len(prompt) - at
    places = [each.token_to_chars for each in coded]  # number of a token -> its (start, end)
    cut = len(os.path.commonprefix(sides))
    while cut and not all(is_boundary(cut, *each, size) for each in zip(sides, places)):
        cut -= 1
    left = size - (places[0](cut - 1)[1] if cut else 0)
    return shared.ids + sides[0][:cut], [ids[cut:] for ids in sides], left

def is_boundary(cut, ids, place, size):
    """Do `cut` tokens end inside the prompt, and not inside a character?"""
    end = place(cut - 1)[1]
    return end <= size and (cut == len(ids) or end <= place(cut)[0])

def encode(kit, messages, answers, found):
    """-> (text of the prompt, its token ids, token ids of the two responses)."""
    asked, told = list(map(pieces, messages)), list(map(pieces, answers))
    if not all(told) or not any(asked):
        drop("empty", [messages[-1]["content"], *(answer["content"] for answer in answers)])
    said = [] if kit.args.plain else sum(asked + told, [])
    for _, text in said:
        special = kit.special.search(text)
        if special:
            drop("special token", text[max(0, special.start() - 40):special.end() + 40])
    question, texts, prompt = render(kit, messages, answers, found)
    if not all(text[max(len(question), len(prompt)):].strip() for text in texts):
        drop("empty", f"rendering leaves nothing of a response: {answers}")
    tools = pieces_of_tools(found.tools)
    for own, text in zip(told, texts, strict=True):  # rendering took an end token off the text
        check_content([tools, *asked, own], text + kit.end_token, len(question))
    start, sides, left = tokenise(kit, prompt, texts)
    if sides[0] == sides[1]:
        drop("identical", answers[0]["content"])
    bos = [i for i in kit.bos if (start + sides[0])[0] != i]
    length = len(bos + start) + max(map(len, sides)) + 1
    if length > kit.args.max_length:
        drop("too long", f"{length} tokens")
    if not bos + start or left > 64:
        drop("boundary", f"no token of the prompt ends near its end: {prompt[-64:]}")
    for ids, text in zip(sides, texts, strict=True):
        check_ids(kit, start + ids, text)
        if kit.end in ids:
            drop("special token", f"{kit.end_token} inside a response: {text[len(prompt):]}")
    return question, bos + start, *(ids + [kit.end] for ids in sides)

def check_ids(kit, ids, text):
    """Drop a pair whose token ids do not give its text back, or do not fit the model."""
    back = kit.backend.decode(ids, skip_special_tokens=False)
    if back != text and canonical(kit, back) != canonical(kit, text):
        at = max(0, len(os.path.commonprefix([back, text])) - 20)
        drop("decode", f"{text[at:at + 50]!r} comes back as {back[at:at + 50]!r}")
    if max(ids) >= kit.rows:
        token = kit.tokenizer.convert_ids_to_tokens(max(ids))
        drop("beyond the embedding", f"id {max(ids)}, {token!r}; the model has {kit.rows} rows")

# -- the folder and the summary
SPLITS = ("train", "val")
SIDES = ("prompt", "chosen", "rejected")
SCHEMA = pa.schema({side: pa.list_(pa.int32()) for side in SIDES} | {
    "source": pa.string(), "subset": pa.string(), "id": pa.string(), "weight": pa.float32(),
    "prompt_text": pa.uint64(), "prompt_id": pa.int64(), "chosen_id": pa.int64(),
    "rejected_id": pa.int64()})
OWN = re.compile(r"(train|val)(\.arrow)?|meta\.json|dropped\.jsonl|ref-.*|clean|noisy")
FIRST_USER = "if the template takes no system turn: --system first_user"
HINTS = {  # reason of a drop: what to do
    "others": "mend the rows, or use --convert", "template": FIRST_USER,
    "too long": "raise --max_length", "ties": "add --ties", "convert": "by --convert",
    "scores tie": "by --drop_ties", "scores contradict": "by --drop_ties",
    "special token": "add --plain if the text is rendered already",
    "images": "this trains on text only", "more pairs of a row": f"at most {PAIRS_OF_A_ROW}",
    "text of system turn left out by the template": FIRST_USER,
    "tools left out by the template": "choose a --model whose template takes tools"}

def chunks(rows):
    """Lists of entries of all_rows, bounded in characters."""
    chunk, size = [], 0
    for entry in rows:
        chunk.append(entry)
        size += len(str(entry))
        if size > CHUNK_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

def in_parallel(args, rows):
    """Results of prepare_chunk in the order of the rows, with few chunks in memory at any time."""
    parts, work = chunks(rows), functools.partial(prepare_chunk, args)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    workers = args.num_proc or len(mine)
    if workers == 1:
        yield from map(work, parts)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for chunk in parts:  # pool.map would read all rows, so it gets eight chunks per worker
            some = itertools.chain([chunk], itertools.islice(parts, 8 * workers - 1))
            yield from pool.map(work, some)

def write_pairs(args, sources, folder):
    """All pairs to folder/{train,val}.arrow and all drops to folder/dropped.jsonl -> counts of the
    rows {what is counted: Counter}."""
    counts = defaultdict(Counter)
    size = sum(source.size for source in sources)
    unit = "B" if file_names(args.dataset) else " rows"
    with (open(folder / "dropped.jsonl", "w") as log,
          tqdm(total=size, unit=unit, unit_scale=True) as bar,
          pa.ipc.new_stream(f"{folder}/train.arrow", SCHEMA) as train,
          pa.ipc.new_stream(f"{folder}/val.arrow", SCHEMA) as val):
        for place, batches, dropped, found in in_parallel(args, all_rows(sources)):
            train.write_batch(batches["train"])
            val.write_batch(batches["val"])
            log.writelines(json.dumps(record) + "\n" for record in dropped)
            for kind, numbers in found.items():
                counts[kind].update(numbers)
            bar.update(place - bar.n)
            if not counts["formats"]:  # nothing is recognised
                break
    return counts

def count(splits, seen):
    """The pairs of both splits, what is seen in the rows -> the counts of meta.json."""
    train, val = (splits[name].data.table for name in SPLITS)
    both = pa.concat_tables([train, val])
    dropped, subsets = seen["dropped"], both["subset"].value_counts().to_pylist()
    different = both.group_by(["chosen_id", "rejected_id"]).aggregate([]).num_rows
    in_both = np.intersect1d(train["prompt_text"], val["prompt_text"])
    tokens = sum(pc.list_value_length(both[side]).to_numpy() for side in SIDES)  # (pairs,)
    longest = np.argsort(-tokens, kind="stable")[:5]
    return dict(
        rows=seen["rows"].total(), formats=seen["formats"], pairs_in=len(both) + dropped.total(),
        pairs_out=len(both), train=len(train), val=len(val), dropped=dropped,
        subsets={each["values"]: each["counts"] for each in subsets},
        distinct_prompts=pc.count_distinct(both["prompt_text"]).as_py(),
        repeats=len(both) - different, prompts_in_both=len(in_both),
        scores=seen["scores"], looks_rendered=seen["rendered"].total(), unused=seen["unused"],
        longest=list(zip(both["id"].take(longest).to_pylist(), tokens[longest].tolist())))

def check_pairs(args, counts, folder):
    """End the program unless both splits have pairs; the drops are kept beside --out."""
    empty = [name for name in SPLITS if not counts[name]]
    if not empty:
        return
    record = Path(f"{Path(args.out)}.dropped.jsonl")
    shutil.copy(folder / "dropped.jsonl", record)
    mostly, way = "", "give another --dataset or --val"
    if counts["dropped"]:
        reason = max(counts["dropped"], key=counts["dropped"].get)
        records = map(json.loads, record.read_text().splitlines())
        example = next(each for each in records if each["reason"] == reason)
        mostly = f", mostly '{reason}' ({example['id']}: {example['value']})"
        way = HINTS.get(reason, HINTS["others"])
    if counts["rows"] and not counts["formats"]:
        names = [f"{name} ({', '.join(sorted(needs))})" for name, (needs, _) in FORMATS.items()]
        fail(f"--dataset {args.dataset}: no row of the first {counts['rows']} has a known format"
             f"{mostly}; known formats: {', '.join(names)}, a prompt under {', '.join(PROMPTS)}; "
             f"read other layouts by --convert FILE.py:FUNCTION; see {record}")
    if counts["pairs_out"] and not args.val:
        way = "give more prompts, change --val_fraction or --seed, or give --val"
    fail(f"no pair for {' and '.join(empty)}: of {counts['rows']} rows of {args.dataset} "
         f"{counts['pairs_out']} pairs with {counts['distinct_prompts']} distinct prompts are kept "
         f"and {counts['dropped'].total()} dropped{mostly}; {way}; see {record}")

def save(kit, folder, splits, counts):
    """The streamed pairs -> train/, val/ and meta.json -> meta"""
    datasets.disable_progress_bars()
    distinct = {}
    for name, rows in splits.items():
        if pc.all(pc.equal(rows.data["weight"], 1)).as_py():
            rows = rows.remove_columns("weight")
        rows, distinct[name] = number_texts(rows)
        rows.save_to_disk(f"{folder}/{name}")
        os.remove(f"{folder}/{name}.arrow")  # stays readable while it is open
    versions = {each.__name__: each.__version__ for each in (datasets, transformers, pa, np)}
    meta = dict(
        arguments=dataclasses.asdict(kit.args), vocab_hash=vocab_hash(kit.tokenizer),
        eos_token=kit.end_token, eos_token_id=kit.end, distinct=distinct, counts=counts,
        versions=versions | {"python": platform.python_version()})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta

def number_texts(rows):
    """Number the distinct prompts and the distinct responses to them in the order in which they
    first occur, in place of their hashes -> rows, {what: how many are distinct}."""
    distinct = {}
    for what, names in dict(prompts=["prompt_id"], responses=["chosen_id", "rejected_id"]).items():
        hashes = np.stack([rows.data[name] for name in names], axis=1)  # (pairs, 1 or 2)
        encoded = pa.array(hashes.ravel()).dictionary_encode()
        numbers = encoded.indices.to_numpy().astype(int).reshape(hashes.shape)
        rows = rows.remove_columns(names)
        for name, column in zip(names, numbers.T, strict=True):
            rows = rows.add_column(name, column)
        distinct[what] = len(encoded.dictionary)
    return rows.remove_columns("prompt_text"), distinct

def vocab_hash(tokenizer) -> str:
    """16 hex digits that change when any token or its id does."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]

def check_out(args, out, part):
    """Nothing may be in the way of the result but an earlier one, and that only if asked for."""
    if out.exists() and not (args.overwrite and (out / "meta.json").is_file()):
        fail(f"--out {out} exists: choose another; --overwrite replaces an earlier result")
    for path in [*out.glob("*"), *part.glob("*")]:
        if not OWN.fullmatch(path.name):
            fail(f"{path} was not made by this script and would be lost: move it, or choose "
                 "another --out")

def replace(out, part):
    """The new folder takes the place of an earlier one, which goes only when the new one stands."""
    old = Path(f"{out}.old")
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)

def report(kit, meta, pair):
    """Print what was read, what a user may not expect, and a pair."""
    counts, decode = meta["counts"], kit.tokenizer.decode
    lines = [
        "formats   " + ", ".join(f"{name}, {n:,} rows" for name, n in counts["formats"].items()),
        f"rendering {'chat template' if kit.template else 'plain text'}, "
        f"{'BOS' if kit.bos else 'no BOS'} added; responses end in {kit.end_token} ({kit.end})",
        f"pairs     {counts['pairs_in']:,} in (of {counts['rows']:,} rows) = {counts['train']:,} "
        f"train + {counts['val']:,} val + {counts['dropped'].total():,} dropped"]
    for reason, n in counts["dropped"].most_common():
        lines.append(f"  dropped {n:>7,}  {reason}: {HINTS.get(reason, HINTS['others'])}")
    lines.append(f"prompts   {counts['distinct_prompts']:,} distinct; {counts['repeats']:,} pairs "
                 "are exact repeats of others")
    if counts["prompts_in_both"]:
        lines.append(f"  warning {counts['prompts_in_both']:,} prompts are in both train and val")
    if counts["unused"]:
        unused = [f"{name} ({n:,} rows)" for name, n in counts["unused"].most_common()]
        lines.append(f"columns   not used: {', '.join(unused)}")
    if counts["looks_rendered"]:
        lines.append(f"  warning {counts['looks_rendered']:,} prompts look rendered already: take "
                     "their markers out by --convert, or use --plain")
    agree, tie, contradict = (counts["scores"][name] for name in ("agree", "tie", "contradict"))
    if agree or tie or contradict:
        lines.append(f"scores    {agree:,} rows agree, {tie:,} tie, {contradict:,} contradict the "
                     "order of their answers; --drop_ties leaves out the latter two")
    longest = [f"{name} {n:,}" for name, n in counts["longest"]]
    lines.append(f"longest   {', '.join(longest)} tokens")
    start = decode(pair["prompt"])
    lines.append(f"pair      {pair['id']}; what is scored stands between [[ and ]]\n{start[-500:]}")
    for side in SIDES[1:]:
        lines.append(f"  {side}: [[{decode(pair['prompt'] + pair[side])[len(start):]}]]")
    print(visible("\n".join([*lines, f"wrote     {kit.args.out}"])))

if __name__ == "__main__":
    main()
