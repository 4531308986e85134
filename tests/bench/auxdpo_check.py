"""What AuxDPO costs: python tests/bench/auxdpo_check.py MODEL DATA [PAIRS]; how far its solver gets: ... train-sketch.npy

MODEL a Hugging Face folder, DATA a folder of prepare_data.py for it. Everything in one process, on a batch of PAIRS [16].
1. The penalty and its gradient in delta by the formula of the public notebook, with two backward passes per pair
   through the reference and all gradients kept, against the sketches of cache_ref.py: values, seconds, memory.
2. A training step against one of dpo.py, interleaved: in one micro-batch, and in four.
With the sketches of a dataset alone: how much of the way to the minimum of the delta-subproblem, as 2000 steps find it,
1, 3, 10, 30 steps of the solver go, for several lambda; and what a penalty misses that has fewer numbers than there are delta.

The notebook's formula is written here from METHODS.md 5.2 as the truth to compare with."""

import resource
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import auxdpo
import cache_ref
import dpo
from sketch_check import policy_of

DIM = 4096
DEFAULTS = {name: value for name, value in vars(auxdpo.Args).items() if name in auxdpo.Args.__dataclass_fields__}
DEFAULTS |= dict(delta="per_pair", label_smoothing=0.0, sft_weight=0.0)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB


def with_delta(pairs, sketch, **more):
    """A split as prepare_delta makes it for the first step with --delta per_pair; sketch (2 pairs, K)."""
    count = len(pairs)
    state = dict(index=np.arange(2 * count).reshape(-1, 2), source=np.arange(2 * count), groups=np.arange(2 * count) // 2,
                 weights=torch.ones(count).double())
    sizes = dict(delta=2 * count, margins=count, c=sketch.shape[1])
    state |= {name: torch.zeros(size).double() for name, size in sizes.items()}
    return dict(pairs=pairs, sketch=sketch, **state, **more)


def notebook(model, pairs, deltas, weight):
    """lambda |1/2B sum delta grad log pi|^2 and its gradient in delta (B, 2): 2B backward passes, all gradients kept."""
    parameters, grads = list(model.parameters()), []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids, start = torch.tensor(pair["prompt"] + pair[side]), len(pair["prompt"])
            logps = model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            grads.append(torch.autograd.grad(logps.gather(1, ids[1:, None])[start - 1:].sum(), parameters))
    deltas = deltas.clone().requires_grad_()
    vector = [sum(d * g for d, g in zip(deltas.flatten(), each)) / (2 * len(pairs)) for each in zip(*grads)]
    penalty = weight * sum(part.square().sum() for part in vector)
    penalty.backward()
    return penalty.item(), deltas.grad


def penalties(path, pairs):
    deltas, weight = torch.from_numpy(np.random.default_rng(0).normal(size=(len(pairs), 2)).astype(np.float32)), 1.0
    policy, state = policy_of(path, DIM)
    cache_ref.sketches(policy, state, pairs[:1])  # the hash tables
    start = time.time()
    sketch = torch.cat([cache_ref.sketches(policy, state, [pair]) for pair in pairs]).flatten(0, 1)  # (2 pairs, K)
    once, before = time.time() - start, peak()
    del policy, state
    split = with_delta(pairs, sketch.numpy())
    rows, args = np.arange(len(pairs)), types.SimpleNamespace(**DEFAULTS)
    start = time.time()
    scores = sketch.double()
    c = deltas.flatten().double() @ scores
    ours = weight * (c / (2 * len(pairs))).square().sum().item()
    slope = (weight / (2 * len(pairs) ** 2) * scores @ c).view(-1, 2)
    for _ in range(10):
        auxdpo.update_delta(rows, torch.zeros(len(pairs)).double(), split, args)
    each, after = (time.time() - start) / 10, peak()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded, start = peak(), time.time()
    theirs, truth = notebook(model, pairs, deltas, weight)
    seconds = time.time() - start
    error = ((slope - truth).norm() / truth.norm()).item()
    print(f"1. batch of {len(pairs)} pairs: penalty {theirs:.4g} (notebook), {ours:.4g} (sketch of K = {DIM}); gradient in delta "
          f"differs by {error:.1%}\n   per step: notebook {seconds:.2f} s and {peak() - loaded:.2f} GiB; ours "
          f"{1000 * each:.1f} ms and {max(0.0, after - before):.2f} GiB, after {once:.2f} s once per dataset for these pairs")
    return sketch


