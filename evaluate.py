"""Which model is better, and did it help or only get longer? Tables, plots and answers of models.

    python evaluate.py --models MODEL,out/dpo,out/simpo --data data/NAME --reference MODEL
    python evaluate.py --models MODEL,out/dpo --data data/NAME --samples 200 --reward REWARD_MODEL
    python evaluate.py --models out/dpo,out/simpo --plot runs.png          (no --data: plot only)
    python evaluate.py --models out/dpo --prompts alpaca_eval.json         (answers for a judge)
    python evaluate.py --models out/dpo --choices mmlu_pro.jsonl           (answers by a letter)

A model is a Hugging Face folder, a hub name, a LoRA adapter, a run (out/dpo means out/dpo/final) or
a checkpoint of a run (out/dpo/step-000020). s = log pi(y|x) in nats, summed over the response by
the model's own forward pass; s_ref is that of --reference; r is --reward, a function
FILE.py:FUNCTION of (prompt text, response text) or a reward model (one label, sequence
classification). Columns are means ± standard error; pairs of one prompt count as one observation.

    accuracy   s(chosen) > s(rejected), a tie = 1/2   margin         s(chosen) - s(rejected)
    per token  the same for s / length                margin to ref  the same for s - s_ref
    to ref     the same for s - s_ref                 chosen, rejected   the change s - s_ref itself
    to ref per token   the same for (s - s_ref) / length
    gain       accuracy less the first model's        agrees   r orders the pair as s - s_ref does
    rank corr.   Spearman's, over pairs, of the margins of r and of s - s_ref
    best, best to ref   of chosen responses in several pairs (multiple choice, RewardBench-2): its s
                        (s - s_ref) exceeds that of each rejected one, a tie of k = 1/k
    ties, ties to ref   RewardBench-2's score of its subset Ties
    length, ended, reward   of --samples: tokens; has an end token; r
    win  r above that of the first model on the same prompt, a tie = 1/2; equal length: the win rate
         that a logistic regression on the difference of lengths predicts where there is none
    KL   of --samples at temperature 1: s - s_ref of the answers, whose mean is KL(pi || ref), nats

results/ gets table.md, differences.md (every two models, bootstrap intervals), evaluation.json,
samples.jsonl and logps.npz: every s, so that another question needs no model. torchrun deals texts
over processes; --shard splits a model that one device does not hold.
"""
import contextlib, dataclasses, functools, hashlib, importlib.util, inspect, itertools, json, math
import os, re, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    models: str  # folders, hub names, runs or checkpoints, separated by commas; the first: baseline
    data: str = ""  # folder made by prepare_data.py; without it only --plot is drawn
    trust_remote_code: bool = False  # run the Python files that come with some models
    split: str = "val"  # which folder of the data; "train,val" is both, for a benchmark
    limit: int = 0  # only the first so many pairs or questions; 0 = all
    reference: str = ""  # model that changes are measured from
    out: str = "results"  # folder for everything that is written
    table: str = ""  # another Markdown file that gets the printed table
    plot: str = ""  # image file (.png, .svg, .pdf): curves of runs, margins, displacement, rewards
    choices: str = ""  # questions in the layout of MMLU-Pro or ARC, answered greedily by a letter
    prompts: str = ""  # AlpacaEval's or Arena-Hard's questions; answers go to --out/answers/
    # samples
    samples: int = 0  # prompts of the split, drawn by seed, that every model answers; 0 = off
    best_of: int = 0  # answers of --reference to each prompt, for its best of n; 0 = off
    max_new_tokens: int = 256  # an answer is cut off there
    temperature: float = 1.0  # of sampling; 0 = greedy
    reward: str = ""  # FILE.py:FUNCTION or reward model: judges the pairs and the samples
    seed: int = 0  # of the choice of prompts and of sampling
    # memory and speed
    max_tokens: int = 8192  # bound on the tokens of one forward pass, or of one batch of samples
    shard: bool = False  # split every model over the processes (FSDP) instead of copying it
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # to compute in; auto: bfloat16 on a GPU


COLUMNS = {  # metric: its heading; per cent, nats or tokens
    "accuracy": "accuracy %", "accuracy/token": "per token %", "accuracy/ref": "to ref %",
    "accuracy/ref/token": "to ref per token %", "gain": "gain %", "best": "best %",
    "best/ref": "best to ref %", "ties": "ties %", "ties/ref": "ties to ref %",
    "agreement": "agrees %", "rank": "rank corr.", "margin": "margin",
    "margin/ref": "margin to ref", "chosen/ref": "chosen", "rejected/ref": "rejected",
    "length": "length", "ended": "ended %", "reward": "reward", "win": "win %",
    "win/length": "equal length %", "kl": "KL"}
ANSWERS = dict(tokens="length", ended="ended", reward="reward", kl="kl")  # of a record: metric
BEST = "best of "


# ---- helpers, the same in every script (tests/test_copies.py): edit them in dpo.py first ----

def fail(message):
    """End the program with one line on stderr and exit status 1."""
    if int(os.environ.get("RANK", 0)) > 0:  # rank 0 says it too, and then torchrun ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    raise SystemExit("error: " + " ".join(message.split()))

@contextlib.contextmanager
def explain(trouble, kinds=(Exception, dcp.CheckpointException)):
    """An error in the `with` block ends the program with the line `trouble`, {} is the reason."""
    try:
        yield
    except kinds as error:
        lines = str(error).strip().splitlines() or [""]
        line = lines[-1] if "Traceback" in str(error) else lines[0]  # checkpoints: a traceback
        fail(trouble.replace("{}", f"{type(error).__name__}: {line[:200]}"))

def parse_args(cls):
    """Command line -> dataclass `cls`; --help shows its source, comments and all. A number must be
    above 0; it may be 0 where that is the default, or where its comment says what "0 =" means."""
    source = inspect.getsource(cls)
    parser = transformers.HfArgumentParser(cls, allow_abbrev=False)
    parser.format_help = lambda: source
    parser.error = lambda message: fail(f"{message}; see --help")
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

