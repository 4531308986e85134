"""One pass of the reference model: log ref(y|x) of every chosen and rejected response, on disk.

It is the term log ref of DPO's eq. 7 (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), a
constant that the training scripts read, so that the reference is never in memory beside the policy.
Model, precision and forward function are those of training, whose first batch checks that they are.

    python cache_ref.py --model MODEL --data data/NAME
    torchrun --nproc_per_node=8 cache_ref.py --model MODEL --data data/NAME [--sketch_dim 4096]

Writes data/NAME/ref-<hash>/{train,val}-logps.npy, float32 (rows, 2) in nats, row i for row i of the
split; the hash is of weights, tokens and precision. While it runs, each process keeps what it has
in ref-<hash>.partial/. A killed run takes up the parts it finds, with any number of processes, and
ends with the same bytes, because what shares a forward pass is a function of the data alone
(sketches made on a GPU: to rounding).

For auxdpo.py a second pass adds ref-<hash>/sketch-<hash>/train-sketch.npy, (rows, 2, K): of every
response a TensorSketch (Pham and Pagh 2013) of g = grad log ref(y|x), so short that all fit on disk
and such that <sketch(g), sketch(g')> estimates <g, g'> without bias. A weight W (out, in) of a
linear layer has the gradient sum_t d_t x_t^T, d the gradient of its output and x its input, and

    sketch = IFFT sum_t FFT(CS_out(d_t)) FFT(CS_in(x_t))

with CS, a count sketch, the sum of the entries with random signs into K buckets. So it takes one
batched backward pass over frozen weights, and no gradient of a weight is ever formed.

With --noise_margin 3 (nats), as in ComPO (Chen et al. 2025, https://arxiv.org/abs/2505.05465), the
pairs that the reference can hardly tell apart, |log ref(y_w|x) - log ref(y_l|x)| <= 3, go to
data/NAME/noisy, the others to data/NAME/clean: data folders for every script, with their log-probs.
"""
import argparse, bisect, contextlib, dataclasses, functools, hashlib, importlib.util, inspect, json
import math, os, re, shutil, sys, time, types, uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    model: str  # Hugging Face folder or hub name of the reference
    data: str  # folder made by prepare_data.py
    layout: str = "packed"  # packed (no padding, each prompt once) | concatenated | separate
    max_tokens: int = 8192  # bound on the tokens of one forward pass of one rank
    dtype: str = "auto"  # of the computation: auto (bfloat16 on a GPU) | bfloat16 | float32
    cpu_offload: bool = False  # keep the weights in host memory
    save_seconds: float = 20.0  # at most so much work is lost when the run is killed
    noise_margin: float = 0.0  # delta, nats: also split the data into noisy and clean/; 0 = no
    # sketches for auxdpo.py
    sketch_dim: int = 0  # K, numbers that stand for the gradient of a response; 0 = no sketches
    sketch_dtype: str = "float16"  # of the sketches on disk: float16 | float32
    sketch_modules: str = ""  # sketch only what matches this regex; empty = all that is trained
    lora_rank: int = 0  # as the training will have it, for the sketches; 0 = off
    train_modules: str = ""  # regex of parameter names, as the training will have it; empty = all
    seed: int = 0  # as the training will have it: with --lora_rank, of the initial adapters


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

