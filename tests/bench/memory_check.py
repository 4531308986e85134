"""Peak memory of one training step: dpo.py's packed layout against padded rows with all their logits.

Both compute the DPO loss of the same pairs (about 2,000 tokens a side: half prompt, half response) with the
same random model, a small Llama with a vocabulary of 50,000, in float32 on the CPU, forward and backward.
The plain computation is that of many trainers: a padded batch of chosen and rejected rows through the
model's own forward, log_softmax in float32 over all logits. Each runs in a process of its own; what is
printed is the highest resident memory of the step minus the resident memory before it.

    python tests/bench/memory_check.py [--pairs 1] [--length 1024] [--vocab 50000]

Exit status 1 unless packed needs at most half of plain.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]


def resident():
    """Bytes of this process in memory now; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(way, folder, args):
    """One step in this process -> dict(bytes=, loss=, norm=)."""
    import torch
    import transformers
    import dpo
    from conftest import tiny_policy

    torch.manual_seed(0)
    length, pairs = args.length, []
    for i in range(args.pairs):  # unequal sides, as in real data
        sizes = dict(prompt=length, chosen=length, rejected=length - 100 * (i + 1) % length)
        pairs.append(
            {side: torch.randint(args.vocab, (size,)).tolist() for side, size in sizes.items()}
        )
    lengths = torch.tensor([[len(pair[side]) for pair in pairs] for side in ("chosen", "rejected")])
    settings = types.SimpleNamespace(beta=0.1, label_smoothing=0.0)
    dpo.start_process_group("float32")
    if way == "packed":
        model = tiny_policy(dpo, folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).train()
    reference = torch.zeros(2, len(pairs))  # its value does not matter for memory

    def plain_logps():
        texts = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
        width = max(len(x + y) for x, y in texts)
        ids = torch.tensor([x + y + [0] * (width - len(x + y)) for x, y in texts])
        real = torch.tensor([[1] * len(x + y) + [0] * (width - len(x + y)) for x, y in texts])
        scored = torch.tensor(
            [[0] * len(x) + [1] * len(y) + [0] * (width - len(x + y)) for x, y in texts]
        )
        logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
        logps = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
        return (logps * scored[:, 1:]).sum(1).view(2, len(pairs))

    for parameter in (
        model.parameters()
    ):  # gradients exist before the step in both, as in all steps but the first
        parameter.grad = torch.zeros_like(parameter)
    before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logps = model(dpo.collate(pairs, "packed")) if way == "packed" else plain_logps()
    losses, _ = dpo.preference_loss(logps, reference, lengths, settings)
    losses.mean().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert after > peak, "the step never exceeded what loading the model had taken: raise --length"
    grad = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    ]
    norm = torch.stack([g.norm() for g in grad]).norm().item()
    return dict(bytes=after - before, loss=losses.mean().item(), norm=norm)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a prompt, and of a response"
    )
    parser.add_argument("--vocab", type=int, default=50_000)
    parser.add_argument("--way", choices=["packed", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.folder, args)))
        return
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=2 * args.length,
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        found = {}
        for way in ("plain", "packed"):
            command = [
                sys.executable,
                __file__,
                "--way",
                way,
                "--folder",
                folder,
                "--pairs",
                str(args.pairs),
                "--length",
                str(args.length),
                "--vocab",
                str(args.vocab),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{way}: {done.stderr[-2000:]}")
            found[way] = json.loads(done.stdout.splitlines()[-1])
    ratio = found["packed"]["bytes"] / found["plain"]["bytes"]
    print(
        "| computation | peak memory of the step, GiB | loss | gradient norm |\n|---|---|---|---|"
    )
    for way, name in dict(plain="padded, all logits", packed="dpo.py, packed").items():
        print(
            f"| {name} | {found[way]['bytes'] / 2**30:.2f} | {found[way]['loss']:.5f} | {found[way]['norm']:.5f} |"
        )
    print(f"| ratio | {ratio:.3f} | | |")
    same = all(
        abs(found["packed"][key] / found["plain"][key] - 1) < 1e-3 for key in ("loss", "norm")
    )
    if ratio > 0.5 or not same:
        sys.exit(
            "error: packed needs more than half of plain"
            if same
            else "error: not the same loss and gradient"
        )


if __name__ == "__main__":
    main()
