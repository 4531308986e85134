"""Preference accuracy and margins, displacement and samples of models, as a table; curves of runs.

    python evaluate.py --models MODEL,out/dpo,out/simpo --data data/NAME --reference MODEL
    python evaluate.py --models MODEL,out/dpo --data data/NAME --samples 200 --reward my.py:score
    python evaluate.py --models out/dpo,out/simpo --plot runs.png          (no --data: plot only)
    python evaluate.py --models out/dpo --prompts alpaca_eval.json         (answers for a judge)
    python evaluate.py --models out/dpo --choices mmlu_pro.jsonl           (answers by a letter)

A model is a Hugging Face folder, a hub name, a LoRA adapter or a run (out/dpo means out/dpo/final).
s = log pi(y|x) in nats, summed over the response by the forward pass of training; s_ref is that of
--reference. Columns are means over pairs, taken as independent, ± standard error:

    accuracy   s(chosen) > s(rejected), a tie = 1/2   margin         s(chosen) - s(rejected)
    per token  the same for s / length                margin to ref  the same for s - s_ref
    to ref     the same for s - s_ref                 chosen, rejected   the change s - s_ref itself
    gain       accuracy less the first model's, ± the error of this paired difference
    best, best to ref   of chosen responses in several pairs (multiple choice, RewardBench-2): its s
                        (s - s_ref) exceeds that of each rejected one, a tie of k = 1/k
    length, ended, reward   of --samples: tokens; has an end token; what --reward FILE.py:FUNCTION
                            returns for (prompt text, response text), both without special tokens
    win  reward above the first model's on the same prompt, a tie = 1/2; equal length: the win rate
         that a logistic regression on the difference of lengths predicts where there is none
    KL   of --samples at temperature 1: s - s_ref of the answers, whose mean is KL(pi || ref), nats

results/ gets evaluation.json, samples.jsonl and logps.npz: every s, so that another question needs
no model. Each process holds whole models; torchrun deals pairs and prompts over several.
"""
import argparse, bisect, contextlib, dataclasses, hashlib, importlib.util, inspect, json, math, os
import re, sys, time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    models: str  # folders, hub names or runs, separated by commas; gains are over the first
    data: str = ""  # folder made by prepare_data.py; without it only --plot is drawn
    split: str = "val"  # which folder of the data
    limit: int = 0  # only the first so many pairs of the split; 0 = all
    reference: str = ""  # model that changes are measured from; without it those columns are blank
    out: str = "results"  # folder for evaluation.json, logps.npz and samples.jsonl
    table: str = ""  # Markdown file that gets the printed table
    plot: str = ""  # image file (.png, .svg, .pdf) for the curves of those models that are runs
    choices: str = ""  # questions in the layout of MMLU-Pro or ARC, answered greedily by a letter
    prompts: str = ""  # AlpacaEval's or Arena-Hard's questions; answers go to --out/answers/
    # samples
    samples: int = 0  # prompts of the split, drawn by seed, that every model answers; 0 = off
    max_new_tokens: int = 256  # an answer is cut off there
    temperature: float = 1.0  # of sampling; 0 = greedy
    reward: str = ""  # FILE.py:FUNCTION that scores a prompt and a response
    seed: int = 0  # of the choice of prompts and of sampling
    # memory and speed
    layout: str = "packed"  # packed (no padding, each prompt once) | concatenated | separate
    max_tokens: int = 8192  # bound on the tokens of one forward pass, or of one batch of samples
    dtype: str = "auto"  # of the computation: auto (bfloat16 on a GPU) | bfloat16 | float32


COLUMNS = {  # metric: its heading; per cent, nats or tokens
    "accuracy": "accuracy %", "accuracy/token": "per token %", "accuracy/ref": "to ref %",
    "gain": "gain %", "best": "best %", "best/ref": "best to ref %",
    "margin": "margin", "margin/ref": "margin to ref", "chosen/ref": "chosen",
    "rejected/ref": "rejected", "length": "length", "ended": "ended %", "reward": "reward",
    "win": "win %", "win/length": "equal length %", "kl": "KL"}


# ---- helpers, the same in every script (tests/test_copies.py): edit them in dpo.py first ----


def fail(message):
    """End the program with one line on stderr and exit status 1."""
    time.sleep(5 * (int(os.environ.get("RANK", 0)) > 0))  # torchrun ends the others after rank 0
    raise SystemExit(f"error: {' '.join(message.split())}")

