"""Raw preference pairs -> cleaned, templated, tokenised and split into a folder all scripts read.

    python prepare_data.py --dataset a.jsonl.gz,b.parquet --model MODEL --out data/NAME
    python prepare_data.py --dataset HuggingFaceH4/ultrafeedback_binarized --split train_prefs \\
        --model MODEL --out data/ultrafeedback

Input is .jsonl, .json or .parquet (each also .gz), a hub name, or a folder that load_dataset reads.
The format of every row is recognised by its columns:

    plain            prompt, chosen, rejected: text
    conversation     chosen, rejected: lists of {role, content}, whose common start is the prompt,
                     unless a column prompt (text or list) has it
    ShareGPT         conversations: list of {from, value}; chosen, rejected: one message each
    Alpaca           instruction, input, chosen, rejected: text (output is ignored)
    hh-rlhf          chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ...", cut at last Assistant
    RewardBench-2    prompt: text; chosen, rejected: lists of text; a pair per chosen x rejected
    multiple choice  question, options or choices, answer (letter, or index from 0); the prompt is
                     "question\\nA. option\\nB. option\\nAnswer:" and a response is "B. option"

Columns of any format: `system` opens the conversation; `subset`, `category` or `subject` names the
subset; `weight` is kept. Without a chat template, or with --plain, prompt and response are joined
as they are; a prompt of several turns becomes "\\n\\nHuman: ...\\n\\nAssistant:". What a template
writes to open the assistant's turn belongs to the prompt, or with --score_header to the response.

Output: train/ and val/ (datasets.load_from_disk: token ids prompt, chosen, rejected; source,
subset, id, weight if any is not 1), meta.json, dropped.jsonl. Pairs in = pairs out + dropped; a row
that cannot be read counts as one pair. A response ends in exactly one end token, which is scored:
the special token that the template puts after an answer, else the tokenizer's EOS, or --eos_token.
"""
import bisect, dataclasses, functools, gzip, hashlib, inspect, itertools, json, math
import multiprocessing, os, platform, random, re, shutil, signal, sys, time, types, zlib
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
    dataset: str  # files, separated by commas, or a folder, or a hub name
    model: str  # folder or hub name of the model whose tokenizer and chat template are used
    out: str  # folder to make, such as data/NAME
    subset: str = ""  # configuration of a hub dataset
    split: str = "train"  # split of a hub dataset
    overwrite: bool = False  # replace an earlier result in --out
    # what a pair is
    plain: bool = False  # no chat template; the text may be rendered already
    score_header: bool = False  # score what opens the assistant's turn too, as SimPO's authors do
    eos_token: str = ""  # ends a response (default: as the template does, else the EOS)
    max_length: int = 2048  # tokens of prompt and response; longer is dropped, never cut
    wrong_options: Literal["all", "one"] = "all"  # of multiple choice, set against the right one
    ties: bool = False  # keep the subset Ties of RewardBench-2, in which several answers are right
    # split and speed
    val_fraction: float = 0.05  # fraction of the prompts, chosen by hash, that go to val
    seed: int = 0  # of the split and of --wrong_options one
    num_proc: int = 0  # worker processes; 0 = one per core


# ---- helpers, the same in every script (tests/test_copies.py): edit them in dpo.py first ----

def fail(message):
    """End the program with one line on stderr and exit status 1."""
    if int(os.environ.get("RANK", 0)) > 0:  # rank 0 says it too, and then torchrun ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    raise SystemExit("error: " + " ".join(message.split()))


def parse_args(cls):
    """Command line -> dataclass `cls`; --help shows its source, comments and all. A number must be
    above 0; it may be 0 where that is the default, or where its comment says what "0 =" means."""
    source = inspect.getsource(cls)
    parser = transformers.HfArgumentParser(cls, allow_abbrev=False)
    parser.format_help = lambda: source
    parser.error = fail
    values = vars(parser.parse_args())
    for name, value in values.items():
        if type(value) is str:
            values[name] = value.rstrip("/") or value  # x/ is x
    args = cls(**values)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    for name, value in vars(args).items():
        may_be_0 = getattr(cls, name, None) == 0 or "0 =" in comments.get(name, "")
        least = 0 if may_be_0 else sys.float_info.min
        if type(value) in (int, float) and not least <= value < math.inf:
            fail(f"--{name} {value} must be finite and {'not below' if may_be_0 else 'above'} 0")
    return args


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


# ---- rows, streamed: (source, id, line or row number from 1, row) ----