def start_process_group(dtype):
    """Join torchrun's process group, or make one alone -> rank, world size, device, dtype."""
    # Each micro-batch has another shape. On a GPU these break the memory into pieces (138 GiB were
    # reserved at a peak of 65) unless its segments can grow, and cuDNN plans each for 0.1 s.
    if not any("ALLOC_CONF" in name for name in os.environ):  # it has two older names
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_flush_denormal(True)  # on a CPU, denormal numbers can be many times slower
    cuda = torch.cuda.is_available()  # true for ROCm as well, where "nccl" is RCCL
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    with explain("the ranks do not find each other ({}): start them by torchrun, or use python"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    if not alone:
        sys.excepthook = late_traceback
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return dist.get_rank(), dist.get_world_size(), device, getattr(torch, dtype)

# ---- end of the helpers ----

# ---- models, and what they are asked: all of it dealt over the ranks

def late_traceback(*error):
    """A rank that only lost its connection to the one that failed is ended before it says so."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)
    sys.__excepthook__(*error)


def model_folder(name):
    """What a name in --models, --reference or --reward stands for: a folder or a hub name."""
    folder = Path(name)
    if not folder.exists() and "/" in name and (folder.parent.exists() or name.count("/") > 1):
        fail(f"there is no folder {name}, see --models, --reference and --reward")
    if (folder / "args.json").is_file():
        folder = folder / "final"
        if not folder.is_dir():
            fail(f"{name} is a run without final/: let it finish (--resume), or take another model")
    if (folder / "adapter_config.json").is_file() and not importlib.util.find_spec("peft"):
        fail(f"{folder} is a LoRA adapter, which needs a package: pip install peft")
    return str(folder)

MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")


@functools.cache
def find_model(name):
    """A name -> folder of the model, and that of a LoRA adapter or None. A run's folder means its
    final/, and what is no folder is downloaded from the hub."""
    folder = Path(name, "final") if Path(name, "final").is_dir() else Path(name)
    if not folder.is_dir():
        wanted = [f"*{kind}" for kind in MODEL_FILES] + ["model*.safetensors", "adapter_model*"]
        with explain(f"--model {name} is no folder here, and the hub has none ({{}})"):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted,
                                                            ignore_patterns="*/*"))
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return folder, None
    if any(folder.glob("model*.safetensors")):
        fail(f"{folder} holds a model and a LoRA adapter: take one of them out")
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    base = folder / base if (folder / base).is_dir() else base  # its path may begin here
    return find_model(str(base))[0], folder


def load_model(name, args, dtype, device, kind=transformers.AutoModelForCausalLM):
    """-> model in eval mode, its tokenizer. Of a checkpoint, the model that its run began with
    gets the weights. With --shard a device holds its share, and one block at a time."""
    folder, run = Path(model_folder(name)), Path(name).parent / "args.json"
    saved = (folder / ".metadata").is_file()
    transformers.utils.logging.disable_progress_bar()
    what = "causal language model"
    if kind is not transformers.AutoModelForCausalLM:
        what = "reward model and no FILE.py:FUNCTION"
    with explain(f"{name} of --models, --reference or --reward is no {what} ({{}})"):
        if saved:
            folder = json.loads(run.read_text())["args"]["model"]
        folder, adapter = find_model(str(folder))
        trust = dict(trust_remote_code=args.trust_remote_code)
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **trust)
        assert not info["missing_keys"], f"it lacks {', '.join(info['missing_keys'])}"
        if adapter:
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        own = adapter if adapter and (adapter / "tokenizer_config.json").exists() else folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(own, **trust)
    if saved:
        state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        with explain(f"{name} is no checkpoint of all of {folder} ({{}}); take its run's final/"):
            dcp.load(dict(model=state), checkpoint_id=name, no_dist=True)  # in place
    if args.shard:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
        for block in blocks[::-1]:  # blocks within blocks first
            fully_shard(block, mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    return model.to(device).eval(), tokenizer

def deal(lengths, name, args):
    """Yield (number, texts of a batch, is it ours) for this rank: longest first, padded to at most
    --max_tokens. All ranks get equally many, some for the second time, or --shard would wait."""
    batches, longest = [], 0
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        if not batches or (len(batches[-1]) + 1) * longest > args.max_tokens:
            batches, longest = batches + [[]], lengths[k]
        batches[-1].append(k)
    rank, world = dist.get_rank(), dist.get_world_size()
    bar = tqdm(total=len(lengths), desc=name, unit=" texts", disable=rank > 0)
    for first in range(0, len(batches), world):
        number = min(first + rank, len(batches) - 1)
        yield number, batches[number], number == first + rank
        bar.update(sum(map(len, batches[first:first + world])))
    bar.close()

def score(model, texts, name, args):
    """log pi(response | prompt), nats, float64 (n,), of texts [(prompt, response)], lists of token
    ids. Equal texts are computed once. Causal attention needs no mask for padding on the right."""
    kinds = sorted({(tuple(x), tuple(y)) for x, y in texts})
    sums = torch.zeros(len(kinds), dtype=torch.float64)
    for _, batch, ours in deal([len(x) + len(y) for x, y in kinds], name, args):
        width = max(sum(map(len, kinds[k])) for k in batch)
        first = min(len(kinds[k][0]) for k in batch) - 1  # its logits are the first that count
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, k in zip(ids, batch):
            row[:sum(map(len, kinds[k]))] = torch.tensor(kinds[k][0] + kinds[k][1])
        ids = ids.to(model.device)
        keep = dict(logits_to_keep=width - first) if model._supports_logits_to_keep() else {}
        with torch.no_grad():
            logits = model(ids, use_cache=False, **keep).logits[:, first - width:]
        for row, k in enumerate(batch):
            start, end = len(kinds[k][0]), sum(map(len, kinds[k]))
            scored = logits[row, start - 1 - first:end - 1 - first].float()
            losses = F.cross_entropy(scored, ids[row, start:end], reduction="none")
            sums[k] = -losses.double().sum() * ours
    dist.all_reduce(sums)  # a text is 0 on all ranks but one
    known = dict(zip(kinds, sums.tolist()))
    return np.array([known[tuple(x), tuple(y)] for x, y in texts])

def generate(model, prompts, ends, name, args):
    """Answers to prompts, lists of token ids -> their token ids, without what follows the end.
    The same for any number of ranks; prompts are padded on the left."""
    drawn = dict(do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0)
    model.generation_config = transformers.GenerationConfig(  # instead of the model's own
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends),
        **drawn if args.temperature else {})
    answers = {}
    for number, batch, ours in deal([len(x) + args.max_new_tokens for x in prompts], name, args):
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), min(ends))
        for row, k in zip(ids, batch):
            row[width - len(prompts[k]):] = torch.tensor(prompts[k])
        real = torch.arange(width) >= width - torch.tensor([[len(prompts[k])] for k in batch])
        torch.manual_seed(args.seed + number)
        inputs = dict(input_ids=ids, attention_mask=real.long())
        output = model.generate(**{key: x.to(model.device) for key, x in inputs.items()},
                                synced_gpus=args.shard and dist.get_world_size() > 1)
        for k, tokens in zip(batch if ours else [], output[:, width:].tolist()):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
            answers[k] = tokens[:length]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, answers)
    answers = {k: answer for part in parts for k, answer in part.items()}
    return [answers[k] for k in range(len(prompts))]

def answer(model, tokenizer, prompts, end, name, args):
    """Sampled answers to prompts as records; `end` ends a turn, beside the model's own end."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end} - {None}
    records = []
    for prompt, tokens in zip(prompts, generate(model, prompts, ends, name, args)):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, tokens)]
        records.append(dict(model=name, prompt=texts[0], response=texts[1], tokens=len(tokens),
                            ended=tokens[-1] in ends, ids=(prompt, tokens)))
    return records