@contextlib.contextmanager
def explain(trouble):
    """Replace any error inside `with` by the line `trouble`, the reason standing for its {}."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # every layer has its own; that of a checkpoint is no Exception
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fail(trouble.replace("{}", lines[-1 if "Traceback" in lines[0] else 0][:200]))

def parse_args(cls):
    """Command line -> frozen dataclass `cls`. A field's comment is its --help; words between bars
    are its choices; a number is above 0, or may be 0 if that is the default or noted as "0 ="."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see {parser.prog} --help")
    for field in dataclasses.fields(cls):
        default, note = getattr(cls, field.name, None), notes[field.name].replace("%", "%%")
        words = re.sub(r" \(.*?\)", "", note).split(": ")[-1].split(" | ")
        kind = dict(type=field.type, choices=words if len(words) > 1 else None)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        note += "" if default is None else f" [{default}]"
        kind |= dict(default=default, required=default is None, help=note)
        parser.add_argument(f"--{field.name}", **kind)
    args = cls(**vars(parser.parse_args()))
    for name, value in vars(args).items():
        zero = "0 =" in notes[name] or not getattr(cls, name, 0)
        if type(value) in (int, float) and not (0 < value < math.inf or zero and value == 0):
            least = "at least" if zero else "above"
            fail(f"--{name} {value} must be finite and {least} 0: {notes[name]}")
    return args

def vocab_hash(tokenizer) -> str:
    """16 hex digits that change when any token or its id does."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]

def start_process_group(dtype):
    """Join torchrun's process group, or make one alone -> rank, world size, device, dtype."""
    cuda = torch.cuda.is_available()  # true for ROCm as well, where "nccl" is RCCL
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # a saturated batch is many times slower on a CPU without it
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    dtype = dict(auto="bfloat16" if cuda else "float32").get(dtype, dtype)
    return dist.get_rank(), dist.get_world_size(), device, getattr(torch, dtype)

