"""Memory and FLOPs of a rank, before anything is downloaded or started: from a model's config.json alone.

    ./launch.sh plan MODEL [--ranks 8] [--max_tokens 8192] [--activation_checkpointing full] ...
    ./launch.sh plan MODEL --ranks 1 --fit 79.2    the largest --max_tokens of 4096, 8192, ... 65536 that fits so many GiB

The model is built on the meta device, which has shapes and no numbers, and one forward pass of --max_tokens counts what autograd
keeps for the backward pass. Bytes per rank, c = 2 for bfloat16 and 4 for float32, P parameters, S ranks that share a copy:

    states       16 P / S: float32 weights, gradients and both moments of AdamW (LoRA: 4 P / S, its own are small)
    gathered     c x (embeddings and head + two blocks), with --zero 2 (auto: on one rank) c P; and the gradient of one block
                 in c and in float32
    activations  what autograd keeps; with --activation_checkpointing full one block of it, and the input of every block;
                 selective: that, and the outputs of matrix products and attention of every block
    head         a chunk of logits, 2^26 numbers: in c, and twice in float32

    FLOPs of a step = 6 x (parameters in matrices) x tokens (8 with full checkpointing), over all ranks; attention itself comes on top.
"""
import argparse

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
BOUNDS = [4096, 8192, 16384, 32768, 65536]  # values of --max_tokens that --fit chooses from


class Attention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values and the output, of rows gathered from the packed one, which hold the
    prompts a second time and padding; 1.5 times the tokens."""

    @staticmethod
    def forward(ctx, query, key, value):
        gathered = lambda x: (*x.shape[:2], 3 * x.shape[2] // 2, x.shape[3])
        ctx.save_for_backward(*(x.new_empty(gathered(x)) for x in (query, key, value)), query.new_zeros(gathered(query)))
        return torch.empty_like(query).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("nothing is computed here")


class Products(TorchDispatchMode):
    """Counts the bytes that come out of matrix products, but not of bmm, and of Attention, whose outputs are the only new_zeros."""
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, aten = func(*args, **(kwargs or {})), torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.new_zeros.default):
            self.bytes += out.numel() * out.element_size()
        return out


def fused(module, query, key, value, mask, **_):
    return Attention.apply(query, key, value), None


transformers.AttentionInterface.register("plan", fused)


def kept_bytes(model, tokens):
    """What autograd keeps of a forward pass of so many tokens, without the parameters themselves; and how much of it comes out
    of matrix products and attention."""
    own = {id(weight) for weight in model.parameters()}
    seen = {}

    def pack(tensor):
        if id(tensor) not in own and not isinstance(tensor, torch.nn.Parameter) and tensor._base is None:
            seen[id(tensor)] = tensor  # alive, so that its id is not given twice
        elif tensor._base is not None and id(tensor._base) not in own:
            seen[id(tensor._base)] = tensor._base
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Products() as products:
        model.base_model(torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values()), products.bytes


def plan(config, ranks=1, group=0, tokens=8192, dtype=torch.bfloat16, checkpointing="off", lora=False, zero="auto"):
    """{what: bytes of a rank}, {what: numbers}."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="plan")
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    size = lambda module: sum(weight.numel() for weight in module.parameters())
    parameters, block, width = size(model), max(map(size, blocks)), dtype.itemsize
    root = parameters - sum(map(size, blocks))
    text = config.get_text_config()
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kept, products = kept_bytes(model, tokens)
    if checkpointing != "off":
        kept = kept / len(blocks) + len(blocks) * tokens * text.hidden_size * width
        kept += products * (checkpointing == "selective")
    whole = zero == "2" or (zero == "auto" and ranks == 1)
    parts = {"states": (4 if lora else 16) * parameters / (group or ranks),
             "gathered": width * (parameters if whole else root + 2 * block) + (0 if lora else (width + 4) * block),
             "activations": kept,
             "head": min(tokens * text.vocab_size, 2**26) * (width + 8)}
    return parts, dict(parameters=parameters, blocks=len(blocks), matmul=parameters - (0 if tied else embedding))


def largest_that_fits(gib, config, ranks, group, dtype, checkpointing, lora, zero):
    """The largest of BOUNDS with which all parts of the plan together take at most so many GiB; 0 if none fits."""
    fitting = 0
    for tokens in BOUNDS:
        parts, _ = plan(config, ranks, group, tokens, dtype, checkpointing, lora, zero)
        if sum(parts.values()) <= gib * GIB:
            fitting = tokens
    return fitting


def main():
    parser = argparse.ArgumentParser(prog="launch.sh plan", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or hub name; config.json is enough")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--shard_group", type=int, default=0, help="ranks that hold one copy; 0 = all")
    parser.add_argument("--max_tokens", type=int, default=8192, help="of one forward pass of one rank")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--activation_checkpointing", default="off", choices=["off", "selective", "full"])
    parser.add_argument("--zero", default="auto", choices=["auto", "2", "3"])
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--pair_tokens", type=int, default=800, help="prompt once, chosen and rejected")
    parser.add_argument("--batch_size", type=int, default=128, help="pairs of a step, over all ranks")
    parser.add_argument("--teraflops", type=float, default=989, help="peak of a device: H100 and H200, bfloat16, dense")
    parser.add_argument("--fit", type=float, default=0, help="GiB of a device: also print the largest --max_tokens that fits")
    args = parser.parse_args()
    dtype, how, lora = getattr(torch, args.dtype), args.activation_checkpointing, args.lora_rank > 0
    try:
        config = transformers.AutoConfig.from_pretrained(args.model)
        parts, about = plan(config, args.ranks, args.shard_group, args.max_tokens, dtype, how, lora, args.zero)
    except Exception as error:
        raise SystemExit(f"error: {args.model} cannot be planned ({str(error).splitlines()[0][:150]}); give a folder with "
                         "config.json of a causal language model") from None
    print(f"{args.model}: {about['parameters'] / 1e9:.3g} billion parameters in {about['blocks']} blocks; {args.ranks} ranks, "
          f"{args.max_tokens} tokens per forward pass, {args.dtype}, checkpointing {how}")
    for name, value in (parts | {"in all": sum(parts.values())}).items():
        print(f"  {name:12}{value / GIB:9.2f} GiB per rank")
    if args.fit:
        tokens = largest_that_fits(args.fit, config, args.ranks, args.shard_group, dtype, how, lora, args.zero)
        answer = f"--max_tokens {tokens} is the largest that fits" if tokens else "no --max_tokens fits"
        print(f"  {answer} {args.fit:g} GiB")
    flops = (8 if how == "full" else 6) * about["matmul"] * args.batch_size * args.pair_tokens / args.ranks
    print(f"  a step of {args.batch_size} pairs of {args.pair_tokens} tokens: {flops:.3g} FLOPs per rank, "
          f"{flops / args.teraflops / 0.4e12:.2f} s at 40 % of {args.teraflops:g} TFLOP/s")


if __name__ == "__main__":
    main()