def reference_folder(args, weights, dtype, splits):
    """Where the log-probs of these weights, in this precision, on these tokens belong; and why."""
    key = dict(weights=weights, attention="gathered", dtype=str(dtype).removeprefix("torch."))
    key |= {name: split["hash"] for name, split in splits.items()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return Path(args.data, f"ref-{name}"), key


# ---- end of the helpers ----


def sketch_folder(args, folder):
    """Where the sketches belong, inside the folder of the log-probs; and what makes them these."""
    names = ("sketch_dim", "sketch_modules", "train_modules", "lora_rank")
    key = {name: getattr(args, name) for name in names} | dict(seed=args.lora_rank and args.seed)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"sketch-{name}", key

def hash_table(name, size, dim, device):
    """Signs and buckets of `size` entries, random of `name` alone; all buckets are equally full."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=random) * 2.0 - 1
    buckets = torch.randperm(math.ceil(size / dim) * dim, generator=random)[:size] % dim
    return signs.to(device), buckets.to(device)

def count_sketch(values, table, dim):
    """values (t, size) -> (t, dim): in each bucket the signed sum of its entries."""
    signs, buckets = table
    sums = torch.zeros(len(values), dim, device=values.device)
    return sums.scatter_add_(1, buckets.expand(len(values), -1), values * signs)

def is_product(module):
    """Is the gradient of its weight a sum of outer products, of its input and its output's?"""
    name = type(module).__name__.removeprefix("FSDP")  # which shard makes of it
    return name in ("Linear", "Embedding", "Conv1D") or hasattr(module, "embed_scale")

def watch(model, names, dim, salt=""):
    """Freeze all weights, and sketch those of `names` in every backward pass -> state of the hooks.
    Another salt makes another, independent sketch."""
    state = types.SimpleNamespace(dim=dim, real=None, head=model.get_output_embeddings())
    state.table = functools.cache(lambda name, *size: hash_table(salt + name, *size))
    known = {id(weight): name for name, weight in model.named_parameters()}  # tied: one name
    for module in model.modules():
        own = {leaf: known[id(weight)] for leaf, weight in module.named_parameters(recurse=False)}
        own = {leaf: name for leaf, name in own.items() if name in names}
        for leaf, name in own.items():
            if not is_product(module) and "Norm" not in type(module).__name__:
                fail(f"--sketch_dim knows linear layers, embeddings and norms, but not {name} of "
                     f"{type(module).__name__}: leave it out with --sketch_modules")
        if own:
            module.register_forward_hook(functools.partial(remember, state, own))
    model.requires_grad_(False)
    return state

def remember(state, own, module, inputs, output):
    """Forward hook of a layer that counts."""
    if state.real is not None and torch.is_grad_enabled():
        if not output.requires_grad:
            output.requires_grad_()  # the backward pass ends at the first layer that counts
        output.register_hook(functools.partial(add_share, state, own, module, inputs[0].detach()))

def add_share(state, own, module, x, d):
    """Backward hook: the share of a layer, x its input and d the gradient of its output."""
    rows, length = state.real.shape
    table = lambda leaf, axis, size: state.table(f"{own[leaf]} {axis}", size, state.dim, d.device)
    name, who = [*own.values()][0], state.who
    sketch = functools.partial(count_sketch, dim=state.dim)
    if module is state.head:  # a chunk of hidden (M, h): a view, which knows where it begins
        first = x.storage_offset() // x.shape[-1]
        who = state.responses[first:first + len(x)]
    elif is_product(module):
        x, d = x.flatten(0, -2) if x.is_floating_point() else x.flatten(), d.flatten(0, -2)
        if not len(x) == len(d) == rows * length:
            fail(f"--sketch_dim cannot tell the sequences of {name} apart: leave it out with "
                 "--sketch_modules")
        x, d = x[state.cells], d[state.cells]
    else:  # a norm: the gradient itself, a vector per row, is small
        weights = {leaf: getattr(module, leaf).detach().float() for leaf in own}
        run = lambda x: lambda weights: torch.func.functional_call(module, weights, (x,))
        one = lambda x, d: torch.func.vjp(run(x), weights)[1](d)[0]
        real, state.real = state.real, None  # this forward pass is not to be watched
        for leaf, grads in torch.func.vmap(one)(x.float(), d.float()).items():
            grads = grads.flatten(1)  # (rows, size)
            state.sums += sketch(grads, table(leaf, 0, grads.shape[1]))
        state.real = real
        return
    for x, d, who in zip(x.split(1024), d.split(1024), who.split(1024)):
        if "bias" in own:
            state.sums.index_add_(0, who, sketch(d, table("bias", 0, d.shape[1])))
        if "weight" not in own:
            continue
        if isinstance(module, torch.nn.Embedding):  # x is the place of the only one in a vector
            signs, buckets = table("weight", 0, module.num_embeddings)
            left = d.new_zeros(len(d), state.dim, dtype=torch.float32)
            left[torch.arange(len(d)), buckets[x]] = signs[x] * (x != module.padding_idx)
            scale = getattr(module, "embed_scale", 1)  # Gemma
            right = sketch(scale * d, table("weight", 1, d.shape[1]))
        else:
            sides = (x, d) if type(module).__name__ == "Conv1D" else (d, x)  # GPT-2: (in, out)
            left, right = (sketch(side, table("weight", axis, side.shape[1]))
                           for axis, side in enumerate(sides))
        state.spectrum.index_add_(0, who, torch.fft.rfft(left) * torch.fft.rfft(right))

def sketches(policy, pairs, state, device):
    """-> float32 (n, 2, dim), the sketched gradients of log pi of both responses of n pairs."""
    batch, = collate(pairs, "concatenated")  # every sequence is a row of its own
    state.real = batch["real"].to(device)
    rows, length = state.real.shape
    batch["position_ids"] = batch["position_ids"].expand(rows, -1)  # they may be an embedding's
    state.cells = state.real.flatten().nonzero()[:, 0]
    state.who = state.cells // length  # (tokens,) the row of each
    sizes = torch.tensor(batch["sizes"], device=device)
    state.responses = torch.arange(rows, device=device).repeat_interleave(sizes)
    state.sums = torch.zeros(rows, state.dim, device=device)
    state.spectrum = torch.zeros(rows, state.dim // 2 + 1, dtype=torch.complex64, device=device)
    policy([batch])[0].sum().backward()
    state.real = None
    sums = state.sums + torch.fft.irfft(state.spectrum, n=state.dim)
    return sums.view(2, len(pairs), -1).transpose(0, 1)


def fill(folder, key, splits, kind, compute, shape, dtype, args):
    """folder/{split}-{kind}.npy: compute(pairs) (n, *shape) for all rows, by all ranks, in parts.

    A part is a file in folder.partial, of this run or of a killed one, here or on other nodes."""
    rank, world, partial = dist.get_rank(), dist.get_world_size(), folder.with_suffix(".partial")
    try:
        partial.mkdir(exist_ok=True)
        parts, known = read_parts(partial, splits, shape, dtype)
        plan = []  # micro-batches of windows of 1024 rows: a function of the data alone
        for name, split in splits.items():
            for first in range(0, len(split["rows"]), 1024):
                rows = np.arange(first, min(first + 1024, len(split["rows"])))
                lists = micro_batches(rows, split["lengths"], args.layout, args.max_tokens, 1)
                plan += [(name, part) for part in lists]
        plan = [(name, part) for name, part in plan if not known[name][part].all()]
        pairs = sum(len(split["rows"]) for split in splits.values())
        left = sum(len(part) for _, part in plan)
        if rank == 0:
            size = pairs * np.dtype(dtype).itemsize * math.prod(shape) / 1e6
            print(f"{folder}: {pairs} pairs, of which {pairs - left} are already done in {partial};"
                  f" {size:.3g} MB on disk")
        done, start, clock = [], time.time(), time.time()
        bar = tqdm(total=left, desc=folder.name, unit=" pairs", disable=rank > 0)
        for i in range(0, len(plan), world):  # FSDP: equally many forward passes per rank
            name, part = plan[min(i + rank, len(plan) - 1)]
            pairs = [splits[name]["rows"][int(row)] for row in part]
            values = compute(pairs).cpu().numpy().astype(dtype)
            for row in part[~np.isfinite(values).reshape(len(part), -1).all(1)]:
                fail(f"pair {splits[name]['rows'][int(row)]['id']} of {name} has {kind} that are "
                     f"not finite in {np.dtype(dtype)}; take it out of the data, or try float32: "
                     "--dtype, --sketch_dtype")
            done.append((name, part, values))
            bar.update(sum(len(part) for _, part in plan[i:i + world]))
            if i == 0 and rank == 0:
                cost = [splits[name]["lengths"][part].sum() for name, part in plan]
                tqdm.write(f"about {(time.time() - start) * sum(cost) / sum(cost[:world]) / 60:.1f}"
                           " minutes, if all go like the first")
            if time.time() - clock > args.save_seconds:
                parts |= write_part(partial, done)
                done, clock = [], time.time()
        if done:
            parts |= write_part(partial, done)
        bar.close()
        write_final(folder, key, splits, kind, parts, shape, dtype, args)
    except OSError as error:
        fail(f"{error.filename or folder} cannot be written ({error.strerror}); {partial} is kept")
    shutil.rmtree(partial, ignore_errors=True)

def read_parts(folder, splits, shape, dtype):
    """-> {path: {split: its rows}} as seen here, {split: is it known to any rank (rows,)}."""
    parts, known = {}, {name: np.zeros(len(split["rows"]), bool) for name, split in splits.items()}
    for path in folder.glob("part-*.npz"):
        try:
            with np.load(path) as part:
                rows = {name: part[f"{name}-rows"] for name in splits if f"{name}-rows" in part}
                for name in rows:
                    values = part[f"{name}-values"].reshape(len(rows[name]), *shape)
                    assert values.dtype == dtype, f"{values.dtype}, not {dtype}"
                    known[name][rows[name]] = True
            parts[path] = rows
        except Exception as error:
            tqdm.write(f"{path} is damaged ({error}) and will be computed again")
    for name, mask in known.items():
        mask = torch.from_numpy(mask.astype(np.int8))
        dist.all_reduce(mask, dist.ReduceOp.MAX)
        known[name] = mask.numpy().astype(bool)
    return parts, known

def write_part(folder, done):
    """Store [(split, rows, values)] in a new file, whole or not at all -> {path: {split: rows}}."""
    arrays, path = {}, folder / f"part-{uuid.uuid4().hex}.npz"
    for name in {name for name, _, _ in done}:
        rows, values = zip(*[(rows, values) for split, rows, values in done if split == name])
        arrays |= {f"{name}-rows": np.concatenate(rows), f"{name}-values": np.concatenate(values)}
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".tmp").rename(path)
    return {path: {key[:-5]: rows for key, rows in arrays.items() if key.endswith("-rows")}}

def write_final(folder, key, splits, kind, parts, shape, dtype, args):
    """All files aside, then one rename: a folder with this name is complete. Each node writes, and
    the last to come finds it there if they share it."""
    aside = folder.with_name(f"tmp-{folder.name}.{dist.get_rank()}")  # not ref-*: not yet a cache
    writer = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if writer:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    for name, split in splits.items():
        size = (len(split["rows"]), *shape)
        path = aside / f"{name}-{kind}.npy"
        file = np.lib.format.open_memmap(path, "w+", dtype, size) if writer else None
        for first in range(0, len(split["rows"]), 1024):  # at no time is all of it in memory
            window = np.full((min(1024, size[0] - first), *shape), -np.inf, np.float32)
            for path, rows in parts.items():
                here = rows.get(name, np.array([], int)) - first
                inside = (here >= 0) & (here < len(window))
                if inside.any():
                    with np.load(path) as part:
                        window[here[inside]] = part[f"{name}-values"][inside]
            window = torch.from_numpy(window)
            dist.all_reduce(window, dist.ReduceOp.MAX)  # equal where two ranks have it
            if not window.isfinite().all():
                fail(f"{folder}.partial lacks some of {name}; the same command makes them")
            if writer:
                file[first:first + len(window)] = window.numpy()
        if writer:
            file.flush()
    record = dict(key=key, args=dataclasses.asdict(args), torch=torch.__version__,
                  transformers=transformers.__version__, files=file_hashes(aside))
    if writer:
        (aside / "meta.json").write_text(json.dumps(record))
    publish(writer, aside, folder)

def file_hashes(folder):
    """{name: SHA-256} of the log-probs in a folder, which every run that loads them checks."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.glob("*-logps.npy")}

def publish(writer, aside, folder):
    """Rename what the writers have, in turns: the last to come may find it there."""
    for turn in range(dist.get_world_size()):
        if writer and turn == dist.get_rank():
            shutil.rmtree(aside) if folder.exists() else aside.rename(folder)
        dist.barrier()


def split_by_margin(folder, splits, dtype, args):
    """data/noisy, the pairs with |log ref(y_w|x) - log ref(y_l|x)| of at most noise_margin, and
    data/clean, the others, each with its part of the cache `folder`; a histogram of the margins."""
    logps = {name: np.load(folder / f"{name}-logps.npy") for name in splits}
    margins = {name: np.abs(values[:, 0] - values[:, 1]) for name, values in logps.items()}
    record, rank = json.loads((folder / "meta.json").read_text()), dist.get_rank()
    origin = dict(reference=folder.name, noise_margin=args.noise_margin)
    if rank == 0:
        edges = args.noise_margin * np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16, np.inf])
        counts = np.histogram(np.concatenate([*margins.values()]), edges)[0]
        for low, high, count in zip(edges, edges[1:], counts):
            print(f"|margin| {low:7.2f} to {high:7.2f} nats {count:7} pairs "
                  + "#" * round(50 * count / counts.sum()))
    for kind in ("noisy", "clean"):
        kept = {name: np.flatnonzero((values <= args.noise_margin) == (kind == "noisy"))
                for name, values in margins.items()}
        sizes = ", ".join(f"{len(rows)} of {len(margins[name])} in {name}"
                          for name, rows in kept.items())
        if not all(map(len, kept.values())):
            fail(f"--noise_margin {args.noise_margin}: {kind} pairs are {sizes}, and each must have"
                 " some; choose another margin, or prepare the data with a larger --val_fraction")
        data = Path(args.data, kind)
        aside = data.with_name(f"tmp-{kind}.{rank}")
        writer = int(os.environ.get("LOCAL_RANK", 0)) == 0 and not data.exists()
        with explain(f"{data} cannot be written or read ({{}}); make room, or delete it"):
            if data.exists():
                made = json.loads((data / "meta.json").read_text()).get("origin")
                assert made == origin, f"it holds the split {made}, not {origin}"
            if writer:
                shutil.rmtree(aside, ignore_errors=True)
                meta = json.loads(Path(args.data, "meta.json").read_text()) | dict(origin=origin)
                for name, rows in kept.items():
                    splits[name]["rows"].select(rows).save_to_disk(str(aside / name))
                    meta.setdefault("counts", {})[name] = len(rows)
                    content = json.dumps([meta["content_hash"][name], kind, origin, len(rows)])
                    content = hashlib.sha256(content.encode()).hexdigest()[:16]
                    meta["content_hash"][name] = content
                (aside / "meta.json").write_text(json.dumps(meta, indent=1))
                here = dataclasses.replace(args, data=str(aside))
                part, _ = load_data(here, tuple(splits))
                own, key = reference_folder(here, record["key"]["weights"], dtype, part)
                own.mkdir()
                for name, rows in kept.items():
                    np.save(own / f"{name}-logps.npy", logps[name][rows])
                own_part = dict(key=key, args=record["args"] | dict(data=str(data)))
                own_part["files"] = file_hashes(own)
                (own / "meta.json").write_text(json.dumps(record | own_part))
            publish(writer, aside, data)
        if rank == 0:
            print(f"{data}: {sizes}")


def summary(folder, kind):
    """Of the training pairs, at most 1024: what a user may recognise."""
    values = np.load(folder / f"train-{kind}.npy", mmap_mode="r")[:1024].astype(np.float32)
    what = "log-probs" if kind == "logps" else "gradient norms"
    values = values if kind == "logps" else np.linalg.norm(values, axis=2)
    return f"mean {what} of (chosen, rejected): {[round(float(x), 2) for x in values.mean(0)]}"


def main():
    args = parse_args(Args)
    if args.sketch_dim and args.lora_rank and not importlib.util.find_spec("peft"):
        fail("--lora_rank needs a package: pip install peft")
    if args.sketch_dim:  # every sequence will have to be a row of its own
        args = dataclasses.replace(args, layout="concatenated")
    rank, world, device, dtype = start_process_group(args.dtype)
    splits, _ = load_data(args)
    model, weights, digest = build_model(args)
    folder, key = reference_folder(args, digest, dtype, splits)
    jobs = [(folder, key, splits, "logps", (2,), "float32")]
    if args.sketch_dim:
        train, shape = dict(train=splits["train"]), (2, args.sketch_dim)
        jobs += [(*sketch_folder(args, folder), train, "sketch", shape, args.sketch_dtype)]
        choose_parameters(model, weights, args)
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        with explain(f"--sketch_modules {args.sketch_modules} is no regular expression ({{}})"):
            names = {name for name in names if re.search(args.sketch_modules, name)}
        if not names:
            fail(f"--sketch_modules {args.sketch_modules} finds no parameter that is trained")
        state = watch(model, names, args.sketch_dim)
        if rank == 0 and 2 * len(splits["train"]["rows"]) > args.sketch_dim:
            print(f"--sketch_dim {args.sketch_dim}: of the {2 * len(splits['train']['rows'])} "
                  "directions of delta, the penalty of auxdpo.py will see only so many")
    complete = torch.tensor([(job[0] / "meta.json").is_file() for job in jobs]).int()
    dist.all_reduce(complete, dist.ReduceOp.MIN)  # on every node
    if complete[-1] and args.sketch_dim:
        made = json.loads((jobs[-1][0] / "meta.json").read_text())["args"]["sketch_dtype"]
        if made != args.sketch_dtype:
            fail(f"{jobs[-1][0]} holds sketches in {made}, not --sketch_dtype {args.sketch_dtype}; "
                 "delete it to make them anew")
    if not complete.all():
        policy = shard(Policy(model), weights, dtype, device, args.cpu_offload)
    del weights

    def logps(pairs):
        with torch.no_grad():
            return policy(collate(pairs, args.layout))[0].T.float()  # (n, 2)

    for (folder, *job), ready in zip(jobs, complete):
        kind = job[2]
        compute = logps if kind == "logps" else lambda pairs: sketches(policy, pairs, state, device)
        if not ready:
            fill(folder, *job[:3], compute, *job[3:], args)
        if rank == 0:
            print(f"{folder} is complete; {summary(folder, kind)}")
    if args.noise_margin:
        split_by_margin(jobs[0][0], splits, dtype, args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
