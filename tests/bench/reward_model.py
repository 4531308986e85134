"""A reward model as the function that evaluate.py --reward wants; REWARD_MODEL names its folder or hub name.

    REWARD_MODEL=MODEL python evaluate.py --reward tests/bench/reward_model.py:reward --models ... --data data/NAME

It needs one label (sequence classification). Prompt and response become one turn of the user and one of the assistant,
in the model's own chat template if it has one. A prompt of several turns is a single message here: evaluate.py hands
over its text without special tokens. Texts are judged one at a time, in float32 on a CPU and bfloat16 on a GPU.
"""
import functools
import os

import torch
import transformers


@functools.cache
def load(name):
    """-> model, tokenizer."""
    cuda = torch.cuda.is_available()
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        name, dtype=torch.bfloat16 if cuda else torch.float32, output_loading_info=True)
    assert not info["missing_keys"], f"{name} is no reward model: it lacks {', '.join(info['missing_keys'])}"
    assert model.config.num_labels == 1, f"{name} has {model.config.num_labels} labels; a reward has one"
    return model.to("cuda" if cuda else "cpu").eval(), transformers.AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def reward(prompt: str, response: str) -> float:
    model, tokenizer = load(os.environ["REWARD_MODEL"])
    text = f"{prompt}\n\n{response}"
    if tokenizer.chat_template:
        turns = [dict(role="user", content=prompt), dict(role="assistant", content=response)]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    model.config.pad_token_id = None  # there is no padding: the last token counts, whatever it is
    return model(input_ids=inputs["input_ids"].to(model.device)).logits[0, 0].item()
