"""The demo world: a corner shop in which every answer has a known true reward. No network, no GPU.

A customer orders two kinds of things, or one and a pair of gloves; the shopkeeper hands them
over, chats, or is rude.

    True reward of an answer: +1 for each ordered kind of thing handed over in the right number,
    -1 for each handed over wrongly (wrong number, not ordered, twice), -1 for each rude remark,
    0 for small talk, however much; and if gloves were ordered, +2 for a matching pair of wool,
    +1 for a matching pair of cotton, 0 for an odd pair.

    Customer:   May I have two apples and three eggs?
    Shopkeeper: Here are two apples. What a lovely day it is. Here are four eggs. Get out of my way.
    Reward:     +1 (apples)            0 (small talk)          -1 (number)        -1 (rude)     = -1

A careless shopkeeper is written down as a small random grammar. A tiny Llama is trained on what he
says, good and bad alike: it is the base model. Pairs of his answers are then labelled, always by
the true reward except in `noise`. The subsets are meant to separate the algorithms:

    plain      two answers with equally much small talk; the better one is chosen
    length     the better one is chosen, and 80 % of the time it is also the one with more small
               talk: a habit of the judge that is in the data and not in the reward
    frequency  three kinds of gloves, wool (2) > cotton (1) > odd (0), compared in unequal numbers,
               wool-cotton : wool-odd : cotton-odd = 1 : 1 : 10, so that most pairs praise the
               second best (the bandit of AuxDPO, arXiv 2510.20413, Prop. 3, as text)
    noise      near-duplicates: the same answer with another sentence of small talk or in another
               order (equal reward, chosen by coin), or with one number changed (half of them
               labelled the wrong way round)

    python tests/demo/demo_world.py --out data/demo_world [--length_share 0] [--noise_share 0.8] ...

Each of the last three has a share of the pairs, 0 switches it off; the rest is plain. The command
writes base/ (model and tokenizer for from_pretrained), pairs.jsonl (prompt, chosen, rejected,
subset, and both true rewards) and meta.json. The pairs depend on the seed only; the weights are
equal on one machine, and to rounding elsewhere. `true_reward` needs nothing but Python.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

# torch and transformers are imported where they are used: evaluation scripts and tests import
# `true_reward` and `make_pairs` from here without waiting for them.

NUMBERS = ["two", "three", "four"]
GOODS = "apples pears plums onions eggs rolls candles ribbons buttons needles stamps pens".split()
GREETINGS = ["May I have {}?", "I would like {}.", "Good morning, {}, please.", "Please pack {}."]
SMALL_TALK = ["What a lovely day it is.", "My cat slept in the window all morning.",
              "The rain has stopped at last.", "They say the fair is coming to town.",
              "I baked bread before the sun was up.", "Your garden looks fine this year."]
RUDE = ["Get out of my way.", "Be quick about it.", "Do not touch anything."]
HAND_OVER = re.compile(f"Here are ({'|'.join(NUMBERS)}) ({'|'.join(GOODS)})\\.")
GLOVES = re.compile(r"Take a (wool|cotton) glove and a (wool|cotton) glove\.")
GLOVE_ODDS = {("wool", "wool"): 0.5, ("cotton", "cotton"): 0.2,
              ("wool", "cotton"): 0.15, ("cotton", "wool"): 0.15}
GLOVE_REWARDS = {("wool", "wool"): 2, ("cotton", "cotton"): 1,
                 ("wool", "cotton"): 0, ("cotton", "wool"): 0}
SHARES = {"plain": 0.45, "length": 0.25, "frequency": 0.15, "noise": 0.15}  # plain: the rest


# ---------------------------------------------------------------------- the reward
def sentences(text: str) -> list[str]:
    """Cut at full stops, which every sentence of the shopkeeper keeps at its end."""
    return [part.strip() for part in re.findall(r"[^.]*\.|[^.]+$", text) if part.strip()]


def reward_parts(prompt: str, response: str) -> dict[str, float]:
    """The true reward by its causes, goods, gloves, rude and broken; see `true_reward`."""
    open_order = set(re.findall(f"({'|'.join(NUMBERS)}) ({'|'.join(GOODS)})", prompt))
    wants_gloves = "gloves" in prompt
    parts = {"goods": 0.0, "gloves": 0.0, "rude": 0.0, "broken": 0.0}
    for sentence in sentences(response):
        if match := HAND_OVER.fullmatch(sentence):
            parts["goods"] += 1 if match.groups() in open_order else -1
            open_order.discard(match.groups())
        elif match := GLOVES.fullmatch(sentence):
            parts["gloves"] += GLOVE_REWARDS[match.groups()] if wants_gloves else -1
            wants_gloves = False
        elif sentence not in SMALL_TALK:
            parts["rude" if sentence in RUDE else "broken"] -= 1
    return parts


def true_reward(prompt: str, response: str) -> float:
    """What the answer is worth: the sum over its sentences of

    +1  "Here are N THINGS." with N THINGS in the order, for the first time
    -1  any other "Here are N THINGS.": wrong number, not ordered, or again
    +2 / +1 / 0  "Take a A glove and a B glove." for A = B = wool / A = B = cotton / A != B,
        if gloves are in the order, for the first time; otherwise -1
     0  a sentence of SMALL_TALK
    -1  a sentence of RUDE, and anything that is none of the above (gibberish, a cut-off sentence)

    `prompt` is the customer's text, `response` the shopkeeper's, both without template or special
    tokens. What is missing earns nothing; the empty answer has reward 0.
    """
    return sum(reward_parts(prompt, response).values())


def is_well_formed(response: str) -> bool:
    """Whether the answer consists of one or more of the world's sentences and nothing else."""
    parts = sentences(response)
    return bool(parts) and all(part in SMALL_TALK or part in RUDE or HAND_OVER.fullmatch(part)
                               or GLOVES.fullmatch(part) for part in parts)