def is_function(spec):
    return ":" in spec or spec.endswith(".py")

def load_function(spec):
    """The function that --reward FILE.py:FUNCTION names."""
    path, _, function = spec.rpartition(":")
    with explain(f"--reward {spec} is no reward model and no FILE.py:FUNCTION ({{}})"):
        place = importlib.util.spec_from_file_location("reward", path)
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        return getattr(module, function)

def conversation(tokenizer, ids):
    """The messages that a rendered prompt was made of, read back by the seams of its chat template;
    if they do not render to the same text, the text as one turn of the user."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for roles in (["user"], ["system", "user"]) * bool(tokenizer.chat_template):
        roles = [*roles, "assistant", "user"]  # rendered with contents that stand nowhere else
        with contextlib.suppress(Exception):  # a template may know no system turn
            render = lambda messages: tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True)
            probe = [dict(role=role, content=chr(0xE000 + k)) for k, role in enumerate(roles)]
            *seams, to_assistant, to_user, tail = re.split("[\uE000-\uE003]", render(probe))
            assert text.startswith(seams[0]) and text.endswith(tail)
            rest, messages = text[len(seams[0]):len(text) - len(tail)], []
            turns = zip(roles[:-2], seams[1:]) if len(roles) > 3 else ()
            for role, seam in itertools.chain(turns, itertools.cycle(
                    [("user", to_assistant), ("assistant", to_user)])):
                content, found, rest = rest.partition(seam)
                messages.append(dict(role=role, content=content))
                if not found:
                    break
            if messages[-1]["role"] == "user" and render(messages) == text:
                return messages
    return [dict(role="user", content=tokenizer.decode(ids, skip_special_tokens=True))]

def judge(records, tokenizer, args, dtype, device):
    """--reward of records with prompt, response and ids -> rewards (n,)."""
    if is_function(args.reward):  # rank 0 calls it: it may be slow, or cost money
        function, rewards = load_function(args.reward), []
        for record in records if dist.get_rank() == 0 else ():
            with explain(f"--reward {args.reward} has to return a number, but failed on pair "
                         f"{record['id']} and the answer of {record['model']}: {{}}"):
                rewards.append(float(function(record["prompt"], record["response"])))
                assert math.isfinite(rewards[-1]), "the number is not finite"
        shared = [rewards]
        dist.broadcast_object_list(shared, 0)
        return np.array(shared[0])
    kind = transformers.AutoModelForSequenceClassification
    model, own = load_model(args.reward, args, dtype, device, kind)
    if model.config.num_labels != 1:
        fail(f"--reward {args.reward} has {model.config.num_labels} labels; a reward has one")
    known = (model.config.pad_token_id, own.pad_token_id, own.eos_token_id)
    pad = model.config.pad_token_id = next(token for token in known if token is not None)
    texts = []
    for record in records:
        turns = conversation(tokenizer, record["ids"][0])
        turns.append(dict(role="assistant", content=record["response"]))
        text = "\n\n".join(turn["content"] for turn in turns)
        with explain(f"--reward {args.reward}: its template fails on pair {record['id']} ({{}})"):
            text = own.apply_chat_template(turns, tokenize=False) if own.chat_template else text
        texts.append(tuple(own(text, add_special_tokens=not own.chat_template)["input_ids"]))
    kinds = sorted(set(texts))
    rewards = torch.zeros(len(kinds), dtype=torch.float64)
    for _, batch, ours in deal(list(map(len, kinds)), args.reward, args):
        real = torch.arange(len(kinds[batch[0]])) < torch.tensor([[len(kinds[k])] for k in batch])
        ids = torch.full(real.shape, pad)
        ids[real] = torch.tensor(sum((kinds[k] for k in batch), ()))
        with torch.no_grad():
            logits = model(ids.to(device), attention_mask=real.long().to(device)).logits[:, 0]
        if ours:
            rewards[batch] = logits.double().cpu()
    dist.all_reduce(rewards)
    known = dict(zip(kinds, rewards.tolist()))
    for record, text in zip(records, texts):
        if not math.isfinite(known[text]):
            fail(f"--reward {args.reward}: the reward of pair {record['id']} is {known[text]}; try "
                 "--dtype float32, or another model")
    return np.array([known[text] for text in texts])


# ---- questions from files

def read_items(path, what):
    """The objects of a JSON list or of JSON lines."""
    with explain(f"{what} {path} is no list or lines of JSON objects ({{}})"):
        text = Path(path).read_text()
        lines = filter(None, map(str.strip, text.splitlines()))
        items = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in lines]
        assert items and all(isinstance(item, dict) for item in items), "no objects"
    return items

def ask(tokenizer, texts):
    """One user turn per text -> token ids of the prompts."""
    if not tokenizer.chat_template:
        return tokenizer(texts)["input_ids"]
    texts = [tokenizer.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                           add_generation_prompt=True) for text in texts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]

def letter_of(text, count):
    """The option that an answer names, 0 to count - 1; None if it names none, or not one.

    In this order: what the last "answer is (B)", "Answer: B" and the like says; "B", "B." or "(B)"
    at the beginning, which "A good question" is not; the only "(B)" in the text. None if there
    are several letters in brackets."""
    last = chr(64 + count)
    said = re.findall(rf"(?i:answer)(?i:\s+is|\s*:)*\s*[*(\[]*([A-{last}])\b(?!')", text)
    first = re.match(rf"\W*([A-{last}])(?:[.):\]*]|\s*$|\s*\n)", text)
    only = set(re.findall(rf"\(([A-{last}])\)", text))
    found = said[-1:] or ([first[1]] if first else sorted(only)) * (len(only) < 2)
    return ord(found[0]) - 65 if found else None

def multiple_choice(model, tokenizer, name, args):
    """--choices -> rows of choices.md: subject, questions, accuracy, share that names an option."""
    texts, right, subjects, counts = [], [], [], []
    for item in read_items(args.choices, "--choices")[:args.limit or None]:
        with explain(f"--choices {args.choices}: {str(item)[:80]} lacks question, options and an "
                     "answer among them ({})"):
            options = item.get("options") or item["choices"]
            letters = [chr(65 + i) for i in range(len(options))]
            key = item["answer"]
            right.append(letters.index(key) if key in letters else int(key))
            assert 0 <= right[-1] < len(options), f"{key}"
            lines = [f"{letter}. {option}" for letter, option in zip(letters, options)]
            ask_for = "Answer with the letter of the right option."
            texts.append("\n".join([item["question"], *lines, ask_for]))
            counts.append(len(options))
            subjects.append(str(item.get("category") or item.get("subject") or ""))
    greedy = dataclasses.replace(args, temperature=0.0)
    records = answer(model, tokenizer, ask(tokenizer, texts), None, name, greedy)
    given = [letter_of(record["response"], count) for record, count in zip(records, counts)]
    rows, subjects = [], np.array(subjects)
    for subject in ["", *sorted(set(subjects) - {""})]:
        group = np.flatnonzero((subjects == subject) | (not subject))
        shares = [given[i] == right[i] for i in group], [given[i] is not None for i in group]
        rows.append([name, subject or "all", str(len(group))]
                    + [show(mean_and_error(share), 100, 1) for share in shares])
    return rows

def write_answers(model, tokenizer, name, args):
    """AlpacaEval's questions (objects with instruction) to out/answers/NAME.json, model outputs;
    Arena-Hard's (question_id or uid, and prompt or turns) to NAME.jsonl, its model answers."""
    items = read_items(args.prompts, "--prompts")[:args.limit or None]
    with explain(f"--prompts {args.prompts}: an object lacks instruction, prompt or turns ({{}})"):
        prompts = ask(tokenizer, [item.get("instruction") or item.get("prompt")
                                  or item["turns"][0]["content"] for item in items])
    answers = []
    for item, record in zip(items, answer(model, tokenizer, prompts, None, name, args)):
        turn = dict(content=record["response"], token_len=record["tokens"])
        key = next((key for key in ("question_id", "uid") if key in item), None)
        alpaca = {k: v for k, v in item.items() if k in ("instruction", "dataset")}
        answers.append(alpaca | dict(output=record["response"], generator=name) if not key else {
            key: item[key], "answer_id": f"{name}-{item[key]}", "model_id": name,
            "choices": [dict(index=0, turns=[turn])], "tstamp": time.time()})
    path = Path(args.out, "answers", name.replace("/", "_") + (".jsonl" if key else ".json"))
    if dist.get_rank() == 0:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)
        with explain(f"{path} cannot be written ({{}}); make room, or choose another --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines if key else json.dumps(answers, indent=1, ensure_ascii=False))
        print(f"{path}: {len(answers)} answers")


# ---- numbers

def measure(logps, lengths, ref_logps=None, first_logps=None, rewards=None):
    """Metrics {name: (rows,)} of arrays (rows, 2), columns chosen and rejected; a tie is 1/2."""
    margin = lambda values: values[:, 0] - values[:, 1]  # (rows,)
    better = lambda values: 0.5 + 0.5 * np.sign(margin(values))  # (rows,) 0, 1/2 or 1
    metrics = {"accuracy": better(logps), "margin": margin(logps)}
    metrics["accuracy/token"] = better(logps / lengths)
    if first_logps is not None:
        metrics["gain"] = better(logps) - better(first_logps)
    if ref_logps is not None:
        change = logps - ref_logps  # (rows, 2)
        metrics |= {"accuracy/ref": better(change), "margin/ref": margin(change),
                    "accuracy/ref/token": better(change / lengths)}
        metrics["chosen/ref"], metrics["rejected/ref"] = change.T
        if rewards is not None:
            same = np.sign(margin(change)) * np.sign(margin(rewards))
            metrics["agreement"] = 0.5 + 0.5 * same
    return metrics

def best_of(values, keys):
    """Is a chosen response better than all of its rejected ones? values (rows, 2), one key per row
    -> an entry per key that has several rows. Responses of equal value share the point. Empty
    where few rows are such: then the data are pairs, and some of them happen to share a side."""
    groups, shares = {}, []
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    groups = [rows for rows in groups.values() if len(rows) > 1]
    for rows in groups if 2 * sum(map(len, groups)) > len(values) else ():
        chosen, rejected = values[rows].max(0)
        ties = (values[rows, 1] == chosen).sum()  # the chosen one is the same in all rows
        shares.append(0.0 if rejected > chosen else 1 / (1 + ties))
    return np.array(shares)

def ties_score(values, ids):
    """RewardBench-2's score of its subset Ties; values (rows, 2), ids that end in ref:NUMBER or
    tied:NUMBER. A prompt is accurate if its worst right answer beats its best wrong one by a gap
    above 0. 30 % accuracy on tied prompts, 30 % on ref ones (one right answer); over prompts that
    are both, 20 % how often the gap exceeds the spread of the right answers, 20 % how often that
    of the ref prompt does too, and 1 % tanh(smaller gap / spread - 1). Malik et al. 2025,
    https://arxiv.org/abs/2506.01937, and the constants of allenai/reward-bench."""
    gap, spread = dict(ref={}, tied={}), {}
    groups = {}
    for row, key in enumerate(ids):
        groups.setdefault(re.search(r"(ref|tied):(\d+)(-\d+)?$", key).group(1, 2), []).append(row)
    for (kind, number), rows in groups.items():
        chosen, rejected = values[rows].T
        gap[kind][number] = chosen.min() - rejected.max()
        if kind == "tied":
            spread[number] = chosen.max() - chosen.min()
    right = {kind: np.mean([x > 0 for x in gap[kind].values() or [-1]]) for kind in gap}
    both = [number for number in spread if number in gap["ref"]]
    tied, ref, spreads = (np.array([part[number] for number in both])
                          for part in (gap["tied"], gap["ref"], spread))
    less = np.minimum(tied, ref)
    with np.errstate(divide="ignore", invalid="ignore"):
        extra = np.nan_to_num(np.tanh(less / spreads - 1))
    shares = [part.mean() if both else 0.0 for part in (tied > spreads, less > spreads, extra)]
    return float(np.dot([0.3, 0.3, 0.2, 0.2, 0.01], [right["tied"], right["ref"], *shares]))

def rank_correlation(one, two):
    """Spearman's: Pearson's correlation of ranks (n,), equal values sharing their mean rank."""
    def ranks(values):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]
    one, two = ranks(one), ranks(two)
    spread = one.std() * two.std()
    return float(((one - one.mean()) * (two - two.mean())).mean() / spread) if spread else 0.0

