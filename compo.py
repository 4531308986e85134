"""ComPO, Chen, Chen, Yin and Lin 2025, https://arxiv.org/abs/2505.05465

    C(W, W') = -1 if log pi_W'(y_w|x) > log pi_W(y_w|x) and log pi_W'(y_l|x) < log pi_W(y_l|x),
               +1 otherwise                                              comparison oracle
    y_i = C(W, W + r z_i),  z_i ~ N(0, I),  i = 1..m                     perturbations
    g = u / |u|,  u = sum_i y_i z_i,  without its entries below lambda_g
    W <- W - gamma p g  if  p = #{i: y_i = -1} / m > lambda,  else the pair is skipped

For noisy pairs, whose two responses the reference finds about equally likely. DPO pushes such a
pair apart along the difference of two nearly parallel gradients; this asks only whether a random
change of the output head W does what it should to *both* responses, and follows the votes.

    torchrun --nproc_per_node=8 cache_ref.py --model MODEL --data data/NAME --noise_margin 3
    torchrun --nproc_per_node=8 dpo.py --model MODEL --data data/NAME/clean --out out/clean
    torchrun --nproc_per_node=8 compo.py --model out/clean/final --data data/NAME/noisy

What the votes estimate: with a, b the gradients of log pi(y_w|x), log pi(y_l|x) and phi the angle
between them, E[y z] = -(a/|a| - b/|b|) / sqrt(2 pi) and p = phi / 2 pi, for small r. So the gate
p > 0.2 says phi > 72 degrees, and --estimator exact is the limit of many perturbations.

Why it takes seconds: only the head moves, so the trunk runs once per pair and is freed. Of z, V x h
numbers, the oracle sees little: z times the hidden states H (t, h), and of tokens that are never
likely only sums weighted by their probabilities. So z is drawn in that subspace; the rest of z goes
into u as noise independent of the votes, which `gaussian` draws once, with the variance it has, and
`span` leaves out: same expectation, less noise.
Differs from dpo.py: votes in place of loss, backward pass and AdamW; the head is what is trained.

Symbols: n pairs of a step, t tokens of their responses, V vocabulary, h hidden size, k rank of H,
C tokens that may be likely, q bundles of the others, B perturbations of a batch, T tokens of the
longest row, L of a micro-batch, M of its responses, H heads, d head size. What stands along a first
dimension of 2 is (chosen, rejected).
"""
import argparse, contextlib, copy, dataclasses, gc, hashlib, importlib.util, inspect, json
import math, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_state_dict)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    model: str  # Hugging Face folder or hub name: policy at step 0, and reference if there is one
    data: str  # folder made by prepare_data.py
    out: str = f"out/{Path(__file__).stem}"  # the run's args.json, log.jsonl, checkpoints, final/
    resume: bool = False  # continue from the last checkpoint in --out; begin if there is none
    save_every: int = 0  # steps between checkpoints; 0 = only one on SIGTERM
    keep: int = 2  # how many checkpoints stay on disk
    hub_repo: str = ""  # push final/ to this Hugging Face hub repository
    # optimisation
    epochs: int = 1  # passes over the training pairs
    max_pairs: int = 100  # the first so many training pairs are used; 0 = all
    pairs_per_step: int = 1  # the oracle compares means over so many pairs
    step_size: float = 0.035  # gamma
    seed: int = 0  # of all that is random
    # memory and speed
    layout: str = "packed"  # packed (no padding, each prompt once) | concatenated | separate
    max_tokens: int = 8192  # bound on the tokens of one forward pass of one rank
    dtype: str = "auto"  # of the computation: auto (bfloat16 on a GPU) | bfloat16 | float32
    cpu_offload: bool = False  # keep weights, gradients and optimiser state in host memory
    # logging
    eval_every: int = 100  # steps between evaluations on val/, also first and last; 0 = never
    wandb: str = ""  # Weights & Biases project that gets the log too
    # algorithm
    estimator: str = "gaussian"  # of the direction: gaussian (as published) | span | exact
    perturbations: int = 1800  # m
    radius: float = 5e-4  # r, of a perturbation
    gate: float = 0.2  # lambda: a pair is skipped unless a larger share of the votes is -1; 0 = no
    keep_fraction: float = 0.012  # share of the entries of g that is kept, if entry_threshold is 0
    entry_threshold: float = 0.0  # lambda_g, absolute: 2.2e-4 for Mistral-7B; 0 = not set
    baseline: bool = False  # u = sum (y - c) z with c = E[y]: a quarter less variance
    accept_step: float = 0.0  # skip unless a step of this size helps both sides; 0 = no such test
    last_layers: int = 0  # perturb the MLPs of so many last blocks too
    rare: float = 1e-4  # tokens never more probable than this are bundled; 0 = none are


def oracle(changes):
    """Votes (B,) on changes (B, 2) of log pi(y_w|x) and log pi(y_l|x)."""
    return 1 - 2.0 * ((changes[:, 0] > 0) & (changes[:, 1] < 0))  # (B,) C