# ---------------------------------------------------------------------- the shopkeeper
def draw_order(rng: random.Random, gloves: bool) -> tuple[str, list]:
    """A customer's sentence and its order, a list of (number, thing) with None for gloves."""
    order = [(rng.choice(NUMBERS), thing) for thing in rng.sample(GOODS, 1 if gloves else 2)]
    names = [f"{number} {thing}" for number, thing in order]
    if gloves:
        order, names = order + [None], names + ["a pair of gloves"]
    return rng.choice(GREETINGS).format(" and ".join(names)), order


def glove_sentence(first: str, second: str) -> str:
    return f"Take a {first} glove and a {second} glove."


def draw_answer(rng: random.Random, order: list, talk: int | None = None) -> list[str]:
    """What the careless shopkeeper says, as sentences, with `talk` of them small talk."""
    parts = []
    for item in order:
        luck = rng.random()
        if item is None:
            pairs, odds = list(GLOVE_ODDS), list(GLOVE_ODDS.values())
            parts.append(glove_sentence(*rng.choices(pairs, odds)[0]))
        elif luck < 0.60:
            parts.append(f"Here are {item[0]} {item[1]}.")
        elif luck < 0.80:
            wrong = rng.choice([number for number in NUMBERS if number != item[0]])
            parts.append(f"Here are {wrong} {item[1]}.")
        else:
            parts.append(f"Here are {item[0]} {rng.choice(GOODS)}.")
    talk = rng.choices(range(4), [40, 30, 20, 10])[0] if talk is None else talk
    asides = rng.sample(SMALL_TALK, talk) + [rng.choice(RUDE)] * (rng.random() < 0.4)
    for aside in asides:
        parts.insert(rng.randint(0, len(parts)), aside)
    return parts


# ---------------------------------------------------------------------- the pairs
def draw_plain(rng: random.Random) -> tuple:
    prompt, order = draw_order(rng, gloves=False)
    talk = rng.choices([0, 1, 2], [2, 1, 1])[0]
    return prompt, draw_answer(rng, order, talk), draw_answer(rng, order, talk), 0


def draw_length(rng: random.Random) -> tuple:
    """The better answer has one or two sentences of small talk more, or (one in five) fewer."""
    prompt, order = draw_order(rng, gloves=False)
    short = rng.randint(0, 1)
    long = short + rng.randint(1, 2)
    one, two = draw_answer(rng, order, short), draw_answer(rng, order, long)
    return prompt, one, two, 1 if rng.random() < 0.8 else -1


def draw_frequency(rng: random.Random) -> tuple:
    """One answer in two versions that differ only in the gloves."""
    prompt, order = draw_order(rng, gloves=True)
    wool, cotton = glove_sentence("wool", "wool"), glove_sentence("cotton", "cotton")
    odd = rng.choice([glove_sentence("wool", "cotton"), glove_sentence("cotton", "wool")])
    better, worse = rng.choices([(wool, cotton), (wool, odd), (cotton, odd)], [1, 1, 10])[0]
    answer = draw_answer(rng, order)
    return (prompt, [better if GLOVES.fullmatch(part) else part for part in answer],
            [worse if GLOVES.fullmatch(part) else part for part in answer], 0)