def load_data(args, names=("train", "val")):
    """{split: dict(rows=dataset, lengths=(rows, 3) of its three columns, hash)}, tokenizer"""
    data, splits = Path(args.data), {}
    remake = f"run: prepare_data.py --model {args.model} --out {data} --dataset ..."
    near = Path(args.model).parent
    if not Path(args.model).exists() and near.is_dir() and near != Path():  # no name on the hub
        fail(f"--model {args.model} is not there, only its parent {near}; correct the path")
    with explain(f"--data {data} or the tokenizer of {args.model} cannot be read ({{}}); {remake}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        meta = json.loads((data / "meta.json").read_text())
        for name in names:
            rows = datasets.load_from_disk(str(data / name))
            columns = (rows.data[side] for side in ("prompt", "chosen", "rejected"))
            lengths = np.stack([pc.list_value_length(c).to_numpy() for c in columns], 1).astype(int)
            content = [meta["content_hash"][name], *lengths.sum(0).tolist()]
            splits[name] = dict(rows=rows, lengths=lengths, hash=content)
    if vocab_hash(tokenizer) != meta["vocab_hash"]:
        fail(f"--data {data} holds the tokens of another model than --model {args.model}; {remake}")
    for name, split in splits.items():
        if len(split["rows"]) == 0 or split["lengths"].min() == 0:
            fail(f"{data}/{name} has no pairs, or an empty prompt or response; {remake}")
        cost = pair_costs(split["lengths"], args.layout)
        if cost.max() > args.max_tokens:
            pair = split["rows"][int(cost.argmax())]["id"]
            fail(f"pair {pair} in {data}/{name} has {cost.max()} tokens, over --max_tokens "
                 f"{args.max_tokens}: raise it, or prepare the data with a smaller --max_length")
    return splits, tokenizer

def pair_costs(lengths, layout):
    """Tokens (rows,) that one forward pass spends on each pair alone; lengths (rows, 3)."""
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    return {"packed": lengths.sum(1), "concatenated": 2 * longest, "separate": longest}[layout]

def micro_batches(rows, lengths, layout, max_tokens, world):
    """Deal `rows` into lists, a multiple of `world` of them; rank k runs lists k, k + world, ...

    Neighbours in length share a list, no list exceeds max_tokens, and the largest is as small as it
    can be: ranks finish together. A list may be empty if there are few rows."""
    cost, longest = (pair_costs(lengths[rows], name) for name in (layout, "separate"))

    def split(limit):
        lists, used = [], math.inf
        for i in np.argsort(-longest, kind="stable"):
            step = cost[i] if layout == "packed" or not lists else cost[lists[-1][0]]  # padding
            if used + step > limit:
                lists.append([])
                used, step = 0, cost[i]
            lists[-1].append(i)
            used += step
        return lists

    count = math.ceil(len(split(max_tokens)) / world) * world
    enough = lambda limit: len(split(limit)) <= count
    lists = split(bisect.bisect_left(range(max_tokens), True, lo=cost.max(), key=enough))
    while len(lists) < count:
        big = lists.pop(max(range(len(lists)), key=lambda i: len(lists[i])))
        lists += [big[:len(big) // 2], big[len(big) // 2:]]
    return [rows[np.array(part, np.int64)] for part in sorted(lists, key=len)]

def collate(pairs, layout):
    """The tensors of a micro-batch: a list, one dict per forward pass (two if layout is separate).

    Rows are prompt + response, right-padded, chosen first: input_ids (rows, T). Packed, they are
    one row (1, L) without padding and second copies of prompts; rows (rows, T) and tokens (L,) lead
    there and back. source (M,) indexes the flattened input_ids: the token that predicts
    targets (M,); sizes are the response lengths and sum to M."""
    batches = []
    for sides in [["chosen"], ["rejected"]] if layout == "separate" else [["chosen", "rejected"]]:
        texts = [(pair["prompt"], pair[side]) for side in sides for pair in pairs]
        starts, responses = np.array([[len(x), len(y)] for x, y in texts]).T[:, :, None]
        columns = np.arange((starts + responses).max())
        real = columns < starts + responses  # masks come from lengths, never from token ids
        response = real & (columns >= starts)
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate([x + y for x, y in texts])
        cells = np.arange(ids.size).reshape(ids.shape)
        batch = dict(targets=ids[response], position_ids=columns[None], input_ids=ids, real=real)
        if layout == "packed":
            kept = real & (response | (np.arange(len(texts)) < len(pairs))[:, None])
            tokens = np.flatnonzero(kept)
            first, second = np.split(np.cumsum(kept).reshape(kept.shape) - 1, 2)
            cells = np.concatenate([first, np.where(response[len(pairs):], second, first)])
            batch |= dict(rows=cells, tokens=tokens, input_ids=ids.flatten()[tokens][None],
                          position_ids=tokens[None] % len(columns))
        batch["source"] = cells[:, :-1][response[:, 1:]]
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        batches.append(batch | {"sizes": responses[:, 0].tolist()})
    return batches

def gathered_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None,
                       rows=None, tokens=None, **kwargs):
    """Causal attention over right-padded rows that start at position 0: no padding mask is needed.

    query (b, H, L, d); key, value may have fewer heads. Packed, b = 1 and the rows are gathered:
    rows (2n, T) says which of the L tokens stands where, tokens (L,) where in the flattened rows
    each token's output is. Returns (b, L, H, d)."""
    if rows is not None:  # (1, H, L, d) -> (2n, H, T, d)
        query, key, value = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))
    length, groups, mask = query.shape[2], query.shape[1] // key.shape[1], None
    own = any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))  # Gemma-2, gpt-oss
    if own or (sliding_window or length) < length:
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place  # (T, T) how far back the key is
        mask = (distance >= 0) & (distance < (sliding_window or length))
    if own:  # what SDPA cannot express is left to the model's own definition
        attend = sys.modules[type(module).__module__].eager_attention_forward
        bias = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)[None, None]
        kwargs |= dict(scaling=scaling, dropout=0.0)
        output, _ = attend(module, query, key, value, bias, **kwargs)
    else:
        if mask is not None and groups > 1:  # no fused kernel takes both a mask and grouped heads
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2)  # (2n, T, H, d)
    return (output if rows is None else output.flatten(0, 1)[tokens][None]), None

transformers.AttentionInterface.register("gathered", gathered_attention)

def token_logps(logits, targets):
    """float32 logits (t, V), targets (t,) -> log pi(target) (t,)."""
    return -F.cross_entropy(logits, targets, reduction="none")

def head_pass(hidden, targets, head, config, score):
    """hidden (t, h), targets (t,) -> score(logits, targets), with all that models do to logits."""
    logits = head(hidden).float()  # (t, V)
    logits = logits * (getattr(config, "logit_scale", None) or 1)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    return score(logits if cap is None else cap * torch.tanh(logits / cap), targets)

BALANCE = "load_balancing_loss_func"  # as transformers' mixtures of experts call it