def sparse(u, args):
    """u, a list of tensors, becomes g in place -> the share of its entries that are kept."""
    norm = math.sqrt(inner(u, u)) or 1.0
    entries = torch.cat([x.div_(norm).flatten() for x in u]).abs_()  # (d,)
    floor, count = args.entry_threshold, max(1, round(args.keep_fraction * len(entries)))
    if not floor and entries.is_cuda:
        floor = entries.kthvalue(len(entries) + 1 - count).values
    elif not floor:  # five times as fast, where it is
        floor = float(np.partition(entries.numpy(), -count)[-count])
    for x in u:
        x *= x.abs() >= floor  # |g| is below 1 then
    return (entries >= floor).count_nonzero().item() / len(entries)


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
        fail(trouble.replace("{}", lines[-1 if "Traceback" in str(error) else 0][:200]))

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
    no_hub_name = len(near.parts) > 1 or near.is_dir() and near != Path()
    if not Path(args.model).exists() and no_hub_name:
        fail(f"--model {args.model} is not there; correct the path")
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

def collate(pairs, layout, put=torch.from_numpy):
    """The tensors of a micro-batch: a list, one dict per forward pass (two if layout is separate).

    Rows are prompt + response, right-padded, chosen first: input_ids (rows, T). Packed, they are
    one row (1, L) without padding and second copies of prompts, and pack says what of it makes up
    each row: keys (K,), row after row; counts (rows, 2), how many of a row's tokens, its last, no
    row before it has, and how many there are; ends (2, rows + 1), both added up. source (M,)
    indexes the flattened input_ids: the token that predicts targets (M,); sizes are the response
    lengths and sum to M."""
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
        batch, pack = dict(input_ids=ids, position_ids=columns[None], real=real), {}
        if layout == "packed":
            kept = real & (response | (np.arange(len(texts)) < len(pairs))[:, None])
            first, second = np.split(np.cumsum(kept).reshape(kept.shape) - 1, 2)
            cells = np.concatenate([first, np.where(response[len(pairs):], second, first)])
            batch |= dict(input_ids=ids[kept][None], position_ids=np.nonzero(kept)[1][None])
            counts = np.stack([kept.sum(1), real.sum(1)])  # (2, rows) new tokens, all tokens
            ends = np.pad(counts.cumsum(1), ((0, 0), (1, 0))).astype(np.int32)
            pack = dict(keys=put(cells[real]), ends=put(ends), longest=counts.max(1).tolist(),
                        counts=counts.T)  # an array, as torch.compile would know a list by heart
        batch |= dict(targets=ids[response], source=cells[:, :-1][response[:, 1:]])
        batch = {name: put(array) for name, array in batch.items()}
        batches.append(batch | dict(sizes=responses[:, 0].tolist(), pack=pack))
    return batches

def gathered_attention(module, query, key, value, attention_mask, pack=None, **kwargs):
    """Causal attention over right-padded rows that start at position 0: no padding mask is needed.

    query (b, H, L, d); key, value may have fewer heads. Packed, b = 1, and pack of collate says
    which tokens are a row: one kernel for all rows, or one row after another where it is not
    (varlen_agrees) or cannot do what the model asks for. Returns (b, L, H, d)."""
    if not pack:
        return causal_attention(module, query, key, value, **kwargs), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, H, d)
    key, value = (x.index_select(0, pack["keys"]) for x in (key, value))  # (K, H, d)
    fits = key.shape == value.shape and key.shape[2] % 8 == 0 and key.shape[2] <= 256
    if pack.get("fused") and fits and not special(kwargs):
        back = (kwargs.get("sliding_window") or 0) - 1  # keys before its own that a query sees
        output = varlen_attn(query, key, value, *pack["ends"], *pack["longest"],
                             scale=kwargs.get("scaling"), window_size=(back, 0), **GROUPED)
    else:
        query = query.index_select(0, pack["keys"])
        output = attention_by_row(module, query, key, value, pack["counts"], kwargs)
    return output[None], None

@torch.compiler.disable  # compiled, it would be another graph for each number of rows
def attention_by_row(module, query, key, value, counts, kwargs):
    """query, key, value (K, H, d) of rows that stand one after another -> new tokens (L, H, d)."""
    outputs, sizes = [], counts[:, 1].tolist()
    for (new, length), *row in zip(counts, *(x.split(sizes) for x in (query, key, value))):
        q, k, v = (x.transpose(0, 1)[None] for x in row)  # (1, H, length, d)
        q = q[:, :, -new:] if 2 * new < length else q  # a mask costs what causality saves, a half
        outputs.append(causal_attention(module, q, k, v, **kwargs)[0, -new:])
    return torch.cat(outputs)

def special(kwargs):
    """Whether a layer asks for what no kernel can express: soft-caps (Gemma-2), sinks (gpt-oss)."""
    return any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))

def causal_attention(module, query, key, value, scaling=None, sliding_window=None, **kwargs):
    """query (b, H, q, d), key, value (b, H or fewer, k, d) -> (b, q, H, d). The last query sees all
    k keys, the one before it k - 1 and so on, but only the last `sliding_window` of them."""
    (queries, length), groups = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    window, mask = sliding_window or length, None
    if special(kwargs) or queries < length or window < length:
        place = torch.arange(length, device=query.device)
        distance = place[length - queries:, None] - place  # (q, k) how far back the key is
        mask = (distance >= 0) & (distance < window)
    if special(kwargs):  # left to the model's own definition
        attend = sys.modules[type(module).__module__].eager_attention_forward
        bias = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)[None, None]
        kwargs |= dict(scaling=scaling, dropout=0.0)
        return attend(module, query, key, value, bias, **kwargs)[0]
    grouped = True if groups > 1 else False  # torch.compile needs a plain one
    if mask is not None and grouped:  # no fused kernel takes both a mask and grouped heads
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None,
                                          scale=scaling, enable_gqa=grouped).transpose(1, 2)