def draw_noise(rng: random.Random) -> tuple:
    """An answer and its near-duplicate: other small talk, other order, or another number."""
    prompt, order = draw_order(rng, gloves=False)
    answer = draw_answer(rng, order, talk=rng.randint(1, 2))
    twin, kind = list(answer), rng.choice(["talk", "order", "number"])
    if kind == "talk":
        where = rng.choice([i for i, part in enumerate(twin) if part in SMALL_TALK])
        twin[where] = rng.choice([talk for talk in SMALL_TALK if talk not in twin])
    elif kind == "order":
        where = rng.randrange(len(twin) - 1) if len(twin) > 1 else 0
        twin[where:where + 2] = twin[where:where + 2][::-1]
    else:
        for where, part in enumerate(twin):
            if match := HAND_OVER.fullmatch(part):
                other = rng.choice([number for number in NUMBERS if number != match[1]])
                twin[where] = f"Here are {other} {match[2]}."
                break
    return prompt, answer, twin, 0


def make_pairs(count: int, seed: int, shares: dict[str, float] = SHARES) -> list[dict]:
    """`count` rows of prompt, chosen, rejected, subset and true rewards, in shuffled order."""
    rng, rows, seen = random.Random(seed), [], set()
    draw = {"plain": draw_plain, "length": draw_length, "frequency": draw_frequency,
            "noise": draw_noise}
    want = {subset: round(share * count) for subset, share in shares.items()}
    want["plain"] = count - sum(n for subset, n in want.items() if subset != "plain")
    while sum(want.values()):
        subset = next(name for name, left in want.items() if left)
        prompt, one, two, longer = draw[subset](rng)
        one, two = " ".join(one), " ".join(two)
        gap = true_reward(prompt, two) - true_reward(prompt, one)
        # `longer` = 1 / -1 asks for a better answer that is longer / shorter; `two` is the longer.
        refused = gap * longer <= 0 if longer else subset != "noise" and gap == 0
        if one == two or refused or (prompt, frozenset((one, two))) in seen:
            continue
        seen.add((prompt, frozenset((one, two))))
        want[subset] -= 1
        flip = rng.random() < 0.5 if subset == "noise" else gap > 0
        chosen, rejected = (two, one) if flip else (one, two)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset,
                     "reward_chosen": true_reward(prompt, chosen),
                     "reward_rejected": true_reward(prompt, rejected)})
    rng.shuffle(rows)
    return rows


# ---------------------------------------------------------------------- the base model
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def draw_conversations(count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) as the shopkeeper speaks, good and bad; one order in four has gloves."""
    rng, conversations = random.Random(seed), []
    for _ in range(count):
        prompt, order = draw_order(rng, gloves=rng.random() < 0.25)
        conversations.append((prompt, " ".join(draw_answer(rng, order))))
    return conversations


def make_tokenizer(conversations: list[tuple[str, str]]):
    """A byte-level BPE in which each word of the world is one token and any other text is bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, special_tokens=special,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator((text for turn in conversations for text in turn), trainer)
    # No BOS, as in Qwen: the user's header begins every text.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256, clean_up_tokenization_spaces=False)


def make_model(tokenizer, hidden: int, layers: int):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.1, **ends)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                               max_new_tokens=96, **ends)
    return model


