"""Simple Preference Optimization (SimPO), Meng et al. 2024, https://arxiv.org/abs/2405.14734

    L = -E log sigmoid(beta / |y_w| log pi(y_w|x) - beta / |y_l| log pi(y_l|x) - gamma)       eq. 6

The reward is the mean log-prob per token, which is also what ranks sequences in decoding, and a
chosen response must win by the target margin gamma. There is no reference: nothing is cached, and
nothing but a small learning rate keeps the policy near its start.

    python prepare_data.py --dataset HUB_OR_FILE --model MODEL --out data/NAME
    torchrun --nproc_per_node=8 simpo.py --model MODEL --data data/NAME    (without cache_ref.py)

Departures from the paper: 1. gamma is given as the ratio gamma / beta, as in the authors' code;
TRL's simpo_gamma is gamma itself. 2. The authors also score the tokens that open the assistant's
turn: prepare_data.py --score_header. 3. label_smoothing and sft_weight, 0 by default.
Differs from dpo.py: no reference, mean log-probs, the margin; the default of beta. The log-probs
are checked against the model's own forward pass, which cache_ref.py does for the other scripts.

Read to line 197: settings, loss, training loop. Below the rule stand the helpers, the same in every
script; you can fork this file without opening them.

Words: a text is a prompt and one response, a pair is two texts of one prompt, rows are indices of
pairs. A batch is the pairs of an optimiser step, a micro-batch those that a rank computes at once.
Shapes: n pairs of a micro-batch, L its tokens, M those in responses, T tokens of the longest text,
V vocabulary, h hidden size, H heads, d head size. A leading dimension of 2 means chosen, rejected.
"""
import contextlib, dataclasses, functools, hashlib, inspect, json, math, os, re, resource, shutil
import signal, subprocess, sys, threading, time, types
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow.compute as pc
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion

@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    model: str  # Hugging Face folder or hub name: the policy at step 0
    data: str  # folder made by prepare_data.py
    trust_remote_code: bool = False  # run the Python files that come with some models
    out: str = f"out/{Path(__file__).stem}"  # the run's args.json, log.jsonl, checkpoints, final/
    resume: bool = False  # continue from the last checkpoint in --out; begin if there is none
    save_every: int = 0  # steps between checkpoints; 0 = only on SIGTERM and before final/
    keep: int = 2  # how many checkpoints stay on disk
    # optimisation
    epochs: int = 1  # passes over the training pairs
    max_steps: int = 0  # optimiser steps, instead of --epochs; 0 = all epochs
    batch_size: int = 32  # pairs per optimiser step, over all ranks whatever their number
    learning_rate: float = 5e-7  # peak, AdamW
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    warmup: float = 0.1  # fraction of the steps in which the learning rate rises; 0 = none
    weight_decay: float = 0.0  # AdamW, decoupled
    max_grad_norm: float = 1.0  # gradient clipping, L2 norm over all parameters
    seed: int = 0  # of the order of the pairs and of LoRA's adapters
    # memory and speed
    layout: Literal["packed", "concatenated", "separate"] = "packed"  # how pairs enter the model
    max_tokens: int = 8192  # bound on the tokens of one forward pass of one rank
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on a GPU, else float32
    activation_checkpointing: Literal["off", "selective", "full"] = "off"  # less memory, more time
    compile: bool = False  # torch.compile each block
    zero: Literal["auto", "2", "3"] = "auto"  # 2 gathers weights once a step; auto: on one rank
    shard_group: int = 0  # ranks that share one copy of the weights, such as a node's; 0 = all
    lora_rank: int = 0  # train LoRA adapters of this rank (peft) instead of all weights; 0 = off
    train_modules: str = ""  # train only the parameters whose names match this regex; empty = all
    # logging
    log_every: int = 10  # steps between lines of log.jsonl
    eval_every: int = 100  # steps between evaluations on val/, also first and last; 0 = never
    wandb: str = ""  # Weights & Biases project that gets the log too
    # algorithm
    beta: float = 2.0  # scale of the reward, beta of eq. 4
    gamma_beta_ratio: float = 0.25  # target margin gamma of eq. 5, divided by beta; 0 = no margin
    label_smoothing: float = 0.0  # probability that a preference label is wrong, eps of cDPO
    sft_weight: float = 0.0  # weight of -log pi(y_w|x) / |y_w|, added to the loss as in RPO

def preference_loss(logps, lengths, args):
    """The algorithm: log-probs logps (2, n) in nats, lengths (2, n) in tokens -> losses (n,) and
    metrics of each pair {name: (n,)}."""
    rewards = args.beta * logps / lengths  # (2, n) eq. 4
    margins = rewards[0] - rewards[1] - args.beta * args.gamma_beta_ratio  # (n,) eq. 5
    losses = -(1 - args.label_smoothing) * F.logsigmoid(margins)  # (n,) eq. 6
    losses = losses - args.label_smoothing * F.logsigmoid(-margins)  # (n,) 0 by default
    return losses, reward_metrics(rewards, logps, lengths)