def equal_length(wins, longer):
    """Win rate without the help of length: sigmoid(a) of the logistic regression of wins (n,), 0 to
    1, on a + b tanh(longer / its spread), longer (n,) in tokens. The idea is that of AlpacaEval 2
    (Dubois et al. 2024, https://arxiv.org/abs/2404.04475), without its terms for each prompt."""
    x = np.stack([np.ones(len(wins)), np.tanh(longer / (longer.std() or 1))], 1)  # (n, 2)
    theta = np.zeros(2)
    for _ in range(25):  # Newton; the ridge is one answer in a thousand
        p = 1 / (1 + np.exp(-x @ theta))
        slope = x.T @ (wins - p) / len(x) - 1e-3 * theta
        bend = (x.T * (p * (1 - p))) @ x / len(x) + 1e-3 * np.eye(2)
        theta += np.linalg.solve(bend, slope)
    return float(1 / (1 + np.exp(-theta[0])))

def mean_and_error(values, clusters=None):
    """(mean, its standard error) of values (n,) that are independent, or those of different
    clusters (n,) are; of one value or cluster the error is unknown."""
    values = np.asarray(values, float)
    off = values - values.mean()
    if clusters is not None:
        off = np.bincount(np.unique(clusters, return_inverse=True)[1], off)
    count = len(off)
    error = (count / (count - 1) * (off**2).sum()) ** 0.5 / len(values) if count > 1 else None
    return float(values.mean()), error

