"""Alignment via comparison oracles (ComPO), Chen et al. 2025, https://arxiv.org/abs/2505.05465

    C(W, W') = -1 if log pi_W'(y_w|x) > log pi_W(y_w|x) and log pi_W'(y_l|x) < log pi_W(y_l|x),
               +1 otherwise                                                  comparison oracle
    y_i = C(W, W + r z_i),  z_i ~ N(0, I),  i = 1..m                         votes
    u = sum_i y_i z_i,  g = u / |u| without its entries below lambda_g       direction
    W <- W - gamma p g  if  p = #{i: y_i = -1} / m > lambda,  else the pair is skipped

It is for noisy pairs, whose responses are about equally likely. The output head W (V, h) moves
towards random perturbations that raise log pi(y_w|x) and lower log pi(y_l|x), and away from others.

    torchrun --nproc_per_node=8 cache_ref.py --model MODEL --data data/NAME --noise_margin 3
    torchrun --nproc_per_node=8 dpo.py --model MODEL --data data/NAME/clean --out out/clean
    torchrun --nproc_per_node=8 compo.py --model out/clean/final --data data/NAME/noisy

What many votes give: let a, b be the gradients of log pi(y_w|x), log pi(y_l|x) with respect to W,
phi the angle between them. For small r, E[y z] = -(a/|a| - b/|b|) / sqrt(2 pi) and E[p] = phi / 2
pi. So the gate p > 0.2 asks for phi > 72 degrees, and --estimator exact uses these limits.
Why it is fast: the trunk, all layers below the head, does not change. It runs once per pair and is
freed, and leaves H (t, h), what enters the head for t response tokens. Write H = L Q, the rows of Q
(k, h) orthonormal. As z changes the logits by r H z^T = r L G^T with G = z Q^T (V, k), the oracle
sees only G, and only G is drawn. The rest of z is independent of the votes: --estimator gaussian
adds its sum to u in one draw, so that u is distributed as published; span leaves it out.

Departures from the paper and its code: 1. Only G is drawn. 2. --keep_fraction sets lambda_g, whose
right size depends on V h. 3. z is normal, as in the code; of length 1, as in the text, it would be
lost in rounding. 4. The paper gives no gamma; 0.035 is the code's. 5. The code rounds W to
bfloat16, which loses most of a step; here it is float32, and never tied to the embedding. 6. The
code's trial step, --accept_step, is off. 7. Ours: span, exact, --pairs_per_step, --baseline.
Differs from dpo.py: votes, not a loss and AdamW; no cache.

Read to line 352: settings, a step of the algorithm, the loop over steps, what the oracle sees, the
head. Below the rule stand the helpers of dpo.py; you can fork this file without opening them.

Words: a text is a prompt and one response, a pair is two texts of one prompt, rows are numbers of
pairs, a batch is the pairs of a step (see run_trunk). Shapes: V vocabulary, h hidden size, t
response tokens of a batch, k rank of H, B perturbations at once; in helpers n pairs, L tokens, M of
them in responses, T tokens of a text, H heads, d head size. A leading 2 means chosen, rejected.
"""
import contextlib, copy, dataclasses, functools, gc, hashlib, inspect, json, math, os, re
import resource, shutil, signal, subprocess, sys, threading, time, types
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
    StateDictOptions, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
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
    max_pairs: int = 100  # the first so many training pairs are used; 0 = all
    pairs_per_step: int = 1  # the oracle compares their mean log-probs
    step_size: float = 0.035  # gamma
    seed: int = 0  # of the perturbations
    # memory and speed
    layout: Literal["packed", "concatenated", "separate"] = "packed"  # how pairs enter the model
    max_tokens: int = 8192  # bound on the tokens of one forward pass of one rank
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on a GPU, else float32
    zero: Literal["auto", "2", "3"] = "auto"  # 2 gathers weights once a step; auto: on one rank
    shard_group: int = 0  # ranks that share one copy of the weights, such as a node's; 0 = all
    # logging
    eval_every: int = 100  # steps between evaluations on val/, also first and last; 0 = never
    wandb: str = ""  # Weights & Biases project that gets the log too
    # algorithm
    estimator: Literal["gaussian", "span", "exact"] = "gaussian"  # of the direction u
    perturbations: int = 1800  # m
    radius: float = 5e-4  # r, size of a perturbation
    gate: float = 0.2  # share of votes -1 above which a step is made, lambda; 0 = any
    keep_fraction: float = 0.012  # share of the entries of g that are kept
    entry_threshold: float = 0.0  # lambda_g, instead of --keep_fraction; 0 = not set
    baseline: bool = False  # u = sum_i (y_i - E[y]) z_i: the same mean, about 1/4 less variance
    accept_step: float = 0.0  # skip the pair unless a step of this size is a success; 0 = no trial