def main():
    args = parse_args(Args)
    rank, world, device, dtype = start_process_group(args.dtype)
    sigterm = threading.Event()  # set when the job's time is up
    signal.signal(signal.SIGTERM, lambda *_: sigterm.set())

    with explain(f"--data {args.data}, --model {args.model} or --out {args.out} cannot be used"):
        splits = load_data(args)
        model, weights = read_model(args.model, args)  # without weights; with them, on rank 0
        content = content_hashes(weights, splits, dtype, args)
        start = open_run(content, args)
    train, val = splits["train"], splits["val"]
    policy = build_policy(model, weights, token_logps, device, dtype, args)
    check_forward(policy, train, dtype, args)
    del weights  # each rank has its share of them in the policy
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay,
                                  fused=True)

    # A new run starts at step 0, one that is resumed at the step of its last checkpoint.
    epoch_steps = math.ceil(len(train["pairs"]) / args.batch_size)
    steps = args.max_steps or args.epochs * epoch_steps
    log = open_log(args)
    evaluation = {}
    if start > 0:
        load_checkpoint(policy, optimizer, start, args)
    if start == 0 and args.eval_every:
        evaluation = evaluate(policy, val, args)
        log({"step": 0} | evaluation)

    sums, seconds = [], 0.0  # metrics of the micro-batches and time, since the last line of the log
    all_tokens, all_seconds = 0, 0.0
    bar = tqdm(range(start, steps), args.out, initial=start, total=steps, disable=rank > 0)
    for step in bar:
        # The batch is the same on all ranks; each rank takes its share of the micro-batches.
        began = time.time()
        batch = batch_rows(step, len(train["pairs"]), args)
        parts = micro_batches(batch, train["lengths"], args, world)[rank::world]
        for i, rows in enumerate(parts):
            policy.set_reshard_after_backward(policy.reshards or i == len(parts) - 1)  # see --zero
            losses, metrics = pair_losses(policy, rows, train, args)
            loss = losses.sum() / len(batch)
            (loss * world).backward()  # FSDP takes the mean over ranks, we want the sum
            sums.append(metrics)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        grad_norm = grad_norm.full_tensor().item()  # of all ranks; the CPU waits for the GPU here
        if not math.isfinite(grad_norm):  # a loss that is not finite ends here too
            ids = [train["pairs"][int(row)]["id"] for row in batch]
            fail(f"step {step}: the gradient norm {grad_norm} is not finite; lower --learning_rate "
                 f"{args.learning_rate}, or look at the pairs of this batch: {' '.join(ids)}")
        rate = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        policy.zero_grad()
        seconds += time.time() - began  # without evaluations and checkpoints
        done = step + 1
        stopping = torch.tensor(float(sigterm.is_set()))
        dist.all_reduce(stopping)  # a signal on any rank stops all of them
        saving = stopping or done == steps or (args.save_every and done % args.save_every == 0)
        # Checkpoints do not hold the sums, so these are logged before each.
        if saving or done % args.log_every == 0:
            means = mean_over_pairs(sums)
            log({"step": done, "epoch": done / epoch_steps, "lr": rate, "grad_norm": grad_norm,
                 "tokens/s": means["tokens"] / seconds, "memory/GiB": peak_memory()} | means)
            bar.set_postfix(loss=means["loss"], accuracy=means["rewards/accuracies"])
            all_tokens += means["tokens"]
            all_seconds += seconds
            sums, seconds = [], 0.0
        if args.eval_every and (done % args.eval_every == 0 or done == steps):
            evaluation = evaluate(policy, val, args)
            log({"step": done} | evaluation)
        if saving:
            save_checkpoint(policy, optimizer, done, args)
        if stopping:
            fail(f"stopped by SIGTERM; step {done} of {steps} is saved, continue with --resume")
    save_final(policy, args)
    check_final(policy, val, dtype, args)
    if rank == 0:  # a block of lines for grep, such as "eval/loss: 0.61"
        summary = {"seconds": all_seconds, "tokens/s": all_tokens / max(all_seconds, 1e-9),
                   "memory/GiB": peak_memory(), "steps": steps, "final": f"{args.out}/final"}
        for name, value in (evaluation | summary).items():
            print(f"{name}: {value}")
    dist.destroy_process_group()

def pair_losses(policy, rows, split, args):
    """The pairs in these rows -> losses (n,) to be minimised, metrics {name: sum over the n}."""
    factor = 1.0
    if len(rows) == 0:  # FSDP needs every rank: without a pair, one computes row 0, times 0
        rows, factor = np.array([0]), 0.0
    pairs = [split["pairs"][int(row)] for row in rows]
    lengths = to_device(split["lengths"][rows].T)  # (3, n) prompt, chosen, rejected
    logps = policy(collate(pairs, args.layout))  # (2, n) log pi(y|x)
    losses, metrics = preference_loss(logps, lengths[1:], args)
    metrics |= dict(preference_loss=losses, tokens=lengths.sum(0), pairs=torch.ones_like(losses))
    losses = losses * to_device(torch.tensor([pair.get("weight", 1.0) for pair in pairs]))
    losses = losses - args.sft_weight * logps[0] / lengths[1]
    metrics["loss"] = losses
    sums = {name: factor * value.detach().double().sum() for name, value in metrics.items()}
    return factor * losses, sums

# ---- helpers, the same in every script (tests/test_copies.py): edit them in dpo.py first ----

# -- command line, errors, processes
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

@contextlib.contextmanager
def explain(trouble, kinds=(Exception, dcp.CheckpointException)):  # dcp's is no Exception
    """An error in the `with` block ends the program with one line: `trouble`, and the reason."""
    try:
        yield
    except kinds as error:
        reason = re.sub(r"(?s).*Traceback.*\n", "", str(error).strip())  # dcp adds a traceback
        fail(f"{trouble} ({type(error).__name__}: {reason[:300]})")