# torch 2.11 takes grouped heads without being asked
GROUPED = dict(enable_gqa=True) if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

@torch.enable_grad()
def varlen_agrees(device, dtype):
    """Whether this device has PyTorch's kernel for rows of unequal length in this precision, and it
    gives what one row after another gives, and its gradient, for three small pairs."""
    pairs = [dict(prompt=[0] * prompt, chosen=[0] * chosen, rejected=[0] * rejected)
             for prompt, chosen, rejected in [(2, 9, 5), (40, 3, 7), (150, 200, 90)]]
    batch = collate(pairs, "packed", lambda array: torch.from_numpy(array).to(device))[0]
    shape, found = (3, 1, 4, batch["input_ids"].numel(), 64), []
    states = torch.arange(math.prod(shape), device=device).sin().to(dtype).view(shape)
    query, key, value = states.requires_grad_()
    try:
        for which in range(6):
            fused, window = which < 3, (None, 4, 170)[which % 3]
            inputs = None, query, key[:, :2], value[:, :2], None, batch["pack"] | dict(fused=fused)
            output = gathered_attention(*inputs, sliding_window=window)[0]
            found += [output.detach(), torch.autograd.grad(output.cos().sum(), states)[0]]
        same = all((a - b).norm() < 0.05 * b.norm() for a, b in zip(found[:6], found[6:]))
        assert same, "it computes something else"
    except Exception as error:  # no such kernel, or called in another way
        if device.type == "cuda" and dist.get_rank() == 0:
            tqdm.write(f"attention row by row, not by torch.nn.attention.varlen: {error!r:.99}")
        return False
    return True

transformers.AttentionInterface.register("gathered", gathered_attention)

def token_logps(logits, targets):
    """float32 logits (t, V), targets (t,) -> log pi(target) (t,)."""
    return -F.cross_entropy(logits, targets, reduction="none")

def head_pass(hidden, targets, head, config, score):
    """hidden (t, h), targets (t,) -> score(logits, targets), with all that models do to logits."""
    logits = head(hidden).float()  # (t, V)
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1)  # Granite
    logits = logits if scale == 1 else scale * logits  # a factor of 1 would copy all of them
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    return score(logits if cap is None else cap * torch.tanh(logits / cap), targets)

BALANCE = "load_balancing_loss_func"  # as transformers' mixtures of experts call it

class Policy(torch.nn.Module):
    """A causal LM whose forward gives log pi(y|x). As the root of FSDP it sees the whole head.

    What is summed over each response is score(logits (t, V), targets (t,)), shaped (..., t)."""

    def __init__(self, model, score=token_logps):
        super().__init__()
        self.model, self.score, self.fused = model, score, False  # shard decides about fused

    def forward(self, batches, router=False, chunk=0):
        """batches of collate -> summed scores (2, n, ...), and the mean router loss (or 0).

        Logits exist for `chunk` response tokens at a time (0: 256 MiB of them), and the backward
        pass makes them again, but for the last chunk, with which it begins."""
        sums, router_loss = [], 0.0
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        chunk = chunk or math.ceil(2**26 / config.vocab_size)
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            inputs |= dict(pack=batch["pack"] | dict(fused=self.fused)) if batch["pack"] else {}
            inputs |= dict(output_router_logits=True) if router else {}
            output = self.model.base_model(**inputs, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)
            hidden = hidden.index_select(0, batch["source"])  # (M, h)
            parts = [(*part, head, config, self.score)
                     for part in zip(hidden.split(chunk), batch["targets"].split(chunk))]
            again = parts[:-1] if batch is batches[-1] else parts
            scores = [checkpoint(head_pass, *part, use_reentrant=False) for part in again]
            scores += [head_pass(*part) for part in parts[len(again):]]
            sums += [part.sum(-1) for part in torch.cat(scores, -1).split(batch["sizes"], -1)]
            if router:
                balance = getattr(sys.modules[type(self.model).__module__], BALANCE)
                experts = getattr(config, "num_experts", None) or config.num_local_experts
                real = None if batch["pack"] else batch["real"]
                loss = balance(output.router_logits, experts, config.num_experts_per_tok, real)
                router_loss = router_loss + loss / len(batches)
        return torch.stack(sums).reshape(2, -1, *sums[0].shape).clone(), router_loss

