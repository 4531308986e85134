"""What the kernels of a training step cannot be faster than: python tests/bench/floor.py --size 1.5B --lengths hh    (no GPU needed)

One micro-batch of dpo.py goes forward and backward on the meta device, where tensors have shapes but no numbers. Each operator is
counted with the bytes that it reads and writes and with the FLOPs of its matrix products, and needs at least the time in which the
card moves or computes them. The defaults are what an H200 was seen to do on large copies and products. What is not an operator of
the model is added by its bytes: FSDP on one rank with --zero 2 (14 bytes per parameter in a step, 26 in a micro-batch) and AdamW
with the gradient's norm (40 in a step). Not compiled, no checkpointing. tests/bench/gpu.py measures; a kind that takes much longer
there than here is where to look.
"""
import argparse
import copy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]

import dpo  # noqa: E402
import gpu  # noqa: E402
import gpu_check  # noqa: E402

VIEWS = set("""view _unsafe_view t transpose expand slice select unsqueeze squeeze as_strided permute detach alias split
    split_with_sizes unbind empty empty_like empty_strided new_empty""".split())  # no kernel
KINDS = {  # operators by what they are for; all others are elementwise
    "matrix products": {"mm", "addmm", "bmm"}, "attention": {"attention"}, "softmax and loss": {
        "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"},
    "reductions": {"sum", "mean"}, "FSDP and optimiser": {"step"}, "copies": {
        "_to_copy", "copy_", "cat", "stack", "clone", "index", "index_select", "index_add_", "index_put", "zero_", "new_zeros", "zeros",
        "zeros_like", "slice_backward", "select_backward", "embedding", "embedding_dense_backward"}}


class Attention(torch.autograd.Function):
    """In place of the kernel, which the meta device lacks: its shapes, and its products under causality, 2 forward, 5 backward."""
    @staticmethod
    def forward(ctx, query, key, value, count):
        ctx.save_for_backward(query, key, value)
        ctx.count, ctx.products = count, query.numel() * query.shape[2]
        count.add("attention", 2 * (query.numel() + key.numel()) * query.itemsize, 2 * ctx.products)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        ctx.count.add("attention", 4 * sum(x.numel() for x in tensors) * grad.itemsize, 5 * ctx.products)
        return *map(torch.empty_like, tensors), None


class Count(TorchDispatchMode):
    """{operator: [bytes, FLOPs, calls]} of what runs in a `with` block."""
    def __init__(self):
        super().__init__()
        self.found = {}

    def add(self, name, moved, flops=0):
        row = self.found.setdefault(name, np.zeros(3))
        row += moved, flops, 1

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, flops = function._schema.name.split("::")[1], 0
        if name in VIEWS:
            return result
        moved = sum(x.numel() * x.itemsize for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        if name in ("index", "index_select", "nll_loss_forward", "embedding"):  # reads what it takes, not all that is there
            moved = 2 * tree_leaves(result)[0].numel() * tree_leaves(result)[0].itemsize
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        self.add(name, moved, flops)
        return result


def count_micro_batch(config, lengths, layers):
    """{operator: [bytes, FLOPs, calls]} of the pairs with these lengths (n, 3) as one micro-batch, in a model of so many layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dpo.choose_attention(model, dpo.Args(model="", data=""))
    pairs = [{side: [1] * int(size) for side, size in zip(("prompt", "chosen", "rejected"), row)} for row in lengths]
    count, old = Count(), (dpo.to_device, dpo.causal_attention)
    dpo.to_device = lambda array: torch.as_tensor(array).to("meta")
    dpo.causal_attention = lambda module, *table, **kwargs: Attention.apply(*table, count).transpose(1, 2)
    try:
        batch = dpo.collate(pairs, "packed")
        with count:
            dpo.Policy(model, dpo.token_logps)(batch).sum().backward()
    finally:
        dpo.to_device, dpo.causal_attention = old
    return count.found


def step_counts(size, lengths, max_tokens):
    """{operator: [bytes, FLOPs, calls]} of a step on the pairs with these lengths. Layers are alike: two are counted, and one."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = gpu_check.SIZES[size]
    config = transformers.LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, vocab_size=vocabulary,
                                      num_key_value_heads=kv_heads, tie_word_embeddings=size not in ("7B", "8B"))
    args, total = dpo.Args(model="", data="", max_tokens=max_tokens), {}
    parts = dpo.micro_batches(np.arange(len(lengths)), lengths, args, 1)
    for part in parts:
        one, two = (count_micro_batch(config, lengths[part], number) for number in (1, 2))
        for name, row in two.items():
            total[name] = total.get(name, 0) + row + (layers - 2) * (row - one[name])
    blocks = layers * (2 * hidden**2 + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * mlp)
    total["step"] = np.array([(blocks + hidden * vocabulary) * (14 + 26 * len(parts) + 40), 0, 0])
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1.5B", choices=gpu_check.SIZES)
    parser.add_argument("--lengths", default="ultrafeedback", choices=gpu.PAIRS)
    parser.add_argument("--max_tokens", type=int, default=16384)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s, of a large copy, reads and writes")
    parser.add_argument("--speed", type=float, default=790, help="TFLOP/s of a large matrix product")
    args = parser.parse_args()
    dpo.attention_tables.__defaults__ = (0.5,)  # as on a GPU
    lengths = gpu.lengths_of(args.lengths, gpu.PAIRS[args.lengths], np.random.default_rng(0))
    counts, kinds = step_counts(args.size, lengths, args.max_tokens), Counter()
    for name, (moved, flops, _) in counts.items():
        kind = next((kind for kind, names in KINDS.items() if name in names), "elementwise")
        kinds[kind] += 1000 * max(moved / args.bandwidth, flops / args.speed) / 1e12
    rows = [["kind", "ms", "%"]] + [[kind, f"{ms:.0f}", f"{100 * ms / kinds.total():.0f}"] for kind, ms in kinds.most_common()]
    share = gpu.flops(args.size, lengths) / kinds.total() / 989e9
    print(gpu.table(rows))
    print(f"{args.size}, {args.lengths}, {len(lengths)} pairs, --max_tokens {args.max_tokens}: at least {kinds.total():.0f} ms and "
          f"{sum(row[2] for row in counts.values()):,.0f} kernels per step; at that speed the MFU would be {100 * share:.0f} %.")


if __name__ == "__main__":
    main()