def resample(clusters, draws=400):
    """Bootstrap: lists of rows, as many clusters as there are, drawn with replacement."""
    if len(clusters) == 0:
        return []
    random = np.random.default_rng(0)
    _, place, count = np.unique(clusters, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(count)[:-1])
    return [np.concatenate([members[k] for k in random.integers(0, len(members), len(members))])
            for _ in range(draws)]

def bootstrap(statistic, clusters):
    """(statistic of all rows, its standard error); clusters (n,) are drawn as a whole."""
    again = [statistic(rows) for rows in resample(clusters, 200)]
    return statistic(np.arange(len(clusters))), float(np.std(again))

def best_of_n(rewards):
    """[(n, KL, mean reward, error)] of the best of n = 1, 2, 4, ... of the N answers to each
    prompt, rewards (prompts, N): the mean over all choices of n. The KL to the model that answers
    is log n - (n - 1) / n at most (Beirami et al. 2024, https://arxiv.org/abs/2401.01879)."""
    rewards, count = np.sort(rewards, 1), rewards.shape[1]
    rows = []
    for n in (2**k for k in range(count.bit_length())):
        chance = np.array([math.comb(i, n - 1) for i in range(count)]) / math.comb(count, n)
        rows.append((n, math.log(n) - (n - 1) / n, *mean_and_error(rewards @ chance)))
    return rows

def show(numbers, factor=1, digits=2):
    return " ± ".join(f"{factor * x:.{digits}f}" for x in numbers if x is not None)