def build_model(args):
    """-> the model without memory (meta device), its float32 weights on rank 0, and their hash."""
    transformers.utils.logging.disable_progress_bar()
    weights, digest = None, hashlib.sha256()
    auto, plain = transformers.AutoModelForCausalLM, {"full_attention", "sliding_attention"}
    with explain(f"--model {args.model} cannot be read as a causal language model ({{}})"):
        config = transformers.AutoConfig.from_pretrained(args.model)
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.float32)
        if dist.get_rank() == 0:
            how = dict(dtype=torch.float32, output_loading_info=True)
            weights, info = auto.from_pretrained(args.model, **how)
            assert not info["missing_keys"], f"it lacks {', '.join(info['missing_keys'])}"
            model.generation_config = weights.generation_config
    plain = set(getattr(config.get_text_config(), "layer_types", None) or plain) <= plain
    plain = plain and model._supports_attention_backend and not model._is_stateful
    if args.layout == "packed" and not plain:
        fail(f"--layout packed needs plain attention, but {config.model_type} mixes tokens "
             "in other ways too; use --layout concatenated or --layout separate")
    if plain:
        model.set_attn_implementation("gathered")
    if weights:
        check_forward(weights, plain, args)
    for key, tensor in sorted(weights.state_dict().items()) if weights else ():
        values = tensor.flatten()[::max(1, tensor.numel() // 4096)].float()  # a sample is enough
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    digest = [digest.hexdigest()[:16]]
    dist.broadcast_object_list(digest, 0)
    return model, weights, digest[0]

@torch.no_grad()
def check_forward(weights, plain, args):
    """Rank 0 stops unless our log-probs of a small pair are those of the model's own forward."""
    ids = (np.arange(3, 95) % weights.config.get_text_config().vocab_size).tolist()
    pair, own = dict(prompt=ids[:3], chosen=ids[3:40], rejected=ids[40:]), []
    with explain(f"--layout {args.layout} does not fit --model {args.model} ({{}}); try another "
                 "--layout, or adapt Policy and head_pass to it"):
        if plain:  # before 5.23 the default, SDPA, left out the soft-cap of Gemma-2
            weights.set_attn_implementation("eager")
        for text in (ids[:40], ids[:3] + ids[40:]):
            logits = weights(torch.tensor([text]), use_cache=False).logits[0, 2:-1].float()
            own.append(-F.cross_entropy(logits, torch.tensor(text[3:]), reduction="sum").item())
        if plain:
            weights.set_attn_implementation("gathered")
        ours = Policy(weights)(collate([pair], args.layout))[0].flatten().tolist()
        agree = np.allclose(ours, own, rtol=1e-4, equal_nan=True)
        assert agree, f"log-probs {ours}, in its own forward {own}"

def shard(policy, weights, dtype, device, cpu_offload=False, compiled=False, group=0):
    """Split every block and the rest of a Policy over the ranks (FSDP2); rank 0 has the weights.
    With a group, over each so many neighbouring ranks, and gradients are reduced between groups."""
    world = dist.get_world_size()
    if group and world % group:
        fail(f"--shard_group {group} does not divide the {world} ranks")
    shape = (world // group, group) if group % world else (world,)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape):])
    rules = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32))
    if cpu_offload and device.type == "cuda":
        rules["offload_policy"] = CPUOffloadPolicy()
    policy.fused = varlen_agrees(device, dtype)
    model = policy.eval().model  # dropout or router noise would make it another one
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for block in blocks[::-1]:  # blocks within blocks first
        block.training = getattr(block, "gradient_checkpointing", False)  # the one use of training
        fully_shard(block, **rules)
        if compiled:  # what is within the hooks of FSDP, which it could not trace
            block.forward = torch.compile(block.forward, dynamic=True)
    table = model.get_input_embeddings()
    if table.weight is not model.get_output_embeddings().weight:
        fully_shard(table, **rules)  # reduced after the head, not with it: a peak half as high
        table.set_unshard_in_backward(False)  # whose gradient needs the token ids alone
    fully_shard(policy, **rules)
    whole = dict([*weights.named_parameters(), *weights.named_buffers()]) if weights else {}
    for key, empty in [*model.named_parameters(), *model.named_buffers()]:
        tensor = whole[key].detach() if whole else torch.empty(empty.shape, dtype=empty.dtype)
        tensor = tensor.to(device)
        if isinstance(empty, torch.nn.Parameter):
            tensor = distribute_tensor(tensor, mesh, empty.placements)
            tensor = tensor.cpu() if "offload_policy" in rules else tensor
            tensor = torch.nn.Parameter(tensor, empty.requires_grad)
        else:  # rotary frequencies and the like
            dist.broadcast(tensor, 0)
        path, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(path), leaf, tensor)
    model.tie_weights()
    return policy

def reward_metrics(rewards, logps, lengths):
    """{name: (n,)} under the names that dashboards know; a tie counts half; all inputs (2, n)."""
    margins = rewards[0] - rewards[1]
    accuracies = (margins > 0) + 0.5 * (margins == 0)
    metrics = {"rewards/accuracies": accuracies, "rewards/margins": margins}
    for name, values in {"rewards": rewards, "logps": logps, "lengths": lengths}.items():
        metrics |= {f"{name}/chosen": values[0], f"{name}/rejected": values[1]}
    return metrics

def open_run(args):
    """Rank 0 opens the run's folder and writes args.json -> step to continue from (0 = afresh)."""
    step = [0]
    if dist.get_rank() == 0:
        with explain(f"--out {args.out}: args.json or log.jsonl cannot be written or read ({{}}); "
                     "make room, or choose another --out"):
            step = [prepare_folder(Path(args.out), args)]
    dist.broadcast_object_list(step, 0)
    return step[0]

