"""What became of the models: preference accuracy and margins, displacement, samples, a table and a plot.

    python evaluate.py --models MODEL,out/dpo,out/simpo --data data/NAME --reference MODEL
    python evaluate.py --models MODEL,out/dpo --data data/NAME --samples 200 --reward my.py:score
    python evaluate.py --models out/dpo,out/simpo --plot runs.png             (without --data: no model runs)

A model is a Hugging Face folder, a hub name, a LoRA adapter, or a run: out/dpo means out/dpo/final.
s(y) = log pi(y|x) in nats, summed over the response by the forward pass of training; s_0 the reference's.
Columns, each a mean over pairs (which count as independent) ± its standard error; a tie counts half:

    accuracy    how often s(chosen) > s(rejected)      margin           s(chosen) - s(rejected)
    per token   how often s/length is larger           margin to ref    s - s_0, chosen less rejected
    to ref      how often s - s_0 is larger            chosen, rejected by how much s moved: s - s_0
    gain        accuracy less the first model's, ± the error of the *paired* difference, which is smaller
    length, ended, reward    of --samples: tokens, how often with an end token, --reward FILE.py:FUNCTION,
                             a function(prompt text, response text) -> number

Writes results/evaluation.json, logps.npz (every pair's s, so that other questions need no model) and
samples.jsonl. Each process holds a whole model; torchrun deals the pairs and prompts over several.
"""
import argparse, bisect, dataclasses, hashlib, importlib.util, inspect, json, math, os, re, sys, time
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
    models: str  # folders, hub names, adapters or runs, separated by commas; gains are over the first
    data: str = ""  # folder made by prepare_data.py; without it only --plot is drawn
    split: str = "val"  # which folder of the data
    reference: str = ""  # model that changes are measured from; without it those columns are blank
    out: str = "results"  # folder for evaluation.json, logps.npz and samples.jsonl
    table: str = ""  # Markdown file for the table that is printed
    plot: str = ""  # image file (.png, .svg, .pdf) for the curves of those models that are runs
    # memory and speed
    layout: str = "packed"  # packed (no padding, each prompt once) | concatenated | separate
    max_tokens: int = 8192  # bound on the tokens of one forward pass, or of one batch of samples
    dtype: str = "auto"  # of the computation: auto (bfloat16 on a GPU) | bfloat16 | float32
    # samples
    samples: int = 0  # prompts of the split, drawn by seed, that every model answers; 0 = off
    max_new_tokens: int = 256  # an answer is cut off there
    temperature: float = 1.0  # of sampling; 0 = greedy
    reward: str = ""  # FILE.py:FUNCTION that scores a prompt and a response
    seed: int = 0  # of the choice of prompts and of sampling


COLUMNS = {  # metric: heading of its column; per cent or nats
    "accuracy": "accuracy %", "accuracy_per_token": "per token %", "accuracy_to_reference": "to ref %",
    "gain": "gain %", "margin": "margin", "margin_to_reference": "margin to ref",
    "change_chosen": "chosen", "change_rejected": "rejected",
    "length": "length", "ended": "ended %", "reward": "reward"}


# ---- helpers: the same source in every script (tests/test_copies.py); edit them in dpo.py first ----


def fail(message: str):
    """End the program with one line on stderr and exit status 1."""
    time.sleep(5 * (int(os.environ.get("RANK", 0)) > 0))  # torchrun ends the others after rank 0 spoke
    raise SystemExit(f"error: {message}")

def parse_args(cls):
    """Command line -> frozen dataclass `cls`. A field's trailing comment is its --help; words between
    bars are its choices; a number is above 0, or may be 0 where that is its default or "0 =" is noted."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see {parser.prog} --help")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        kind = dict(type=field.type, default=None if required else field.default, required=required)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction, default=field.default)
        note = notes[field.name].replace("%", "%%") + ("" if required else f" [{field.default}]")
        parser.add_argument(f"--{field.name}", help=note, **kind)
    args = cls(**vars(parser.parse_args()))
    for name, value in vars(args).items():
        choices = re.findall(r"(\w+)(?: \([^)]*\))? (?=\|)|\| (\w+)", notes[name])
        if choices and value not in [word for pair in choices for word in pair]:
            fail(f"--{name} {value} is not a choice: {notes[name]}")
        if isinstance(value, (int, float)):
            zero = "0 =" in notes[name] or not getattr(cls, name, 1)
            if not (value > 0 or zero and value == 0):
                fail(f"--{name} {value} must be {'at least' if zero else 'above'} 0: {notes[name]}")
    return args

def vocab_hash(tokenizer) -> str:
    """16 hex digits that change when any token or its id does."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]