def markdown(cells, left=2):
    """Rows of words, the first of them headings -> a Markdown table, aligned to be read as is."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    rule = ["-" * (w - 1) + "-:"[i >= left] for i, w in enumerate(widths)]
    rows = [[x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))]
            for row in [cells[0], rule, *cells[1:]]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)

def make_table(results):
    """results, dicts of model, subset, pairs and metrics -> Markdown."""
    names = [name for name in COLUMNS if any(name in result["metrics"] for result in results)]
    cells = [["model", "subset", "pairs"] + [COLUMNS[name] for name in names]]
    for result in results:
        cells.append([result["model"], result["subset"] or "all", str(result["pairs"] or "")])
        for name in names:
            digits = (100, 1) if "%" in COLUMNS[name] else (1, 2)
            cells[-1].append(show(result["metrics"].get(name, []), *digits))
    return markdown(cells)

def make_differences(compared, data):
    """{metric: {model: values of pairs or answers (n,)}} -> Markdown: of every two models the mean
    difference and its 95 % interval by bootstrap over prompts; a star where 0 is outside."""
    cells = [["model", "against"] + [COLUMNS[key] for key in compared]]
    pairs, answers = resample(data.clusters), resample(np.arange(len(data.asked)))
    for one, two in itertools.combinations(compared["accuracy"], 2):
        cells.append([two, one])
        for key, models in compared.items():
            factor, digits = (100, 1) if "%" in COLUMNS[key] else (1, 2)
            gap = factor * (models[two] - models[one])
            draws = answers if key == "reward" else pairs
            low, high = np.percentile([gap[rows].mean() for rows in draws], [2.5, 97.5])
            words = [f"{x:+.{digits}f}" for x in (gap.mean(), low, high)]
            star = "*" if low > 0 or high < 0 else " "
            cells[-1].append("{} [{}, {}]".format(*words) + star)
    return markdown(cells)


# ---- plots

def curve_of(name):
    """(run, step) of a checkpoint; of any other model (its name, infinity)."""
    path = Path(name)
    step = re.fullmatch(r"step-(\d+)", path.name)
    return (str(path.parent), int(step[1])) if step else (name.removesuffix("/final"), math.inf)

def read_log(run):
    """{metric: [(step, value)]} of log.jsonl."""
    curves = {}
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    with explain(f"{run}/log.jsonl has a line that is not JSON ({{}}); take the line out"):
        for line in (json.loads(line) for line in lines if line.endswith("}")):  # last may be cut
            for name, value in line.items():
                curves.setdefault(name, []).append((line["step"], value))
    return curves

def draw(path, runs, results=(), margins=None):
    """Curves of the log.jsonl of runs, validation solid and training pale; of models the margins to
    the reference (margins: {model: (rows,)}), displacement, and reward of the answers against
    their length and KL. Checkpoints of a run make one line, which begins at the reference."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    means = {r["model"]: {key: x[0] for key, x in r["metrics"].items()} for r in results
             if not r["subset"] and ("accuracy/token" in r["metrics"] or not r["pairs"])}
    best = {name: means.pop(name) for name in list(means) if name.startswith(BEST)}
    lines = {}  # {curve: models in the order of their steps}
    for name in sorted(means, key=lambda name: curve_of(name)[1]):
        lines.setdefault(curve_of(name)[0], []).append(name)
    curves = list(dict.fromkeys(runs + [curve_of(r["model"])[0] for r in results
                                        if r["model"] in means]))
    colour = {curve: f"C{k % 10}" for k, curve in enumerate(curves)}
    panels = [(key, *words) for key, *words in [
        ("loss", "Loss", "optimiser step", "loss"),
        ("rewards/accuracies", "Accuracy", "optimiser step", "fraction of pairs"),
        ("rewards/margins", "Reward margin", "optimiser step", "chosen - rejected"),
        ("logps/chosen", "Log-prob of the chosen response", "optimiser step", "change, nats")]
        if runs]
    scatter = {("chosen/ref", "rejected/ref"): ("Displacement", "chosen, nats", "rejected, nats"),
               ("length", "reward"): ("Reward against length", "tokens of an answer", "reward"),
               ("kl", "reward"): ("Reward against KL", "KL to the reference, nats", "reward")}
    panels += [("margins", "Margins to the reference", "nats", "fraction of pairs below")
               ] if margins else []
    panels += [(keys, *words) for keys, words in scatter.items()
               if any(set(keys) <= metrics.keys() for metrics in means.values())]
    wide = 2 if len(panels) <= 4 else 4
    high = math.ceil(len(panels) / wide)
    figure, axes = plt.subplots(high, wide, figsize=(5 * wide, 3.3 * high), layout="constrained",
                                squeeze=False)
    for ax, (key, title, x, y) in itertools.zip_longest(
            axes.flat, panels, fillvalue=(None, "", "", "")):
        if key is None:
            ax.set_axis_off()
            continue
        for run in runs if isinstance(key, str) and key != "margins" else ():
            log = read_log(run)
            train, val = (np.array(log.get(name, [])) for name in (key, f"eval/{key}"))
            for curve, style in (train, dict(alpha=0.3, lw=1)), (val, dict(lw=2, marker=".")):
                if key == "logps/chosen":  # since step 0; training batches differ too much
                    curve = val - [0, val[0, 1]] if curve is val and len(val) else ()
                if len(curve):
                    ax.plot(*curve.T, color=colour[run], **style)
        for name in margins if key == "margins" else ():
            curve, step = curve_of(name)
            if step == math.inf and margins[name].any():
                share = np.arange(1, len(margins[name]) + 1) / len(margins[name])
                ax.plot(np.sort(margins[name]), share, color=colour[curve])
        for curve, names in lines.items() if isinstance(key, tuple) else ():
            points = [[means[name][k] for k in key] for name in names
                      if set(key) <= means[name].keys()]
            start = next((means[n] for n in means if means[n].get("margin/ref") == 0), {})
            if len(points) > 1 and set(key) <= start.keys():
                points.insert(0, [start[k] for k in key])
            if points:
                ax.plot(*np.array(points).T, color=colour[curve], alpha=0.8)
                ax.plot(*points[-1], "o", color=colour[curve])
        if key == ("kl", "reward") and best:
            ax.plot(*np.array([[each[k] for k in key] for each in best.values()]).T, "k--",
                    label="best of n")
            ax.legend(frameon=False)
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], color=colour[curve], lw=2, label=curve) for curve in curves]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(curves), 8),
                  frameon=False)
    figure.savefig(path, dpi=150)


def answer_questions(names, args, dtype, device):
    """--choices and --prompts: no pairs are needed."""
    rows = []
    for name in names:
        model, tokenizer = load_model(name, args, dtype, device)
        if args.prompts:
            write_answers(model, tokenizer, name, args)
        if args.choices:
            rows += multiple_choice(model, tokenizer, name, args)
        del model
    if rows and dist.get_rank() == 0:
        heading = ["model", "subject", "questions", "right %", "named an option %"]
        print(markdown([heading, *rows]), end="")
        with explain(f"--out {args.out}/choices.md cannot be written ({{}})"):
            Path(args.out, "choices.md").write_text(markdown([heading, *rows]))

# ---- the pairs of a data folder