class Policy(torch.nn.Module):
    """A causal LM whose forward gives log pi(y|x). As the root of FSDP it sees the whole head.

    What is summed over each response is score(logits (t, V), targets (t,)), shaped (..., t)."""

    def __init__(self, model, score=token_logps):
        super().__init__()
        self.model, self.score = model, score

    def forward(self, batches, router=False, chunk=1024):
        """batches of collate -> summed scores (2, n, ...), and the mean router loss (or 0).

        Logits exist for `chunk` response tokens at a time; the backward pass makes them again."""
        sums, router_loss, names = [], 0.0, ("input_ids", "position_ids", "rows", "tokens")
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        for batch in batches:
            inputs = {name: batch[name] for name in names if name in batch}
            inputs |= dict(output_router_logits=True) if router else {}
            output = self.model.base_model(**inputs, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)[batch["source"]]  # (M, h)
            scores = [checkpoint(head_pass, *part, head, config, self.score, use_reentrant=False)
                      for part in zip(hidden.split(chunk), batch["targets"].split(chunk))]
            sums += [part.sum(-1) for part in torch.cat(scores, -1).split(batch["sizes"], -1)]
            if router:
                balance = getattr(sys.modules[type(self.model).__module__], BALANCE)
                experts = getattr(config, "num_experts", None) or config.num_local_experts
                real = None if "rows" in batch else batch["real"]
                loss = balance(output.router_logits, experts, config.num_experts_per_tok, real)
                router_loss = router_loss + loss / len(batches)
        return torch.stack(sums).reshape(2, -1, *sums[0].shape).clone(), router_loss

# ---- end of the helpers ----


def model_folder(name):
    """What from_pretrained takes for a name in --models or --reference."""
    folder = Path(name)
    if not folder.exists() and "/" in name and (folder.parent.exists() or name.count("/") > 1):
        fail(f"there is no folder {name}, see --models and --reference")
    if (folder / "args.json").is_file():
        folder = folder / "final"
        if not folder.is_dir():
            fail(f"{name} is a run without final/: let it finish (--resume), or take another model")
    if (folder / "adapter_config.json").is_file() and not importlib.util.find_spec("peft"):
        fail(f"{folder} is a LoRA adapter, which needs a package: pip install peft")
    return str(folder)