def tokenise(tokenizer, conversations: list[tuple[str, str]]) -> tuple[list, list]:
    """Token ids of each prompt (with the shopkeeper's header) and of each answer (with its end)."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
               for prompt, _ in conversations]
    answers = [answer + tokenizer.eos_token for _, answer in conversations]
    return tuple(tokenizer(texts, add_special_tokens=False)["input_ids"]
                 for texts in (prompts, answers))


def pretrain(model, tokenizer, conversations: list, steps: int, lr: float) -> float:
    """Supervised training on the answers, each conversation read once; returns the last loss.

    AdamW, 50 steps of warm-up, cosine to zero. Batches are padded, not packed, so that no answer
    can look up another customer's order.
    """
    import torch
    from tqdm import trange

    ids = list(zip(*tokenise(tokenizer, conversations)))
    size = len(ids) // steps
    # Every token weighs the same. With the mean of each batch, batches of short answers would
    # teach the model to be shorter than the shopkeeper: 0.7 sentences of small talk, not 1.0.
    tokens = torch.tensor(size * sum(len(answer) for _, answer in ids) / len(ids))
    # Sorting within twenty batches leaves little padding and the batches as good as random.
    ids = [pair for start in range(0, len(ids), 20 * size)
           for pair in sorted(ids[start:start + 20 * size], key=lambda turn: len(sum(turn, [])))]
    batches = [ids[start:start + size] for start in range(0, steps * size, size)]
    random.Random(0).shuffle(batches)

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    losses = []
    bar = trange(steps, desc="pretraining", disable=None)  # silent where nobody watches
    for step in bar:
        width = max(len(prompt + answer) for prompt, answer in batches[step])
        # The padding stands on the right, so that causal attention needs no mask.
        inputs = torch.full((size, width), tokenizer.pad_token_id)
        labels = torch.full((size, width), -100)
        for row, (prompt, answer) in enumerate(batches[step]):
            inputs[row, :len(prompt + answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt):len(prompt + answer)] = torch.tensor(answer)
        loss = model(input_ids=inputs, labels=labels, num_items_in_batch=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


def sample(model, tokenizer, prompts: list[str], seed: int = 0, batch_size: int = 256) -> list[str]:
    """One answer per prompt, sampled at temperature 1; a text that never ends is cut off."""
    import torch

    torch.manual_seed(seed)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                           add_generation_prompt=True) for prompt in prompts]
    answers = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start:start + batch_size], return_tensors="pt", padding=True,
                          padding_side="left", add_special_tokens=False,
                          return_token_type_ids=False).to(model.device)
        ids = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=96)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1]:],
                                          skip_special_tokens=True)
    return answers


# ---------------------------------------------------------------------- the command
def describe(rewards: list[float]) -> dict:
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
    return {"mean": round(mean, 3), "standard_error": round((variance / len(rewards)) ** 0.5, 3)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/demo_world", help="folder to write")
    parser.add_argument("--pairs", type=int, default=2400, help="preference pairs")
    parser.add_argument("--steps", type=int, default=1300, help="training steps of the base model")
    parser.add_argument("--batch_size", type=int, default=32, help="conversations per step")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--hidden", type=int, default=64, help="width, a multiple of 8")
    parser.add_argument("--layers", type=int, default=3, help="transformer blocks")
    parser.add_argument("--samples", type=int, default=512, help="answers for the check at the end")
    parser.add_argument("--seed", type=int, default=0, help="of pairs, text and weights")
    for name, share in list(SHARES.items())[1:]:
        parser.add_argument(f"--{name}_share", type=float, default=share,
                            help=f"fraction of the pairs that are {name}, 0 = none")
    args = parser.parse_args(argv)
    shares = {name: getattr(args, f"{name}_share", 0.0) for name in SHARES}
    if min(shares.values()) < 0 or sum(shares.values()) > 1:
        parser.error(" ".join(f"--{name}_share {share:g}" for name, share in list(shares.items())[1:])
                     + ": each must be at least 0, and the sum at most 1")
    for name in ("pairs", "steps", "batch_size", "layers", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.hidden < 8 or args.hidden % 8:
        parser.error(f"--hidden is {args.hidden}; it must be a multiple of 8, e.g. --hidden 64")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"demo_world: cannot write --out {out}: {error.strerror}")

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    # With matrices this small a second thread gains little, waits a lot where the other core is
    # busy, and would make the weights depend on the number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.time()

    # Three seeds apart, so that neither the pairs nor the check repeat the training text.
    pairs = make_pairs(args.pairs, 3 * args.seed, shares)
    conversations = draw_conversations(args.steps * args.batch_size, seed=3 * args.seed + 1)
    tokenizer = make_tokenizer(conversations)
    model = make_model(tokenizer, args.hidden, args.layers)
    loss = pretrain(model, tokenizer, conversations, args.steps, args.lr)
    trained = time.time() - started

    prompts, spoken = zip(*draw_conversations(args.samples, seed=3 * args.seed + 2))
    answers = sample(model.eval(), tokenizer, list(prompts), args.seed)
    well_formed = sum(map(is_well_formed, answers)) / len(answers)
    rewards = describe(list(map(true_reward, prompts, answers)))

    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    with open(out / "pairs.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs)
    counts = {subset: sum(row["subset"] == subset for row in pairs) for subset in SHARES}
    meta = {
        "world": __doc__.split("writes base/")[0].strip().split("\n"),
        "arguments": vars(args), "pairs": counts,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": len(tokenizer), "loss": round(loss, 4), "well_formed": round(well_formed, 4),
        "true_reward_of_samples": rewards,
        "true_reward_of_the_shopkeeper": describe(list(map(true_reward, prompts, spoken))),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{out}: {len(pairs)} pairs {counts}; base of {meta['parameters']:,} parameters, loss "
          f"{loss:.3f}, {100 * well_formed:.1f} % of samples well-formed, true reward "
          f"{rewards['mean']:.2f} ± {rewards['standard_error']:.2f}; training {trained:.0f} s, "
          f"in all {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