def start_process_group(dtype):
    """Join torchrun's process group, or make one alone -> rank, world size, device, dtype."""
    # Each micro-batch has another shape. On a GPU these break the memory into pieces (138 GiB were
    # reserved at a peak of 65) unless its segments can grow, and cuDNN plans each for 0.1 s.
    if not any("ALLOC_CONF" in name for name in os.environ):  # set by the user, by any of its names
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_flush_denormal(True)  # on a CPU, denormal numbers can be many times slower
    cuda = torch.cuda.is_available()  # true for ROCm as well, where "nccl" is RCCL
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    with explain("the ranks do not find each other: start them by torchrun, or use python"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    if "RANK" in os.environ:  # torchrun's
        sys.excepthook = late_traceback
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return dist.get_rank(), dist.get_world_size(), device, getattr(torch, dtype)

def late_traceback(*error):
    """Wait first: if another rank failed, and this one only lost it, torchrun ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)
    sys.__excepthook__(*error)

def to_device(array):
    """Array or tensor -> tensor on the device of the model. The CPU does not wait for the copy."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().cuda(non_blocking=True) if torch.cuda.is_available() else tensor

# -- metrics, order of the pairs, learning rate
def reward_metrics(rewards, logps, lengths):
    """{name: (n,)} under the names that dashboards know; all inputs (2, n)."""
    margins = rewards[0] - rewards[1]
    correct = (margins > 0).float()
    correct[margins.abs() < 1e-4] = 0.5  # a tie but for rounding, as at step 0, counts half
    return {"rewards/accuracies": correct, "rewards/margins": margins,
            "rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
            "logps/chosen": logps[0], "logps/rejected": logps[1],
            "lengths/chosen": lengths[0], "lengths/rejected": lengths[1]}

def mean_over_pairs(sums):
    """Sums of micro-batches -> means over the pairs of all ranks; pairs and tokens stay sums."""
    names = sorted(sums[0])
    totals = sum(torch.stack([each[name] for name in names]) for each in sums)
    dist.all_reduce(totals)
    total_of = dict(zip(names, totals.tolist()))
    means = {name: total / total_of["pairs"] for name, total in total_of.items()}
    return means | dict(pairs=total_of["pairs"], tokens=total_of["tokens"])

@torch.no_grad()
def evaluate(policy, split, args):
    """Means over all pairs of a split, {eval/...: mean}; the ranks share the work."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = np.arange(len(split["pairs"]))
    parts = micro_batches(rows, split["lengths"], args, world)[rank::world]
    means = mean_over_pairs([pair_losses(policy, part, split, args)[1] for part in parts])
    free_weights(policy)
    return {f"eval/{name}": means[name] for name in means if name not in ("pairs", "tokens")}

def batch_rows(step, pairs, args):
    """Rows of optimiser step `step`, by the seed alone: a resumed run goes on where it was."""
    epoch, index = divmod(step, math.ceil(pairs / args.batch_size))
    order = np.random.default_rng((args.seed, epoch)).permutation(pairs)
    return order[index * args.batch_size:(index + 1) * args.batch_size]

def learning_rate(step, steps, args):
    """The rate of optimiser step 0 <= step < steps. It is never 0, not even at the last step."""
    warmup = int(args.warmup * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    left = (steps - step) / (steps - warmup)  # 1 -> 0
    factors = dict(linear=left, cosine=0.5 - 0.5 * math.cos(math.pi * left), constant=1.0)
    return args.learning_rate * factors[args.schedule]

# -- data, stored log-probs, micro-batches
def load_data(args):
    """{split: dict(pairs=dataset, lengths=(rows, 3) tokens of prompt, chosen, rejected,
    responses=(rows, 2) numbers of the chosen and the rejected one, hash=of all this)}"""
    with explain(f"{args.data}/meta.json cannot be read: run prepare_data.py"):
        meta = json.loads(Path(args.data, "meta.json").read_text())
    folder, trust = find_model(args.model)[0], dict(trust_remote_code=args.trust_remote_code)
    if not (folder / "config.json").exists():
        fail(f"--model {args.model} is neither a model nor a run with final/: no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, **trust).get_text_config()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    if hashlib.sha256(vocabulary).hexdigest()[:16] != meta["vocab_hash"]:
        fail(f"--data {args.data} has other tokens than --model {args.model}: run prepare_data.py")
    splits = {}
    for name in ("train", "val"):
        pairs = datasets.load_from_disk(f"{args.data}/{name}")
        sides = [pairs.data[side] for side in ("prompt", "chosen", "rejected")]
        lengths = np.stack([pc.list_value_length(side).to_numpy() for side in sides], 1).astype(int)
        tokens = pair_tokens(lengths, args.layout)
        if tokens.max() > args.max_tokens:
            pair = pairs[int(tokens.argmax())]["id"]
            fail(f"pair {pair} of {args.data}/{name} has {tokens.max()} tokens, over --max_tokens "
                 f"{args.max_tokens}: raise it, or prepare the data with a smaller --max_length")
        largest = max(pc.max(pc.list_flatten(side)).as_py() for side in sides)
        if largest >= config.vocab_size:
            fail(f"{args.data}/{name} has the token id {largest}, but --model {args.model} has "
                 f"{config.vocab_size} embeddings: leave out the texts with that token")
        longest, limit = pair_tokens(lengths, "separate").max(), most_positions(config)
        if longest > limit:
            fail(f"a text of {args.data}/{name} has {longest} tokens, --model {args.model} has "
                 f"{limit} positions: prepare the data with a smaller --max_length")
        responses = [pairs.data[side].to_numpy() for side in ("chosen_id", "rejected_id")]
        splits[name] = dict(pairs=pairs, lengths=lengths, responses=np.stack(responses, 1),
                            hash=rows_hash(pairs, lengths))
    return splits

def most_positions(config):
    """How many tokens a text may have by GPT-2's table, or by ropes that a longer text changes."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "table")
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    limit = rope.get("original_max_position_embeddings", limit)
    return limit if limit > 0 and kind in ("table", "dynamic", "longrope") else math.inf

def rows_hash(pairs, lengths):
    """-> 16 hex digits that change with anything that log-probs and losses take from the pairs."""
    digest = hashlib.sha256(lengths.tobytes())
    for side in ("prompt", "chosen", "rejected"):
        digest.update(pc.list_flatten(pairs.data[side]).to_numpy())
    for name in ("chosen_id", "rejected_id", "weight"):
        if name in pairs.column_names:  # weight may be missing
            digest.update(pairs.data[name].to_numpy())
    return digest.hexdigest()[:16]

def content_hashes(weights, splits, dtype, args):
    """All that log-probs depend on: config, weights (a sample of each tensor), rows, precision."""
    digest = hashlib.sha256((find_model(args.model)[0] / "config.json").read_bytes())
    if dist.get_rank() == 0:
        for name, tensor in sorted(weights.state_dict().items()):
            if not tensor.sum().isfinite():
                fail(f"--model {args.model}: not all weights in {name} are finite")
            sample = tensor.flatten()[::max(1, tensor.numel() // 4096)].float()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    digest = [digest.hexdigest()[:16]]
    dist.broadcast_object_list(digest, 0)
    return dict(weights=digest[0], dtype=str(dtype).removeprefix("torch."),
                train=splits["train"]["hash"], val=splits["val"]["hash"])

def pair_tokens(lengths, layout):
    """Tokens (rows,) that one forward pass spends on each pair alone; lengths (rows, 3)."""
    if layout == "packed":
        return lengths.sum(1)
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    return 2 * longest if layout == "concatenated" else longest

def fill(order, tokens, layout, limit):
    """Put pairs into parts, longest pair first, as many in each as `limit` tokens allow."""
    parts, used, longest = [], math.inf, 0
    for i in order:
        more = tokens[i] if layout == "packed" else longest  # padded to the first of its part
        if used + more > limit:
            parts.append([])
            used, more, longest = 0, tokens[i], tokens[i]
        parts[-1].append(i)
        used += more
    return parts

def micro_batches(rows, lengths, args, world):
    """Deal the pairs in `rows` into micro-batches -> list of arrays of rows, some maybe empty.
    Their number is a multiple of the ranks, `world`: under FSDP all ranks must run equally often.
    Pairs of similar length go together (less padding), and the fullest is small (no rank waits)."""
    tokens = pair_tokens(lengths[rows], args.layout)
    order = np.argsort(-pair_tokens(lengths[rows], "separate"), kind="stable")  # longest first
    count = math.ceil(len(fill(order, tokens, args.layout, args.max_tokens)) / world) * world
    # Of 256 limits, take the lowest with which that many suffice.
    for limit in np.geomspace(max(tokens.max(), tokens.sum() / count), args.max_tokens, 256):
        parts = fill(order, tokens, args.layout, limit)
        if len(parts) <= count:
            break
    parts += [[]] * (count - len(parts))
    return [rows[np.array(part, int)] for part in parts]

def free_weights(policy):
    """Give the gathered weights back after forward passes that no backward pass follows."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

def collate(pairs, layout):
    """Tensors of a micro-batch -> a list, one dict per forward pass (two if layout is separate).
    inputs        for the model: input_ids (1, L) packed or (texts, T) padded; position_ids, the
                  places of tokens in their own texts; packed only: texts, the attention_tables
    targets (M,)  all response tokens, those of all chosen responses first; sizes, their lengths
    source (M,)   where, in the flattened input_ids, the token before each target stands"""
    chosen = [(pair["prompt"], pair["chosen"]) for pair in pairs]
    rejected = [(pair["prompt"], pair["rejected"]) for pair in pairs]
    if layout == "packed":
        return [pack(chosen, rejected)]
    if layout == "separate":
        return [pad(chosen), pad(rejected)]
    return [pad(chosen + rejected)]

def pad(texts):
    """A row per (prompt, response), filled up with zeros on the right; for `places`, see pack."""
    tokens = [torch.tensor(prompt + response) for prompt, response in texts]
    ids = pad_sequence(tokens, batch_first=True)  # (texts, T)
    width = ids.shape[1]
    places = [row * width + torch.arange(len(text)) for row, text in enumerate(tokens)]
    inputs = dict(input_ids=to_device(ids), position_ids=to_device(torch.arange(width)[None]))
    return dict(inputs=inputs, **predictions(places, texts))

def pack(chosen, rejected):
    """One row without padding, with each prompt once. Two pairs, prompts p and P:

        place           0 1 2 3 4 5 6 7 8 9 10 11 12 13
        input_ids       p p c c c P C C C r  r  R  R  R
        position_ids    0 1 2 3 4 0 1 2 3 2  3  1  2  3

    Only attention must know that the row holds four texts: those of the first pair have the places
    0 1 2 3 4 and 0 1 9 10."""
    ids, positions, places = [], [], []
    for prompt, response in chosen:
        positions += range(len(prompt + response))
        places.append(len(ids) + torch.arange(len(prompt + response)))
        ids += prompt + response
    for i, (prompt, response) in enumerate(rejected):
        positions += range(len(prompt), len(prompt + response))
        new = len(ids) + torch.arange(len(response))
        places.append(torch.cat([places[i][:len(prompt)], new]))
        ids += response
    # Without a mask of ones, transformers would search the row for texts, and wait for the GPU.
    inputs = dict(input_ids=to_device(np.array([ids])), texts=attention_tables(places, len(ids)),
                  position_ids=to_device(np.array([positions])),
                  attention_mask=to_device(torch.ones(1, len(ids))))
    return dict(inputs=inputs, **predictions(places, chosen + rejected))

def predictions(places, texts):
    """Where the tokens that predict the responses stand, and what they should predict."""
    responses = [response for prompt, response in texts]
    source = [place[-len(response) - 1:-1] for place, response in zip(places, responses)]
    return dict(source=to_device(torch.cat(source)), targets=to_device(np.concatenate(responses)),
                sizes=[len(response) for response in responses])

def attention_tables(places, size, shortest=0.5 if torch.cuda.is_available() else 0.8):
    """What gathered_attention needs: the `places` of each text in a packed row of `size` tokens, in
    tables of texts of similar length, padded with 0. The row drawn in pack has one table:

        0  1  2  3  4    tokens (C,): the token in each of the C cells, counted over all tables
        5  6  7  8  0    cells (2, L): the cells in which each token stands, -1 = none
        0  1  9 10  0    takers (1, C): the token that takes the result of each cell, -1 = none
        5 11 12 13  0

    A prompt stands in two texts, with the same result, so its tokens have two cells. Here cells is
    10 11 2 3 4 15 6 7 8 12 13 16 17 18, 0 1 -1 -1 -1 5 -1 -1 -1 -1 -1 -1 -1 -1"""
    groups = []
    for place in sorted(places, key=len, reverse=True):
        # A GPU may pad to twice the length, as there each table costs time (results/README.md).
        if not groups or len(place) < shortest * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(place)
    tables = [pad_sequence(group, batch_first=True) for group in groups]  # (k, T) for k texts
    count, cells = 0, torch.full((2, size), -1)
    for table, group in zip(tables, groups):
        for place in group:
            cells[1, place] = cells[0, place]  # -1, or where a prompt stood first
            cells[0, place] = count + torch.arange(len(place))
            count += table.shape[1]
    takers = torch.full((1, count), -1)
    takers[0, cells[0]] = torch.arange(size)
    return types.SimpleNamespace(  # torch.compile would look into a dict, and compile anew
        shapes=[table.shape for table in tables], cells=to_device(cells), takers=to_device(takers),
        tokens=to_device(torch.cat([table.flatten() for table in tables])))

# -- forward pass and attention
def token_logps(logits, targets):
    """float32 logits (t, V), targets (t,) -> log pi(target) (t,)."""
    return -F.cross_entropy(logits, targets, reduction="none")

def head_pass(hidden, targets, head, config, score):
    """Scores of hidden (t, h), targets (t,), with the scaling and soft-capping of some models."""
    logits = head(hidden.to(head.weight.dtype)).float()  # (t, V) Mamba's hidden is float32
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1)  # Granite
    if scale != 1:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return score(logits, targets)

class Policy(torch.nn.Module):
    """A causal LM whose forward gives log pi(y|x). The output head is computed within it, as FSDP
    has the head's weights whole only in the forward pass of its root module."""
    def __init__(self, model, score):
        super().__init__()
        self.model, self.score = model, score
    def forward(self, batches):
        """Dicts of collate -> log pi(y|x) (2, n), sums over each response of score(logits (t, V),
        targets (t,)). A score that has k numbers for each token, (k, t), makes it (2, n, k)."""
        sums, head = [], self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        size = math.ceil(2**26 / config.vocab_size)  # tokens with 256 MiB of logits
        for batch in batches:
            output = self.model.base_model(**batch["inputs"], use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)
            hidden = hidden.index_select(0, batch["source"])  # (M, h) what predicts responses
            # Logits exist for one chunk of tokens at a time. The backward pass makes them again,
            # except for the last chunk, with which it begins.
            *chunks, last = zip(hidden.split(size), batch["targets"].split(size))
            scores = [checkpoint(head_pass, *chunk, head, config, self.score, use_reentrant=False)
                      for chunk in chunks]
            scores.append(head_pass(*last, head, config, self.score))
            sums += [part.sum(-1) for part in torch.cat(scores, -1).split(batch["sizes"], -1)]
        return torch.stack(sums).unflatten(0, (2, -1)).clone()  # FSDP warns about views

def window_as_mask(local_size=None, **kwargs):
    """What models get in place of a mask, and give to attention: the size of a sliding window."""
    return local_size

class Gather(torch.autograd.Function):
    """rows (a, ...), index (b,) -> rows[index]. The gradient is gathered too: `uses` (k, a) tells
    where in index each row stands, or -1. torch's own adds by atomic operations, slow on a GPU."""
    @staticmethod
    def forward(ctx, rows, index, uses):
        ctx.save_for_backward(uses)
        return rows.index_select(0, index)
    @staticmethod
    def backward(ctx, grad):
        grad = torch.cat([grad, torch.zeros_like(grad[:1])])  # -1 takes this zero
        return grad[ctx.saved_tensors[0]].sum(0), None, None

@torch.compiler.disable  # compiled, it would be another graph for each number of tables
def gathered_attention(module, query, key, value, attention_mask, texts=None, **kwargs):
    """Every layer calls this with query (b, H, L, d), key and value (maybe fewer heads), and wants
    (b, L, H, d). Packed, b is 1: gather the texts into tables, attend, put the results back."""
    if kwargs.get("sliding_window") is None:  # then window_as_mask may have sent it
        kwargs["sliding_window"] = attention_mask
    if texts is None:
        return causal_attention(module, query, key, value, **kwargs), None
    outputs, sizes = [], [shape.numel() for shape in texts.shapes]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # each (L, H, d)
    gathered = [Gather.apply(x, texts.tokens, texts.cells).split(sizes) for x in rows]
    for shape, *table in zip(texts.shapes, *gathered):
        table = [x.unflatten(0, shape).transpose(1, 2) for x in table]  # each (k, H, T, d)
        output = causal_attention(module, *table, **kwargs)  # (k, T, H, d)
        outputs.append(output.flatten(0, 1))
    return Gather.apply(torch.cat(outputs), texts.cells[0], texts.takers)[None], None

def causal_attention(module, query, key, value, sliding_window=None, **kwargs):
    """query (b, H, T, d), key, value (b, H or fewer, T, d) -> (b, T, H, d). Padding comes last, so
    that causality alone keeps it out."""
    length = query.shape[2]
    window = sliding_window or length
    # Soft-caps (Gemma-2) and sinks (gpt-oss) are not in torch's kernels but in the model's file.
    special = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    mask = None
    if special or window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - window)  # (T, T) the query (row) sees the key (column)
    if special:
        file = sys.modules[type(module).__module__]
        bias = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)[None, None]
        return file.eager_attention_forward(module, query, key, value, bias, **kwargs)[0]
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None,
                                            scale=kwargs.get("scaling"), enable_gqa=grouped)
    return output.transpose(1, 2)