def load_model(name, args, dtype, device):
    """The whole model with the attention of training, and the name of the attention it had."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"], f"it lacks {', '.join(info['missing_keys'])}"
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        fail(f"{name} of --models or --reference is no causal language model ({reason[0][:150]})")
    model = model.to(device)
    config, own = model.config, model.config._attn_implementation
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    plain = model._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"}
    if args.layout == "packed" and (model._is_stateful or not plain):
        fail(f"--layout packed gathers tokens for attention, but {config.model_type} models mix "
             "them in other ways too: use --layout concatenated or --layout separate")
    if plain:
        model.set_attn_implementation("gathered")
    return model.eval(), own

@torch.no_grad()
def score(model, split, name, args):
    """Summed log-probs in nats of chosen and rejected, float32 (rows, 2), dealt over the ranks."""
    rank, world, policy = dist.get_rank(), dist.get_world_size(), Policy(model)
    rows = np.arange(len(split["rows"]))
    lists = micro_batches(rows, split["lengths"], args.layout, args.max_tokens, world)[rank::world]
    logps = torch.zeros(len(rows), 2)
    bar = tqdm(total=sum(map(len, lists)), desc=name, unit=" pairs", disable=rank > 0)
    for part in filter(len, lists):
        batches = collate([split["rows"][int(row)] for row in part], args.layout)
        for batch in batches:
            batch |= {k: v.to(model.device) for k, v in batch.items() if torch.is_tensor(v)}
        logps[part] = policy(batches)[0].T.float().cpu()
        bar.update(len(part))
    bar.close()
    dist.all_reduce(logps)  # a row is 0 on all ranks but one
    broken = np.flatnonzero(~logps.isfinite().all(1).numpy())
    if len(broken):
        fail(f"{name}: the log-prob of pair {split['rows'][int(broken[0])]['id']} is not finite "
             f"({len(broken)} pairs in all); try --dtype float32, or drop the model from --models")
    return logps.numpy()

@torch.no_grad()
def sample(model, tokenizer, rows, reward, name, args):
    """Answers to --samples different prompts, the same for every model and any number of ranks:
    [{model, id, prompt, response, tokens, ended, reward}]."""
    rank, world, prompts, records = dist.get_rank(), dist.get_world_size(), rows["prompt"][:], []
    kept = list({tuple(prompt): row for row, prompt in enumerate(prompts)}.values())
    kept = np.random.default_rng(args.seed).permutation(kept)[:args.samples].tolist()
    kept.sort(key=lambda row: len(prompts[row]))
    size = max(1, args.max_tokens // (len(prompts[kept[-1]]) + args.max_new_tokens))
    batches = [kept[start:start + size] for start in range(0, len(kept), size)]
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    ends |= {rows[0]["chosen"][-1]}  # the end of a turn, which not every tokenizer calls its EOS
    drawn = dict(do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0)
    model.generation_config = transformers.GenerationConfig(  # instead of the model's own
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends),
        **drawn if args.temperature else {})
    for k in tqdm(range(rank, len(batches), world), f"{name} samples", disable=rank > 0):
        width = len(prompts[batches[k][-1]])
        real = np.array([np.arange(width) >= width - len(prompts[row]) for row in batches[k]])
        ids = np.full(real.shape, min(ends))
        ids[real] = np.concatenate([prompts[row] for row in batches[k]])  # padded on the left
        torch.manual_seed(args.seed + k)
        inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(real).long())
        output = model.generate(**{key: x.to(model.device) for key, x in inputs.items()})
        for row, tokens in zip(batches[k], output[:, width:].tolist()):
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), 0)
            texts = [tokenizer.decode(x, skip_special_tokens=True)
                     for x in (prompts[row], tokens[:length or None])]
            records.append(dict(model=name, id=rows[row]["id"], prompt=texts[0], response=texts[1],
                                tokens=length or len(tokens), ended=length > 0,
                                ids=(prompts[row], tokens[:length or None])))
            try:
                if reward:
                    records[-1]["reward"] = float(reward(*texts))
                    assert math.isfinite(records[-1]["reward"]), "the number is not finite"
            except Exception as error:
                fail(f"--reward {args.reward} has to return a number, but failed on pair "
                     f"{rows[row]['id']} and the answer of {name}: {type(error).__name__}: {error}")
    gathered = [None] * world
    dist.all_gather_object(gathered, records)
    return sorted(sum(gathered, []), key=lambda record: record["id"])

def read_items(path, what):
    """The objects of a JSON list or of JSON lines."""
    with explain(f"{what} {path} is no list or lines of JSON objects ({{}})"):
        text = Path(path).read_text()
        lines = filter(None, map(str.strip, text.splitlines()))
        items = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in lines]
        assert items and all(isinstance(item, dict) for item in items), "no objects"
    return items

def ask(tokenizer, texts):
    """One user turn per text -> rows as `sample` wants them."""
    rows, plain = [], not tokenizer.chat_template
    for number, text in enumerate(texts):
        shown = text if plain else tokenizer.apply_chat_template(
            [dict(role="user", content=text)], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(shown, add_special_tokens=plain)["input_ids"]
        rows.append(dict(id=str(number), prompt=ids, chosen=[tokenizer.eos_token_id]))
    return datasets.Dataset.from_list(rows)

def answers_of(model, tokenizer, rows, name, args):
    """A record of `sample` for every row, equal ones for equal prompts."""
    given = dataclasses.replace(args, samples=len(rows))
    records = {tuple(record["ids"][0]): record
               for record in sample(model, tokenizer, rows, None, name, given)}
    return [records[tuple(prompt)] for prompt in rows["prompt"][:]]

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
    """--choices -> [(subject, questions, accuracy, share of answers that name an option)]."""
    texts, right, subjects, counts = [], [], [], []
    for item in read_items(args.choices, "--choices"):
        with explain(f"--choices {args.choices}: {str(item)[:80]} lacks question, options and an "
                     "answer among them ({})"):
            options = item.get("options") or item["choices"]
            letters = [chr(65 + i) for i in range(len(options))]
            answer = item["answer"]
            right.append(letters.index(answer) if answer in letters else int(answer))
            assert 0 <= right[-1] < len(options), f"{answer}"
            lines = [f"{letter}. {option}" for letter, option in zip(letters, options)]
            ask_for = "Answer with the letter of the right option."
            texts.append("\n".join([item["question"], *lines, ask_for]))
            counts.append(len(options))
            subjects.append(str(item.get("category") or item.get("subject") or ""))
    args = dataclasses.replace(args, temperature=0.0)
    rows = ask(tokenizer, texts[:args.limit or None])
    given = [letter_of(record["response"], count) for record, count in zip(
        answers_of(model, tokenizer, rows, name, args), counts)]
    results, subjects = [], np.array(subjects[:len(given)])
    for subject in ["", *sorted(set(subjects) - {""})]:
        group = np.flatnonzero((subjects == subject) | (not subject))
        hits = [given[i] == right[i] for i in group]
        parsed = [given[i] is not None for i in group]
        results.append((subject, len(group), mean_and_error(hits), mean_and_error(parsed)))
    return results

def write_answers(model, tokenizer, name, args):
    """AlpacaEval's questions (objects with instruction) to out/answers/NAME.json, model outputs;
    Arena-Hard's (question_id or uid, and prompt or turns) to NAME.jsonl, its model answers."""
    items = read_items(args.prompts, "--prompts")
    with explain(f"--prompts {args.prompts}: an object lacks instruction, prompt or turns ({{}})"):
        rows = ask(tokenizer, [item.get("instruction") or item.get("prompt")
                               or item["turns"][0]["content"] for item in items])
    answers = []
    for item, answer in zip(items, answers_of(model, tokenizer, rows, name, args)):
        turn = dict(content=answer["response"], token_len=answer["tokens"])
        key = next((key for key in ("question_id", "uid") if key in item), None)
        alpaca = {k: v for k, v in item.items() if k in ("instruction", "dataset")}
        answers.append(alpaca | dict(output=answer["response"], generator=name) if not key else {
            key: item[key], "answer_id": f"{name}-{item[key]}", "model_id": name,
            "choices": [dict(index=0, turns=[turn])], "tstamp": time.time()})
    path = Path(args.out, "answers", name.replace("/", "_") + (".jsonl" if key else ".json"))
    if dist.get_rank() == 0:
        with explain(f"{path} cannot be written ({{}})"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            path.write_text(lines if key else json.dumps(answers, indent=1, ensure_ascii=False))
        print(f"{path}: {len(answers)} answers")

def score_answers(model, records, name, args):
    """log pi (n,) of sampled answers; the second of a pair, which score wants, is one token."""
    rows = [dict(id=record["id"], prompt=prompt, chosen=answer, rejected=answer[:1])
            for record in records for prompt, answer in [record["ids"]]]
    lengths = np.array([[len(row[side]) for side in ("prompt", "chosen", "rejected")]
                        for row in rows])
    limit = max(args.max_tokens, int(pair_costs(lengths, args.layout).max()))
    args = dataclasses.replace(args, max_tokens=limit)
    return score(model, dict(rows=rows, lengths=lengths), f"{name} answers", args)[:, 0]

def load_reward(spec):
    """The function that --reward FILE.py:FUNCTION names."""
    path, _, function = spec.rpartition(":")
    try:
        place = importlib.util.spec_from_file_location("reward", path)
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:
        fail(f"--reward {spec} does not name a function as FILE.py:FUNCTION ({error})")

def measure(logps, lengths, ref_logps=None, first_logps=None):
    """Metrics {name: (rows,)}; log-probs, lengths (rows, 2) of chosen, rejected; a tie is 1/2."""
    def compare(values):
        margins = values[:, 0] - values[:, 1]
        return (margins > 0) + 0.5 * (margins == 0), margins  # (rows,) each

    accuracy, margins = compare(logps)
    metrics = {"accuracy": accuracy, "margin": margins}
    metrics["accuracy/token"] = compare(logps / lengths)[0]
    if first_logps is not None:
        metrics["gain"] = accuracy - compare(first_logps)[0]
    if ref_logps is not None:
        change = logps - ref_logps  # (rows, 2)
        metrics["accuracy/ref"], metrics["margin/ref"] = compare(change)
        metrics["chosen/ref"], metrics["rejected/ref"] = change.T
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

def at_equal_length(wins, longer):
    """Win rate without the help of length: sigmoid(a) of the logistic regression of wins (n,), 0 to
    1, on a + b tanh(longer / its spread), longer (n,) in tokens; and its bootstrap error. The idea
    is that of AlpacaEval 2 (Dubois et al. 2024, https://arxiv.org/abs/2404.04475), without its
    terms for the difficulty of each prompt."""
    x = np.stack([np.ones(len(wins)), np.tanh(longer / (longer.std() or 1))], 1)  # (n, 2)

    def fit(rows):
        theta = np.zeros(2)
        for _ in range(25):  # Newton; the ridge is one answer in a thousand
            p = 1 / (1 + np.exp(-x[rows] @ theta))
            slope = x[rows].T @ (wins[rows] - p) / len(rows) - 1e-3 * theta
            bend = (x[rows].T * (p * (1 - p))) @ x[rows] / len(rows) + 1e-3 * np.eye(2)
            theta += np.linalg.solve(bend, slope)
        return 1 / (1 + np.exp(-theta[0]))

    random = np.random.default_rng(0)
    again = [fit(random.integers(0, len(wins), len(wins))) for _ in range(200)]
    return fit(np.arange(len(wins))), float(np.std(again))

def mean_and_error(values):
    """(mean, its standard error) of independent values (n,); of one value the error is unknown."""
    values = np.asarray(values, float)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None

def make_table(results):
    """results, dicts of model, subset, pairs and metrics -> Markdown, aligned to be read as is."""
    used = {name for result in results for name in result["metrics"]}
    names = [name for name in COLUMNS if name in used or "/ref" in name and name != "best/ref"]
    cells = [["model", "subset", "pairs"] + [COLUMNS[name] for name in names]]
    for result in results:
        cells.append([result["model"], result["subset"] or "all", str(result["pairs"])])
        for name in names:
            factor, digits = (100, 1) if "%" in COLUMNS[name] else (1, 2)
            known = [x for x in result["metrics"].get(name, []) if x is not None]
            cells[-1].append(" ± ".join(f"{factor * x:.{digits}f}" for x in known))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * (w - 1) + "-:"[i > 1] for i, w in enumerate(widths)])
    rows = [[x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))]
            for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