FILE = re.compile(r"(.+)\.(jsonl|json|parquet)(\.gz)?")

def short(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"

def drop(reason: str, value):
    """Leave this pair out; prepare_chunk records the reason and the offending value."""
    raise ValueError(reason, short(value))

def parse(text: bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}: ...{text[-60:]!r}"  # no row, so it is dropped as malformed

def file_rows(path: Path):
    _, kind, zipped = FILE.fullmatch(path.name).groups()
    number = 0
    try:
        with gzip.open(path) if zipped else open(path, "rb") as stream:
            start = stream.read(4096).lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
            stream.seek(0)
            rows = (parse(line) if line.strip() else ... for line in stream)
            if kind == "parquet":  # its index is at the end, to which gzip cannot seek
                file = pq.ParquetFile(pa.BufferReader(stream.read()) if zipped else path)
                rows = (row for b in file.iter_batches(batch_size=200) for row in b.to_pylist())
            elif kind == "json" and start != b"{":  # an array; else it has a row per line
                rows = parse(stream.read())
                if not isinstance(rows, list):
                    fail(f"{path}: {short(rows)}; give a list of rows, or .jsonl")
            for number, row in enumerate(rows, 1):
                if row is not ...:  # a blank line
                    yield number, row
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        fail(f"cannot read {path} after row {number}: {short(error)}; check --dataset or the file")

def all_rows(args):
    paths = [Path(part.strip()) for part in args.dataset.split(",")]
    names = [FILE.fullmatch(path.name) for path in paths]
    if not all(names):
        try:
            rows = datasets.load_dataset(args.dataset, args.subset or None, split=args.split)
        except Exception as error:  # hub, network, name, split, folder: each raises its own errors
            fail(f"--dataset {args.dataset} --subset '{args.subset}' --split {args.split}: "
                 f"{short(error)}; a file ends in .jsonl, .json or .parquet (.gz)")
        for number, row in enumerate(rows, 1):
            yield args.dataset, f"{args.dataset}:{number:06d}", number, row
        return
    if len(set(paths)) < len(paths):
        fail(f"--dataset {args.dataset} names a file twice")
    stems = [name[1] for name in names]
    for path, stem in zip(paths, stems, strict=True):
        stem = stem if stems.count(stem) == 1 else str(path)  # ids are unique over all files
        for number, row in file_rows(path):
            yield path.name, f"{stem}:{number:06d}", number, row


# ---- formats: a row -> pairs of (messages, chosen text, rejected text) ----

ROLES = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
SAME_ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}

def text_of(value, name: str) -> str:
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):  # half a surrogate pair
        drop("malformed", f"{name} is not valid text: {value!r}")
    return value

def message(value, name: str) -> dict:
    value = value if isinstance(value, dict) else {"role": f"none: {value!r}"}
    role = str(value.get("role") or value.get("from"))
    if SAME_ROLES.get(role, role) not in ROLES:
        drop("malformed", f"{name} has a message of role {role}")
    content = value.get("value") if value.get("content") is None else value["content"]
    return {"role": SAME_ROLES.get(role, role), "content": text_of(content, f"content in {name}")}

def answer_of(value, name: str, hh: bool, plain: bool):
    """One side of a pair -> (messages before the answer, text of the answer)."""
    if hh:
        prompt, turn, answer = text_of(value, name).rpartition("\n\nAssistant:")
        if not turn or not prompt.startswith("\n\nHuman:") or "\n\nHuman:" in answer:
            drop("malformed", f"no prompt, and {name} is no Human/Assistant dialogue: {value}")
        turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
        turns = [("user", prompt + turn)] if plain else zip(turns[::2], turns[1::2], strict=True)
        return [message({"role": who, "content": said if plain else said.strip()}, name)
                for who, said in turns], answer if plain else answer.strip()
    if not isinstance(value, (list, dict)):
        return [], text_of(value, name)
    *before, last = [message(m, name) for m in (value if isinstance(value, list) else [value])]
    if last["role"] != "assistant":
        drop("malformed", f"{name} does not end with an assistant turn: {value}")
    return before, last["content"]