# -- model
MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")

@functools.cache
def find_model(name):
    """A name -> the folder of the model, then those of the LoRA adapters on it. A run's folder
    means its final/, and what is no folder is downloaded from the hub."""
    folder = Path(name, "final") if Path(name, "final").is_dir() else Path(name)
    if not folder.is_dir():
        wanted = [f"*{kind}" for kind in MODEL_FILES] + ["model*.safetensors", "adapter_model*"]
        with explain(f"{name} (--model or its base) is no folder, and the hub has none"):
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return [folder]
    if any(folder.glob("model*.safetensors")):
        fail(f"{folder} holds a model and a LoRA adapter: take one of them out")
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    base = folder / base if (folder / base).is_dir() else base  # its path may begin here
    return [*find_model(str(base)), folder]

def read_model(name, args):
    """-> the model `name` without weights (on the meta device), and on rank 0 a second one with
    them, in which LoRA adapters are merged."""
    transformers.utils.logging.disable_progress_bar()
    auto, (folder, *adapters) = transformers.AutoModelForCausalLM, find_model(name)
    trust = dict(trust_remote_code=args.trust_remote_code)
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    if getattr(config, "quantization_config", None):
        fail(f"--model {name} is quantised; train the dense model that it was made from")
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32, **trust)
    if dist.get_rank() > 0:
        return model, None
    # The folder's generation_config is not judged. Before transformers 5.23, SDPA lacked soft-caps.
    weights, info = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
        generation_config=transformers.GenerationConfig(), attn_implementation="eager", **trust)
    wrong = info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    model._weight_conversions = weights._weight_conversions  # which weight_files undoes
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for adapter in adapters:
        from peft import PeftModel
        weights = PeftModel.from_pretrained(weights, adapter)
        info = weights.load_adapter(adapter, "default")  # once more, for what it returns
        wrong |= {*info.missing_keys, *info.unexpected_keys}
        wrong |= tied & {f"{module}.weight" for module in weights.targeted_module_names}
        weights = weights.merge_and_unload()
    wrong |= dict(model.named_parameters()).keys() ^ dict(weights.named_parameters()).keys()
    if wrong:  # such as a second output head, or one that is tied and that an adapter has changed
        fail(f"--model {name}: config and weights do not agree on {sorted(map(str, wrong))[:3]}")
    list(weight_files(model, model.state_dict(), folder))  # if this fails, then now, not at the end
    return model, weights