def oracle(changes):
    """Changes (..., 2) of log pi(y_w|x), log pi(y_l|x) -> votes C (...), where -1 is a success."""
    return torch.where((changes[..., 0] > 0) & (changes[..., 1] < 0), -1.0, 1.0)

def update(head, batch, step, args):
    """The algorithm: one step on a batch -> {name: number} for the log. Directions are (V, h)."""
    with torch.enable_grad():
        before = mean_logps(head, batch)  # (2,) log pi(y_w|x), log pi(y_l|x)
        grads = [torch.autograd.grad(logp, head.weight, retain_graph=True)[0] for logp in before]
    a, b = map(unit, grads)  # a / |a|, b / |b|
    phi = (a * b).sum().clamp(-1, 1).acos().item()
    limit = b - a  # E[y z], but for its length
    if args.estimator == "exact":
        u, p = limit, phi / (2 * math.pi)
    else:
        constant = 1 - phi / math.pi if args.baseline else 0.0  # of the votes: E[y] = 1 - 2 E[p]
        u, p = estimate(head, batch, constant, step, args)
    g = unit(u)
    cosine = (g * unit(limit)).sum().item()
    kept = sparse(g, args)

    accepted = p > args.gate
    if accepted and args.accept_step:  # a trial, which is taken back
        weight = head.weight.clone()
        head.weight -= args.accept_step * g
        accepted = oracle(mean_logps(head, batch) - before).item() == -1
        head.weight.copy_(weight)
    move = -args.step_size * p * g
    if accepted:
        head.weight += move
    realised = mean_logps(head, batch) - before  # (2,)
    head.accepted_steps += accepted  # since step 0

    metrics = dict(accepted_steps=head.accepted_steps.item(), p=p, angle=math.degrees(phi),
                   cosine=cosine, kept=kept, accepted=int(accepted))
    for i, side in enumerate(("chosen", "rejected")):
        metrics[f"predicted/{side}"] = (move * grads[i]).sum().item()  # to first order
        metrics[f"realised/{side}"] = realised[i].item()
    return metrics