def start_process_group(dtype):
    """Join torchrun's process group, or make one of this process. Returns rank, world, device, dtype."""
    cuda = torch.cuda.is_available()  # true for ROCm as well, where "nccl" is RCCL
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # a saturated batch is many times slower on a CPU without it
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    dtype = dict(auto=torch.bfloat16 if cuda else torch.float32).get(dtype) or getattr(torch, dtype)
    return dist.get_rank(), dist.get_world_size(), device, dtype

def load_data(args, names=("train", "val")):
    """{split: dict(rows=dataset, lengths=(rows, 3) of prompt, chosen, rejected, hash=list)}, tokenizer."""
    folder, splits = Path(args.data), {}
    remake = f"run: prepare_data.py --model {args.model} --out {args.data} --dataset ..."
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        meta = json.loads((folder / "meta.json").read_text())
        for name in names:
            rows = datasets.load_from_disk(str(folder / name))
            sizes = [pc.list_value_length(rows.data[side]).to_numpy() for side in ("prompt", "chosen", "rejected")]
            lengths = np.stack(sizes, 1).astype(np.int64)
            content = [meta["content_hash"][name], *map(int, lengths.sum(0))]
            splits[name] = dict(rows=rows, lengths=lengths, hash=content)
    except Exception as error:  # every library has its own errors for a folder that is absent or broken
        reason = str(error).strip().splitlines() or [type(error).__name__]
        fail(f"--data {folder} or the tokenizer of --model {args.model} is unusable ({reason[0][:150]}); {remake}")
    if vocab_hash(tokenizer) != meta["vocab_hash"]:
        fail(f"--data {folder} was tokenised for another model than --model {args.model}; {remake}")
    for name, split in splits.items():
        if len(split["rows"]) == 0 or split["lengths"].min() == 0:
            fail(f"{folder}/{name} has no pairs, or an empty prompt or response; {remake}")
        cost = pair_costs(split["lengths"], args.layout)
        if cost.max() > args.max_tokens:
            fail(f"pair {split['rows'][int(cost.argmax())]['id']} of {folder}/{name} takes {cost.max()} tokens, over "
                 f"--max_tokens {args.max_tokens}: raise it, or prepare the data with a smaller --max_length")
    return splits, tokenizer

def pair_costs(lengths, layout):
    """Tokens (rows,) that one forward pass spends on each pair alone; lengths (rows, 3)."""
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    return {"packed": lengths.sum(1), "concatenated": 2 * longest, "separate": longest}[layout]