def plot_runs(runs, path):
    """Four panels from the log.jsonl of folders; validation solid, training pale."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {"loss": ("Loss", "loss"), "rewards/accuracies": ("Accuracy", "fraction of pairs"),
              "rewards/margins": ("Reward margin", "chosen − rejected"),
              "logps/chosen": ("Log-prob of the chosen response", "change since step 0, nats")}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharex=True, layout="constrained")
    for k, run in enumerate(runs):
        lines = (Path(run) / "log.jsonl").read_text().splitlines()
        try:
            lines = [json.loads(line) for line in lines if line.endswith("}")]  # last may be cut
        except ValueError as error:
            fail(f"{run}/log.jsonl has a line that is not JSON ({error}); take the line out")
        axes[0, 0].plot([], [], color=f"C{k}", lw=2, label=run)
        for ax, (key, (title, unit)) in zip(axes.flat, panels.items()):
            train, val = (np.array([(line["step"], line[name]) for line in lines if name in line])
                          for name in (key, f"eval/{key}"))
            for curve, style in (train, dict(alpha=0.3, lw=1)), (val, dict(lw=2, marker=".")):
                if len(curve) and key != "logps/chosen":
                    ax.plot(*curve.T, color=f"C{k}", **style)
                elif len(curve) and curve is val:  # training batches differ too much
                    ax.plot(val[:, 0], val[:, 1] - val[0, 1], color=f"C{k}", **style)
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.supxlabel("optimiser step (solid: validation; pale: training batches)", fontsize=11)
    figure.legend(loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    figure.savefig(path, dpi=150)


def main():
    args = parse_args(Args)
    names = list(dict.fromkeys(filter(None, map(str.strip, args.models.split(",")))))
    runs = [name for name in names if Path(name, "log.jsonl").is_file()]
    if not names or not (args.data or args.plot or args.prompts or args.choices):
        fail("nothing to do: give --models A,B with --data data/NAME, --plot FILE.png, --prompts "
             "alpaca_eval.json or --choices mmlu_pro.jsonl")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs a package: pip install matplotlib")
    if args.plot and not runs:
        fail(f"--plot {args.plot} draws log.jsonl of runs such as out/dpo: {args.models} has none")
    if args.reward and not (args.samples and args.data):
        fail(f"--reward {args.reward} scores samples: add --data data/NAME --samples N")
    reward = load_reward(args.reward) if args.reward else None
    rank, world, device, dtype = start_process_group(args.dtype)
    choices = []
    try:
        for path in filter(None, (args.data and f"{args.out}/x", args.table, args.plot)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if args.plot and rank == 0:
            plot_runs(runs, args.plot)
            print(f"{args.plot}: the curves of {', '.join(runs)}")
    except (OSError, ValueError) as error:
        fail(f"cannot write --out {args.out}, --table {args.table} or --plot {args.plot} ({error})")
    for name in names if args.prompts or args.choices else ():
        folder = model_folder(name)
        model, attention = load_model(folder, args, dtype, device)
        model.set_attn_implementation(attention)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if args.prompts:
            write_answers(model, tokenizer, name, args)
        for subject, count, *shares in (
                multiple_choice(model, tokenizer, name, args) if args.choices else ()):
            choices.append([name, subject or "all", str(count)] + [
                " ± ".join(f"{100 * x:.1f}" for x in share if x is not None) for share in shares])
        del model
    if choices and rank == 0:
        heading = ["model", "subject", "questions", "right %", "named an option %"]
        lines = [" | ".join(row) for row in [heading, ["---"] * 5, *choices]]
        lines = "".join(f"| {line} |\n" for line in lines)
        with explain(f"--out {args.out}/choices.md cannot be written ({{}})"):
            Path(args.out).mkdir(parents=True, exist_ok=True)
            Path(args.out, "choices.md").write_text(lines)
        print(lines, end="")
    if not args.data:
        return dist.destroy_process_group()

    # one model at a time: the log-probs of all pairs, then samples
    folders = {name: model_folder(name) for name in names + [args.reference] * bool(args.reference)}
    logps, samples, seconds = {}, {}, {}
    divergence = args.samples and args.reference and args.temperature == 1  # else answers not of pi
    for name, folder in folders.items():
        clock = time.time()
        place = dict(model=folder, data=args.data, layout=args.layout, max_tokens=args.max_tokens)
        splits, tokenizer = load_data(SimpleNamespace(**place), [args.split])
        split = splits[args.split]
        split["rows"] = split["rows"].select(range(min(args.limit or 10**9, len(split["rows"]))))
        split["lengths"] = split["lengths"][:len(split["rows"])]
        try:
            model, attention = load_model(folder, args, dtype, device)
            logps[name] = score(model, split, name, args).astype(float)
            if args.samples and name in names:
                training = model.config._attn_implementation
                model.set_attn_implementation(attention)
                samples[name] = sample(model, tokenizer, split["rows"], reward, name, args)
                model.set_attn_implementation(training)
                if divergence:
                    for record, logp in zip(samples[name], score_answers(
                            model, samples[name], name, args).tolist()):
                        record["logp"] = logp
        except torch.OutOfMemoryError:
            fail(f"{name} runs out of memory: lower --max_tokens {args.max_tokens}")
        del model
        seconds[name] = time.time() - clock

    if divergence:
        model, _ = load_model(folders[args.reference], args, dtype, device)
        for name, records in samples.items():
            ref_logps = score_answers(model, records, f"reference, {name}", args).tolist()
            for record, ref_logp in zip(records, ref_logps):
                record["kl"] = record["logp"] - ref_logp
        del model

    # means over all pairs and over each subset
    rows, lengths, results = split["rows"], split["lengths"][:, 1:], []
    subsets = np.array(rows["subset"][:] if "subset" in rows.column_names else [""] * len(rows))
    keys = np.array([str(both) for both in zip(rows["prompt"][:], rows["chosen"][:])])
    groups = {"": subsets == subsets} | {str(x): subsets == x for x in np.unique(subsets) if x}
    for name in names:
        first = logps[names[0]] if name != names[0] else None
        metrics = measure(logps[name], lengths, logps.get(args.reference), first)
        for subset, group in groups.items():
            means = {key: mean_and_error(values[group]) for key, values in metrics.items()}
            change = logps[name] - logps[args.reference] if args.reference else None
            for key, values in {"best": logps[name], "best/ref": change}.items():
                if values is not None:
                    shares = best_of(values[group], keys[group])
                    means |= {key: mean_and_error(shares)} if len(shares) else {}
            results.append(dict(model=name, subset=subset, pairs=int(group.sum()), metrics=means))
            if name in samples and not subset:
                for key, heading in dict(tokens="length", ended="ended", reward="reward",
                                         kl="kl").items():
                    values = [record[key] for record in samples[name] if key in record]
                    means |= {heading: mean_and_error(values)} if values else {}
                if reward:
                    values = {each: np.array([(answer["reward"], answer["tokens"])
                                              for answer in samples[each]])
                              for each in (name, names[0])}
                    better, longer = (values[name] - values[names[0]]).T
                    wins = (better > 0) + 0.5 * (better == 0)
                    means["win"], means["win/length"] = (
                        mean_and_error(wins), at_equal_length(wins, longer))

    if rank == 0:
        out, table = Path(args.out), make_table(results)
        hardware = f"{torch.get_num_threads()} CPU threads"
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else hardware
        record = dict(args=dataclasses.asdict(args), ranks=world, hardware=hardware,
                      dtype=str(dtype)[6:], torch=torch.__version__, numpy=np.__version__,
                      transformers=transformers.__version__, datasets=datasets.__version__,
                      seconds=seconds, results=results)
        table += (f"\n\n{args.data}/{args.split}: mean ± standard error, log-probs in nats; "
                  f"{len(samples.get(names[0], []))} samples per model at temperature "
                  f"{args.temperature:g}; {world} x {hardware}, {record['dtype']}, torch "
                  f"{torch.__version__}, transformers {transformers.__version__}, "
                  f"{sum(seconds.values()):.0f} s")
        print(table)  # first: it is not lost if the disk is full
        try:
            np.savez(out / "logps.npz", models=list(logps), logps=np.float32(list(logps.values())),
                     ids=rows["id"][:], lengths=split["lengths"])
            with open(out / "samples.jsonl", "w") as file:
                for answer in sum(samples.values(), []):
                    del answer["ids"]
                    file.write(json.dumps(answer) + "\n")
            if args.table:
                Path(args.table).write_text(table + "\n")
            (out / "evaluation.json").write_text(json.dumps(record, indent=1))
        except OSError as error:
            fail(f"cannot write --out {args.out} or --table {args.table} ({error}); make room")
        print(f"{out}/evaluation.json has all numbers")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