def prepare_folder(out, args):
    out.mkdir(parents=True, exist_ok=True)
    new, old = dataclasses.asdict(args), {}
    if (out / "args.json").exists():
        old = json.loads((out / "args.json").read_text())["args"]
        if not args.resume:
            fail(f"--out {out} holds a run: continue it with --resume, or choose another --out")
    free = """out resume save_every keep hub_repo layout max_tokens activation_checkpointing compile
        cpu_offload shard_group liger log_every eval_every wandb""".split()  # change only rounding
    changed = [k for k in new if k in old and k not in free and old[k] != new[k]]
    if changed:
        changed = ", ".join(f"--{k} {old[k]}, now {new[k]}" for k in changed)
        fail(f"--out {out} holds another run: {changed}; repeat its flags, or choose another --out")
    step = max([int(path.name[5:]) for path in out.glob("step-*")], default=0)
    log = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    log = [line for line in log if line.endswith("}") and json.loads(line)["step"] <= step > 0]
    commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    record = dict(args=new, ranks=dist.get_world_size(),
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                  commit=subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
                  source=hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16])
    record |= {each.__name__: each.__version__ for each in (torch, transformers, datasets, np)}
    for name, text in {"log.jsonl": "".join(f"{line}\n" for line in log),  # the rest comes again
                       "args.json": json.dumps(record, indent=1)}.items():
        (out / "new.txt").write_text(text)
        (out / "new.txt").rename(out / name)  # a kill leaves the old file or the new one
    return step

INTACT = "earlier checkpoints are intact: make room and continue with --resume"

def checkpoint_state(policy, optimizer):
    options = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen: the base of LoRA
    model, optim = get_state_dict(policy, optimizer, options=options)
    return dict(model=model, optim=optim, rng=torch.get_rng_state()), options

def save_checkpoint(policy, optimizer, step, args):
    """out/step-NNNNNN: weights, optimiser, random state; written aside, renamed when complete."""
    out, state = Path(args.out), checkpoint_state(policy, optimizer)[0]
    with explain(f"{out}/new.tmp cannot be written ({{}}); {INTACT}"):
        if dist.get_rank() == 0:
            shutil.rmtree(out / "new.tmp", ignore_errors=True)
        dist.barrier()
        dcp.save(state, checkpoint_id=out / "new.tmp")
        if dist.get_rank() == 0:
            (out / "new.tmp").rename(out / f"step-{step:06d}")
            for path in sorted(out.glob("step-*"))[:-args.keep]:
                shutil.rmtree(out / "old.tmp", ignore_errors=True)  # left by a kill
                path.rename(out / "old.tmp")  # first: a kill leaves no half-deleted checkpoint
                shutil.rmtree(out / "old.tmp")
    dist.barrier()

def load_checkpoint(policy, optimizer, step, args):
    state, options = checkpoint_state(policy, optimizer)
    folder = Path(args.out, f"step-{step:06d}")
    with explain(f"{folder} is damaged ({{}}); delete it, and --resume finds the one before it"):
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(policy, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optim"], options=options)
    torch.set_rng_state(state["rng"])

def save_folder(model, state, tokenizer, args):
    """Rank 0: a model with the weights `state` as out/final, whole or not at all; hub_repo."""
    aside, final = Path(args.out, "final.tmp"), Path(args.out, "final")
    with explain(f"{aside} cannot be written ({{}}); {INTACT}"):
        model.save_pretrained(aside, state_dict=state)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    if args.hub_repo:
        import huggingface_hub
        with explain(f"--hub_repo {args.hub_repo} failed ({{}}); the weights are in {final}"):
            huggingface_hub.create_repo(args.hub_repo, exist_ok=True)
            huggingface_hub.upload_folder(repo_id=args.hub_repo, folder_path=final)

def open_log(args):
    """A function of a dict that, on rank 0, adds it to log.jsonl, the console and maybe wandb."""
    if args.wandb and dist.get_rank() == 0:
        import wandb
        wandb.init(project=args.wandb, name=Path(args.out).name, config=vars(args))

    def log(line):
        if dist.get_rank() == 0:
            with explain(f"{args.out}/log.jsonl cannot be written ({{}}); {INTACT}"):
                with open(Path(args.out, "log.jsonl"), "a") as file:
                    file.write(json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in line.items()))
            if args.wandb:
                wandb.log(line, step=line["step"])
    return log


# ---- end of the helpers ----