def choice_row(row: dict, args, plain: bool, key: str):
    """Multiple choice -> (row with a prompt, pairs of the right and a wrong response)."""
    options, answer = row.get("options", row.get("choices")), row["answer"]
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        drop("malformed", f"options are {options}, not a list of 2 to 26 texts")
    letters = [chr(65 + i) for i in range(len(options))]
    right = letters.index(answer) if answer in letters else answer
    if type(right) is not int or not 0 <= right < len(options):
        drop("malformed", f"answer {answer!r} is no letter or index of {len(options)} options")
    lines = [f"{a}. {text_of(text, 'option')}" for a, text in zip(letters, options, strict=True)]
    prompt = "\n".join([text_of(row["question"], "question"), *lines, "Answer:"])
    replies = [" " * plain + line for line in lines]
    chosen = replies.pop(right)
    if args.wrong_options == "one":
        replies = [random.Random(f"{args.seed} {key}").choice(replies)]
    return row | {"prompt": prompt}, [(chosen, wrong) for wrong in replies]

def read_row(row, args, plain: bool, key: str):
    """-> (name of the format, row, list of raw (chosen, rejected), for some formats several)."""
    if not isinstance(row, dict):
        drop("malformed", f"no row: {row}")
    if {"question", "answer"} <= row.keys() and row.keys() & {"options", "choices"}:
        return "multiple choice", *choice_row(row, args, plain, key)
    if not {"chosen", "rejected"} <= row.keys():
        drop("malformed", f"columns of no known format: {', '.join(row)}")
    sides = [row["chosen"], row["rejected"]]
    if [] in sides:
        drop("malformed", f"chosen or rejected is an empty list: {sides}")
    several = [isinstance(side, list) and not isinstance(side[0], dict) for side in sides]
    messages = any(isinstance(value, (list, dict)) for value in (*sides, row.get("prompt")))
    name = ("ShareGPT" if "conversations" in row else "Alpaca" if "instruction" in row
            else "RewardBench-2" if any(several) else "conversation" if messages
            else "plain" if "prompt" in row else "hh-rlhf")
    sides = [side if many else [side] for side, many in zip(sides, several, strict=True)]
    return name, row, list(itertools.product(*sides))

def read_pair(row: dict, name: str, pair: tuple, plain: bool):
    """Raw chosen and rejected of a row -> (messages, chosen text, rejected text)."""
    (before, chosen), (other, rejected) = (
        answer_of(side, column, name == "hh-rlhf", plain) for side, column in zip(pair, SIDES[1:]))
    if before != other:
        drop("prompts differ", next((f"{a} / {b}" for a, b in zip(before, other) if a != b), other))
    prompt = row.get({"ShareGPT": "conversations", "Alpaca": "instruction"}.get(name, "prompt"))
    if isinstance(prompt, list):
        turns = [message(m, "prompt") for m in prompt]
        messages = before if before[:len(turns)] == turns else turns + before
    elif before:  # beside a conversation, the text of a prompt only repeats its first question
        messages = before
    else:
        extra = text_of(row.get("input") or "", "input") if name == "Alpaca" else ""
        prompt = text_of(prompt, "prompt") + f"\n\n{extra}" * bool(extra.strip())
        messages = [{"role": "user", "content": prompt}]
    if row.get("system") and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": text_of(row["system"], "system")}, *messages]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        drop("malformed", f"the prompt does not end with a user turn: {messages}")
    return messages, chosen, rejected


# ---- text and tokens ----