def weight_files(model, state, folder):
    """Yields for each file of weights {name: tensor} and its path. Where `state` has a tensor, it
    stands in place of the old one, under the name and in the type that it has in the file."""
    tied = {name: state[name] for name in model.all_tied_weights_keys if name in state}
    tied = revert_weight_conversion(model, tied)  # which most files leave out
    state = revert_weight_conversion(model, state)
    whole = folder / "model.safetensors"  # if it is there, transformers does not look for parts
    parts = [] if whole.exists() else list(folder.glob("model*-of-*.safetensors"))
    for path in parts or [whole]:
        tensors = safetensors.torch.load_file(path)  # each is read from the disk when it is used
        for name, old in tensors.items():
            own = name if name in state else f"{model.base_model_prefix}.{name}"  # as in gpt2
            if own in state:
                assert state[own].shape == old.shape and old.itemsize > 1, f"{name} is {old.dtype}"
                tensors[name] = state.pop(own).to(old.dtype, copy=True).contiguous()
        yield tensors, path
    missing = state.keys() - tied.keys()
    assert not missing, f"no model*.safetensors of it has {sorted(missing)[:3]}"

def build_policy(model, weights, score, device, dtype, args):
    """Choose what is trained and how it is computed, spread it over the ranks -> Policy."""
    choose_attention(model, args)
    choose_trained(model, weights, args)
    policy = Policy(model, score).eval()  # dropout would make the policy another model
    shard(policy, device, dtype, args)
    if args.compile:  # within the hooks of FSDP, which torch.compile cannot trace
        for block in blocks_of(model):
            block.forward = torch.compile(block.forward, dynamic=True)
    if args.activation_checkpointing != "off":
        checkpoint_blocks(model, args.activation_checkpointing)
    place_weights(model, weights, device)
    return policy

