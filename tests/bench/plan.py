"""Memory and FLOPs of a rank, before anything is downloaded or started: from a model's config.json alone.

    ./launch.sh plan MODEL [--ranks 8] [--max_tokens 8192] [--activation_checkpointing full] ...
    ./launch.sh plan MODEL --ranks 1 --fit 79.2    the largest --max_tokens of 4096, 8192, ... 65536 that fits so many GiB
    ./launch.sh dpo.py ...                         on GPUs, launch.sh asks for that number itself (training_flag)

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
import os
import re
import sys
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import dpo

GIB = 2**30
BOUNDS = [4096, 8192, 16384, 32768, 65536]  # values of --max_tokens that --fit chooses from


class Attention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values and the output, of rows gathered from the packed one, which hold the
    prompts a second time and padding; 1.5 times the tokens."""

    @staticmethod
    def forward(ctx, query, key, value):
        gathered = lambda x: (*x.shape[:2], 3 * x.shape[2] // 2, x.shape[3])
        output = query.new_empty(*query.shape[:3], value.shape[3])  # DeepSeek's values are narrower than its queries
        ctx.save_for_backward(*(x.new_empty(gathered(x)) for x in (query, key, value)), output.new_zeros(gathered(output)))
        return output.transpose(1, 2)

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


def add_flags(parser):
    """The flags that a training has too."""
    parser.add_argument("--shard_group", type=int, default=0, help="ranks that hold one copy; 0 = all")
    parser.add_argument("--max_tokens", type=int, default=8192, help="of one forward pass of one rank")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: bfloat16")
    parser.add_argument("--activation_checkpointing", default="off", choices=["off", "selective", "full"])
    parser.add_argument("--zero", default="auto", choices=["auto", "2", "3"])
    parser.add_argument("--lora_rank", type=int, default=0)


def settings(args):
    """Arguments of plan() after its first two that the flags say; without the tokens."""
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    return dict(group=args.shard_group, dtype=dtype, checkpointing=args.activation_checkpointing, lora=args.lora_rank > 0,
                zero=args.zero)


def training_flag(ranks, words):
    """What launch.sh adds to the words of a training on GPUs: --max_tokens and the largest number that fits nine tenths of a
    GPU's memory; or nothing, if the training has a number, or cannot be planned. GPU_GIB=80 plans for another GPU."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="")
    add_flags(parser)
    parser.set_defaults(max_tokens=0)
    parser.error = sys.exit  # the training itself says what is wrong
    underscored = [re.sub("^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    try:
        args, _ = parser.parse_known_args(underscored)
        if args.max_tokens or not args.model:
            return ""
        memory = float(os.environ.get("GPU_GIB") or torch.cuda.get_device_properties(0).total_memory / GIB)
        gib = 0.9 * memory
        config = transformers.AutoConfig.from_pretrained(dpo.find_model(args.model)[0])
        tokens = largest_that_fits(gib, config, ranks, **settings(args))
    except (Exception, SystemExit) as error:
        print(f"--max_tokens keeps its default: the memory cannot be planned ({str(error).splitlines()[0][:150]})", file=sys.stderr)
        return ""
    if tokens:
        print(f"--max_tokens {tokens}: the largest of {BOUNDS} whose step fits into {gib:.1f} GiB (./launch.sh plan)", file=sys.stderr)
    else:
        tokens = BOUNDS[0]
        print(f"--max_tokens {tokens}: by ./launch.sh plan not even this fits into {gib:.1f} GiB; if it does not, use more ranks, "
              "--activation_checkpointing full, or --lora_rank", file=sys.stderr)
    return f"--max_tokens {tokens}"


def main():
    if sys.argv[1:2] == ["--training"]:
        print(training_flag(int(sys.argv[2]), sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(prog="launch.sh plan", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or hub name; config.json is enough")
    parser.add_argument("--ranks", type=int, default=8)
    add_flags(parser)
    parser.add_argument("--pair_tokens", type=int, default=800, help="prompt once, chosen and rejected")
    parser.add_argument("--batch_size", type=int, default=128, help="pairs of a step, over all ranks")
    parser.add_argument("--teraflops", type=float, default=989, help="peak of a device: H100 and H200, bfloat16, dense")
    parser.add_argument("--fit", type=float, default=0, help="GiB of a device: also print the largest --max_tokens that fits")
    parser.error = lambda message: sys.exit(f"error: {message}; see ./launch.sh plan --help")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or value == parser.get_default(name)):
            parser.error(f"--{name} {value} must be above 0")
    if args.ranks % (args.shard_group or args.ranks):
        parser.error(f"--shard_group {args.shard_group} does not divide --ranks {args.ranks}")
    how, final = settings(args), Path(args.model, "final")
    try:
        config = transformers.AutoConfig.from_pretrained(final if final.is_dir() else args.model)  # a run means its final/
        parts, about = plan(config, args.ranks, tokens=args.max_tokens, **how)
    except Exception as error:
        raise SystemExit(f"error: {args.model} cannot be planned ({str(error).splitlines()[0][:150]}); give a folder with "
                         "config.json of a causal language model") from None
    dtype = str(how["dtype"]).removeprefix("torch.")
    print(f"{args.model}: {about['parameters'] / 1e9:.3g} billion parameters in {about['blocks']} blocks; {args.ranks} ranks, "
          f"{args.max_tokens} tokens per forward pass, {dtype}, checkpointing {how['checkpointing']}")
    for name, value in (parts | {"in all": sum(parts.values())}).items():
        print(f"  {name:12}{value / GIB:9.2f} GiB per rank")
    if args.fit:
        tokens = largest_that_fits(args.fit, config, args.ranks, **how)
        answer = f"--max_tokens {tokens} is the largest that fits" if tokens else "no --max_tokens fits"
        print(f"  {answer} {args.fit:g} GiB")
    flops = (8 if how["checkpointing"] == "full" else 6) * about["matmul"] * args.batch_size * args.pair_tokens / args.ranks
    print(f"  a step of {args.batch_size} pairs of {args.pair_tokens} tokens: {flops:.3g} FLOPs per rank, "
          f"{flops / args.teraflops / 0.4e12:.2f} s at 40 % of {args.teraflops:g} TFLOP/s")


if __name__ == "__main__":
    main()
