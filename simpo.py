"""Simple Preference Optimization (SimPO), Meng et al. 2024, https://arxiv.org/abs/2405.14734

    L = -E log sigmoid(beta / |y_w| log pi(y_w|x) - beta / |y_l| log pi(y_l|x) - gamma)       eq. 6

The reward is the mean log-prob per token, which is also what ranks sequences in decoding, and a
chosen response must win by the target margin gamma. There is no reference: nothing is cached, and
nothing but a small learning rate keeps the policy near where it started.

    python prepare_data.py --dataset HUB_OR_FILE --model MODEL --out data/NAME
    torchrun --nproc_per_node=8 simpo.py --model MODEL --data data/NAME    (without cache_ref.py)

The authors also score the tokens that open the assistant's turn: prepare_data.py --score_header.
gamma is given as the ratio gamma / beta, as in their code; TRL's simpo_gamma is gamma itself.

Differs from dpo.py: no reference, mean log-probs, the margin; the default of beta.

Symbols: n pairs, T tokens of the longest row, L of a micro-batch, M of its responses, V vocabulary,
h hidden size, H heads, d head size. What stands along a first dimension of 2 is (chosen, rejected).
"""
import argparse, bisect, contextlib, dataclasses, functools, hashlib, importlib.util, inspect, json
import math, os, re, resource, shutil, signal, subprocess, sys, time
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
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
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
    max_steps: int = 0  # stop after so many optimiser steps; 0 = all epochs
    batch_size: int = 32  # pairs per optimiser step, over all ranks whatever their number
    learning_rate: float = 5e-7  # peak, AdamW
    schedule: str = "linear"  # after warm-up: linear (to zero) | cosine (to zero) | constant
    warmup: float = 0.1  # fraction of the steps in which the learning rate rises; 0 = none
    weight_decay: float = 0.0  # AdamW, decoupled
    max_grad_norm: float = 1.0  # gradient clipping, L2 norm over all parameters
    seed: int = 0  # of all that is random
    # memory and speed
    layout: str = "packed"  # packed (no padding, each prompt once) | concatenated | separate
    max_tokens: int = 8192  # bound on the tokens of one forward pass of one rank
    dtype: str = "auto"  # of the computation: auto (bfloat16 on a GPU) | bfloat16 | float32
    activation_checkpointing: str = "off"  # recompute: off | selective (no matrix products) | full
    compile: bool = False  # torch.compile each block
    cpu_offload: bool = False  # keep weights, gradients and optimiser state in host memory
    shard_group: int = 0  # ranks that hold one copy of all that, such as a node's; 0 = all ranks
    lora_rank: int = 0  # train LoRA adapters of this rank (peft) instead of all weights; 0 = off
    train_modules: str = ""  # train only the parameters whose names match this regex; empty = all
    liger: bool = False  # Liger kernels for norms, rotary embedding and MLP (GPU only)
    # logging
    log_every: int = 10  # steps between lines of log.jsonl
    eval_every: int = 100  # steps between evaluations on val/, also first and last; 0 = never
    wandb: str = ""  # Weights & Biases project that gets the log too
    # algorithm
    beta: float = 2.0  # scale of the reward, beta of eq. 4
    gamma_beta_ratio: float = 0.25  # target margin gamma of eq. 5, divided by beta
    label_smoothing: float = 0.0  # probability that a preference label is wrong, eps of cDPO
    sft_weight: float = 0.0  # weight of -log pi(y_w|x) / |y_w|, added to the loss as in RPO
    router_aux_coef: float = 0.0  # weight of the load-balancing loss of a mixture of experts


def preference_loss(logps, ref_logps, lengths, args):
    """The algorithm: log-probs logps (2, n) in nats, lengths (2, n) in tokens -> losses
    (n,) and per-pair metrics {name: (n,)}; rewards include beta. There are no ref_logps."""
    rewards = args.beta * logps / lengths  # (2, n) eq. 4
    margins = rewards[0] - rewards[1] - args.beta * args.gamma_beta_ratio  # (n,) eq. 5
    losses = -(1 - args.label_smoothing) * F.logsigmoid(margins)  # (n,) eq. 6
    losses = losses - args.label_smoothing * F.logsigmoid(-margins)  # (n,) 0 by default
    return losses, reward_metrics(rewards, logps, lengths)


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