def micro_batches(rows, lengths, layout, max_tokens, world):
    """Deal `rows` into lists, a multiple of `world` of them; rank k runs lists k, k + world, ...

    Neighbours in length share a list, no list exceeds max_tokens, and the largest is as small as it can
    be, so that ranks finish together. A list is empty only if there are fewer rows than ranks."""
    cost = pair_costs(lengths[rows], layout)
    order = np.argsort(-lengths[rows, 0] - lengths[rows, 1:].max(1), kind="stable")  # longest first

    def split(limit):
        lists, used = [], math.inf
        for i in order:
            step = cost[i] if layout == "packed" or not lists else cost[lists[-1][0]]  # padded to the first
            if used + step > limit:
                lists.append([])
                used, step = 0, cost[i]
            lists[-1].append(i)
            used += step
        return lists

    count = math.ceil(len(split(max_tokens)) / world) * world
    limits = range(max_tokens)
    lists = split(bisect.bisect_left(limits, True, lo=cost.max(), key=lambda limit: len(split(limit)) <= count))
    while len(lists) < count:
        big = lists.pop(max(range(len(lists)), key=lambda i: len(lists[i])))
        lists += [big[:len(big) // 2], big[len(big) // 2:]]
    return [rows[np.array(part, np.int64)] for part in sorted(lists, key=len)]

def collate(pairs, layout):
    """The tensors of one micro-batch: a list with one dict per forward pass (two if layout is separate).

    Rows are prompt + response, right-padded, chosen first: input_ids (rows, T). Packed, they are one row
    (1, L) that leaves out the padding and the second copy of each prompt; then rows (rows, T) and tokens
    (L,) lead there and back. source (M,) indexes the flattened input_ids: the token that predicts
    targets (M,); sizes are the response lengths and sum to M."""
    batches = []
    for sides in [["chosen"], ["rejected"]] if layout == "separate" else [["chosen", "rejected"]]:
        texts = [(pair["prompt"], pair[side]) for side in sides for pair in pairs]
        starts = np.array([len(prompt) for prompt, _ in texts])[:, None]  # column of the response
        ends = starts + np.array([len(response) for _, response in texts])[:, None]
        columns = np.arange(ends.max())
        ids = np.stack([np.pad(x + y, (0, len(columns) - len(x + y))) for x, y in texts])  # (rows, T)
        real, response = columns < ends, (columns >= starts) & (columns < ends)  # masks from lengths
        cells = np.arange(ids.size).reshape(ids.shape)
        batch = dict(targets=ids[response], position_ids=columns[None], input_ids=ids, real=real)
        if layout == "packed":
            kept = real & (response | (np.arange(len(texts)) < len(pairs))[:, None])
            tokens = np.flatnonzero(kept)
            cells = np.cumsum(kept).reshape(kept.shape) - 1
            first, second = np.split(cells, 2)
            cells = np.concatenate([first, np.where(response[len(pairs):], second, first)])
            batch |= dict(rows=cells, tokens=tokens, input_ids=ids.flatten()[tokens][None],
                          position_ids=tokens[None] % len(columns))
        batch["source"] = cells[:, :-1][response[:, 1:]]
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        batches.append(batch | {"sizes": response.sum(1).tolist()})
    return batches

def gathered_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None,
                       rows=None, tokens=None, **kwargs):
    """Causal attention over right-padded rows that start at position 0, so that no padding mask is needed.

    query (b, H, L, d); key, value with H or fewer heads. In the packed layout b = 1 and the rows are
    gathered: rows (2n, T) says which of the L tokens stands where in each prompt + response, tokens (L,)
    where in those rows, flattened, each token's output is found. Returns (b, L, H, d)."""
    if rows is not None:
        query, key, value = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))  # (2n, H, T, d)
    length = query.shape[2]
    window, mask = sliding_window or length, None
    own_rule = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None  # Gemma-2; gpt-oss
    if own_rule or window < length:
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance  # (T, T) how far back the key is
        mask = (distance >= 0) & (distance < window)
    if own_rule:  # what SDPA cannot express is left to the model's own definition
        attend = sys.modules[type(module).__module__].eager_attention_forward
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        kwargs["dropout"] = 0.0
        output = attend(module, query, key, value, bias[None, None], scaling=scaling, **kwargs)[0]
    else:
        groups = query.shape[1] // key.shape[1]
        if mask is not None and groups > 1:  # no fused kernel takes both a mask and grouped heads
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None,
                                                scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
        output = output.transpose(1, 2)  # (2n, T, H, d)
    return (output if rows is None else output.flatten(0, 1)[tokens][None]), None

transformers.AttentionInterface.register("gathered", gathered_attention)

def token_logps(hidden, targets, head, config):
    """hidden (t, h), targets (t,) -> log pi(target) (t,), float32; what models do to their logits included."""
    logits = F.linear(hidden, head.weight, head.bias).float()  # (t, V)
    logits = logits * (getattr(config, "logit_scale", None) or 1)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return -F.cross_entropy(logits, targets, reduction="none")

