"""DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290): the complete algorithm.
Everything else in dpo.py is efficiency.

    L = -E log sigmoid(beta [log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)])            eq. 7

A pair is a prompt x with two responses: y_w, which somebody chose, and y_l, which they rejected.
The policy pi is trained to prefer y_w to y_l by more than the reference ref does, which is the
policy as it was before training. One device, float32, both models in memory, one padded batch.

    python prepare_data.py --dataset HUB_OR_FILE --model MODEL --out data/NAME
    python tests/micro_dpo.py --model MODEL --data data/NAME

dpo.py with the same settings takes the same steps: tests/test_micro_dpo.py compares the losses, the
gradients and the trained weights. dpo.py adds the reference's log-probs on disk, batches without
padding, several devices, bfloat16, checkpoints, and settings such as a weight for each pair.
"""
import argparse, math

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
parser.add_argument("--data", required=True, help="folder made by prepare_data.py")
parser.add_argument("--out", default="out/micro_dpo", help="where the trained model goes")
parser.add_argument("--beta", type=float, default=0.1, help="strength of the pull to the reference")
parser.add_argument("--learning_rate", type=float, default=5e-7, help="its peak")
parser.add_argument("--batch_size", type=int, default=32, help="pairs per step")
parser.add_argument("--max_steps", type=int, default=0, help="0 = one pass over the training pairs")
parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs")
args = parser.parse_args()

# The data: a pair has the token ids of its "prompt", of "chosen" and of "rejected".
train = datasets.load_from_disk(f"{args.data}/train")
val = datasets.load_from_disk(f"{args.data}/val")

# The models. eval() turns dropout off, which would make the policy differ from the reference.
device = "cuda" if torch.cuda.is_available() else "cpu"
policy = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
reference = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
policy, reference = policy.to(device).eval(), reference.to(device).eval()

def response_logps(model, pairs, side):
    """log p(y|x) (n,) of the responses y, "chosen" or "rejected", of n pairs: the sum over the
    tokens of y. T is the length of the longest text, V the size of the vocabulary."""
    texts = [pair["prompt"] + pair[side] for pair in pairs]
    width = max(len(text) for text in texts)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # (n, T), padded on the right
    in_response = torch.zeros(len(pairs), width)  # (n, T), 1 for the tokens of y
    for row, (pair, text) in enumerate(zip(pairs, texts)):
        ids[row, :len(text)] = torch.tensor(text)
        in_response[row, len(pair["prompt"]):len(text)] = 1
    ids, in_response = ids.to(device), in_response.to(device)

    # The logits at each token predict the next one. A token sees only those to its left, so the
    # padding on the right changes nothing.
    logits = model(ids).logits[:, :-1]  # (n, T - 1, V)
    logps = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (n, T - 1)
    return (logps * in_response[:, 1:]).sum(1)

def preference_loss(pairs):
    """n pairs -> losses (n,) and margins (n,); a margin above 0 means that the policy has learnt
    to prefer the chosen response."""
    chosen = response_logps(policy, pairs, "chosen")
    rejected = response_logps(policy, pairs, "rejected")
    with torch.no_grad():
        ref_chosen = response_logps(reference, pairs, "chosen")
        ref_rejected = response_logps(reference, pairs, "rejected")
    margins = args.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins), margins  # eq. 7

@torch.no_grad()
def evaluate(step):
    """Print the mean loss of the pairs in val/, and the share of them with a margin above 0."""
    losses, margins = [], []
    for first in range(0, len(val), args.batch_size):
        rows = range(first, min(first + args.batch_size, len(val)))
        batch_losses, batch_margins = preference_loss([val[row] for row in rows])
        losses += batch_losses.tolist()
        margins += batch_margins.tolist()
    accuracy = (np.sign(margins).mean() + 1) / 2  # a margin of 0, as before training, counts half
    print(f"step {step}  eval loss {np.mean(losses):.6f}  eval accuracy {accuracy:.3f}")

optimizer = torch.optim.AdamW(policy.parameters(), args.learning_rate, weight_decay=0.0)
epoch_steps = math.ceil(len(train) / args.batch_size)
steps = args.max_steps or epoch_steps
warmup = int(0.1 * steps)
evaluate(0)

for step in range(steps):
    # Each epoch has its own order of the pairs, and each step takes the next few of them.
    epoch, index = divmod(step, epoch_steps)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(train))
    rows = order[index * args.batch_size:(index + 1) * args.batch_size]
    losses, margins = preference_loss([train[int(row)] for row in rows])
    loss = losses.mean()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)  # before clipping

    # The learning rate rises in the first tenth of the steps, and then falls towards 0.
    if step < warmup:
        rate = args.learning_rate * (step + 1) / (warmup + 1)
    else:
        rate = args.learning_rate * (steps - step) / (steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}  loss {loss:.6f}  margin {margins.mean():.6f}  "
          f"grad_norm {grad_norm:.6f}  lr {rate:.3g}")

evaluate(steps)
policy.save_pretrained(args.out)
transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