def generator(device, *key):
    """Random numbers that depend on key alone, whichever rank draws them."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)

def inner(xs, ys):
    return sum(torch.dot(x.flatten(), y.flatten()).item() for x, y in zip(xs, ys))

def subspace(rows, floor=1e-5):
    """rows (t, n) -> left (t, k), basis (k, n) orthonormal, rows = left @ basis, k their rank."""
    values, vectors = torch.linalg.eigh((rows := rows.double()) @ rows.T)
    kept = values > floor**2 * values[-1]
    sizes, vectors = values[kept].sqrt(), vectors[:, kept]
    return (vectors * sizes).float(), ((vectors / sizes).T @ rows).float()

def blocks_of(model, last):
    """-> its blocks, the `last` ones apart."""
    name = lambda module: type(module).__name__.removeprefix("FSDP")
    blocks = [module for module in model.modules() if name(module) in model._no_split_modules]
    return blocks[:-last or len(blocks)], blocks[-last or len(blocks):]

def make_tail(policy, tail, device, args):
    """Fill `tail`, a frozen model without memory, with what is perturbed and what comes after it:
    float32, whole on every rank, the head untied. -> parameters that are perturbed"""
    (frozen, last), head = blocks_of(tail, args.last_layers), tail.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach())
    for module in [*last, head]:
        if len(last) < args.last_layers or module is not head and not hasattr(module, "mlp"):
            fail(f"--last_layers {args.last_layers}: {len(last)} blocks, or without mlp; use 0")
        getattr(module, "mlp", head.weight).requires_grad_(True)
    freed = [*frozen, tail.get_input_embeddings()] if last else [tail.base_model]
    freed = {id(parameter) for module in freed for parameter in module.parameters()}
    source = dict(policy.model.named_parameters(remove_duplicate=False))
    source |= dict(policy.model.named_buffers())
    for name, empty in [*tail.named_parameters(), *tail.named_buffers()]:
        if id(empty) not in freed:
            whole = getattr(source[name], "full_tensor", source[name].detach)()
            whole = whole.to(device, copy=True)
            if isinstance(empty, torch.nn.Parameter):
                whole = torch.nn.Parameter(whole, empty.requires_grad)
            setattr(tail.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], whole)
    for block in frozen:
        block.forward = lambda hidden, *_, **__: hidden
    if last:  # whatever the model did to the embedding on its way
        last[0].register_forward_pre_hook(lambda _, inputs: (tail.entry, *inputs[1:]))
    return [parameter for parameter in tail.parameters() if parameter.requires_grad]

def cache_entries(policy, splits, args):
    """Run the trunk once, pair by pair. Each split gets "entries", on the CPU: per row what enters
    the head (t, h), or a list of what enters the first perturbed block; and "logps" (rows, 2)."""
    seen, model = [], policy.model
    entry = [*blocks_of(model, args.last_layers)[1], model.get_output_embeddings()][0]
    entry.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].cpu()))
    for name, split in splits.items():
        split |= dict(entries=[], logps=torch.zeros(len(split["rows"]), 2))
        for row in tqdm(range(len(split["rows"])), f"trunk, {name}", disable=dist.get_rank() > 0):
            seen.clear()
            split["logps"][row] = policy(collate([split["rows"][row]], args.layout))[0].T
            split["entries"].append([*seen] if args.last_layers else torch.cat(seen))

def replay(tail, entries, pair, args):
    """Hidden states (t, h) of the responses of a pair, chosen first, that enter the head."""
    device = tail.get_output_embeddings().weight.device
    if not args.last_layers:
        return entries.to(device).float()
    hidden, put = [], lambda array: torch.from_numpy(array).to(device)
    for entry, batch in zip(entries, collate([pair], args.layout, put)):
        tail.entry = entry.to(device).float()
        inputs = {name: batch[name] for name in ("position_ids", "pack") if len(batch[name])}
        output = tail.base_model(inputs_embeds=tail.entry, use_cache=False, **inputs)
        hidden.append(output.last_hidden_state.flatten(0, 1)[batch["source"]])
    return torch.cat(hidden)

def mean_logps(tail, split, rows, args):
    """Mean log pi (2,) of some pairs; the hidden states (t, h) and targets (t,) it is made of, and
    weights (2, t) with which the log-probs of tokens add up to it."""
    head, pairs = tail.get_output_embeddings(), [split["rows"][row] for row in rows]
    hidden = [replay(tail, split["entries"][row], pair, args) for row, pair in zip(rows, pairs)]
    tokens = [(t, i) for pair in pairs for i in (0, 1) for t in pair[("chosen", "rejected")[i]]]
    targets, side = torch.tensor(tokens, device=head.weight.device).T
    hidden, weights = torch.cat(hidden), F.one_hot(side, 2).T / len(rows)  # (t, h), (2, t)
    scores = head_pass(hidden, targets, head, tail.config.get_text_config(), token_logps)
    return weights @ scores, hidden, targets, weights

def all_logps(tail, split, args):
    """log pi (rows, 2) of a whole split, by all ranks."""
    logps, rank, world = torch.zeros(len(split["rows"]), 2), dist.get_rank(), dist.get_world_size()
    for row in range(rank, len(logps), world):
        logps[row] = mean_logps(tail, split, [row], args)[0].cpu()
    dist.all_reduce(logps)
    return logps

def displacement(tail, split, name, args):
    """{name/...: mean}; the rewards are the changes of the log-probs since step 0."""
    logps, lengths = all_logps(tail, split, args), torch.from_numpy(split["lengths"][:, 1:].T)
    metrics = reward_metrics((logps - split["logps"]).T, logps.T, lengths)
    return {f"{name}/{key}": value.double().mean().item() for key, value in metrics.items()}

def view_of(hidden, targets, weights, tail, args):
    """What the oracle sees of a perturbation z of the head, at hidden (t, h).

    z changes the logits by r hidden z^T = r left (z span^T)^T, so (V, k) of its numbers count. And
    log sum_v p_v exp(s_v), s the change of the logits, has of unlikely tokens v little but the sum
    of p_v s_v, linear in z: q <= t combinations of their rows count. Their second order, p_v s_v^2
    / 2 summed, hardly fluctuates and is replaced by its expectation, `drift`."""
    head, config = tail.get_output_embeddings(), tail.config.get_text_config()
    logits_of = lambda raw: head_pass(raw, None, torch.nn.Identity(), config, lambda x, _: x)
    capped = getattr(config, "final_logit_softcapping", None)
    raw = head(hidden)  # (t, V)
    probs = logits_of(raw).softmax(-1)
    left, span = subspace(hidden)  # (t, k), (k, h)
    reach = args.radius * left if capped else logits_of(args.radius * left)  # (t, k) scaled
    likely = (probs >= (0 if capped else args.rare)).any(0)  # (V,) a cap is not linear: all are
    likely[targets] = True
    loads, bundles = subspace(probs[:, ~likely])  # (t, q), (q, V - C)
    drift = probs[:, ~likely].sum(1) * (reach.square().sum(1) / 2).expm1()  # (t,)
    return argparse.Namespace(
        likely=likely, probs=probs[:, likely].T.contiguous(), reach=reach, span=span, loads=loads.T,
        bundles=bundles, drift=drift, places=(likely.cumsum(0) - 1)[targets], weights=weights,
        raw=raw[:, likely].T if capped else None, logits_of=logits_of)

def changes(noise, view):
    """noise (B, C + q, k) -> changes (B, 2) of both log-probs, without taking a difference of two:
    log sum_v p_v exp(s_v) = log(1 + sum_v p_v (exp(s_v) - 1)), s the changes of the logits."""
    shift, bundled = (noise @ view.reach.T).split([len(view.probs), len(view.bundles)], 1)
    if view.raw is not None:  # soft-capped
        shift = view.logits_of(view.raw + shift) - view.logits_of(view.raw)
    own = shift[:, view.places, torch.arange(len(view.places))]  # (B, t)
    growth = shift.expm1_().mul_(view.probs).sum(1)  # (B, t)
    growth += bundled.mul_(view.loads).sum(1) + view.drift
    return (own - growth.log1p()) @ view.weights.T

def narrow(wide, view):
    """(V, h) -> (C + q, k): the part that the oracle sees."""
    wide = wide @ view.span.T
    return torch.cat([wide[view.likely], view.bundles @ wide[~view.likely]])

def widen(part, view):
    """(C + q, k) -> (V, k), the transpose of `narrow` but for a product with span (k, h)."""
    likely, bundled = part.split([len(view.probs), len(view.bundles)])
    wide = part.new_empty(len(view.likely), part.shape[1])
    wide[view.likely], wide[~view.likely] = likely, view.bundles.T @ bundled
    return wide

def estimate(weight, view, constant, step, args, chunk=1024):
    """-> u = sum of (y - constant) z, a list of one (V, h), and p, from the votes of all ranks."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), weight.device
    m, size = args.perturbations, (len(view.probs) + len(view.bundles), len(view.span))
    noise = torch.empty(max(1, chunk // len(view.reach)), *size, device=device)
    sums, total = torch.zeros(size, device=device), torch.zeros(weight.numel() + 1, device=device)
    for first in range(rank, m, world * len(noise)):
        mine = range(first, m, world)[:len(noise)]
        for z, index in zip(noise, mine):
            z.normal_(generator=generator(device, args.seed, step, index))
        votes = oracle(changes(noise[:len(mine)], view))
        sums += ((votes - constant) @ noise[:len(mine)].flatten(1)).view(size)
        total[-1] += (votes < 0).sum()
    u = total[:-1].view_as(weight).addmm_(widen(sums, view), view.span)
    dist.all_reduce(total)
    p = total[-1].item() / m
    if args.estimator == "gaussian":  # what the oracle does not see, with the variance of y - c
        rest = torch.empty_like(u).normal_(generator=generator(device, args.seed, step, m))
        rest *= math.sqrt(m * (p * (1 + constant)**2 + (1 - p) * (1 - constant)**2))
        u += rest.addmm_(widen(narrow(rest, view), view), view.span, alpha=-1)
    return [u], p

def estimate_whole(parameters, logps, constant, step, args):
    """The same by the definition, one perturbation after another, for --last_layers."""
    old, u = [w.clone() for w in parameters], [torch.zeros_like(w) for w in parameters]
    before, better = logps(), torch.zeros(1, device=old[0].device)
    for index in range(dist.get_rank(), args.perturbations, dist.get_world_size()):
        source = generator(better.device, args.seed, step, index)
        noise = [torch.empty_like(w).normal_(generator=source) for w in old]
        for w, start, z in zip(parameters, old, noise):
            torch.add(start, z, alpha=args.radius, out=w)
        vote = oracle((logps() - before)[None])
        for total, z in zip(u, noise):
            total.add_(z, alpha=vote.item() - constant)
        better += vote < 0
    for w, start, total in zip(parameters, old, u):
        w.copy_(start)
        dist.all_reduce(total)
    dist.all_reduce(better)
    return u, better.item() / args.perturbations

def save_tail(tail, tokenizer, args):
    """out/final: the model as --model has it, but what was perturbed in float32."""
    if dist.get_rank() == 0:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        state = model.state_dict() | {
            name: p.detach().cpu() for name, p in tail.named_parameters() if p.requires_grad}
        save_folder(model.float(), state, tokenizer, args)  # float: how it is to be read
    dist.barrier()


@torch.no_grad()
def main():
    args = parse_args(Args)
    for flag, package in dict(wandb="wandb").items():
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"--{flag} needs a package: pip install {package.replace('_', '-')}")
    if args.last_layers and args.estimator == "span":
        fail("--estimator span is for the head alone; with --last_layers use gaussian or exact")
    if max(args.keep_fraction, args.gate, args.rare) > 1:
        fail("--keep_fraction, --gate and --rare are shares of 1, not percent")
    rank, world, device, dtype = start_process_group(args.dtype)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))

    # what is trained
    splits, tokenizer = load_data(args, ("train", "val") if args.eval_every else ("train",))
    train, pairs = splits["train"], len(splits["train"]["rows"])
    pairs = min(pairs, args.max_pairs or pairs)
    if args.pairs_per_step > pairs:
        fail(f"--pairs_per_step {args.pairs_per_step} is more than the {pairs} pairs to train on")
    train |= dict(rows=train["rows"].select(range(pairs)), lengths=train["lengths"][:pairs])
    model, weights, digest = build_model(args)
    tail = copy.deepcopy(model).eval().requires_grad_(False)
    policy = shard(Policy(model), weights, dtype, device, args.cpu_offload)
    del weights
    parameters = make_tail(policy, tail, device, args)
    cache_entries(policy, splits, args)
    del policy, model  # the trunk is not needed any more, but FSDP's modules are in cycles
    gc.collect()
    for name, split in splits.items():
        logps, slack = all_logps(tail, split, args), 1e-4 if dtype == torch.float32 else 2e-2
        for row, (ours, own) in enumerate(zip(logps, split["logps"])):
            if not torch.allclose(ours, own, slack, 100 * slack):
                fail(f"pair {split['rows'][row]['id']} of {name} has log-probs {own.tolist()} by "
                     f"{args.model}, by its last {args.last_layers} layers {ours.tolist()}")
        split["logps"] = logps

    # the run
    tail.register_buffer("moved", torch.zeros(3))  # sums over steps: chosen, rejected, accepted
    epoch_steps = math.ceil(pairs / args.pairs_per_step)
    steps = args.epochs * epoch_steps
    start = open_run(args)
    if start:
        load_checkpoint(tail, [], start, args)
    log, clock = open_log(args), time.time()
    if args.eval_every and not start:
        log({"step": 0} | displacement(tail, splits["val"], "eval", args))
    for step in tqdm(range(start, steps), args.out, initial=start, total=steps, disable=rank > 0):
        rows = range(pairs)[step % epoch_steps * args.pairs_per_step:][:args.pairs_per_step]
        with torch.enable_grad():
            before, *where = mean_logps(tail, train, rows, args)  # (2,)
            a, b = (torch.autograd.grad(each, parameters, retain_graph=True) for each in before)
        size_a, size_b = (math.sqrt(inner(each, each)) or 1.0 for each in (a, b))
        angle = math.acos(max(-1, min(1, inner(a, b) / (size_a * size_b))))
        constant = 1 - angle / math.pi if args.baseline else 0.0  # E[y]
        if args.estimator == "exact" or not before.isfinite().all():  # which ends below
            u, p = [y / size_b - x / size_a for x, y in zip(a, b)], angle / (2 * math.pi)
        elif args.last_layers:
            logps = lambda: mean_logps(tail, train, rows, args)[0]
            u, p = estimate_whole(parameters, logps, constant, step, args)
        else:
            u, p = estimate(parameters[0], view_of(*where, tail, args), constant, step, args)
        cosine = inner(u, b) / size_b - inner(u, a) / size_a
        cosine /= math.sqrt(inner(u, u) * (2 - 2 * math.cos(angle)) + 1e-30)
        kept, rate = sparse(u, args), -args.step_size * p
        predicted = rate * inner(u, a), rate * inner(u, b)  # to first order
        accepted = p > args.gate
        if accepted and args.accept_step:
            old = [(w, w.clone(), w.sub_(g, alpha=args.accept_step)) for w, g in zip(parameters, u)]
            accepted = oracle((mean_logps(tail, train, rows, args)[0] - before)[None]).item() < 0
            for w, value, _ in old:
                w.copy_(value)
        for w, g in zip(parameters, u if accepted else ()):
            w.add_(g, alpha=rate)
        realised = mean_logps(tail, train, rows, args)[0] - before
        flags = torch.tensor([not (cosine + realised.sum()).isfinite(), len(stop)], device=device)
        dist.all_reduce(flags)  # a CPU-GPU sync point: the ranks stop together
        if flags[0]:
            fail(f"step {step}: log-probs {before.tolist()} or changes {realised.tolist()} are not "
                 f"finite, pairs {[train['rows'][row]['id'] for row in rows]}; the checkpoints in "
                 f"{args.out} are good: lower --step_size {args.step_size}, or take the pairs out")

        done = step + 1
        saving = flags[1] or args.save_every and done % args.save_every == 0
        tail.moved += torch.tensor([*realised, accepted])
        line = dict(step=done, epoch=done / epoch_steps, accepted_steps=int(tail.moved[2]), p=p,
                    angle=math.degrees(angle), cosine=cosine, kept=kept, accepted=int(accepted))
        for i, side in enumerate(("chosen", "rejected")):
            line |= {f"predicted/{side}": predicted[i], f"realised/{side}": realised[i].item(),
                     f"displacement/{side}": tail.moved[i].item()}
        log(line | dict(seconds=time.time() - clock))
        if args.eval_every and (done % args.eval_every == 0 or done == steps):
            log({"step": done} | displacement(tail, splits["val"], "eval", args))
        if saving:
            save_checkpoint(tail, [], done, args)
        clock = time.time()
        if flags[1]:
            fail(f"stopped by SIGTERM; step {done} of {steps} is saved, continue with --resume")
    save_tail(tail, tokenizer, args)
    for kind in ("float32", "bfloat16"):  # what is left of it if final/ is read in this precision
        for w in parameters:
            w.copy_(w.to(getattr(torch, kind)))
        line = dict(step=steps, accepted_steps=int(tail.moved[2]))
        log(line | displacement(tail, splits.get("val", train), f"export/{kind}", args))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