class Policy(torch.nn.Module):
    """A causal LM whose forward gives log pi(y|x). It is the root of FSDP, so inside it the head is whole."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batches, router=False, chunk=1024):
        """batches from collate -> (2, n) summed response log-probs, and the mean router loss (or 0).

        The logits of `chunk` response tokens exist at a time; the backward pass computes them again."""
        sums, router_loss = [], 0.0
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids", "rows", "tokens")}
            inputs |= dict(use_cache=False) | (dict(output_router_logits=True) if router else {})
            output = self.model.base_model(**inputs)
            hidden = output.last_hidden_state.flatten(0, 1)[batch["source"]]  # (M, h)
            parts = zip(hidden.split(chunk), batch["targets"].split(chunk))
            logps = [checkpoint(token_logps, x, y, head, config, use_reentrant=False) for x, y in parts]
            sums += [part.sum() for part in torch.cat(logps).split(batch["sizes"])]
            if router:
                balance = sys.modules[type(self.model).__module__].load_balancing_loss_func
                experts = getattr(config, "num_experts", None) or config.num_local_experts
                real = None if "rows" in batch else batch["real"]
                router_loss += balance(output.router_logits, experts, config.num_experts_per_tok, real) / len(batches)
        return torch.stack([torch.stack(sums[:len(sums) // 2]), torch.stack(sums[len(sums) // 2:])]), router_loss

# ---- end of the helpers ----


def model_folder(name):
    """What from_pretrained takes for a name in --models or --reference."""
    folder = Path(name)
    if not (folder / "config.json").is_file() and (folder / "args.json").is_file():
        folder = folder / "final"
        if not folder.is_dir():
            fail(f"{name} is a run without final/: it has not finished; continue it with --resume, or "
                 "choose another of --models")
    if (folder / "adapter_config.json").is_file() and not importlib.util.find_spec("peft"):
        fail(f"{folder} is a LoRA adapter, which needs a package: pip install peft")
    return str(folder)

def load_model(name, args, dtype, device):
    """The whole model on this rank, with the attention that training has."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        fail(f"{name} of --models or --reference is no causal language model ({reason[0][:160]})")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    plain = model._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"}
    if args.layout == "packed" and (model._is_stateful or not plain):
        fail(f"--layout packed gathers tokens for attention, but {model.config.model_type} models mix "
             "them in other ways too: use --layout concatenated or --layout separate")
    own_attention = model.config._attn_implementation
    if plain:
        model.set_attn_implementation("gathered")
    return model, own_attention

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
        batches = [{key: value.to(model.device) if torch.is_tensor(value) else value
                    for key, value in batch.items()} for batch in batches]
        logps[part] = policy(batches)[0].T.float().cpu()
        bar.update(len(part))
    bar.close()
    dist.all_reduce(logps)  # a row is 0 on all ranks but one
    broken = np.flatnonzero(~logps.isfinite().all(1).numpy())
    if len(broken):
        fail(f"{name}: the log-prob of pair {split['rows'][int(broken[0])]['id']} is not finite, "
             f"{len(broken)} pairs in all; try --dtype float32, or another of --models")
    return logps.numpy()

def measure(logps, lengths, ref_logps=None, first=None):
    """Metrics {name: (rows,)} from log-probs (rows, 2), lengths (rows, 2), the reference's log-probs
    and the accuracies (rows,) of the first model; a tie counts half."""
    logps = logps.astype(np.float64)
    margins, per_token = logps[:, 0] - logps[:, 1], logps / lengths
    metrics = {"accuracy": wins(margins), "margin": margins,
               "accuracy_per_token": wins(per_token[:, 0] - per_token[:, 1])}
    if first is not None:
        metrics["gain"] = metrics["accuracy"] - first
    if ref_logps is not None:
        change = logps - ref_logps
        margins = change[:, 0] - change[:, 1]
        metrics |= {"accuracy_to_reference": wins(margins), "margin_to_reference": margins,
                    "change_chosen": change[:, 0], "change_rejected": change[:, 1]}
    return metrics

def wins(margins):
    return (margins > 0) + 0.5 * (margins == 0)