def load_pairs(args, names):
    """--split as ids, prompts, texts (prompt, response) with all chosen first, lengths (rows, 2),
    clusters (rows,) of equal prompts, subsets, and the rows whose prompts are answered."""
    remake = f"run: prepare_data.py --model {names[0]} --out {args.data} --dataset ..."
    with explain(f"--data {args.data}, --split {args.split}: cannot be read ({{}}); {remake}"):
        vocabulary = json.loads(Path(args.data, "meta.json").read_text())["vocab_hash"]
        rows = datasets.concatenate_datasets(
            [datasets.load_from_disk(f"{args.data}/{part}") for part in args.split.split(",")])
        rows = rows.select(range(min(args.limit or len(rows), len(rows))))
        assert len(rows), "it has no pairs"
        ids, prompts, chosen, rejected = (
            rows[key][:] for key in ("id", "prompt", "chosen", "rejected"))
    texts = [*zip(prompts, chosen), *zip(prompts, rejected)]
    _, first, clusters = np.unique(list(map(str, prompts)), return_index=True, return_inverse=True)
    asked = np.random.default_rng(args.seed).permutation(np.sort(first))[:args.samples]
    return SimpleNamespace(
        ids=ids, prompts=prompts, texts=texts, clusters=clusters, vocabulary=vocabulary,
        lengths=np.array([len(y) for _, y in texts]).reshape(2, -1).T, remake=remake,
        asked=sorted(asked.tolist(), key=lambda row: ids[row]), end=chosen[0][-1],
        subsets=np.array(rows["subset"][:] if "subset" in rows.column_names else [""] * len(rows)))

def ask_model(name, data, samples, args, dtype, device):
    """-> log-probs (rows, 2) of the pairs. Adds the model's answers to samples {name: records}; the
    reference, which comes last, scores all answers, and makes those for --best_of."""
    model, tokenizer = load_model(name, args, dtype, device)
    if vocab_hash(tokenizer) != data.vocabulary:
        fail(f"--data {args.data} holds the tokens of another model than {name}; {data.remake}")
    logps = score(model, data.texts, name, args).reshape(2, -1).T
    broken = np.flatnonzero(~np.isfinite(logps).all(1))
    if len(broken):
        fail(f"{name}: the log-prob of pair {data.ids[broken[0]]} is not finite ({len(broken)} "
             "pairs in all); try --dtype float32, or drop the model from --models")
    named = {name: 1} if name in samples else {}
    if name == args.reference and args.best_of:
        named |= {BEST: args.best_of}
    for key, copies in named.items() if data.asked else ():
        rows = [row for row in data.asked for _ in range(copies)]
        asked = [data.prompts[row] for row in rows]
        records = answer(model, tokenizer, asked, data.end, name, args)
        samples[key] = [record | dict(id=data.ids[row]) for row, record in zip(rows, records)]
        if key == name and args.reference and args.temperature == 1:  # else they are not of pi
            logp = score(model, [record["ids"] for record in samples[key]], name, args)
            samples[key] = [r | dict(logp=x) for r, x in zip(samples[key], logp.tolist())]
    for other, records in samples.items() if name == args.reference else ():
        if records and "logp" in records[0]:  # in the same batches, so that equal models have KL 0
            ref_logps = score(model, [r["ids"] for r in records], other, args).tolist()
            samples[other] = [r | dict(kl=r["logp"] - x) for r, x in zip(records, ref_logps)]
    return logps, tokenizer