def estimate(head, batch, constant, step, args):
    """-> u = sum_i (y_i - constant) z_i (V, h), and p. The ranks share the m perturbations."""
    changes, span = changes_by(head, batch, args)  # span is Q (k, h)
    shape, m, device = (len(head.weight), len(span)), args.perturbations, span.device
    memory = 2**31 if head.weight.is_cuda else 2**26  # bytes of as many as are handled at once
    size = max(1, memory // (4 * len(head.weight) * (len(span) + len(batch.targets))))
    sums, successes = torch.zeros(shape, device=device), torch.zeros(1, device=device)
    mine = range(dist.get_rank(), m, dist.get_world_size())
    for first in range(0, len(mine), size):
        draws = [normal(shape, device, args.seed, step, i) for i in mine[first:first + size]]
        G = torch.stack(draws)  # (B, V, k)
        votes = oracle(changes(G))  # (B,) y
        sums += torch.tensordot(votes - constant, G, 1)
        successes += (votes == -1).sum()
    dist.all_reduce(sums)
    dist.all_reduce(successes)
    p = successes.item() / m
    u = sums @ span  # (V, h) the part of u in the rows of Q
    if args.estimator == "gaussian":  # and the rest, which is normal for any given votes
        rest = normal(u.shape, device, args.seed, step, m)
        variance = m * (p * (-1 - constant)**2 + (1 - p) * (1 - constant)**2)  # sum (y - c)^2
        u += math.sqrt(variance) * (rest - rest @ span.T @ span)
    return u, p

def sparse(g, args):
    """Zero the small entries of g, in place -> the share of its entries that is kept."""
    sizes, floor = g.abs(), args.entry_threshold  # lambda_g
    if floor == 0:
        count = max(1, round(args.keep_fraction * g.numel()))
        if g.is_cuda:
            floor = sizes.flatten().topk(count, sorted=False).values.min().item()
        else:  # on a CPU, numpy takes a tenth to two thirds of the time
            floor = float(np.partition(sizes.flatten().numpy(), -count)[-count])
    g *= sizes >= floor
    return g.count_nonzero().item() / g.numel()

@torch.no_grad()
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
    train, val = splits["train"]["pairs"], splits["val"]["pairs"]
    train = train.select(range(min(args.max_pairs or len(train), len(train))))

    # The trunk runs once over all pairs. Then only the head stays in memory.
    head = copy.deepcopy(model.get_output_embeddings())  # float32, not tied, whole on every rank
    place_weights(head, weights.get_output_embeddings() if weights else None, device)
    head.config = model.config.get_text_config()
    head.register_buffer("accepted_steps", torch.tensor(0))  # in checkpoints, not in final/
    choose_attention(model, args)
    policy = Policy(model, token_logps).eval()
    shard(policy, device, dtype, args)
    place_weights(model, weights, device)
    batches = run_trunk(policy, train, args.pairs_per_step, args)
    held_out = run_trunk(policy, val if args.eval_every else train, 1, args)  # pair by pair
    del policy, model, weights
    gc.collect()  # FSDP's modules refer to each other in circles
    first = torch.stack([mean_logps(head, pair) for pair in held_out], 1)  # (2, n) at step 0

    steps = args.epochs * len(batches)
    log = open_log(args)
    evaluation = {}
    if start > 0:
        load_checkpoint(head, [], start, args)  # [] as there is no optimiser
    elif args.eval_every:
        evaluation = displacement(head, held_out, first, "eval")
        log({"step": 0} | evaluation)
    all_seconds = 0.0
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=rank > 0):
        began = time.time()
        batch = batches[step % len(batches)]
        metrics = update(head, batch, step, args)
        if not all(map(math.isfinite, metrics.values())):
            ids = " ".join(pair["id"] for pair in batch.pairs)
            fail(f"step {step}: log-probs moved by {metrics['realised/chosen']}, not finite; lower "
                 f"--step_size, or look at --model {args.model} and the pairs {ids}")
        seconds = time.time() - began  # without evaluations and checkpoints
        all_seconds += seconds
        done = step + 1
        stopping = torch.tensor(float(sigterm.is_set()))
        dist.all_reduce(stopping)  # a signal on any rank stops all of them
        saving = stopping or done == steps or (args.save_every and done % args.save_every == 0)
        log({"step": done, "epoch": done / len(batches)} | metrics | {"seconds": seconds})
        if args.eval_every and (done % args.eval_every == 0 or done == steps):
            evaluation = displacement(head, held_out, first, "eval")
            log({"step": done} | evaluation)
        if saving:
            save_checkpoint(head, [], done, args)
        if stopping:
            fail(f"stopped by SIGTERM; step {done} of {steps} is saved, continue with --resume")
    with explain(f"{args.out}/final cannot be written: make room, and use --resume"):
        save_head(head, args)
    check_head(head, held_out, dtype, args)
    head.weight.copy_(head.weight.bfloat16())  # what is left of it if final/ is read in bfloat16
    log({"step": steps} | displacement(head, held_out, first, "export/bfloat16"))
    if rank == 0:  # a block of lines for grep, such as "eval/rewards/chosen: 0.61"
        summary = {"accepted_steps": head.accepted_steps.item(), "seconds": all_seconds,
                   "memory/GiB": peak_memory(), "steps": steps, "final": f"{args.out}/final"}
        for name, value in (evaluation | summary).items():
            print(f"{name}: {value}")
    dist.destroy_process_group()

def changes_by(head, batch, args):
    """-> a function from G (B, V, k) to the changes (B, 2) of mean_logps by their z; and Q (k, h).

    If the logits of a token change by s, its log-prob changes by s_token - log sum_v p_v exp(s_v) =
    s_token - log1p(sum_v p_v expm1(s_v)), where no large numbers cancel."""
    config, hidden, targets = head.config, to_device(batch.hidden).float(), batch.targets
    logits = head_pass(hidden, targets, head, config, lambda logits, targets: logits)  # (t, V)
    probs = logits.softmax(-1).T.contiguous()  # (V, t)
    scale = getattr(config, "logit_scale", None) or 1  # as in head_pass
    scale = scale / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    rows = hidden.double()
    squares, vectors = torch.linalg.eigh(rows @ rows.T)  # squares of H's singular values, rising
    span = F.normalize(vectors[:, squares > 1e-10 * squares[-1]].T @ rows).float()  # Q (k, h)
    reach = args.radius * scale * (span @ hidden.T)  # r L^T (k, t)
    def changes(G):
        s = G @ reach  # (B, V, t) one matrix product
        if cap is not None:  # cap (tanh(x + d) - tanh(x)), by the addition theorem
            tanh_x, tanh_d = logits.T / cap, torch.tanh(s / cap)
            s = cap * tanh_d * (1 - tanh_x**2) / (1 + tanh_x * tanh_d)
        own = s.gather(1, targets.expand(len(G), 1, -1))[:, 0]  # (B, t) s_token
        growth = s.expm1_().mul_(probs).sum(1)  # (B, t)
        return (own - growth.log1p()) @ batch.sides.T
    return changes, span