def mean_and_error(values):
    """[mean, its standard error], from independent values (n,); one value has no error (None)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return [float(values.mean()), error if error is None else float(error)]

@torch.no_grad()
def sample(model, tokenizer, rows, reward, name, args):
    """Answers to --samples different prompts of the split, the same for every model and any number of
    ranks: a list of dicts with model, id, prompt, response, tokens, ended and reward."""
    rank, world = dist.get_rank(), dist.get_world_size()
    prompts = rows["prompt"][:]
    kept = list({tuple(prompt): row for row, prompt in enumerate(prompts)}.values())
    kept = np.random.default_rng(args.seed).permutation(kept)[:args.samples].tolist()
    kept.sort(key=lambda row: len(prompts[row]))
    size = max(1, args.max_tokens // (len(prompts[kept[-1]]) + args.max_new_tokens))
    batches = [kept[start:start + size] for start in range(0, len(kept), size)]
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, rows[0]["chosen"][-1]} - {None}
    pad, greedy = min(ends), args.temperature == 0  # what stands behind an answer's end is not read
    model.generation_config = transformers.GenerationConfig(  # the model's own could change the sampling
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad,
        **{} if greedy else dict(do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0))
    records = []
    for index in tqdm(range(rank, len(batches), world), desc=f"{name} samples", disable=rank > 0):
        width = len(prompts[batches[index][-1]])
        ids = [[pad] * (width - len(prompts[row])) + prompts[row] for row in batches[index]]
        real = [[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in batches[index]]
        torch.manual_seed(args.seed + index)
        output = model.generate(input_ids=torch.tensor(ids, device=model.device),
                                attention_mask=torch.tensor(real, device=model.device))
        for row, tokens in zip(batches[index], output[:, width:].tolist()):
            end = next((i for i, token in enumerate(tokens) if token in ends), None)
            tokens = tokens if end is None else tokens[:end + 1]
            prompt, response = (tokenizer.decode(x, skip_special_tokens=True) for x in (prompts[row], tokens))
            record = dict(model=name, id=rows[row]["id"], prompt=prompt, response=response,
                          tokens=len(tokens), ended=end is not None, reward=None)
            if reward:
                try:
                    record["reward"] = float(reward(prompt, response))
                    assert math.isfinite(record["reward"]), f"{record['reward']} is not finite"
                except Exception as error:
                    fail(f"--reward {args.reward} must return a number, but on pair {record['id']} and an answer "
                         f"of {name}: {type(error).__name__}: {error}")
            records.append(record)
    gathered = [None] * world
    dist.all_gather_object(gathered, records)
    return sorted(sum(gathered, []), key=lambda record: record["id"])

def load_reward(spec):
    """The function of --reward FILE.py:FUNCTION."""
    path, _, function = spec.rpartition(":")
    try:
        module = importlib.util.module_from_spec(place := importlib.util.spec_from_file_location("reward", path))
        place.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:
        fail(f"--reward {spec} must be FILE.py:FUNCTION, a Python file and a function in it "
             f"({type(error).__name__}: {error})")

def make_table(results):
    """Markdown, aligned so that it can be read as it is. results: dicts of model, subset, pairs, metrics."""
    used = {name for result in results for name in result["metrics"]}
    used |= {name for name in COLUMNS if "reference" in name or "change" in name}  # blank without one
    names = [name for name in COLUMNS if name in used]
    cells = [["model", "subset", "pairs", *(COLUMNS[name] for name in names)]]
    for result in results:
        cells.append([result["model"], result["subset"] or "all", str(result["pairs"])])
        for name in names:
            mean, error = result["metrics"].get(name, [None, None])
            factor, digits = (100, 1) if "%" in COLUMNS[name] else (1, 2)
            text = "" if mean is None else f"{factor * mean:.{digits}f}"
            cells[-1].append(text + (f" ± {factor * error:.{digits}f}" if error is not None else ""))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(row[i].ljust(w) if i < 2 else row[i].rjust(w) for i, w in enumerate(widths)) + " |"
             for row in cells]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

def plot_runs(runs, path):
    """Four panels from log.jsonl of the folders `runs`: loss, accuracy, margin, displacement."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "font.size": 11, "axes.titlesize": 12})
    panels = {"loss": ("Loss", "loss"), "rewards/accuracies": ("Preference accuracy", "fraction of pairs"),
              "rewards/margins": ("Reward margin", "chosen − rejected"),
              "logps/chosen": ("Displacement of the chosen response", "log-prob since step 0, nats")}
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.2), sharex=True, layout="constrained")
    for run in runs:
        lines = (Path(run) / "log.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines if line.endswith("}")]
        color = f"C{runs.index(run)}"
        for ax, (key, (title, unit)) in zip(axes.flat, panels.items()):
            curves = {kind: np.array([(line["step"], line[kind + key]) for line in lines if kind + key in line])
                      for kind in ("", "eval/")}
            change = key == "logps/chosen"
            for kind, curve in curves.items():
                if not len(curve) or change and not kind and len(curves["eval/"]):
                    continue  # training batches differ, so only the validation pairs show a small change
                style = dict(alpha=0.35, lw=1.2) if kind == "" and len(curves["eval/"]) else dict(lw=2, marker="o", ms=4)
                ax.plot(curve[:, 0], curve[:, 1] - change * curve[0, 1], color=color, **style)
            ax.set(title=title, ylabel=unit)
        axes[0, 0].plot([], [], color=color, lw=2, label=Path(run).name)
    for ax in axes[1]:
        ax.set_xlabel("optimiser step")
    figure.legend(loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    figure.supxlabel("solid: validation pairs, pale: training batches", fontsize=10, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    args = parse_args(Args)
    names = list(dict.fromkeys(name.strip() for name in args.models.split(",") if name.strip()))
    runs = [name for name in names if Path(name, "log.jsonl").is_file()]
    scored = list(dict.fromkeys(names + [args.reference] * bool(args.reference)))
    if not (args.data or args.plot):
        fail("nothing to do: give --data data/NAME, or --plot FILE.png, or both")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs a package: pip install matplotlib")
    if args.plot and not runs:
        fail(f"--plot {args.plot} draws log.jsonl of runs such as out/dpo, but --models {args.models} has none")
    if args.reward and not args.samples:
        fail(f"--reward {args.reward} scores samples: add --samples N")
    reward = load_reward(args.reward) if args.reward else None
    try:
        for file in filter(None, (args.data and Path(args.out, "x"), args.table, args.plot)):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{error.filename} cannot be made ({error.strerror}); choose another --out, --table or --plot")
    if args.plot and int(os.environ.get("RANK", 0)) == 0:
        plot_runs(runs, args.plot)
        print(f"{args.plot}: curves of {', '.join(runs)}")
    if not args.data:
        return
    folders = {name: model_folder(name) for name in scored}
    rank, world, device, dtype = start_process_group(args.dtype)

    # one model at a time: log-probs of all pairs, samples
    logps, samples, seconds = {}, {}, {}
    for name, folder in folders.items():
        clock = time.time()
        settings = SimpleNamespace(model=folder, data=args.data, layout=args.layout, max_tokens=args.max_tokens)
        splits, tokenizer = load_data(settings, [args.split])
        split = splits[args.split]
        model, own_attention = load_model(folder, args, dtype, device)
        logps[name] = score(model, split, name, args)
        if args.samples and name in names:
            model.set_attn_implementation(own_attention)
            samples[name] = sample(model, tokenizer, split["rows"], reward, name, args)
        seconds[name] = round(time.time() - clock, 2)
        del model

    # means over all pairs and over those of each subset
    rows, lengths, results = split["rows"], split["lengths"][:, 1:], []
    subsets = np.array(rows["subset"][:] if "subset" in rows.column_names else [""] * len(rows))
    groups = {"": np.arange(len(rows))} | {x: np.flatnonzero(subsets == x) for x in sorted({*subsets} - {""})}
    for name in names:
        first = None if name == names[0] else measure(logps[names[0]], lengths)["accuracy"]
        metrics = measure(logps[name], lengths, logps.get(args.reference), first)
        for subset, group in groups.items():
            means = {key: mean_and_error(values[group]) for key, values in metrics.items()}
            results.append(dict(model=name, subset=str(subset), pairs=len(group), metrics=means))
            if name in samples and not subset:
                means["length"] = mean_and_error([record["tokens"] for record in samples[name]])
                means["ended"] = mean_and_error([record["ended"] for record in samples[name]])
                means |= {"reward": mean_and_error([r["reward"] for r in samples[name]])} if reward else {}

    if rank == 0:
        out = Path(args.out)
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        record = dict(args=dataclasses.asdict(args), results=results, seconds=seconds, ranks=world, hardware=hardware,
                      dtype=str(dtype).removeprefix("torch."), torch=torch.__version__, numpy=np.__version__,
                      transformers=transformers.__version__, datasets=datasets.__version__)
        (out / "evaluation.json").write_text(json.dumps(record, indent=1))
        np.savez(out / "logps.npz", models=scored, logps=np.stack([logps[name] for name in scored]),
                 ids=rows["id"][:], lengths=split["lengths"])
        if samples:
            lines = [json.dumps(line, ensure_ascii=False) for name in names for line in samples[name]]
            (out / "samples.jsonl").write_text("\n".join(lines) + "\n")
        table = make_table(results)
        note = (f"{args.split} of {args.data}, mean ± standard error; {world} x {hardware}, {record['dtype']}, "
                f"torch {torch.__version__}, transformers {transformers.__version__}, {sum(seconds.values()):.0f} s")
        print(f"{table}\n\n{note}\n{out}/evaluation.json has all numbers")
        if args.table:
            Path(args.table).write_text(f"{table}\n\n{note}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