def reward_everything(data, samples, tokenizer, args, dtype, device):
    """Adds the rewards to the answers in samples -> those of the pairs (rows, 2)."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    pairs = [dict(id=name, model="--data", ids=text, prompt=decode(text[0]),
                  response=decode(text[1])) for name, text in zip(data.ids * 2, data.texts)]
    answers = sum(samples.values(), [])
    rewards = judge(pairs + answers, tokenizer, args, dtype, device)
    for record, reward in zip(answers, rewards[len(pairs):].tolist()):
        record["reward"] = reward
    return rewards[:len(pairs)].reshape(2, -1).T

def of_several(s, rows, data):
    """best and ties of log-probs s (rows, 2), of those rows that are parts of a question."""
    tie = [bool(re.search(r"(ref|tied):\d+(-\d+)?$", data.ids[row])) for row in rows]
    tied, plain = rows[np.array(tie)], rows[~np.array(tie)]
    shares = best_of(s[plain], [str(data.texts[row]) for row in plain])
    found = {"best": mean_and_error(shares)} if len(shares) else {}
    if len(tied):
        found["ties"] = ties_score(s[tied], [data.ids[row] for row in tied]), None
    return found

def summarise(names, data, logps, samples, rewards, args):
    """-> results [{model, subset, pairs, metrics: {name: (mean, error)}}], and per metric that is
    compared between models {metric: {model: values}}."""
    results, compared = [], {}
    groups = {"": np.arange(len(data.ids))} | {
        subset: np.flatnonzero(data.subsets == subset) for subset in sorted({*data.subsets} - {""})}

    def add(model, metrics, extra=lambda rows: {}):
        for subset, rows in groups.items():
            means = {key: mean_and_error(values[rows], data.clusters[rows])
                     for key, values in metrics.items()}
            results.append(dict(model=model, subset=subset, pairs=len(rows),
                                metrics=means | extra(rows)))
        return results[-len(groups)]["metrics"]  # of all pairs

    for name in names:
        first, ref = logps[names[0]] if name != names[0] else None, logps.get(args.reference)
        metrics = measure(logps[name], data.lengths, ref, first, rewards)

        def extra(rows):
            found = of_several(logps[name], rows, data)
            if ref is not None:
                more = of_several(logps[name] - ref, rows, data)
                found |= {f"{key}/ref": value for key, value in more.items()}
                gap = metrics["margin/ref"][rows]
                if rewards is not None and gap.any():
                    judged = rewards[rows] @ [1, -1]
                    found["rank"] = bootstrap(lambda k: rank_correlation(judged[k], gap[k]),
                                              data.clusters[rows])
            return found

        means = add(name, metrics, extra)
        compared |= {key: compared.get(key, {}) | {name: metrics[key]}
                     for key in ("accuracy", "accuracy/ref", "margin/ref") if key in metrics}
        of = {key: np.array([record[key] for record in samples.get(name, ())], float)
              for key in samples.get(name, [{}])[0] if key in ANSWERS}
        means |= {ANSWERS[key]: mean_and_error(x) for key, x in of.items()}
        if "reward" in of:
            compared["reward"] = compared.get("reward", {}) | {name: of["reward"]}
            base = {key: np.array([record[key] for record in samples[names[0]]]) for key in of}
            wins = 0.5 + 0.5 * np.sign(of["reward"] - base["reward"])
            longer = of["tokens"] - base["tokens"]
            means["win"] = mean_and_error(wins)
            means["win/length"] = bootstrap(lambda k: equal_length(wins[k], longer[k]),
                                            np.arange(len(wins)))
    if rewards is not None:
        metrics = measure(rewards, data.lengths)
        add(args.reward, {key: metrics[key] for key in ("accuracy", "margin")})
    if BEST in samples:
        table = np.array([record["reward"] for record in samples.pop(BEST)])
        for n, bound, *reward in best_of_n(table.reshape(len(data.asked), -1)):
            results.append(dict(model=f"{BEST}{n}", subset="", pairs=0,
                                metrics=dict(reward=reward, kl=(bound, None))))
    return results, compared

def main():
    args = parse_args(Args)
    names = [name.strip().rstrip("/") for name in args.models.split(",")]
    names = list(dict.fromkeys(filter(None, names)))  # each once
    runs = [name for name in names if Path(name, "log.jsonl").is_file()]
    if not names or not (args.data or args.plot or args.prompts or args.choices):
        fail("nothing to do: give --models A,B with --data data/NAME, --plot FILE.png, --prompts "
             "alpaca_eval.json or --choices mmlu_pro.jsonl")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs a package: pip install matplotlib")
    if args.plot and not runs and not (args.data and args.reference):
        fail(f"--plot {args.plot} draws log.jsonl of runs such as out/dpo, and {args.models} has "
             "none; or changes from a --reference on --data")
    if args.reward and not args.data:
        fail(f"--reward {args.reward} judges pairs and samples: add --data data/NAME [--samples N]")
    if args.best_of and not (args.samples and args.reference and args.reward):
        fail(f"--best_of {args.best_of} needs --samples, --reference and --reward")
    if is_function(args.reward):
        load_function(args.reward)
    others = [each for each in (args.reference, args.reward) if each and not is_function(each)]
    for name in names * bool(args.data) + others:
        model_folder(name)
    if args.reward in others:  # which is loaded last
        with explain(f"--reward {args.reward} is no reward model and no FILE.py:FUNCTION ({{}})"):
            transformers.AutoConfig.from_pretrained(args.reward)
    data = load_pairs(args, names) if args.data else None
    rank, world, device, dtype = start_process_group(args.dtype)
    out = Path(args.out)
    with explain(f"cannot write --out {out}, --table {args.table} or --plot {args.plot} ({{}})"):
        for path in filter(None, (f"{out}/x", args.table, args.plot)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if runs and args.plot and rank == 0:  # again at the end, with what is measured
            draw(args.plot, runs)
            print(f"{args.plot}: the curves of {', '.join(runs)}")
    if args.prompts or args.choices:
        answer_questions(names, args, dtype, device)
    if not args.data:
        return dist.destroy_process_group()

    # one model at a time; the reference comes last, and scores what the others have answered
    logps, samples, seconds = {}, {name: [] for name in names} if data.asked else {}, {}
    for name in [n for n in names if n != args.reference] + [args.reference] * bool(args.reference):
        clock = time.time()
        try:
            logps[name], tokenizer = ask_model(name, data, samples, args, dtype, device)
        except torch.OutOfMemoryError:
            fail(f"{name} runs out of memory: lower --max_tokens {args.max_tokens}, or --shard")
        seconds[name] = time.time() - clock
    rewards = None
    if args.reward:
        rewards = reward_everything(data, samples, tokenizer, args, dtype, device)
    results, compared = summarise(names, data, logps, samples, rewards, args)

    if rank == 0:
        hardware = f"{torch.get_num_threads()} CPU threads"
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else hardware
        record = dict(args=dataclasses.asdict(args), ranks=world, hardware=hardware,
                      dtype=str(dtype)[6:], torch=torch.__version__, numpy=np.__version__,
                      transformers=transformers.__version__, datasets=datasets.__version__,
                      seconds=seconds, results=results)
        note = (f"{args.data}/{args.split}: mean ± standard error, log-probs in nats; "
                f"{len(data.asked)} samples per model at temperature {args.temperature:g}; "
                f"{world} x {hardware}, {record['dtype']}, torch {torch.__version__}, transformers "
                f"{transformers.__version__}, {sum(seconds.values()):.0f} s\n")
        table = make_table(results) + "\n" + note
        print(table, end="")  # first: it is not lost if the disk is full
        with explain(f"cannot write --out {out}, --table {args.table}, --plot {args.plot} ({{}})"):
            for path in {out / "table.md", Path(args.table or out / "table.md")}:
                path.write_text(table)
            if len(names) > 1:
                (out / "differences.md").write_text(make_differences(compared, data) + "\n" + note)
            np.savez(out / "logps.npz", models=list(logps), logps=np.float32(list(logps.values())),
                     ids=data.ids, lengths=np.column_stack([list(map(len, data.prompts)),
                                                            data.lengths]))
            with open(out / "samples.jsonl", "w") as file:
                for answer in sum(samples.values(), []):
                    del answer["ids"]
                    file.write(json.dumps(answer) + "\n")
            if args.plot:
                margins = {name: (logps[name] - logps[args.reference]) @ [1, -1]
                           for name in names if args.reference}
                draw(args.plot, runs, results, margins)
            (out / "evaluation.json").write_text(json.dumps(record, indent=1))
        print(f"{out}/evaluation.json has all numbers")
    dist.destroy_process_group()


if __name__ == "__main__":
    with explain("{}; mend this and run the same command again",
                 (OSError, dcp.CheckpointException, ModuleNotFoundError)):
        main()
