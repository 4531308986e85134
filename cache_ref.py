"""One pass of the reference model: log ref(y|x) of every chosen and rejected response, on disk.

It is the term log ref of DPO's eq. 7 (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), a
constant that the training scripts read, so that the reference is never in memory beside the policy.
Model, precision and forward function are those of training, whose first batch checks that they are.

    python cache_ref.py --model MODEL --data data/NAME
    torchrun --nproc_per_node=8 cache_ref.py --model MODEL --data data/NAME

Writes data/NAME/ref-<hash>/{train,val}-logps.npy, float32 (rows, 2) in nats, row i for row i of the
split; the hash is of weights, tokens and precision. While it runs, each process keeps what it has
in ref-<hash>.partial/. A killed run takes up the parts it finds, with any number of processes, and
ends with the same bytes, because what shares a forward pass is a function of the data alone.
"""
import argparse, bisect, contextlib, dataclasses, hashlib, inspect, json, math, os, re, shutil
import sys, time, uuid
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

def shard(policy, weights, dtype, device, cpu_offload=False, compiled=False):
    """Split every block and the rest of a Policy over the ranks (FSDP2); rank 0 has the weights."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    rules = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32))
    if cpu_offload and device.type == "cuda":
        rules["offload_policy"] = CPUOffloadPolicy()
    model = policy.eval().model  # dropout or router noise would make it another one
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for block in blocks[::-1]:  # blocks within blocks first
        block.training = getattr(block, "gradient_checkpointing", False)  # the one use of training
        if compiled:  # inside the hooks of FSDP, which it could not trace
            block.forward = torch.compile(block.forward, dynamic=True)
        fully_shard(block, **rules)
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


def merge(logps):
    """Give every rank what any rank has; NaN where none has anything. {split: float32 (rows, 2)}"""
    for name, values in logps.items():
        known = torch.from_numpy(np.nan_to_num(values, nan=-np.inf))
        dist.all_reduce(known, dist.ReduceOp.MAX)  # equal where two ranks have it
        logps[name] = np.where(np.isneginf(known.numpy()), np.float32(np.nan), known.numpy())
    return logps

def read_parts(folder, splits):
    """What processes of this run or killed ones have stored, here or on other nodes."""
    sizes = {name: (len(split["rows"]), 2) for name, split in splits.items()}
    logps = {name: np.full(size, np.nan, np.float32) for name, size in sizes.items()}
    for path in folder.glob("part-*.npz"):
        try:
            with np.load(path) as part:
                for name in {key.removesuffix("-rows") for key in part if key.endswith("-rows")}:
                    logps[name][part[f"{name}-rows"]] = part[f"{name}-logps"]
        except Exception as error:
            tqdm.write(f"{path} is damaged ({error}) and will be computed again")
    return merge(logps)

def write_part(folder, done):
    """Store [(split, rows, logps)] under a new name, whole or not at all."""
    arrays = {}
    for name in {name for name, _, _ in done}:
        rows, logps = zip(*[(rows, logps) for split, rows, logps in done if split == name])
        arrays |= {f"{name}-rows": np.concatenate(rows), f"{name}-logps": np.concatenate(logps)}
    path = folder / f"part-{uuid.uuid4().hex}.npz"
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".tmp").rename(path)

def write_final(folder, logps, key, args):
    """All files aside, then one rename: a folder with this name is complete."""
    aside = folder.with_name(f"tmp-{folder.name}.{dist.get_rank()}")  # not ref-*: not yet a cache
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, values in logps.items():
        np.save(aside / f"{name}-logps.npy", values)
    record = dict(key=key, args=dataclasses.asdict(args), torch=torch.__version__,
                  transformers=transformers.__version__)
    (aside / "meta.json").write_text(json.dumps(record))
    aside.rename(folder)


def main():
    args = parse_args(Args)
    rank, world, device, dtype = start_process_group(args.dtype)
    splits, _ = load_data(args)
    model, weights, digest = build_model(args)
    folder, key = reference_folder(args, digest, dtype, splits)
    partial = folder.with_suffix(".partial")
    complete = [(folder / "meta.json").is_file()]
    dist.broadcast_object_list(complete, 0)
    if complete[0]:
        print(f"{folder} is complete\n" * (rank == 0), end="")
        return dist.destroy_process_group()
    try:
        partial.mkdir(exist_ok=True)
        logps = read_parts(partial, splits)

        plan = []  # micro-batches of windows of 1024 rows: a function of the data alone
        for name, split in splits.items():
            for first in range(0, len(split["rows"]), 1024):
                rows = np.arange(first, min(first + 1024, len(split["rows"])))
                lists = micro_batches(rows, split["lengths"], args.layout, args.max_tokens, 1)
                plan += [(name, part) for part in lists]
        plan = [(name, part) for name, part in plan if np.isnan(logps[name][part]).any()]
        pairs = sum(len(split["rows"]) for split in splits.values())
        left = sum(len(part) for _, part in plan)
        if rank == 0:
            print(f"{folder}: {pairs} pairs, of which {pairs - left} are already done in {partial}")

        policy = shard(Policy(model), weights, dtype, device, args.cpu_offload)
        done, clock = [], time.time()
        bar = tqdm(total=left, desc=folder.name, unit=" pairs", disable=rank > 0)
        for i in range(0, len(plan), world):  # FSDP: equally many forward passes per rank
            name, part = plan[min(i + rank, len(plan) - 1)]
            with torch.no_grad():
                batches = collate([splits[name]["rows"][int(row)] for row in part], args.layout)
                values = policy(batches)[0].T.float().cpu().numpy()  # (n, 2)
            for row in part[~np.isfinite(values).all(1)]:
                fail(f"pair {splits[name]['rows'][int(row)]['id']} of {name} has a log-prob that "
                     "is not finite; take it out of the data, or try --dtype float32")
            logps[name][part] = values
            done.append((name, part, values))
            bar.update(sum(len(part) for _, part in plan[i:i + world]))
            if time.time() - clock > args.save_seconds:
                write_part(partial, done)
                done, clock = [], time.time()
        if done:
            write_part(partial, done)
        logps = merge(logps)
        for writer in range(world):  # the folder is shared, or each node keeps its own
            if rank == writer and int(os.environ.get("LOCAL_RANK", 0)) == 0 and not folder.exists():
                write_final(folder, logps, key, args)
            dist.barrier()
    except OSError as error:
        fail(f"{error.filename or folder} cannot be written ({error.strerror}); {partial} is kept")
    bar.close()
    if rank == 0:
        mean = {name: values.mean(0).round(2).tolist() for name, values in logps.items()}
        print(f"{folder} is complete; mean log-probs of (chosen, rejected): {mean}")
    shutil.rmtree(partial, ignore_errors=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