def choose_attention(model, args):
    """Use our attention if the model mixes tokens by attention only."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    plain = kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful
    if plain and model._supports_attention_backend:
        transformers.AttentionInterface.register("gathered", gathered_attention)
        transformers.AttentionMaskInterface.register("gathered", window_as_mask)
        model.set_attn_implementation("gathered")
    elif args.layout == "packed":
        fail(f"--layout packed needs plain attention, but {config.model_type} mixes tokens in "
             "other ways too; use --layout concatenated or --layout separate")

def choose_trained(model, weights, args):
    """Train LoRA adapters if --lora_rank says so, and only what --train_modules matches. Towers
    for images get no gradient from text, and stay as they are."""
    if args.lora_rank:
        if find_model(args.model)[1:]:
            fail(f"--lora_rank cannot add to --model {args.model}, an adapter: merge it first")
        from peft import LoraConfig
        routers = [name for name, _ in model.named_modules() if name.endswith("router")]  # Phi-MoE
        lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                          target_modules="all-linear", exclude_modules=routers or None)
        with explain(f"--lora_rank does not fit --model {args.model}"):
            model.add_adapter(lora)
        if weights is not None:  # rank 0, where the adapters get their random start
            torch.manual_seed(args.seed)
            weights.add_adapter(lora)
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    with explain(f"--train_modules {args.train_modules} is no regular expression"):
        for name, parameter in model.named_parameters():
            if parameter not in text or not re.search(args.train_modules, name):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        fail(f"--train_modules {args.train_modules} matches no parameter, such as {name}")

def blocks_of(model):
    """The transformer's blocks, which are sharded, recomputed and compiled one by one."""
    return [module for module in model.modules()
            if type(module).__name__.removeprefix("FSDP") in (model._no_split_modules or [])]

