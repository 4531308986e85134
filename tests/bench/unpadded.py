"""Attention in the layout packed without tables and padding, to be measured against that of dpo.py, which gathers texts into padded
tables so that there is one way on every device. Here each text's own tokens, which stand together in the row, attend to the keys
and values that it sees: in one kernel (GPUs of NVIDIA, half precision), or one text after the other.

    python tests/bench/gpu.py --slice layouts15b                               the variants `kernel` and `loop`
    python tests/bench/bench.py --contenders "packed,packed loop" --out DIR    on a CPU

Not for models with soft-caps, sinks or value heads of another size, nor for selective checkpointing.
"""
import inspect
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer heads of keys as they are, later versions want to be told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def use(dpo, kernel):
    """Let a policy that dpo.py builds from now on compute attention in this way."""
    def attend(module, query, key, value, attention_mask, texts=None, sliding_window=None, scaling=None, **kwargs):
        key, value = (dpo.Gather.apply(x[0].transpose(0, 1), texts.keys, texts.cells) for x in (key, value))  # (K, H, d)
        how = in_one_kernel if kernel else text_by_text
        return how(query[0].transpose(0, 1), key, value, texts, sliding_window or attention_mask, scaling)[None], None
    dpo.attention_tables = stand_in(dpo)
    dpo.gathered_attention = torch.compiler.disable(attend)


def stand_in(dpo):
    """-> what stands in for attention_tables: of texts in the order of `pack`, the places (K,) of all that they see, and the cells
    (2, L) of those in which each token stands; for each text, how many tokens of the row are its own and how many it sees; and
    where these begin."""
    def texts_of(places, size):
        count = len(places) // 2
        rejected = sum(map(len, places[:count]))  # where the rejected responses begin
        queries = [int((place >= rejected * (i >= count)).sum()) for i, place in enumerate(places)]
        seen = [len(place) for place in places]
        starts = [dpo.to_device(np.cumsum([0, *sizes], dtype=np.int32)) for sizes in (queries, seen)]
        cells = torch.full((2, size), -1)
        for place, end in zip(places, np.cumsum(seen)):
            cells[1, place] = cells[0, place]
            cells[0, place] = end - len(place) + torch.arange(len(place))
        return types.SimpleNamespace(keys=dpo.to_device(torch.cat(places)), cells=dpo.to_device(cells), queries=queries, seen=seen,
                                     starts=starts)
    return texts_of


def in_one_kernel(query, key, value, texts, window, scale):
    """query (L, H, d), key and value (K, maybe fewer, d) -> (L, H, d). The kernel puts a text's last query beside its last key."""
    reach = ((window or 0) - 1, 0)  # keys before a query, -1: all; keys after it
    return varlen_attn(query, key, value, *texts.starts, max(texts.queries), max(texts.seen), scale=scale, window_size=reach, **GROUPED)


def text_by_text(query, key, value, texts, window, scale):
    """The same."""
    outputs = []
    for parts in zip(query.split(texts.queries), key.split(texts.seen), value.split(texts.seen)):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)  # (1, heads, tokens, d)
        length, seen = q.shape[2], k.shape[2]
        mask, past = None, seen - length  # the first query sees these, itself, and nothing after it
        if past or (window or seen) < seen:
            mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(past).triu(past + 1 - (window or seen))
        output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale,
                                                enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
