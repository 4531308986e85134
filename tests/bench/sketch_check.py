"""How well, and how fast, sketches stand for gradients: python tests/bench/sketch_check.py MODEL DATA [PAIRS]

MODEL a Hugging Face folder, DATA a folder of prepare_data.py for it. Prints, for several K, the relative Frobenius error
of the Gram matrix of the gradients of 2 x PAIRS responses, the correlation of their cosines with the exact ones (pairs of
different responses), and seconds: of the sketches, of an ordinary forward pass, of one backward pass per response."""

import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import cache_ref


CPU = torch.device("cpu")


def policy_of(folder, dim=0, **changes):
    """The Policy that main() of cache_ref.py makes of a model folder; what its hooks share, if it makes sketches."""
    settings = dict(model=folder, trust_remote_code=False, layout="concatenated", shard_group=0, zero="auto", lora_rank=0, train_modules="", seed=0)
    args = types.SimpleNamespace(**settings | dict(sketch_dim=dim, sketch_modules="") | changes)
    model, weights = cache_ref.read_model(args.model, args)
    cache_ref.choose_attention(model, args)
    cache_ref.choose_trained(model, weights, args)
    policy = cache_ref.Policy(model, cache_ref.token_logps).eval()
    cache_ref.shard(policy, CPU, torch.float32, args)
    cache_ref.place_weights(model, weights, CPU)
    return policy, cache_ref.watch(model, args) if dim else None


def exact_gram(model, pairs):
    """Inner products (2n, 2n) of the gradients, one response at a time; norms; seconds."""
    policy, _ = policy_of(model)
    start, found = time.time(), []
    for pair in pairs:
        for side in (0, 1):
            policy.zero_grad()
            policy(cache_ref.collate([pair], "concatenated"))[side, 0].backward()
            found.append(torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()]))
    seconds, gram = time.time() - start, torch.zeros(len(found), len(found), dtype=torch.float64)
    for part in zip(*[each.split(2**20) for each in found]):
        block = torch.stack(part).double()
        gram += block @ block.T
    return gram, seconds


def compare(gram, exact):
    """Relative Frobenius error, correlation of the cosines of different responses."""
    cosines = [g / g.diag().sqrt().outer(g.diag().sqrt()) for g in (gram, exact)]
    other = ~torch.eye(len(exact), dtype=bool)
    correlation = np.corrcoef(*[c[other].numpy() for c in cosines])[0, 1]
    return ((gram - exact).norm() / exact.norm()).item(), correlation


def sketched(model, pairs, dim):
    policy, state = policy_of(model, dim)
    cache_ref.sketches(policy, state, pairs[:1])  # makes the hash tables
    start = time.time()
    parts = [cache_ref.sketches(policy, state, pairs[i:i + 8]) for i in range(0, len(pairs), 8)]
    sketch = torch.cat(parts).flatten(0, 1).double()
    return sketch @ sketch.T, time.time() - start


def main():
    model, data, count = sys.argv[1], sys.argv[2], int((sys.argv + ["32"])[3])
    cache_ref.start_process_group("float32")
    args = types.SimpleNamespace(model=model, trust_remote_code=False, data=data, layout="concatenated", max_tokens=8192)
    rows = cache_ref.load_data(args)["train"]["pairs"]
    pairs = [rows[i] for i in range(count)]
    exact, each = exact_gram(model, pairs)
    policy, _ = policy_of(model)
    with torch.no_grad():
        start = time.time()
        for i in range(0, len(pairs), 8):
            policy(cache_ref.collate(pairs[i:i + 8], "concatenated"))
    forward = time.time() - start
    print(f"{Path(model).name}, {2 * count} responses, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"one backward pass per response: {each:.1f} s; forward only: {forward:.1f} s\n")
    print("| K | Gram error | correlation of cosines | seconds | to forward |\n|---|---|---|---|---|")
    for dim in (256, 1024, 4096, 16384):
        gram, seconds = sketched(model, pairs, dim)
        error, correlation = compare(gram, exact)
        print(f"| {dim} | {error:.1%} | {correlation:.4f} | {seconds:.1f} | {seconds / forward:.1f} x |")


if __name__ == "__main__":
    main()