def to_device(array):
    """numpy -> torch, where the model computes; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().cuda(non_blocking=True) if torch.cuda.is_available() else tensor

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

def choose_parameters(model, weights, args):
    """Mark what is trained, in the empty model and in rank 0's weights: --lora_rank adds adapters
    and freezes the rest, --train_modules freezes what its regex does not find."""
    for each in (model, weights) if weights else (model,):
        if args.lora_rank:
            from peft import LoraConfig
            torch.manual_seed(args.seed)
            sizes = dict(r=args.lora_rank, lora_alpha=2 * args.lora_rank)
            each.add_adapter(LoraConfig(**sizes, target_modules="all-linear"))
        with explain(f"--train_modules {args.train_modules} is not a regular expression ({{}})"):
            for name, parameter in each.named_parameters():
                found = parameter.requires_grad and re.search(args.train_modules, name)
                parameter.requires_grad_(bool(found))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = [name for name, _ in model.named_parameters()]
        fail(f"--train_modules {args.train_modules} finds no parameter to train; there are "
             f"{names[0]}, {names[len(names) // 2]}, {names[-1]} and the like")

def checkpoint_blocks(model, how):
    """Keep the inputs of each block alone, and compute the rest again in the backward pass (full);
    selective: keep the outputs of matrix products and attention too, so that the rest is cheap."""
    options = dict(use_reentrant=False)
    if how == "selective":
        kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention",
                   "cudnn_attention")
        names = "mm", "addmm", "bmm", *(f"_scaled_dot_product_{kernel}" for kernel in kernels)
        kept = [getattr(torch.ops.aten, name).default for name in names]
        kept += [torch.ops.torch_attn._varlen_attn.default]
        options["context_fn"] = functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts, kept)
    old_name = model.gradient_checkpointing_enable  # until transformers 5.22
    getattr(model, "activation_checkpointing_enable", old_name)(options)

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

def pair_losses(policy, part, split, totals, args):
    """Losses (n,) of a micro-batch as they are optimised; adds its metrics to the sums `totals`."""
    real = min(len(part), 1)  # 0 for an empty list: the rank computes along, with weight 0
    part = part if real else [0]
    pairs = [split["rows"][int(row)] for row in part]
    batches = collate(pairs, args.layout, to_device)
    logps, router_loss = policy(batches, args.router_aux_coef > 0)
    lengths = to_device(split["lengths"][part].T)  # (3, n)
    ref_logps = to_device(split["ref"][part].T) if "ref" in split else None
    losses, metrics = preference_loss(logps, ref_logps, lengths[1:], args)
    metrics |= dict(preference_loss=losses, tokens=lengths.sum(0), pairs=torch.ones_like(losses))
    losses = losses * to_device(np.float32([pair.get("weight", 1.0) for pair in pairs]))
    losses = losses - args.sft_weight * metrics["logps/chosen"] / lengths[1]
    if args.router_aux_coef:
        losses = losses + args.router_aux_coef * router_loss
        metrics["aux_loss"] = router_loss.expand(len(pairs))
    metrics["loss"] = losses
    for name, value in metrics.items():
        totals[name] = totals.get(name, 0.0) + real * value.detach().double().sum()
    return real * losses

def mean_over_pairs(totals):
    """Sums made by pair_losses -> means over the pairs of all ranks; pairs and tokens stay sums."""
    sums = torch.stack([totals[name] for name in sorted(totals)])
    dist.all_reduce(sums)
    sums = dict(zip(sorted(totals), sums.tolist()))
    return {n: v if n in ("pairs", "tokens") else v / sums["pairs"] for n, v in sums.items()}

def evaluate(policy, split, args):
    """Metrics of a whole split as {eval/...: mean}, dealt over the ranks."""
    totals, world, rows = {}, dist.get_world_size(), np.arange(len(split["rows"]))
    lists = micro_batches(rows, split["lengths"], args.layout, args.max_tokens, world)
    with torch.no_grad():
        for part in lists[dist.get_rank()::world]:
            pair_losses(policy, part, split, totals, args)
    means = mean_over_pairs(totals)
    return {f"eval/{k}": v for k, v in means.items() if k not in ("pairs", "tokens")}

def batch_rows(step, pairs, args):
    """Rows of optimiser step `step`: a function of the seed, so that a resumed run repeats none."""
    epoch, index = divmod(step, math.ceil(pairs / args.batch_size))
    order = np.random.default_rng((args.seed, epoch)).permutation(pairs)
    return order[index * args.batch_size:(index + 1) * args.batch_size]

def learning_rate(step, steps, args):
    """For optimiser step 0 <= step < steps; neither the first nor the last has a rate of 0."""
    warmup = int(args.warmup * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    left = (steps - step) / (steps - warmup)  # 1 -> 0
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    return args.learning_rate * dict(linear=left, cosine=cosine, constant=1.0)[args.schedule]

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

def save_final(policy, tokenizer, args):
    """out/final: a Hugging Face folder (LoRA: an adapter) in the precision of --model; hub_repo."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)
    if dist.get_rank() == 0:
        dtype = transformers.AutoConfig.from_pretrained(args.model).dtype or torch.float32
        state = {key.removeprefix("model."): tensor.to(dtype) for key, tensor in state.items()}
        policy.model.config.dtype = dtype
        save_folder(policy.model, state, tokenizer, args)
    dist.barrier()

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