def checkpoint_blocks(model, how):
    """Keep the input of each block only, and compute the rest again in the backward pass (full:
    1.19 of the time, 0.55 of the memory); or keep what matrix products and attention made as well
    (selective: 1.15, 0.75), but not what bmm made, as Gemma 3n changes that in place."""
    options = dict(use_reentrant=False)
    if how == "selective":
        kept = ("mm", "addmm", "_scaled_dot_product_flash_attention",
                "_scaled_dot_product_efficient_attention",
                "_scaled_dot_product_flash_attention_for_cpu")
        kept = [getattr(torch.ops.aten, name).default for name in kept]
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)
    if not blocks_of(model):
        fail(f"--activation_checkpointing {how}: transformers names no blocks of this model")
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, **options)

def shard(policy, device, dtype, args):
    """FSDP2: every block is gathered when it is needed, and the rest with the root. --zero 3 gives
    the gathered weights back at once, 2 keeps them until the step ends: no copies in between."""
    world = dist.get_world_size()
    policy.reshards = args.zero == "3" or (args.zero == "auto" and world > 1)
    group = args.shard_group or world
    if world % group:
        fail(f"--shard_group {group} does not divide the {world} ranks")
    mesh = dist.init_device_mesh(device.type, (world // group, group),
                                 mesh_dim_names=("copies", "shards"))
    if group == world:
        mesh = mesh["shards"]
    rules = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32),
                 reshard_after_forward=policy.reshards)
    for block in reversed(blocks_of(policy.model)):  # a block within a block must come first
        fully_shard(block, **rules)
    # On its own, an untied embedding's gradient is reduced after the head's, not together with it:
    # the peak is 1.58 GiB instead of 1.87, with 128k words. Its backward pass needs no weights.
    table = policy.model.get_input_embeddings()
    if table.weight is not policy.model.get_output_embeddings().weight:
        fully_shard(table, **rules)
        table.set_unshard_in_backward(False)
    fully_shard(policy, **rules)

def place_weights(model, weights, device):
    """Send the weights from rank 0 to where they belong, one tensor after another."""
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():  # rotary frequencies and the like
        if weights is not None:
            buffer.copy_(weights.get_buffer(name))
        dist.broadcast(buffer, 0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = {} if weights is None else weights.state_dict()
    set_model_state_dict(model, state, options=options)

@torch.no_grad()
def check_forward(policy, split, dtype, args):
    """Stop unless our log-probs are those of the model's own forward pass, for the longest pair
    together with two short ones, as then every layout has padding."""
    config = policy.model.config.get_text_config()
    texts = split["lengths"][:, 0] + split["lengths"][:, 1:].max(1)  # (rows,) the longer one
    rows = texts.argsort()[[-1, 0, 1 if len(texts) > 2 else 0]]
    pairs = [split["pairs"][int(row)] for row in rows]
    cause = "try another --layout or --dtype, or adapt Policy and head_pass to it"
    with explain(f"--layout {args.layout} does not fit --model {args.model}: {cause}"):
        logps = policy(collate(pairs, args.layout))
        # Before transformers 5.23, Gemma-2's cap was ignored by SDPA.
        sdpa = policy.model._supports_sdpa and not hasattr(config, "attn_logit_softcapping")
        policy.model.set_attn_implementation("sdpa" if sdpa else "eager")
        policy.unshard()
        truth = own_logps(policy.model, pairs)
        free_weights(policy)
        choose_attention(policy.model, args)  # ours again
    check_same(logps, truth, split["lengths"][rows], dtype, f"in --layout {args.layout} the "
               f"log-probs are not those of the forward pass of --model {args.model}: {cause}")

def check_same(logps, truth, lengths, dtype, trouble):
    """Stop if log-probs (2, n) or (2, n, k) are not the true ones (2, n), but for rounding."""
    logps = logps.reshape(*truth.shape, -1)[..., 0].cpu().numpy()
    errors = np.abs(logps - truth) / (lengths[:, 1:].T + 10)  # (2, n) nats per token; 10: slack
    if not errors.max() < (1e-4 if dtype == torch.float32 else 0.05):
        fail(f"{trouble} (they differ by {errors.max():.2g} nats per token)")

# -- the run's folder: log, checkpoints, final model
# A resumed run may change these: they move files, or change the numbers by rounding only. What the
# folders of --model, --data and --reference hold is compared by its hashes.
MAY_CHANGE = set("""model data reference out resume save_every keep layout max_tokens compile
    activation_checkpointing zero shard_group log_every eval_every wandb""".split())

def open_run(content, args):
    """Make the folder --out, or find the run that is in it -> step of its last checkpoint, or 0."""
    out, log, last = Path(args.out), Path(args.out, "log.jsonl"), [0]
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        steps = [int(path.name.removeprefix("step-")) for path in out.glob("step-*[0-9]")]
        last = [max(steps, default=0)]
        settings = dataclasses.asdict(args)
        settings |= {f"hash of {name}": value for name, value in content.items()}
        if steps or log.exists() or any(out.glob("*model*.safetensors")):
            check_settings(settings, args)
            if not steps and (out / "final").exists():
                fail(f"the run in --out {out} is complete: take {out}/final")
            log.unlink(missing_ok=True)
            if steps:  # a checkpoint has the log as it then was; what came after is done again
                shutil.copyfile(out / f"step-{last[0]:06d}" / "log.jsonl", log)
        else:
            write_settings(out / "args.json", settings)
        copy_model_files(out / "final.tmp", args)  # if this fails, then now and not at the end
    dist.broadcast_object_list(last, 0)
    return last[0]

def check_settings(settings, args):
    """Stop unless --resume is given, and the run in --out has the same settings."""
    if not args.resume:
        fail(f"--out {args.out} holds a run or a model: use --resume, or choose another --out")
    with explain(f"{args.out}/args.json is damaged: choose another --out"):
        old = json.loads(Path(args.out, "args.json").read_text())["args"]
    for name in sorted(settings.keys() - MAY_CHANGE):
        if settings[name] != old.get(name):
            fail(f"--out {args.out} holds a run with {name} {old.get(name)}, not {settings[name]}: "
                 "repeat its settings, or choose another --out")

def write_settings(path, settings):
    """args.json: what is needed to repeat the run."""
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
    record = dict(args=settings, ranks=dist.get_world_size(), commit=commit,
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                  torch=torch.__version__, transformers=transformers.__version__,
                  source=hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16])
    path.write_text(json.dumps(record, indent=1))