def normal(size, device, *key):
    """Random normal numbers that depend on the key alone, whichever rank draws them."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device)

def run_trunk(policy, pairs, size, args):
    """Run the model over all pairs -> batches of `size` pairs: hidden (t, h), H on the CPU; targets
    (t,), the tokens that follow; sides (2, t), the weights with which the log-probs of the targets
    add up to mean_logps; and the pairs."""
    entries, batches = [], []
    hook = policy.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: entries.append(inputs[0].cpu()))
    for start in tqdm(range(0, len(pairs), size), "trunk", disable=dist.get_rank() > 0):
        some = list(pairs.select(range(start, min(start + size, len(pairs)))))
        entries.clear()
        targets, side = [], []
        for pair in some:
            policy(collate([pair], args.layout))  # the hook keeps what enters the head
            targets += pair["chosen"] + pair["rejected"]
            side += [0] * len(pair["chosen"]) + [1] * len(pair["rejected"])
        sides = to_device(F.one_hot(torch.tensor(side), 2).T / len(some))
        batches.append(types.SimpleNamespace(hidden=torch.cat(entries), targets=to_device(targets),
                                             sides=sides, pairs=some))
    hook.remove()
    return batches

def mean_logps(head, batch):
    """-> (2,) log pi(y_w|x) and log pi(y_l|x), means over the pairs of a batch"""
    hidden = to_device(batch.hidden).float()
    return batch.sides @ head_pass(hidden, batch.targets, head, head.config, token_logps)

def unit(x):
    """x / |x|, row by row, as one float32 sum of 10^8 squares would be 1 % off on a CPU."""
    return x / x.norm(dim=1).norm().clamp(min=1e-30)

def displacement(head, pairs, first, name):
    """Means over batches of one pair {name/...: mean}; rewards are the changes since `first`."""
    logps = torch.stack([mean_logps(head, pair) for pair in pairs], 1)  # (2, n)
    lengths = torch.stack([pair.sides.sum(1) for pair in pairs], 1)
    metrics = reward_metrics(logps - first, logps, lengths)
    return {f"{name}/{key}": value.double().mean().item() for key, value in metrics.items()}

def save_head(head, args):
    """out/final: the files of --model with this head, untied, in float32. The config says so too:
    in bfloat16 the head would lose most of what it learnt."""
    if dist.get_rank() == 0:
        aside, final = Path(args.out, "final.tmp"), Path(args.out, "final")
        model, weights = read_model(args.model, args)
        modules = {module: name for name, module in model.named_modules()}
        name = f"{modules[model.get_output_embeddings()]}.weight"
        name, = revert_weight_conversion(model, {name: head.weight})  # as it is called in files
        index = {}
        for tensors, path in weight_files(model, weights.state_dict(), find_model(args.model)[0]):
            tensors.pop(name, None)
            if not index:
                tensors[name] = head.weight.cpu()
            index |= dict.fromkeys(tensors, path.name)
            safetensors.torch.save_file(tensors, aside / path.name, dict(format="pt"))
        if len(set(index.values())) > 1:
            file = aside / "model.safetensors.index.json"
            file.write_text(json.dumps(dict(metadata={}, weight_map=index)))
        config = json.loads((aside / "config.json").read_text())
        for part in (config, config.get("text_config", {})):  # torch_dtype is an older name
            part |= dict(tie_word_embeddings=False, dtype="float32", torch_dtype="float32")
        (aside / "config.json").write_text(json.dumps(config, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)

def check_head(head, held_out, dtype, args):
    """Rank 0 reads final/ back: it must give two short pairs the log-probs of trunk and head."""
    if dist.get_rank() == 0:
        shortest = np.argsort([len(each.targets) for each in held_out])[:2]
        logps = torch.stack([mean_logps(head, held_out[i]) for i in shortest], 1)  # (2, n)
        pairs = [held_out[i].pairs[0] for i in shortest]
        lengths = [(0, len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
        truth = own_logps(read_model(f"{args.out}/final", args)[1].eval(), pairs)
        check_same(logps, truth, np.array(lengths), dtype,
                   f"{args.out}/final gives other log-probs than the head that was trained")
        for path in Path(args.out).glob("step-*") if args.save_every == 0 else []:
            shutil.rmtree(path)  # it was there in case that final/ is wrong
    dist.barrier()  # a rank that ended now would end rank 0

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

def blocks_of(model):
    """The transformer's blocks, which are sharded, recomputed and compiled one by one."""
    return [module for module in model.modules()
            if type(module).__name__.removeprefix("FSDP") in (model._no_split_modules or [])]

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

if __name__ == "__main__":
    with explain("mend the cause and run the same command again, a training with --resume",
                 (OSError, dcp.CheckpointException, ModuleNotFoundError)):
        main()