def speed(means, seconds, policy, args):
    """tokens/s of all ranks, peak memory of this one, MFU (arXiv 2204.02311) of a known GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = dict(A100=312, H100=989, H200=989, B200=2250, MI300X=1307, L40S=362)  # bf16 TFLOP/s
    peak = [tera * 1e12 for gpu, tera in peaks.items() if gpu in name and args.dtype != "float32"]
    memory = torch.cuda.max_memory_allocated() if name else 1024 * resource.getrusage(0).ru_maxrss
    line = {"tokens/s": means["tokens"] / seconds, "memory/GiB": memory / 2**30}
    if peak and not args.train_modules:  # the head sees response tokens only, an embedding none
        model = policy.model
        tables = [model.get_output_embeddings().weight, model.get_input_embeddings().weight]
        trunk, head = sum(p.numel() for p in {*model.parameters()} - {*tables}), tables[0].numel()
        responses = (means["lengths/chosen"] + means["lengths/rejected"]) * means["pairs"]
        work = (4 if args.lora_rank else 6) * (trunk * means["tokens"] + head * responses)
        line["mfu"] = work / seconds / dist.get_world_size() / peak[0]
    return line

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


def main():
    args = parse_args(Args)
    for flag, package in dict(wandb="wandb", lora_rank="peft", liger="liger_kernel").items():
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"--{flag} needs a package: pip install {package.replace('_', '-')}")
    rank, world, device, dtype = start_process_group(args.dtype)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))

    # what is trained
    splits, tokenizer = load_data(args)
    train, pairs = splits["train"], len(splits["train"]["rows"])
    if args.batch_size > pairs:
        fail(f"--batch_size {args.batch_size} is more than the {pairs} pairs of {args.data}/train")
    model, weights, digest = build_model(args)
    if args.router_aux_coef and not hasattr(sys.modules[type(model).__module__], BALANCE):
        fail(f"--router_aux_coef {args.router_aux_coef} is for a mixture of experts, which "
             f"{model.config.model_type} is not")
    choose_parameters(model, weights, args)
    if args.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as use_liger
        use_liger(model, cross_entropy=False, fused_linear_cross_entropy=False)
    if args.activation_checkpointing != "off":
        checkpoint_blocks(model, args.activation_checkpointing)
    policy = shard(Policy(model), weights, dtype, device, args.cpu_offload, args.compile,
                   args.shard_group)
    del weights
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay,
                                  fused=True)

    # the run
    epoch_steps = math.ceil(pairs / args.batch_size)
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    start = open_run(args)
    if start:
        load_checkpoint(policy, optimizer, start, args)
    log, totals, clock = open_log(args), {}, time.time()
    if args.eval_every and not start:
        log({"step": 0} | evaluate(policy, splits["val"], args))
    for step in tqdm(range(start, steps), args.out, initial=start, total=steps, disable=rank > 0):
        rows, computed = batch_rows(step, pairs, args), []
        lists = micro_batches(rows, train["lengths"], args.layout, args.max_tokens, world)
        for part in lists[rank::world]:
            losses = pair_losses(policy, part, train, totals, args)
            (losses.sum() * world / len(rows)).backward()  # FSDP takes the mean over ranks
            computed += [(part, losses.detach())]
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).full_tensor().item()
        broken = [int(row) for part, losses in computed
                  for row in part[~losses.isfinite().numpy(force=True)[:len(part)]]]
        flags = torch.tensor([len(broken) + (not math.isfinite(norm)), len(stop)], device=device)
        dist.all_reduce(flags)  # a CPU-GPU sync point: the ranks stop together
        if flags[0]:
            names = [None] * world
            dist.all_gather_object(names, [train["rows"][row]["id"] for row in broken])
            fail(f"step {step}: loss {losses.mean():.4g} or gradient {norm:.4g} is not finite, "
                 f"pairs {sum(names, []) or 'none alone'}; the checkpoints in {args.out} are good: "
                 f"take the pairs out, or lower --learning_rate {args.learning_rate}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        saving = flags[1] or args.save_every and done % args.save_every == 0
        logging = saving or done % args.log_every == 0 or done == steps
        if logging:
            means = mean_over_pairs(totals)
            line = dict(step=done, epoch=done / epoch_steps, lr=group["lr"], grad_norm=norm)
            log(line | means | speed(means, time.time() - clock, policy, args))
        if args.eval_every and (done % args.eval_every == 0 or done == steps):
            log({"step": done} | evaluate(policy, splits["val"], args))
        if saving:
            save_checkpoint(policy, optimizer, done, args)
        if logging:
            totals, clock = {}, time.time()
        if flags[1]:
            fail(f"stopped by SIGTERM; step {done} of {steps} is saved, continue with --resume")
    save_final(policy, tokenizer, args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