def steps(path, pairs, sketch):
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    policy, _ = policy_of(path)
    rows = np.arange(len(pairs))
    for parts in (1, 4):
        limit = 10**6 if parts == 1 else int(lengths.sum() / 3.6)
        args = types.SimpleNamespace(**DEFAULTS | dict(max_tokens=limit))
        lists = dpo.micro_batches(rows, lengths, args, 1)
        split = with_delta(pairs, sketch.numpy(), lengths=lengths, ref_logps=np.zeros((len(pairs), 2), np.float32))

        def ordinary():
            for part in lists:
                dpo.pair_losses(policy, part, split, args)[0].sum().backward()

        def auxiliary():
            margins, computed = auxdpo.first_pass(policy, lists, split, args)
            auxdpo.update_delta(rows, margins, split, args)
            for part, logps in computed:
                auxdpo.pair_losses(policy, part, split, args, logps)[0].sum().backward()

        times = {ordinary: [], auxiliary: []}
        for turn in range(8):
            for run in (ordinary, auxiliary) if turn % 2 else (auxiliary, ordinary):
                policy.zero_grad()
                start = time.time()
                run()
                times[run].append(time.time() - start)
        ratio = statistics.median(b / a for a, b in zip(times[ordinary][1:], times[auxiliary][1:]))
        print(f"2. a step in {len(lists)} micro-batches: {statistics.median(times[auxiliary]):.2f} s, {ratio:.3f} times that of dpo.py")


def subproblem(sketch, size=32):
    """A dataset of pairs of these sketches (U, K), its first batches one after the other, margins drawn from N(0, 1)."""
    count = len(sketch) // 2
    sketch = sketch[:2 * count]
    margins = torch.from_numpy(np.random.default_rng(0).normal(size=count))
    print("\n| lambda | 1 step | 3 | 10 | 30 | norm of delta |\n|---|---|---|---|---|---|")
    for weight in (0.1, 1.0, 10.0, 100.0, 1000.0):
        fell = {}
        for inner in (1, 3, 10, 30, 2000):
            split = with_delta([{}] * count, sketch)
            args = types.SimpleNamespace(**DEFAULTS | dict(penalty_weight=weight, delta_steps=inner))

            def value(batch):
                delta = split["delta"].view(-1, 2)[batch].numpy()
                loss = np.logaddexp(0, -margins[batch].numpy() - delta[:, 0] + delta[:, 1]).sum()
                return loss + count * weight * (split["c"] / (2 * count)).square().sum().item()

            fell[inner] = 0.0
            for first in range(0, min(count, 12 * size), size):
                batch = np.arange(first, min(first + size, count))
                before = value(batch)
                auxdpo.update_delta(batch, margins, split, args)
                fell[inner] += before - value(batch)
        cells = [f"{fell[inner] / fell[2000]:.1%}" for inner in (1, 3, 10, 30)]
        print(f"| {weight:g} | {' | '.join(cells)} | {split['delta'].norm().item():.2f} |")


def blind(sketch, count=400, weight=100.0):
    """What a penalty does not see that has fewer numbers than there are delta: the given sketches stand for the truth."""
    count = min(count, len(sketch) // 2)
    truth = np.array(sketch[:2 * count], np.float64)
    margins = torch.from_numpy(np.random.default_rng(0).normal(size=count))
    print(f"\n{2 * count} delta, lambda {weight:g}\n\n| K | epochs | penalty seen | true | ratio | norm of delta |\n|---|---|---|---|---|---|")
    for dim in (128, 512):
        state = types.SimpleNamespace(dim=dim)
        folded = cache_ref.count_sketch(torch.from_numpy(truth).float(), state, "fold", 0)
        split = with_delta([{}] * count, folded.numpy())
        args = types.SimpleNamespace(**DEFAULTS | dict(penalty_weight=weight))
        for epoch in range(1, 21):
            order = np.random.default_rng(epoch).permutation(count)
            for first in range(0, count, 32):
                auxdpo.update_delta(order[first:first + 32], margins, split, args)
            if epoch in (1, 20):
                delta = split["delta"].numpy()
                seen = weight * (split["c"] / (2 * count)).square().sum().item()
                true = weight * np.square(delta @ truth / (2 * count)).sum()
                print(f"| {dim} | {epoch} | {seen:.4f} | {true:.4f} | {true / seen:.0f} | {np.linalg.norm(delta):.1f} |")


def main():
    if sys.argv[1].endswith(".npy"):
        sketch = np.load(sys.argv[1], mmap_mode="r")
        subproblem(sketch)
        return blind(sketch)
    path, data, count = sys.argv[1], sys.argv[2], int((sys.argv + ["16"])[3])
    transformers.utils.logging.disable_progress_bar()
    cache_ref.start_process_group("float32")
    args = types.SimpleNamespace(model=path, trust_remote_code=False, data=data, layout="concatenated", max_tokens=8192)
    rows = cache_ref.load_data(args)["train"]["pairs"]
    pairs = [rows[i] for i in range(count)]
    print(f"{Path(path).name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers {transformers.__version__}")
    sketch = penalties(path, pairs)
    steps(path, pairs, sketch)

if __name__ == "__main__":
    main()
