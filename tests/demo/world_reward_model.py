"""A reward model for the demo world, to show tests/bench/reward_model.py on something real: the demo's base model with one
label, trained on its training pairs by Bradley-Terry, -log sigmoid(r(chosen) - r(rejected)). It sees what the algorithms
see, so it learns the judge's habits too; the true reward tells how far it can be trusted.

    python tests/demo/world_reward_model.py data/demo_world
    export REWARD_MODEL=data/demo_world/reward_model
    python evaluate.py --models data/demo_world/base,out/demo/dpo,out/demo/simpo --reference data/demo_world/base \\
        --data data/demo_world/pairs --samples 400 --reward tests/bench/reward_model.py:reward
"""
import sys
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers


def main(world: Path, epochs: int = 3, size: int = 32, lr: float = 1e-3) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = datasets.load_from_disk(str(world / "pairs/train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    steps, losses = epochs * len(rows) // size, []
    for step in range(steps):
        if step * size % len(rows) < size:
            order = torch.randperm(len(rows)).tolist()
        start = step * size % len(rows)
        pairs = [rows[row] for row in order[start:start + size]]
        texts = [pair["prompt"] + pair[side] for side in ("chosen", "rejected") for pair in pairs]
        batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        chosen, rejected = model(**batch).logits[:, 0].chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(world / "reward_model")
    tokenizer.save_pretrained(world / "reward_model")
    print(f"{world}/reward_model: {steps} steps, loss {sum(losses[:20]) / 20:.3f} -> {sum(losses[-20:]) / 20:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