def open_log(args):
    """-> a function that adds a dict to log.jsonl, the console and maybe Weights & Biases."""
    if dist.get_rank() > 0:
        return lambda line: None
    if args.wandb:
        import wandb
        wandb.init(project=args.wandb, name=Path(args.out).name, config=vars(args))

    def log(line):
        with open(Path(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in line.items()))
        if args.wandb:
            wandb.log(line, step=line["step"])
    return log

def peak_memory():
    """GiB of this rank, of its GPU or, without one, of its process."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else host

def checkpoint_state(policy, optimizer):
    options = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen: the base of LoRA
    model, optim = get_state_dict(policy, optimizer, options=options)
    return dict(model=model, optim=optim, rng=torch.get_rng_state()), options

def save_checkpoint(policy, optimizer, step, args):
    """out/step-NNNNNN: weights, optimiser, random state; written aside, renamed when complete."""
    out = Path(args.out)
    with explain(f"{out}/new.tmp cannot be written: make room, and continue with --resume"):
        dcp.save(checkpoint_state(policy, optimizer)[0], checkpoint_id=out / "new.tmp")
    if dist.get_rank() == 0:
        shutil.copyfile(out / "log.jsonl", out / "new.tmp" / "log.jsonl")
        (out / "new.tmp").rename(out / f"step-{step:06d}")
        for path in sorted(out.glob("step-*[0-9]"))[:-args.keep]:
            shutil.rmtree(path)
    dist.barrier()

def load_checkpoint(policy, optimizer, step, args):
    state, options = checkpoint_state(policy, optimizer)
    folder = Path(args.out, f"step-{step:06d}")
    with explain(f"{folder} cannot be read: if damaged, delete it; --resume takes the one before"):
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optim"], options=options)
    torch.set_rng_state(state["rng"])

def copy_model_files(folder, args):
    """All files of --model but its weights, as they are: configs, tokenizer, chat template, ..."""
    folder.mkdir(exist_ok=True)
    for source in find_model(args.model):  # an adapter may have its own tokenizer
        for path in source.iterdir():
            if path.suffix in MODEL_FILES and path.name != "adapter_config.json":
                shutil.copyfile(path, folder / path.name)

def save_final(policy, args):
    """out/final: the files of --model with other weights, or with LoRA an adapter."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)  # whole on rank 0, empty elsewhere
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    aside, final = Path(args.out, "final.tmp"), Path(args.out, "final")
    if dist.get_rank() == 0:
        with explain(f"{aside} cannot be written: make room and use --resume; no step is lost"):
            write = write_adapter if args.lora_rank else write_weights
            write(policy.model, state, args.model, aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)

def write_weights(model, state, name, folder):
    for tensors, path in weight_files(model, state, find_model(name)[0]):
        safetensors.torch.save_file(tensors, folder / path.name, dict(format="pt"))

def write_adapter(model, state, name, folder):
    base = str(find_model(name)[0].resolve()) if Path(name).exists() else name  # of the hub
    model.peft_config["default"].base_model_name_or_path = base
    model.generation_config = transformers.GenerationConfig()  # that of the base may be refused
    model.save_pretrained(folder, state_dict=state)
    (folder / "generation_config.json").unlink(missing_ok=True)

@torch.no_grad()
def own_logps(model, pairs):
    """log pi(y|x) (2, n) by the model's own forward pass, one text at a time."""
    sums = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt"] + pair[side]], device=model.device)
            logits = model(ids, use_cache=False).logits[0, len(pair["prompt"]) - 1:-1].float()
            sums.append(token_logps(logits, ids[0, len(pair["prompt"]):]).sum().item())
    return np.array(sums).reshape(2, -1)

@torch.no_grad()
def check_final(policy, split, dtype, args):
    """Rank 0 reads final/ back: it must give two short pairs the log-probs of the policy, in the
    precision of final/, which may have lost much of a short training."""
    kinds = set()
    for path in find_model(args.model)[0].glob("model*.safetensors"):
        kinds |= {tensor.dtype for tensor in safetensors.torch.load_file(path).values()}
    precision = next((k for k in (torch.bfloat16, torch.float16) if k in kinds), torch.float32)
    for parameter in policy.parameters():
        parameter.copy_(parameter.to(precision))
    rows = split["lengths"].sum(1).argsort()[:2]
    pairs = [split["pairs"][int(row)] for row in rows]
    logps = policy(collate(pairs, args.layout))
    if dist.get_rank() == 0:
        model = read_model(f"{args.out}/final", args)[1].eval()
        for parameter in model.parameters():  # in float32, other experts may be chosen
            parameter.data = parameter.data.to(dtype)
        truth = own_logps(model, pairs)
        dtype = dtype if precision == torch.float32 else precision
        check_same(logps, truth, split["lengths"][rows], dtype,
                   f"{args.out}/final gives other log-probs than the weights that were trained")
        for path in Path(args.out).glob("step-*[0-9]") if args.save_every == 0 else []:
            shutil.rmtree(path)  # it was there in case that final/ is wrong
    dist.barrier()  # a rank that ended now would end rank 0

if __name__ == "__main__":
    with explain("mend the cause and run the same command again, a training with --resume",
                 (OSError, dcp.CheckpointException, ModuleNotFoundError)):
        main()