@functools.cache
def load_tokenizer(args):
    """What rendering needs, once per process. `tail` is what the template writes after an answer,
    from its end token on; it is cut off, and the end token comes back as the id `end`."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        has_template = tokenizer.chat_template and not args.plain
        template = tokenizer.get_chat_template() if has_template else ""
        probe = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "An answer."}]
        text = tokenizer.apply_chat_template(probe, tokenize=False) if template else ""
    except Exception as error:  # a wrong name, no network, a broken file or template: all differ
        fail(f"tokenizer or template of --model {args.model}: {short(error)}; check the name, "
             "or --plain if the template is at fault")
    tokens, tail = tokenizer.added_tokens_decoder.values(), text.rpartition("An answer.")[2]
    added = "|".join(re.escape(t.content) for t in tokens) or "(?!)"  # which matches nothing
    special = "|".join(re.escape(t.content) for t in tokens if t.special) or "(?!)"
    alone = [t.content for t in tokens if not (t.normalized or t.lstrip or t.single_word)]
    breaks = "|".join(map(re.escape, sorted(alone, key=len)[::-1])) or "(?!)"
    named = re.escape(args.eos_token) if args.eos_token and args.eos_token in tail else special
    found = re.search(named, tail)
    end = args.eos_token or (found[0] if found else tokenizer.eos_token)
    if not tokenizer.is_fast or end not in tokenizer.get_vocab():
        fail(f"--model {args.model} needs a tokenizer.json, for character offsets, and the end "
             f"token {end!r} in its vocabulary; set --eos_token")
    if args.score_header and not template:
        fail(f"--score_header needs a chat template, and --model {args.model} has none"
             + ", as --plain is set" * args.plain)
    bos = [] if template else tokenizer("a").input_ids[:1]
    backend = tokenizer.backend_tokenizer  # 1.3 x as fast as through the wrapper
    backend.no_truncation()  # --max_length decides
    backend.no_padding()
    return types.SimpleNamespace(
        tokenizer=tokenizer, backend=backend, template=template,
        end=tokenizer.get_vocab()[end], end_token=end, score_header=args.score_header,
        tail=tail[found.start():] if found else tail[len(tail.rstrip()):],
        bos=bos if bos == [tokenizer.bos_token_id] else [], special=re.compile(special),
        breaks=re.compile(breaks),
        seams=re.compile(rf"\s*({added})\s*"), normalizer=backend.normalizer)

def canonical(kit, text: str) -> str:
    """Text without what tokenizers change on purpose: normal form, spaces around special tokens."""
    text = kit.normalizer.normalize_str(text) if kit.normalizer else text
    return kit.seams.sub(r"\1", text.replace("\u2581", " ")).lstrip(" ")  # SentencePiece's space

def render(kit, messages: list, answers: list):
    """-> (text of the prompt, [prompt + answer, without end token], the part that is not scored).
    Templates strip, reorder and leave out, so a response is whatever follows the prompt in the
    rendered conversation; with --score_header it begins where the question ends."""
    if not kit.template:
        prompt, gap = messages[0]["content"], ""
        if len(messages) > 1:
            prompt = "".join(f"\n\n{ROLES[m['role']]}: {m['content']}" for m in messages)
            prompt, gap = prompt + "\n\nAssistant:", " "
        end = re.escape(kit.end_token) + r"\s*\Z"
        return prompt, [re.sub(end, "", prompt + gap + answer) for answer in answers], prompt
    chat = functools.partial(kit.tokenizer.apply_chat_template, tokenize=False)
    try:
        prompt = chat(messages, add_generation_prompt=True)
        texts = chat([[*messages, {"role": "assistant", "content": a}] for a in answers])
        whole = all(text.startswith(prompt) for text in texts)
        bare = prompt if whole and not kit.score_header else chat(messages)
    except Exception as error:  # a template raises what it likes
        drop("template", f"{type(error).__name__}: {error}")
    if not whole:  # it opens <think> for generation and leaves it out of a conversation
        prompt = os.path.commonprefix([prompt, *texts])
    if not prompt.startswith(bare) or not all(text.endswith(kit.tail) for text in texts):
        drop("template", f"the conversation is not prompt + answer + {kit.tail!r}: {texts[0]}")
    return prompt, [t.removesuffix(kit.tail) for t in texts], bare if kit.score_header else prompt

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

def encode(kit, args, messages: list, answers: list):
    """-> (text of the prompt, its token ids, token ids of the two responses)."""
    asked = [m["content"] for m in messages]
    if not all(answer.strip() for answer in answers) or not "".join(asked).strip():
        drop("empty", [asked[-1], *answers])
    for found in map(kit.special.search, [] if args.plain else asked + answers):
        if found:
            drop("special token", found.string[max(0, found.start() - 40):found.end() + 40])
    question, texts, prompt = render(kit, messages, answers)
    if not all(text[len(question):].strip() for text in texts):  # a header alone is no response
        drop("empty", f"rendering leaves nothing of a response: {answers}")
    start, sides, left = tokenise(kit, prompt, texts)
    if sides[0] == sides[1]:
        drop("identical", answers[0])
    bos = [i for i in kit.bos if (start + sides[0])[0] != i]
    length = len(bos + start) + max(map(len, sides)) + 1
    if length > args.max_length:
        drop("too long", f"{length} tokens")
    if not bos + start or left > 64:
        drop("boundary", f"no token of the prompt ends near its end: {prompt[-64:]}")
    for ids, text in zip(sides, texts, strict=True):
        back = kit.backend.decode(start + ids, skip_special_tokens=False)
        if back != text and canonical(kit, back) != canonical(kit, text):
            at = max(0, len(os.path.commonprefix([back, text])) - 20)
            drop("decode", f"{text[at:at + 50]!r} comes back as {back[at:at + 50]!r}")
        if kit.end in ids:
            drop("special token", f"{kit.end_token} inside a response: {text[len(prompt):]}")
    return question, bos + start, *(ids + [kit.end] for ids in sides)

def prepare_pair(kit, args, row: dict, name: str, pair: tuple):
    """-> (split, columns of the pair)."""
    label = next((row[c] for c in ("subset", "category", "subject") if row.get(c)), "")
    if name == "RewardBench-2" and label == "Ties" and not args.ties:
        drop("ties", pair[0])
    weight = row.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 <= weight < 1e30:
        drop("malformed", f"weight is {weight!r}, not a number from 0")
    messages, *answers = read_pair(row, name, pair, not kit.template)
    prompt, *ids = encode(kit, args, messages, answers)
    # Prompts that differ only in white space or Unicode form may have equal tokens: one split.
    same = f"{args.seed} {' '.join(canonical(kit, prompt).split())}"
    point = int.from_bytes(hashlib.sha256(same.encode()).digest()[:8], "big") / 2**64
    columns = dict(zip(SIDES, ids), subset=text_of(str(label), "subset"), weight=float(weight))
    return ("val" if point < args.val_fraction else "train"), columns

def attempt(step, *inputs):
    try:
        return step(*inputs)
    except ValueError as error:  # of drop: reason and value
        return error

def prepare_chunk(args, chunk: list):
    """Rows -> (how many, Arrow batch of each split, records of drops, rows of each format)."""
    kit, pairs, dropped, formats = load_tokenizer(args), {"train": [], "val": []}, [], Counter()
    for source, key, number, row in chunk:
        results = [attempt(read_row, row, args, not kit.template, key)]
        if isinstance(results[0], tuple):
            name, row, sides = results[0]
            formats[name] += 1
            if row.get("subset") == "Ties":  # ref:5 and tied:5 belong together; evaluate.py asks
                key += f":{row.get('id')}"
            results = [attempt(prepare_pair, kit, args, row, name, side) for side in sides]
        for k, result in enumerate(results):
            one = f"{key}-{k}" if len(results) > 1 else key
            if isinstance(result, tuple):
                pairs[result[0]].append(result[1] | {"source": source, "id": one})
            else:
                reason, value = result.args
                dropped.append(dict(file=source, line=number, id=one, reason=reason, value=value))
    batches = {split: pa.RecordBatch.from_pylist(rows, SCHEMA) for split, rows in pairs.items()}
    return len(chunk), batches, dropped, formats


# ---- the folder ----

SIDES = ("prompt", "chosen", "rejected")
SCHEMA = pa.schema({side: pa.list_(pa.int32()) for side in SIDES} | {
    "source": pa.string(), "subset": pa.string(), "id": pa.string(), "weight": pa.float32()})
HINTS = {"too long": "raise --max_length", "template": "try --plain", "ties": "add --ties",
         "special token": "add --plain if the text is rendered already"}

def in_parallel(args):
    """Results of prepare_chunk in the order of the rows, with few chunks in memory at any time."""
    rows, work = all_rows(args), functools.partial(prepare_chunk, args)
    chunks = iter(lambda: list(itertools.islice(rows, 200)), [])
    mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)  # cores, if Linux
    workers = args.num_proc or len(mine)
    if workers == 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = []  # few: map alone would read all rows
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.pop(0).result()
        yield from (each.result() for each in waiting)

def write_pairs(args, folder: Path) -> dict:
    """All pairs to folder/{train,val}.arrow and all drops to folder/dropped.jsonl -> the counts."""
    rows, formats, dropped, pairs, examples = 0, Counter(), Counter(), Counter(train=0, val=0), {}
    with (open(folder / "dropped.jsonl", "w") as log, tqdm(unit=" rows") as bar,
          pa.OSFile(f"{folder}/train.arrow", "wb") as train,
          pa.OSFile(f"{folder}/val.arrow", "wb") as val):
        writers = {"train": pa.ipc.new_stream(train, SCHEMA), "val": pa.ipc.new_stream(val, SCHEMA)}
        for read, batches, records, names in in_parallel(args):
            for split, batch in batches.items():
                writers[split].write_batch(batch)
                pairs[split] += len(batch)
            for record in records:
                dropped[record["reason"]] += 1
                examples.setdefault(record["reason"], f"{record['id']}: {record['value']}")
                log.write(json.dumps(record) + "\n")
            rows, formats = rows + read, formats + names
            bar.update(read)
        for writer in writers.values():
            writer.close()
    if not rows:
        fail(f"--dataset {args.dataset} has 0 rows: give others")
    if not all(pairs.values()):
        shutil.copy(folder / "dropped.jsonl", f"{args.out}.dropped.jsonl")
        reason = max(dropped, key=dropped.get, default="none")
        fail(f"no pair for {' and '.join(s for s in pairs if not pairs[s])}: of {rows} rows of "
             f"{args.dataset} {pairs.total()} pairs are kept and {dropped.total()} dropped, mostly "
             f"'{reason}' ({examples.get(reason, '')}); {HINTS.get(reason, 'mend the rows')}, give "
             f"more, or change --val_fraction or --seed; see {args.out}.dropped.jsonl")
    return dict(rows=rows, formats=formats, pairs_in=pairs.total() + dropped.total(),
                pairs_out=pairs.total(), **pairs, dropped=dropped)

def save(args, kit, folder: Path, counts: dict):
    """The streamed pairs -> train/, val/ and meta.json -> (meta, first pair of train)."""
    datasets.disable_progress_bars()
    splits, subsets, lengths = {}, Counter(), []
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
    meta = dict(
        arguments=dataclasses.asdict(args), tokenizer=args.model,
        vocab_hash=vocab_hash(kit.tokenizer),
        template_hash=kit.template and hashlib.sha256(kit.template.encode()).hexdigest()[:16],
        eos_token=kit.end_token, eos_token_id=kit.end, counts=counts | {"subsets": subsets},
        content_hash={split: content_hash(rows) for split, rows in splits.items()},
        lengths={name: {f"p{p}": int(np.percentile(n, p, method="higher"))
                        for p in (0, 10, 50, 90, 99, 100)} for name, n in lengths.items()},
        versions={m.__name__: m.__version__ for m in (datasets, transformers, pa, np)}
        | {"python": platform.python_version()})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta, splits["train"][0]

def report(args, kit, meta: dict, pair: dict):
    counts, decode = meta["counts"], kit.tokenizer.decode
    print("formats   " + ", ".join(f"{name}, {n:,} rows" for name, n in counts["formats"].items()))
    print(f"rendering {'chat template' if kit.template else 'plain text'}, "
          f"{'BOS' if kit.bos else 'no BOS'} added; responses end in {kit.end_token} ({kit.end})")
    print(f"pairs     {counts['pairs_in']:,} in (of {counts['rows']:,} rows) = {counts['train']:,} "
          f"train + {counts['val']:,} val + {counts['dropped'].total():,} dropped")
    for reason, n in counts["dropped"].most_common():
        print(f"  dropped {n:>7,}  {reason}")
    for name, points in meta["lengths"].items():
        print(f"{name:10}" + "  ".join(f"{p} {n:>5,}" for p, n in points.items()) + "  tokens")
    start = decode(pair["prompt"])
    print(f"pair      {pair['id']}; what is scored stands between [[ and ]]\n{start[-500:]}")
    for side in SIDES[1:]:
        print(f"  {side}: [[{decode(pair['prompt'] + pair[side])[len(start):]}]]")
    print(f"wrote     {args.out}")

def main():
    args = parse_args(Args)
    out, part = Path(args.out), Path(f"{args.out}.partial")
    if args.val_fraction >= 1 or args.wrong_options not in ("all", "one"):
        fail(f"--val_fraction {args.val_fraction} must be below 1, --wrong_options one or all")
    if out.exists() and not (args.overwrite and (out / "meta.json").is_file()):
        fail(f"--out {out} exists: choose another; --overwrite replaces a result of this script")
    kit = load_tokenizer(args)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        meta, pair = save(args, kit, part, write_pairs(args, part))
        if out.exists():  # is moved aside first: half deleted it would look finished
            shutil.rmtree(f"{out}.old", ignore_errors=True)
            out.rename(f"{out}.old")
        part.rename(out)
        shutil.rmtree(f"{out}.old", ignore_errors=True)
    except OSError as error:
        fail(f"cannot write {part}: {error}; make room or choose another --out")
    except process.BrokenProcessPool:
        fail("a worker process was killed, probably for memory: lower --num_proc")
    finally:  # a result that is not whole is none
        shutil.rmtree(part, ignore_errors=True)
    report(args, kit, meta, pair)


if __name__ == "__main__":
    main()
