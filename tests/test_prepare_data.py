"""prepare_data.py claims, and this file tests:

- every documented format becomes the same kind of pair, with or without a chat template;
- pairs in = pairs out + dropped, for every input, and every drop names file, line and reason;
- prompt and response decode to the source text; both sides share one list of prompt tokens;
- a response ends in exactly one end token; no prompt begins with two BOS;
- no prompt is in both splits; the result does not depend on the number of processes;
- what a user gets wrong is answered by one line, and leaves no folder that looks finished;
- memory does not grow with the number of rows.
"""

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402

SHARED = ROOT.parent / "shared"
SMOLLM = Path("/tmp/smollm2")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXT = ["Why is the sky blue? Because blue light is scattered more than red light.",
        "Human: Assistant: user system Question Answer: A. B. C. D. good bad answer prompt chosen"]
ODD = "e\u0301 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u0928\u093f \ud55c\uae00 \t  x\u00a0y"


def make_tokenizer(folder, template=None, bos=False, normalizer=None, merges=True):
    """A byte-level BPE tokenizer of a few hundred tokens in `folder`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges)
    core.decoder, core.normalizer = decoders.ByteLevel(), normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>", "<|eos|>"])
    core.train_from_iterator(TEXT * 3 + ["foobar foobar " * 9], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|im_end|>" if template else "<|eos|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("chat"), CHATML)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("base"), bos=True)


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def run(dataset, model, out, *flags):
    """The script in this process -> (meta, {split: rows}, dropped records)."""
    argv = ["prepare_data.py", "--dataset", str(dataset), "--model", str(model), "--out", str(out)]
    saved, sys.argv = sys.argv, [*argv, "--num_proc", "1", *map(str, flags)]
    try:
        prepare_data.main()
    finally:
        sys.argv = saved
    return load(out)


def load(out):
    splits = {name: datasets.load_from_disk(str(Path(out) / name)) for name in ("train", "val")}
    dropped = [json.loads(line) for line in (Path(out) / "dropped.jsonl").read_text().splitlines()]
    return json.loads((Path(out) / "meta.json").read_text()), splits, dropped


def fails(capsys, *inputs):
    """The one line with which the script gives up."""
    with pytest.raises(SystemExit) as error:
        run(*inputs)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message, message
    assert not Path(inputs[2]).exists() and not Path(f"{inputs[2]}.partial").exists()
    return message


def one(row, model, tmp_path, *flags):
    """What becomes of one row: ((prompt, chosen, rejected) as text, ...), [(reason, value), ...]."""
    filler = [{"prompt": f"filler {i}", "chosen": "good", "rejected": "bad"} for i in range(40)]
    path = write(tmp_path / "one.jsonl", [row, *filler])
    _, splits, dropped = run(path, model, tmp_path / "out", "--val_fraction", 0.3, "--overwrite", *flags)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = [p for s in splits.values() for p in s if p["id"].startswith("one:000001")]
    texts = []
    for pair in sorted(pairs, key=lambda p: p["id"]):
        start = tokenizer.decode(pair["prompt"])
        sides = [tokenizer.decode(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        texts.append((start, *(side[len(start):] for side in sides)))
    return texts, [(d["reason"], d["value"]) for d in dropped]


def check(meta, splits, dropped, tokenizer):
    """What must hold for every result."""
    counts = meta["counts"]
    assert counts["pairs_in"] == counts["pairs_out"] + len(dropped)
    assert counts["pairs_out"] == counts["train"] + counts["val"] == sum(map(len, splits.values()))
    assert counts["dropped"] == Counter(d["reason"] for d in dropped)
    assert sum(counts["subsets"].values()) == counts["pairs_out"]
    bad_rows = {(d["file"], d["line"]) for d in dropped}
    assert counts["rows"] <= len(bad_rows) + counts["pairs_out"]
    end, bos, prompts, ids = meta["eos_token_id"], tokenizer.bos_token_id, {}, []
    for name, rows in splits.items():
        ids += rows["id"]
        assert prepare_data.content_hash(rows) == meta["content_hash"][name]
        for pair in rows:
            assert prompts.setdefault(tuple(pair["prompt"]), name) == name, "a prompt in both splits"
            assert pair["prompt"] and pair["chosen"] != pair["rejected"]
            assert pair["prompt"][:2] != [bos, bos]
            for side in (pair["chosen"], pair["rejected"]):
                assert side.count(end) == 1 and side[-1] == end and len(side) > 1
                assert len(pair["prompt"]) + len(side) <= meta["arguments"]["max_length"]
    assert len(set(ids)) == len(ids)


# ---- formats ----

USER, GOOD, BAD = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "good"},
                   {"role": "assistant", "content": "bad"})
SYSTEM, FIRST = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hm?"}
ONE_TURN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
WITH_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n" + ONE_TURN
TWO_TURNS = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nHm?<|im_end|>\n") + ONE_TURN
FORMATS = {
    "plain": (dict(prompt="Why?", chosen="good", rejected="bad"), ONE_TURN),
    "plain with system": (dict(system="Be kind.", prompt="Why?", chosen="good", rejected="bad"), WITH_SYSTEM),
    "conversation, implicit": (dict(chosen=[USER, GOOD], rejected=[USER, BAD]), ONE_TURN),
    "conversation, explicit": (dict(prompt=[SYSTEM, USER], chosen=[GOOD], rejected=[BAD]), WITH_SYSTEM),
    "conversation, both": (dict(prompt=[USER], chosen=[USER, GOOD], rejected=[USER, BAD]), ONE_TURN),
    "conversation, text answers": (dict(prompt=[USER], chosen="good", rejected="bad"), ONE_TURN),
    "conversation, several turns": (
        dict(chosen=[USER, FIRST, USER, GOOD], rejected=[USER, FIRST, USER, BAD]), TWO_TURNS),
    "ShareGPT": (dict(conversations=[{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Why?"}],
                      chosen={"from": "gpt", "value": "good"}, rejected={"from": "gpt", "value": "bad"}),
                 WITH_SYSTEM),
    "Alpaca": (dict(instruction="Why?", input="", output="x", chosen="good", rejected="bad"), ONE_TURN),
    "Alpaca with input": (dict(instruction="Why?", input="Sky", chosen="good", rejected="bad"),
                          ONE_TURN.replace("Why?", "Why?\n\nSky")),
    "hh-rlhf": (dict(chosen="\n\nHuman: Why?\n\nAssistant: good", rejected="\n\nHuman: Why?\n\nAssistant: bad"),
                ONE_TURN),
    "hh-rlhf, several turns": (
        {k: f"\n\nHuman: Why?\n\nAssistant: Hm?\n\nHuman: Why?\n\nAssistant: {v}"
         for k, v in (("chosen", "good"), ("rejected", "bad"))}, TWO_TURNS),
    "UltraFeedback": (dict(prompt="Why?", prompt_id="1", messages=[USER, GOOD], score_chosen=9.0, score_rejected=2.0,
                           chosen=[USER, GOOD], rejected=[USER, BAD]), ONE_TURN),
    "RewardBench-2": (dict(prompt="Why?", chosen=["good"], rejected=["bad"], subset="Math"), ONE_TURN),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_conversation_that_it_means(name, chat, tmp_path):
    row, prompt = FORMATS[name]
    texts, dropped = one(row, chat, tmp_path)
    assert texts == [(prompt, "good<|im_end|>", "bad<|im_end|>")] and not dropped
    counts = json.loads((tmp_path / "out/meta.json").read_text())["counts"]
    assert set(counts["formats"]) == {name.split(",")[0].split(" with")[0].replace("UltraFeedback", "conversation"), "plain"}


@pytest.mark.parametrize("answer", ["B", 1])
@pytest.mark.parametrize("column", ["options", "choices"])
def test_multiple_choice_sets_the_right_option_against_each_wrong_one(answer, column, chat, base, tmp_path):
    row = {"question": "Why?", column: ["red", "blue", "x"], "answer": answer, "category": "light"}
    question = ONE_TURN.replace("Why?", "Why?\nA. red\nB. blue\nC. x\nAnswer:")
    texts, _ = one(row, chat, tmp_path)
    assert texts == [(question, "B. blue<|im_end|>", f"{w}<|im_end|>") for w in ("A. red", "C. x")]
    assert json.loads((tmp_path / "out/meta.json").read_text())["counts"]["subsets"]["light"] == 2
    texts, _ = one(row, chat, tmp_path, "--wrong_options", "one")
    assert len(texts) == 1 and texts[0][1] == "B. blue<|im_end|>" and texts[0][2] != texts[0][1]
    texts, _ = one(row, base, tmp_path)
    assert texts[0] == ("<|bos|>Why?\nA. red\nB. blue\nC. x\nAnswer:", " B. blue<|eos|>", " A. red<|eos|>")


def test_several_chosen_and_rejected_give_a_pair_each_and_ties_are_kept_apart(chat, tmp_path):
    row = dict(prompt="Why?", chosen=["a", "b"], rejected=["c", "d", None], subset="Ties")
    texts, dropped = one(row, chat, tmp_path)
    assert not texts and Counter(r for r, _ in dropped) == {"ties": 6}
    texts, dropped = one(row, chat, tmp_path, "--ties")
    assert [t[1:] for t in texts] == [(f"{c}<|im_end|>", f"{r}<|im_end|>") for c in "ab" for r in "cd"]
    assert [r for r, _ in dropped] == ["malformed"] * 2


def test_without_template_text_is_joined_as_it_is_behind_one_bos(base, chat, tmp_path):
    row = dict(prompt="Why?", chosen=" good", rejected=" bad")
    assert one(row, base, tmp_path)[0] == [("<|bos|>Why?", " good<|eos|>", " bad<|eos|>")]
    assert one(row, chat, tmp_path, "--plain")[0] == [("Why?", " good<|im_end|>", " bad<|im_end|>")]
    row = FORMATS["hh-rlhf"][0]
    assert one(row, base, tmp_path)[0][0][0] == "<|bos|>\n\nHuman: Why?\n\nAssistant:"
    row = FORMATS["conversation, several turns"][0]
    assert one(row, base, tmp_path)[0] == [
        ("<|bos|>\n\nHuman: Why?\n\nAssistant: Hm?\n\nHuman: Why?\n\nAssistant:", " good<|eos|>", " bad<|eos|>")]


def test_rendered_text_gets_no_second_bos_and_no_second_end(base, tmp_path):
    row = dict(prompt="<|bos|><|im_start|>Why?", chosen=" good<|eos|>\n", rejected=" bad")
    assert one(row, base, tmp_path, "--plain")[0] == [
        ("<|bos|><|im_start|>Why?", " good<|eos|>", " bad<|eos|>")]


def test_eos_token_overrides_the_end_token(chat, base, tmp_path):
    row = dict(prompt="Why?", chosen="good", rejected="bad")
    assert one(row, chat, tmp_path, "--eos_token", "<|eos|>")[0][0][1] == "good<|eos|>"
    assert one(row, base, tmp_path, "--eos_token", "<|im_end|>")[0][0][1] == "good<|im_end|>"


TEMPLATES = {
    "no end token": ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                     "{% if add_generation_prompt %}assistant: {% endif %}",
                     "user: Why?\nassistant:", " good<|im_end|>"),  # one token across the boundary
    "bos and a space before the end": (
        "<|bos|>{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} "
        "{{ m['content'] }} <|eos|>{% endif %}{% endfor %}", "<|bos|>[Why?]", " good <|eos|>"),
    "thinking opened for generation only": (
        CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif"),
        ONE_TURN, "good<|im_end|>"),
    "thinking written before every answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ONE_TURN, "<think>\n\n</think>\n\ngood<|im_end|>"),
    "two end tokens": (CHATML + "{% if not add_generation_prompt %}<|eos|>{% endif %}", ONE_TURN, "good<|im_end|>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_is_what_the_template_renders_after_the_prompt(name, tmp_path):
    template, prompt, chosen = TEMPLATES[name]
    model = make_tokenizer(tmp_path / "tokenizer", template, bos=True)
    texts, dropped = one(dict(prompt="Why?", chosen="good", rejected="bad"), model, tmp_path)
    assert texts[0][:2] == (prompt, chosen) and not dropped


SCORED = {  # template: its prompt and chosen response with --score_header
    "two end tokens": None,  # it writes <|eos|> after the question, and not before an answer
    "no end token": ("user: Why?\n", "assistant: good<|im_end|>"),
    "bos and a space before the end": ("<|bos|>[Why?]", " good <|eos|>"),  # there is no header
    "thinking opened for generation only": ("<|im_start|>user\nWhy?<|im_end|>\n", "<|im_start|>assistant\ngood<|im_end|>"),
    "thinking written before every answer": (
        "<|im_start|>user\nWhy?<|im_end|>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\ngood<|im_end|>"),
    "Llama 3": ("<|bos|><|start|>user<|end|>\n\nWhy?<|im_end|>", "<|start|>assistant<|end|>\n\ngood<|im_end|>"),
}
LLAMA = ("{{ '<|bos|>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|im_end|>' }}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}")


@pytest.mark.parametrize("name", SCORED)
def test_with_score_header_the_prompt_ends_with_the_question_and_the_response_opens_the_turn(name, tmp_path):
    """As the authors of SimPO render: the prompt without add_generation_prompt."""
    model = make_tokenizer(tmp_path / "tokenizer", LLAMA if name == "Llama 3" else TEMPLATES[name][0], bos=True)
    row = dict(prompt="Why?", chosen="good", rejected="bad")
    if SCORED[name] is None:
        with pytest.raises(SystemExit, match="mostly 'template'"):
            one(row, model, tmp_path, "--score_header")
        return
    (scored, *_), dropped = one(row, model, tmp_path, "--score_header")
    assert scored[:2] == SCORED[name] and not dropped
    (plain, *_), _ = one(row, model, tmp_path)
    assert scored[0] + scored[1] == plain[0] + plain[1]  # the same text, cut elsewhere


@pytest.mark.parametrize("flags", [[], ["--score_header"]])
def test_a_response_of_which_the_template_leaves_nothing_is_dropped(flags, tmp_path):
    template = LLAMA.replace("m['content']", "m['content'].split('</think>')[-1]")
    model = make_tokenizer(tmp_path / "tokenizer", template, bos=True)
    row = dict(prompt="Why?", chosen="<think>good</think>", rejected="bad")
    texts, dropped = one(row, model, tmp_path, *flags)
    assert not texts and [reason for reason, _ in dropped] == ["empty"]


def test_score_header_leaves_the_split_as_it_is_and_needs_a_template(chat, base, tmp_path, capsys):
    path, ids = write(tmp_path / "a.jsonl", ROWS), []
    for i, flags in enumerate(([], ["--score_header"])):
        meta, splits, dropped = run(path, chat, tmp_path / f"out{i}", *flags)
        check(meta, splits, dropped, AutoTokenizer.from_pretrained(chat))
        ids.append({name: rows["id"] for name, rows in splits.items()})
    assert ids[0] == ids[1]
    assert "--score_header" in fails(capsys, path, base, tmp_path / "x", "--score_header")
    assert "--plain" in fails(capsys, path, chat, tmp_path / "x", "--score_header", "--plain")


# ---- drops ----

DROPS = {
    "a truncated line": ('{"prompt": "Why?", "chosen": "go', "malformed", "not JSON"),
    "a number as a row": ("7", "malformed", "no row: 7"),
    "a null row": ("null", "malformed", "no row"),
    "invalid columns": (dict(text="Why?"), "malformed", "text"),
    "a null answer": (dict(prompt="Why?", chosen="good", rejected=None), "malformed", "rejected is not valid text: None"),
    "a null prompt": (dict(prompt=None, chosen="good", rejected="bad"), "malformed", "prompt is not valid text: None"),
    "a missing answer": (dict(prompt="Why?", chosen="good"), "malformed", "prompt, chosen"),
    "a number as an answer": (dict(prompt="Why?", chosen=3, rejected="bad"), "malformed", "3"),
    "half a surrogate pair": ('{"prompt": "Why?", "chosen": "\\ud83d", "rejected": "bad"}', "malformed", "ud83d"),
    "an empty list": (dict(prompt="Why?", chosen=[], rejected=["bad"]), "malformed", "[]"),
    "an unknown role": (dict(chosen=[USER, {"role": "elf", "content": "x"}], rejected=[USER, BAD]), "malformed", "elf"),
    "a message without content": (dict(chosen=[USER, {"role": "assistant"}], rejected=[USER, BAD]), "malformed", "None"),
    "an answer by the user": (dict(chosen=[GOOD, USER], rejected=[USER, BAD]), "malformed", "assistant turn"),
    "a prompt that ends with an answer": (dict(prompt=[USER, GOOD], chosen="x", rejected="y"), "malformed", "user turn"),
    "a dialogue without Assistant": (dict(chosen="\n\nHuman: a", rejected="\n\nHuman: b"), "malformed", "dialogue"),
    "an answer out of range": (dict(question="q", options=["a", "b"], answer="C"), "malformed", "'C'"),
    "an index as text": (dict(question="q", options=["a", "b"], answer="1"), "malformed", "'1'"),
    "a boolean answer": (dict(question="q", options=["a", "b"], answer=True), "malformed", "True"),
    "a weight that is no number": (dict(prompt="Why?", chosen="a", rejected="b", weight=None), "malformed", "weight"),
    "a weight that is not finite": (
        '{"prompt": "Why?", "chosen": "a", "rejected": "b", "weight": NaN}', "malformed", "nan"),
    "an empty answer": (dict(prompt="Why?", chosen="", rejected="bad"), "empty", "Why?"),
    "a blank answer": (dict(prompt="Why?", chosen=" \n\u00a0", rejected="bad"), "empty", "Why?"),
    "an empty prompt": (dict(prompt=" ", chosen="good", rejected="bad"), "empty", "good"),
    "identical answers": (dict(prompt="Why?", chosen="good", rejected="good"), "identical", "good"),
    "different dialogues": (dict(chosen="\n\nHuman: a\n\nAssistant: x", rejected="\n\nHuman: b\n\nAssistant: y"),
                            "prompts differ", "a"),
    "different conversations": (dict(chosen=[USER, GOOD], rejected=[SYSTEM, USER, BAD]), "prompts differ", "Be kind"),
    "answers of several turns": (
        dict(chosen=[USER, GOOD, USER, GOOD], rejected=[USER, BAD, USER, BAD]), "prompts differ", "good"),
    "an end token in the answer": (dict(prompt="Why?", chosen="a<|im_end|>b", rejected="b"), "special token", "<|im_end|>"),
    "a special token in the prompt": (dict(prompt="<|bos|>", chosen="a", rejected="b"), "special token", "<|bos|>"),
    "100,000 tokens": (dict(prompt="Why?", chosen="7 " * 50_000, rejected="b"), "too long", "tokens"),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_pair_is_dropped_with_place_and_reason_for(name, chat, tmp_path):
    row, reason, value = DROPS[name]
    texts, dropped = one(row, chat, tmp_path)
    assert not texts and [r for r, _ in dropped] == [reason] and value in dropped[0][1]
    record = json.loads((tmp_path / "out/dropped.jsonl").read_text())
    assert (record["file"], record["line"], record["id"]) == ("one.jsonl", 1, "one:000001")
    assert len(record["value"]) < 300


def test_a_template_that_refuses_a_conversation_drops_it_with_its_own_words(tmp_path):
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    model = make_tokenizer(tmp_path / "tokenizer", picky)
    texts, dropped = one(FORMATS["plain with system"][0], model, tmp_path)
    assert not texts and dropped[0][0] == "template" and "no system role" in dropped[0][1]


def test_in_rendered_text_an_end_token_inside_a_response_is_a_drop(base, tmp_path):
    row = dict(prompt="Why?", chosen="a<|eos|>b", rejected="b")
    assert one(row, base, tmp_path, "--plain")[1][0][0] == "special token"


def test_a_tokenizer_that_loses_text_drops_the_pair_and_one_that_normalises_it_does_not(tmp_path):
    row = dict(prompt="Why?", chosen=f"good {ODD}", rejected="bad")
    lossy = make_tokenizer(tmp_path / "lossy", CHATML)
    core = json.loads((tmp_path / "lossy/tokenizer.json").read_text())
    core["decoder"] = {"type": "Sequence", "decoders": [core["decoder"], {"type": "Replace", "pattern": {"String": "\t"}, "content": ""}]}
    (tmp_path / "lossy/tokenizer.json").write_text(json.dumps(core))
    texts, dropped = one(row, lossy, tmp_path)
    assert not texts and dropped[0][0] == "decode"
    nfc = make_tokenizer(tmp_path / "nfc", CHATML, normalizer=normalizers.NFC())
    texts, dropped = one(row, nfc, tmp_path)
    assert not dropped and texts[0][1] == f"good {ODD}<|im_end|>".replace("e\u0301", "\u00e9")


# ---- the boundary ----


def test_a_token_across_the_boundary_belongs_to_both_responses(tmp_path):
    model = make_tokenizer(tmp_path / "tokenizer", bos=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer(" foobar", add_special_tokens=False).input_ids) == 1
    texts, dropped = one(dict(prompt="so foo", chosen="bar", rejected="d"), model, tmp_path)
    assert not dropped and texts == [("<|bos|>so", " foobar<|eos|>", " food<|eos|>")]
    texts, _ = one(dict(prompt="foo", chosen="bar", rejected="d"), model, tmp_path)
    assert "".join(texts[0][:2]) == "<|bos|>foobar<|eos|>"


def whole_texts(tokenizer, prompt, texts):
    """What tokenise must return, from whole texts and all their offsets."""
    coded = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
    ids, spans, cut = [each.input_ids for each in coded], [each.offset_mapping for each in coded], 0
    for a, b, (_, end_a), (_, end_b) in zip(*ids, *spans):
        if a != b or max(end_a, end_b) > len(prompt):
            break
        cut += 1
    while cut and any(span[cut:] and span[cut][0] < span[cut - 1][1] for span in spans):
        cut -= 1
    return ids[0][:cut], [each[cut:] for each in ids], len(prompt) - (spans[0][cut - 1][1] if cut else 0)


@pytest.mark.parametrize("name", ["bytes", "first", "always", "prepend", "lstrip", "normalized", "stories15M", "MiniMind2-Small"])
def test_what_both_sides_share_is_encoded_once_and_no_token_differs_from_those_of_whole_texts(name, tmp_path):
    if name in ("stories15M", "MiniMind2-Small"):
        if not (SHARED / "models" / name).is_dir():
            pytest.skip("no shared models")
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
        open_, close = ("<s>", "</s>") if name == "stories15M" else ("<|im_start|>", "<|im_end|>")
    else:
        open_, close = "<|im_start|>", "<|im_end|>"
        normalizer = normalizers.Prepend("x") if name in ("prepend", "normalized") else None
        tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "made", CHATML, normalizer=normalizer))
        if name in ("first", "always"):
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Metaspace(prepend_scheme=name, split=False), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        if name in ("lstrip", "normalized"):
            tokenizer.backend_tokenizer.add_tokens([AddedToken("<|odd|>", **{kind: kind == name for kind in ("lstrip", "normalized")})])
            open_ = "<|odd|>"
        tokenizer.save_pretrained(tmp_path / "made")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "kit")
    kit = prepare_data.load_tokenizer(prepare_data.Args(dataset="", model=str(tmp_path / "kit"), out="", plain=True))
    shared = 0
    for start in ("", open_, f"a{open_}b  {open_}", f"{open_}a {close}\n {open_}b\n", f"a{close}  {close}\n", "foo"):
        for cut in range(len(ODD)):
            prompt = start + ODD[:cut]
            texts = [prompt + answer for answer in (ODD[cut:], "bar", " d", f"{close}x", "")]
            for pair in itertools.permutations(texts, 2):
                assert prepare_data.tokenise(kit, prompt, pair) == whole_texts(tokenizer, prompt, pair)
            shared += max((found.start() for found in kit.breaks.finditer(prompt)), default=0) > 0
    assert shared > 0


@pytest.mark.parametrize("cut", range(1, len(ODD)))
def test_prompt_and_response_decode_to_the_source_wherever_it_is_cut(cut, base, chat, tmp_path):
    if not ODD[:cut].strip() or not ODD[cut:].strip():
        pytest.skip("a blank side is another test")
    row = dict(prompt=ODD[:cut], chosen=ODD[cut:], rejected="\u200d bad")
    for model, bos, end in ((base, "<|bos|>", "<|eos|>"), (chat, "", "<|im_end|>")):
        texts, dropped = one(row, model, tmp_path, "--plain")
        assert not dropped and "".join(texts[0][:2]) == bos + ODD + end
        assert "\ufffd" not in "".join(texts[0]), "a character was split"


@pytest.mark.parametrize("name", ["stories15M", "stories260K", "MiniMind2-Small"])
def test_the_pretrained_tokenizers_give_odd_texts_back(name, tmp_path):
    model = SHARED / "models" / name
    if not model.is_dir():
        pytest.skip(f"no {model}")
    cuts = [i for i in range(1, len(ODD)) if ODD[:i].strip() and ODD[i:].strip()]
    rows = [dict(prompt=f"{i}: {ODD[:i]}", chosen=ODD[i:], rejected=" bad") for i in cuts]
    rows += [dict(prompt=f" \u2581 {i}", chosen="\u2581  a\n", rejected=" bad") for i in range(9)]
    path = write(tmp_path / "odd.jsonl", rows)
    for flags in ([], ["--plain"]):
        meta, splits, dropped = run(path, model, tmp_path / "out", "--val_fraction", 0.5, "--overwrite", *flags)
        check(meta, splits, dropped, AutoTokenizer.from_pretrained(model))
        assert not dropped and meta["eos_token_id"] == 2  # </s> or <|im_end|>, never stories' <s>


# ---- files ----

ROWS = [dict(prompt=f"Why {i}?", chosen="good", rejected="bad", weight=i / 2) for i in range(60)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.parquet.gz", "lines.json"])
def test_all_kinds_of_files_give_the_same_pairs(name, chat, tmp_path):
    if ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "raw")
    else:
        lines = "\ufeff" + "\n\n".join(map(json.dumps, ROWS))
        (tmp_path / "raw").write_text(json.dumps(ROWS) if name.startswith("a.json") and "jsonl" not in name else lines)
    data = (tmp_path / "raw").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    meta, splits, dropped = run(tmp_path / name, chat, tmp_path / "out")
    check(meta, splits, dropped, AutoTokenizer.from_pretrained(chat))
    assert meta["counts"]["rows"] == 60 and not dropped
    weights = {p["id"].split(":")[1]: p["weight"] for s in splits.values() for p in s}
    assert sorted(weights.values()) == [i / 2 for i in range(60)]
    assert splits["train"].features["weight"].dtype == "float32"
    assert splits["train"].features["prompt"].feature.dtype == "int32"
    assert set(splits["train"]["source"]) == {name}


def test_several_files_have_unique_ids_and_no_weight_column_without_weights(chat, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "weight"} for row in ROWS]
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", rows)
    both = f"{tmp_path}/x/a.jsonl, {tmp_path}/y/a.jsonl"
    meta, splits, dropped = run(both, chat, tmp_path / "out")
    check(meta, splits, dropped, AutoTokenizer.from_pretrained(chat))
    assert meta["counts"]["pairs_out"] == 120
    assert splits["train"].column_names == ["prompt", "chosen", "rejected", "source", "subset", "id"]


def test_a_folder_is_read_through_load_dataset(chat, tmp_path):
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", ROWS)
    meta, splits, dropped = run(tmp_path / "hub", chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 60
    assert splits["val"][0]["id"].startswith(f"{tmp_path}/hub:0000")


def test_the_result_depends_neither_on_processes_nor_on_a_second_run(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS * 12, '{"prompt": "cut'])
    hashes, drops = [], []
    for i, flags in enumerate(([], [], ["--num_proc", "2"])):
        meta, _, dropped = run(path, chat, tmp_path / f"out{i}", *flags)
        hashes.append(meta["content_hash"])
        drops.append(dropped)
    assert hashes[0] == hashes[1] == hashes[2] and drops[0] == drops[2]
    assert drops[0][0]["line"] == 721


def test_equal_prompts_stay_together_and_the_seed_deals_them_anew(chat, tmp_path):
    rows = [dict(prompt=f"Why {i % 30}?" + " " * (i // 30), chosen="good", rejected="bad") for i in range(90)]
    path, val = write(tmp_path / "a.jsonl", rows), []
    for seed in (0, 1):
        _, splits, _ = run(path, chat, tmp_path / f"out{seed}", "--val_fraction", 0.3, "--seed", seed)
        numbers = [int(i.split(":")[1]) - 1 for i in splits["val"]["id"]]
        assert Counter(n % 30 for n in numbers).most_common()[-1][1] == 3  # all three or none
        val.append(set(numbers))
    assert val[0] != val[1]


# ---- what users get wrong ----


def test_errors_are_one_line_that_names_value_and_way_out(chat, base, tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", ROWS)
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.json").write_text("this is no JSON")
    (tmp_path / "object.json").write_text('[{"prompt": "Why?", "cho')
    whole = gzip.compress(good.read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(good.read_bytes())
    (tmp_path / "not.parquet").write_bytes(good.read_bytes())
    columns = write(tmp_path / "columns.jsonl", [dict(question="a", reply="b")] * 3)
    for dataset, words in [
            ("empty.jsonl", "0 rows"), ("wrong.json", "wrong.json"), ("object.json", "object.json"),
            ("cut.jsonl.gz", "cut.jsonl.gz"), ("not.jsonl.gz", "gz"), ("not.parquet", "not.parquet"),
            ("absent.jsonl", "No such file"), ("absent", "--dataset"), ("columns.jsonl", "question, reply")]:
        assert words in fails(capsys, tmp_path / dataset, chat, out), dataset
    assert columns and len((tmp_path / "out.dropped.jsonl").read_text().splitlines()) == 3
    assert "--max_length" in fails(capsys, good, chat, out, "--max_length", 5)
    assert "--val_fraction" in fails(capsys, good, chat, out, "--val_fraction", 1e-9)
    assert "--val_fraction" in fails(capsys, good, chat, out, "--val_fraction", 1.5)
    assert "--wrong_options" in fails(capsys, good, chat, out, "--wrong_options", "none")
    assert "--max" in fails(capsys, good, chat, out, "--max", 5)  # no abbreviations
    assert "--eos_token" in fails(capsys, good, chat, out, "--eos_token", "<no>")
    assert "--model" in fails(capsys, good, tmp_path / "no_model", out)
    assert "twice" in fails(capsys, f"{good},{good}", chat, out)
    assert "good.jsonl" in fails(capsys, good, chat, good / "x")  # a folder inside a file


def test_only_an_earlier_result_is_overwritten_and_only_when_asked(chat, tmp_path):
    path, out = write(tmp_path / "a.jsonl", ROWS), tmp_path / "out"
    run(path, chat, out)
    with pytest.raises(SystemExit, match="--overwrite"):
        run(path, chat, out)
    with pytest.raises(SystemExit, match="no pair for train and val"):  # a failed run leaves the earlier result
        run(path, chat, out, "--overwrite", "--max_length", 5)
    assert run(path, chat, out, "--overwrite")[0]["counts"]["pairs_out"] == 60
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="exists"):
        run(path, chat, tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine").is_dir()


def command(dataset, model, out, *flags):
    return [sys.executable, str(ROOT / "prepare_data.py"), "--dataset", str(dataset), "--model", str(model),
            "--out", str(out), *flags]


def test_a_full_disk_is_one_line_and_leaves_nothing(chat, tmp_path):
    rows = [dict(prompt=f"Why {i}?", chosen="7 " * 400, rejected="8 " * 400) for i in range(400)]
    path = write(tmp_path / "a.jsonl", rows)
    done = subprocess.run(["bash", "-c", 'ulimit -f 500; exec "$@"', "-", *command(path, chat, tmp_path / "out", "--num_proc", "1")],
                          capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: cannot write") and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_clears_up(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS * 200)
    child = subprocess.Popen(command(path, chat, tmp_path / "out", "--num_proc", "1"), stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.partial" / "train.arrow").exists():
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    run(write(tmp_path / "a.jsonl", ROWS), chat, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_the_report_marks_the_scored_part_and_adds_up(chat, tmp_path, capsys):
    run(write(tmp_path / "a.jsonl", [*ROWS, dict(prompt="Why?", chosen="", rejected="x")]), chat, tmp_path / "out")
    text = capsys.readouterr().out
    assert "[[good<|im_end|>]]" in text and "[[bad<|im_end|>]]" in text and ONE_TURN[-30:] in text
    assert "61 in (of 61 rows) = " in text and "+ 1 dropped" in text and "1  empty" in text


# ---- real data ----

REAL = ["raw/hh_harmless_test.jsonl.gz", "raw/dpo_en_demo.json", "raw/instruction_data_with_preference.json",
        "instruction_preference.jsonl", "mc/mmlu_pro_sample.jsonl", "mc/arc_easy_val.jsonl",
        "mc/arc_challenge_val.jsonl", "mc/arc_easy_train.jsonl", "mc/arc_challenge_train.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMOLLM, *(SHARED / "models" / m for m in ("MiniMind2-Small", "stories15M", "stories260K"))],
                         ids=lambda path: path.name)
@pytest.mark.parametrize("name", REAL)
def test_real_data_holds_every_promise(name, model, tmp_path):
    path = SHARED / "data" / name
    if not path.exists() or not model.exists():
        pytest.skip(f"no {path} or {model}")
    flags = ["--wrong_options", "one"] if "mmlu" in name else []
    meta, splits, dropped = run(path, model, tmp_path / "out", *flags)
    tokenizer = AutoTokenizer.from_pretrained(model)
    check(meta, splits, dropped, tokenizer)
    known = {"empty", "identical", "prompts differ", "too long"}
    known |= {"malformed"} if "mmlu" in name else set()  # three questions have one option only
    assert set(meta["counts"]["dropped"]) <= known, meta["counts"]["dropped"]
    stream = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    raw = json.load(stream) if path.suffix == ".json" else [json.loads(line) for line in stream]
    assert meta["counts"]["rows"] == len(raw)
    for pair in splits["val"].select(range(min(20, len(splits["val"])))):  # against the raw file
        row = raw[int(pair["id"].split(":")[1].split("-")[0]) - 1]
        answer = tokenizer.decode(pair["chosen"][:-1])
        if "question" in row:
            right = row["answer"] if isinstance(row["answer"], int) else ord(row["answer"]) - 65
            answer_raw = row.get("options", row.get("choices"))[right]
        else:
            answer_raw = row["chosen"]["value"] if isinstance(row["chosen"], dict) else row["chosen"]
        assert answer.strip() in answer_raw if "hh" in name else answer_raw.strip() in answer.strip() \
            or answer.strip()[-20:] == answer_raw.strip()[-20:]


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMOLLM, *(SHARED / "models" / m for m in ("MiniMind2-Small", "stories15M", "stories260K"))],
                         ids=lambda path: path.name)
@pytest.mark.parametrize("name", [REAL[0], REAL[1], "mc/mmlu_pro_sample.jsonl"])
def test_the_tokens_of_real_pairs_are_those_of_whole_texts(name, model, monkeypatch):
    path = SHARED / "data" / name
    if not path.exists() or not model.exists():
        pytest.skip(f"no {path} or {model}")
    args = prepare_data.Args(dataset=str(path), model=str(model), out="", max_length=10**6)
    ours, tokenizer, seen = prepare_data.tokenise, AutoTokenizer.from_pretrained(model), []

    def both(kit, prompt, texts):
        seen.append(ours(kit, prompt, texts))
        assert seen[-1] == whole_texts(tokenizer, prompt, texts)
        return seen[-1]
    monkeypatch.setattr(prepare_data, "tokenise", both)
    prepare_data.prepare_chunk(args, list(itertools.islice(prepare_data.all_rows(args), 200)))
    assert len(seen) > 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(chat, tmp_path):
    def peak(n):
        """Peak of private memory in MiB; mapped files, which Linux may drop any time, do not count."""
        path = tmp_path / f"{n}.jsonl"
        with open(path, "w") as file:
            for i in range(n):
                file.write(json.dumps(dict(prompt=f"Why {i}? " * 4, chosen="good " * 40, rejected="bad " * 40)) + "\n")
        child = subprocess.Popen(command(path, chat, tmp_path / f"out{n}", "--num_proc", "1"),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        most = 0
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            most = max(most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
            time.sleep(0.02)
        assert child.returncode == 0
        return most / 1024

    small, large = peak(6_000), peak(60_000)
    size = os.path.getsize(tmp_path / "60000.jsonl") / 2**20
    print(f"6,000 rows: {small:.0f} MiB, 60,000 rows ({size:.0f} MiB of text): {large:.0f} MiB")
    assert large < small + 40
