"""prepare_data.py claims, and this file tests:

- every documented format becomes the same kind of pair, with or without a chat template;
- pairs in = pairs out + dropped, for every input, and every drop names file, line and reason;
- prompt and response decode to the source text; both sides share one list of prompt tokens;
- a response ends in exactly one end token; no prompt begins with two BOS;
- no prompt is in both splits; the result does not depend on the number of processes;
- what a user gets wrong is answered by one line, and leaves no folder that looks finished;
- memory does not grow with the number of rows, and a chunk of rows is bounded in bytes;
- all that the messages of a pair say stands in its text (tools, calls, thoughts, system), or the pair is dropped;
- no row ends the run, and what is not used is counted in the summary;
- each case of ../shared/data/cases, and each kind of row and file like it, gives what it must;
- distinct prompts and responses are numbered as a loop over the pairs numbers them;
- every converter of convert_examples.py reads its layout.
"""

import gzip
import itertools
import json
import os
import random
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
from conftest import with_numbers  # noqa: E402

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
        numbers = ("prompt_id", "chosen_id", "rejected_id")
        expected = [tuple(pair[number] for number in numbers) for pair in with_numbers(rows)]
        assert list(zip(*(rows[number] for number in numbers))) == expected
        assert meta["distinct"][name]["prompts"] == len(set(rows["prompt_id"]))
        assert meta["distinct"][name]["responses"] == len({*rows["chosen_id"], *rows["rejected_id"]})
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
    assert splits["train"].column_names == ["prompt", "chosen", "rejected", "source", "subset", "id",
                                            "prompt_id", "chosen_id", "rejected_id"]


def test_a_folder_is_read_through_load_dataset(chat, tmp_path):
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", ROWS)
    meta, splits, dropped = run(tmp_path / "hub", chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 60
    assert splits["val"][0]["id"].startswith(f"{tmp_path}/hub:0000")


def test_a_folder_with_files_of_two_kinds_is_not_read_in_part(chat, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "a.jsonl", ROWS)
    (tmp_path / "x" / "b.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
    assert "x has .csv and .jsonl files: give the files themselves" in fails(capsys, tmp_path / "x", chat, tmp_path / "out")


def test_a_folder_that_cannot_be_read_is_a_line_that_names_the_cause(chat, tmp_path, capsys):
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub/train.jsonl", [*ROWS, '{"prompt": "Wh'])
    assert "JSON parse error" in fails(capsys, tmp_path / "hub", chat, tmp_path / "out")


@pytest.mark.slow
def test_the_result_depends_neither_on_processes_nor_on_a_second_run(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS * 12, '{"prompt": "cut'])
    results, drops = [], []
    for i, flags in enumerate(([], [], ["--num_proc", "2"])):
        _, splits, dropped = run(path, chat, tmp_path / f"out{i}", *flags)
        results.append({name: rows.to_list() for name, rows in splits.items()})
        drops.append(dropped)
    assert results[0] == results[1] == results[2] and drops[0] == drops[2]
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


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(chat, tmp_path):
    rows = [dict(prompt=f"Why {i}?", chosen="7 " * 400, rejected="8 " * 400) for i in range(400)]
    path = write(tmp_path / "a.jsonl", rows)
    done = subprocess.run(["bash", "-c", 'ulimit -f 500; exec "$@"', "-", *command(path, chat, tmp_path / "out", "--num_proc", "1")],
                          capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: cannot write") and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.slow
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
    rows = prepare_data.all_rows(prepare_data.find_sources(args))
    prepare_data.prepare_chunk(args, list(itertools.islice(rows, 200)))
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


# ---- what the cases of ../shared/data/cases must give, and their kinds ----

TOOLS = ("{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
         "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
         "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
         "{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CUTS_THINK = CHATML.replace("m['content']", "(m['content'].split('</think>') | last)")
CASES = SHARED / "data/cases"
CITY = "What should I wear in Lund on day 1?"
ANSWER, OTHER = "Take a light coat; Lund is mild and often windy.", "Anything. It is Lund."


@pytest.fixture(scope="session")
def with_tools(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tools"), TOOLS)


@pytest.fixture(scope="session")
def cuts_think(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("cuts"), CUTS_THINK)


def turns(*texts, last="assistant"):
    """The prompt of a conversation whose turns are user and assistant in alternation; "system: ..." opens it."""
    text, roles = "", itertools.cycle(["user", "assistant"])
    for said in texts:
        role = "system" if said.startswith("system: ") else next(roles)
        text += f"<|im_start|>{role}\n{said.removeprefix('system: ')}<|im_end|>\n"
    return text + f"<|im_start|>{last}\n"


def first_pair(splits, model):
    """The pair of the first row as text: (prompt, chosen, rejected)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pair = min((pair for rows in splits.values() for pair in rows), key=lambda pair: pair["id"])
    start = tokenizer.decode(pair["prompt"])
    return (start, *(tokenizer.decode(pair["prompt"] + pair[side])[len(start):] for side in ("chosen", "rejected")))


CALL = '<call>{"name": "get_weather", "arguments": {"town": "%s"}}</call>'
MUST = {  # case: (pairs, prompt of the first, its chosen, its rejected)
    "alpaca_history.jsonl": (24, turns("Are you a tailor?", "I am, and I travel.", CITY), ANSWER, OTHER),
    "chosen_is_json_text.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "column_oriented.json": (24, turns(CITY), ANSWER, OTHER),
    "content_parts.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "hh_in_prompt.jsonl": (24, turns("Hello", "Hi, how can I help?", CITY), ANSWER, OTHER),
    "messages_column.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "mixed_with_nulls.parquet": (24, turns(CITY), ANSWER, OTHER),
    "one_bad_row.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "overlap_system_only_in_prompt.jsonl": (24, turns("system: Be brief.", CITY), ANSWER, OTHER),
    "overlap_trailing_newline.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "pairs.csv": (24, turns(CITY), ANSWER, OTHER),
    "passage.jsonl": (96, turns("In Lund the market opens at 6.\n\nWhen does the market in Lund open?\nA. At 6\nB. At 7\nC. At 8\n"
                                "D. At 9\nE. At 10\nAnswer:"), "A. At 6", "B. At 7"),
    "question_column.jsonl": (24, turns("system: Be brief.", CITY), ANSWER, OTHER),
    "repeats.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "scores.jsonl": (24, turns(CITY), ANSWER, OTHER),
    "step_dpo.jsonl": (24, turns("A coat costs 30 and a hat 10. What do both cost?") + "The coat costs 30.",
                       " The hat costs 10, so both cost 40.", " Both cost 30."),
    "think_in_answer.jsonl": (24, turns(CITY), f"<think>\nWindy towns need a coat.\n</think>\n\n{ANSWER}", f"<think>\nhm\n</think>\n\n{OTHER}"),
    "under_a_key.json": (24, turns(CITY), ANSWER, OTHER),
    "reasoning_content.jsonl": (24, turns(CITY), f"<think>Windy towns need a coat.</think>{ANSWER}", f"<think>I do not care.</think>{OTHER}"),
    "same_text_other_call.jsonl": (24, None, "Let me look." + CALL % "Lund", "Let me look." + CALL % "Bergen"),
    "tool_call_as_answer.jsonl": (24, None, "Let me look." + CALL % "Lund", OTHER),
    "tool_call_in_prompt.jsonl": (24, None, ANSWER, OTHER),
}


@pytest.mark.parametrize("case", MUST)
def test_a_case_gives_what_it_must(case, with_tools, tmp_path):
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    meta, splits, dropped = run(CASES / case, with_tools, tmp_path / "out", "--val_fraction", 0.3)
    check(meta, splits, dropped, AutoTokenizer.from_pretrained(with_tools))
    pairs, prompt, chosen, rejected = MUST[case]
    start, *sides = first_pair(splits, with_tools)
    assert meta["counts"]["pairs_out"] == pairs and sides == [chosen + "<|im_end|>", rejected + "<|im_end|>"]
    assert len(dropped) == (case == "one_bad_row.jsonl")
    if prompt is None:  # the list of tools stands first
        assert "Weather of a town" in start
        prompt = start[:start.index("<|im_start|>user")] + turns(CITY)
        if "in_prompt" in case:
            prompt += CALL % "Lund" + "<|im_end|>\n<|im_start|>tool\n14 degrees, windy<|im_end|>\n<|im_start|>assistant\n"
    assert start == prompt


LEFT_OUT = {"tool_call_in_prompt.jsonl": "tools", "tool_call_as_answer.jsonl": "tools", "same_text_other_call.jsonl": "tools",
            "reasoning_content.jsonl": "reasoning", "think_in_answer.jsonl": "<think>", "images.jsonl": "images"}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_case_is_dropped_by_a_template_that_leaves_its_content_out(case, cuts_think, base, tmp_path, capsys):
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    for model in (cuts_think, base):
        if case == "think_in_answer.jsonl" and model == base:
            continue  # plain text has it
        assert f"24 dropped, mostly '{LEFT_OUT[case]}" in fails(capsys, CASES / case, model, tmp_path / "out")
        records = (tmp_path / "out.dropped.jsonl").read_text().splitlines()
        assert len(records) == 24 and LEFT_OUT[case] in json.loads(records[0])["reason"]


def test_the_case_of_two_labelled_answers_names_the_hook_and_is_read_by_it(chat, tmp_path, capsys):
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    message = fails(capsys, CASES / "labelled_ab.jsonl", chat, tmp_path / "out")
    assert "--convert" in message and "response_a, response_b, preferred" in message and "ShareGPT" in message
    meta, splits, _ = run(CASES / "labelled_ab.jsonl", chat, tmp_path / "out", "--val_fraction", 0.3, "--convert", f"{EXAMPLES}:labelled_ab")
    assert meta["counts"]["pairs_out"] == 24
    decode = AutoTokenizer.from_pretrained(chat).decode
    assert all(decode(pair["chosen"]).startswith("Take") for rows in splits.values() for pair in rows)


def test_the_summary_counts_scores_repeats_prompts_and_the_longest(chat, tmp_path, capsys):
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    run(CASES / "scores.jsonl", chat, tmp_path / "a", "--val_fraction", 0.3)
    assert "8 rows agree, 8 tie, 8 contradict" in capsys.readouterr().out
    meta, _, dropped = run(CASES / "scores.jsonl", chat, tmp_path / "b", "--val_fraction", 0.3, "--drop_ties")
    assert meta["counts"]["dropped"] == {"scores tie": 8, "scores contradict": 8}
    run(CASES / "repeats.jsonl", chat, tmp_path / "c", "--val_fraction", 0.3)
    assert "8 distinct; 16 pairs are exact repeats" in capsys.readouterr().out


# ---- kinds of rows ----

EXAMPLES = Path(__file__).parent / "convert_examples.py"
CALLS = [dict(type="function", function=dict(name="look", arguments=dict(town="Lund")))]
WHY, YES, NO = dict(role="user", content="Why?"), dict(role="assistant", content="good"), dict(role="assistant", content="bad")
GOOD_BAD = ("good<|im_end|>", "bad<|im_end|>")
KINDS = {  # what the row has: (row, prompt)
    "a prompt under query": (dict(query="Why?", chosen="good", rejected="bad"), turns("Why?")),
    "a prompt under input": (dict(input="Why?", chosen="good", rejected="bad"), turns("Why?")),
    "an empty prompt beside a question": (dict(prompt="", question="Why?", chosen="good", rejected="bad"), turns("Why?")),
    "conversations and texts": (dict(conversations=[dict(role="user", content="Why?")], chosen="good", rejected="bad"), turns("Why?")),
    "a list under instruction": (dict(instruction=[WHY], chosen="good", rejected="bad"), turns("Why?")),
    "a system_prompt": (dict(system_prompt="Be kind.", prompt="Why?", chosen="good", rejected="bad"), turns("system: Be kind.", "Why?")),
    "a null system": (dict(system=None, prompt="Why?", chosen="good", rejected="bad"), turns("Why?")),
    "the role developer": (dict(prompt=[dict(role="developer", content="Be kind."), WHY], chosen="good", rejected="bad"),
                           turns("system: Be kind.", "Why?")),
    "the role model": (dict(prompt=[WHY], chosen=[dict(role="model", content="good")], rejected=[dict(role="model", content="bad")]), turns("Why?")),
    "messages that hold the answer too": (dict(messages=[WHY, YES], chosen="good", rejected="bad"), turns("Why?")),
    "messages as JSON text": (dict(messages=json.dumps([WHY]), chosen=json.dumps([YES]), rejected=json.dumps(NO)), turns("Why?")),
    "messages as Python text": (dict(prompt=str([WHY]), chosen=str([YES]), rejected=str([NO])), turns("Why?")),
    "a system turn in the answers only": (dict(prompt=[WHY], chosen=[dict(role="system", content="Be kind."), WHY, YES],
                                               rejected=[dict(role="system", content="Be kind."), WHY, NO]), turns("system: Be kind.", "Why?")),
    "the last turn of the prompt again": (dict(prompt=[WHY, YES, dict(role="user", content="So?")], chosen=[dict(role="user", content="So?"), YES],
                                               rejected=[dict(role="user", content="So?"), NO]), turns("Why?", "good", "So?")),
    "a prompt that opens with Human:": (dict(prompt="Human: Why?\n\nAssistant: Hm?\n\nHuman: So?\n\nAssistant: ", chosen="good", rejected="bad"),
                                        turns("Why?", "Hm?", "So?")),
    "dialogues that repeat the prompt": (dict(prompt="\n\nHuman: Why?\n\nAssistant:", chosen="\n\nHuman: Why?\n\nAssistant: good",
                                              rejected="\n\nHuman: Why?\n\nAssistant: bad"), turns("Why?")),
    "parts of OpenAI's kind": (dict(prompt=[dict(role="user", content=[dict(type="input_text", text="Why"), dict(type="text", text="so?")])],
                                    chosen="good", rejected="bad"), turns("Why\nso?")),
    "a conversation in numbered columns of null": (dict(prompt=[WHY | dict(name=None, tool_calls=None)], chosen=[YES | dict(tool_calls=None)],
                                                        rejected=[NO]), turns("Why?")),
    "scores beside the answers": (dict(prompt="Why?", chosen="good", rejected="bad", chosen_rating=5, rejected_rating=1), turns("Why?")),
    "a dialogue as prompt, answers as messages": (dict(prompt="\n\nHuman: Why?\n\nAssistant: Hm?\n\nHuman: So?\n\nAssistant:", chosen=[YES], rejected=[NO]),
                                                  turns("Why?", "Hm?", "So?")),
    "a dialogue as prompt, answers in lists": (dict(prompt="\n\nHuman: Why?\n\nAssistant:", chosen=[" good"], rejected=[" bad"]), turns("Why?")),
    "history as messages": (dict(instruction="So?", history=[WHY, YES], chosen="good", rejected="bad"), turns("Why?", "good", "So?")),
    "history as ShareGPT's messages": (dict(instruction="So?", history=[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Hm?"}],
                                            chosen="good", rejected="bad"), turns("Why?", "Hm?", "So?")),
    "a system column that the messages repeat": (dict(system="Be kind.", prompt=[SYSTEM, WHY], chosen="good", rejected="bad"),
                                                 turns("system: Be kind.", "Why?")),
    "a blank system": (dict(system="  ", prompt="Why?", chosen="good", rejected="bad"), turns("Why?")),
    "columns of NaN": (dict(system=float("nan"), tools=float("nan"), prompt=float("nan"), question="Why?", chosen="good", rejected="bad"),
                       turns("Why?")),
    "blank tools": (dict(tools=" ", prompt="Why?", chosen="good", rejected="bad"), turns("Why?")),
    "an image column without an image": (dict(prompt="Why?", images=[None], image=dict(bytes=None, path=None), chosen="good", rejected="bad"),
                                         turns("Why?")),
    "a text part with a null image": (dict(prompt=[dict(role="user", content=[dict(type="text", text="Why?", image=None)])],
                                           chosen="good", rejected="bad"), turns("Why?")),
    "messages as JSON text, another key first": (dict(prompt='[{"id": 7, "name": "x", "role": "user", "content": "Why?"}]',
                                                      chosen="good", rejected="bad"), turns("Why?")),
    "a text prompt that is the last question": (dict(prompt="So?", chosen=[WHY, YES, dict(role="user", content="So?"), YES],
                                                     rejected=[WHY, YES, dict(role="user", content="So?"), NO]), turns("Why?", "good", "So?")),
    "a text prompt with other white space": (dict(prompt=" Why  so?", chosen=[dict(role="user", content="Why\nso?"), YES],
                                                  rejected=[dict(role="user", content="Why\nso?"), NO]), turns("Why\nso?")),
    "empty lists in other columns": (dict(prompt="Why?", conversations=[{}], messages=[None], options=[], question="So?", answer="x", chosen="good", rejected="bad"),
                                     turns("Why?")),
    "a text prompt that is rendered": (dict(prompt="<|user|>\nWhy?\n<|assistant|>\n", chosen=[WHY, YES], rejected=[WHY, NO]), turns("Why?")),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_row_is_read_without_the_hook(name, chat, tmp_path):
    row, prompt = KINDS[name]
    assert one(row, chat, tmp_path) == ([(prompt, *GOOD_BAD)], [])


def call_answer(call):
    return dict(prompt=[WHY], chosen=[dict(role="assistant", content=None) | call], rejected=[NO])


CALL_KINDS = {
    "arguments as JSON text": call_answer(dict(tool_calls=[dict(function=dict(name="look", arguments='{"town": "Lund"}'))])),
    "calls as JSON text": call_answer(dict(tool_calls=json.dumps(CALLS))),
    "arguments under parameters": call_answer(dict(tool_calls=[dict(name="look", parameters=dict(town="Lund"))])),
    "OpenAI's old function_call": call_answer(dict(function_call=dict(name="look", arguments='{"town": "Lund"}'))),
    "ShareGPT's function_call": dict(conversations=[{"from": "human", "value": "Why?"}], rejected={"from": "gpt", "value": "bad"},
                                     chosen={"from": "function_call", "value": '{"name": "look", "arguments": {"town": "Lund"}}'}),
}


@pytest.mark.parametrize("name", CALL_KINDS)
def test_a_call_is_what_is_scored_in_whatever_form_it_stands(name, with_tools, chat, tmp_path):
    (texts,), dropped = one(CALL_KINDS[name], with_tools, tmp_path)
    assert texts[1] == '<call>{"name": "look", "arguments": {"town": "Lund"}}</call><|im_end|>' and not dropped
    texts, ((reason, value),) = one(CALL_KINDS[name], chat, tmp_path)
    assert not texts and "empty" in reason or "tool calls" in reason


def test_tools_as_json_text_and_settings_of_the_template_reach_it(tmp_path):
    model = make_tokenizer(tmp_path / "model", "{{ mood }}" + TOOLS)
    row = dict(prompt="Why?", chosen="good", rejected="bad", tools=json.dumps([dict(name="look", description="Looks.")]),
               chat_template_kwargs=dict(mood="calm"))
    (texts,), dropped = one(row, model, tmp_path)
    assert texts[0].startswith('calm<|im_start|>system\n{"name": "look"') and not dropped


TOOL = dict(type="function", function=dict(name="look", description="Looks."))


@pytest.mark.parametrize("columns", [
    dict(tools=TOOL), dict(tools=[json.dumps(TOOL)]), dict(prompt=[SYSTEM | dict(tools=[TOOL]), USER]),
    dict(prompt=[SYSTEM, USER | dict(tools=json.dumps([TOOL]))])], ids=["one", "list of JSON texts", "of the system turn", "of a turn, JSON text"])
def test_tools_reach_the_template_wherever_they_stand(columns, with_tools, chat, tmp_path):
    row = dict(prompt=[SYSTEM, USER], chosen=["good", "fine"], rejected="bad") | columns
    texts, dropped = one(row, with_tools, tmp_path)
    assert len(texts) == 2 and not dropped
    assert all(start.count('"name": "look"') == 1 and start.endswith(WITH_SYSTEM) for start, *_ in texts)
    assert {reason for reason, _ in one(row, chat, tmp_path)[1]} == {"tools left out by the template"}


def test_a_template_may_write_the_arguments_of_a_call_as_they_are_or_as_json(with_tools, tmp_path):
    bare = make_tokenizer(tmp_path / "model", TOOLS.replace("(c.function | tojson)", "c.function.name + ' code=' + c.function.arguments.code"))
    row = call_answer(dict(tool_calls=[dict(function=dict(name="run", arguments=dict(code='print("a")\n\treturn\tb, "C:\\new"')))]))
    assert one(row, bare, tmp_path)[0][0][1] == '<call>run code=print("a")\n\treturn\tb, "C:\\new"</call><|im_end|>'
    assert "\\treturn" in one(row, with_tools, tmp_path)[0][0][1]


def test_a_call_without_arguments_gets_none(with_tools, tmp_path):
    for arguments in ("", None, {}):
        row = call_answer(dict(tool_calls=[dict(function=dict(name="now", arguments=arguments))]))
        assert one(row, with_tools, tmp_path)[0][0][1] == '<call>{"name": "now", "arguments": {}}</call><|im_end|>'


@pytest.mark.parametrize("answer", ['{"role": "admin", "level": 1}', '{"from": "Lund", "to": "Oslo"}', '[{"content": "x"}]'])
def test_an_answer_in_json_that_is_no_message_is_an_answer(answer, chat, tmp_path):
    row = dict(prompt="Why?", chosen=answer, rejected="bad")
    assert one(row, chat, tmp_path) == ([(ONE_TURN, answer + "<|im_end|>", "bad<|im_end|>")], [])


def test_thoughts_of_an_earlier_turn_that_the_template_cuts_are_a_drop(cuts_think, tmp_path):
    row = dict(prompt=[WHY, dict(role="assistant", content="<think>hm</think>good"), WHY], chosen="good", rejected="bad")
    texts, ((reason, value),) = one(row, cuts_think, tmp_path)
    assert not texts and reason == "<think> left out by the template" and "hm" in value


def test_a_turn_of_a_tool_that_the_template_skips_is_a_drop_that_shows_it(tmp_path):
    model = make_tokenizer(tmp_path / "model", CHATML.replace("for m in messages %}", "for m in messages if m.role != 'tool' %}"))
    row = dict(prompt=[WHY, YES, dict(role="observation", content="14 degrees")], chosen="good", rejected="bad")
    assert one(row, model, tmp_path) == ([], [("text of tool turn left out by the template", "14 degrees")])


def test_a_template_may_change_white_space_and_move_the_system_turn(tmp_path):
    template = ("{% for m in messages %}{% if m.role == 'user' %}[{% if loop.last or loop.revindex == 2 %}{% if messages[0].role == 'system' %}"
                "{{ messages[0].content }} {% endif %}{% endif %}{{ m.content.split() | join(' ') }}]{% elif m.role == 'assistant' %}"
                "{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}")
    model = make_tokenizer(tmp_path / "model", template)
    row = dict(system="Be kind.", prompt="Why\n\n so?", chosen=" good ", rejected="bad")
    assert one(row, model, tmp_path) == ([("[Be kind. Why so?]", *GOOD_BAD)], [])
    row = dict(system="Be kind.", prompt=[WHY, YES, WHY], chosen="good", rejected="bad")  # the system text stands last
    assert one(row, model, tmp_path) == ([("[Why?]good<|im_end|>[Be kind. Why?]", *GOOD_BAD)], [])


DROP_KINDS = {  # what is wrong: (row, reason, words of the value)
    "two user turns in a row": (dict(prompt=[WHY], chosen=[dict(role="user", content="So?"), YES], rejected=[dict(role="user", content="So?"), NO]),
                                "malformed", "two user turns"),
    "a late system turn": (dict(prompt=[WHY], chosen=[dict(role="system", content="x"), dict(role="user", content="So?"), YES],
                                rejected=[dict(role="system", content="x"), dict(role="user", content="So?"), NO]), "malformed", "system turn"),
    "an image part": (dict(prompt=[dict(role="user", content=[dict(type="image_url", image_url="x")])], chosen="a", rejected="b"), "images", "image_url"),
    "a video column": (dict(prompt="Why?", videos=["a.mp4"], chosen="a", rejected="b"), "images", "a.mp4"),
    "a sound in a message": (dict(prompt=[WHY | dict(audio="a.wav")], chosen="a", rejected="b"), "images", "audio"),
    "an empty list in a list": (dict(prompt="Why?", chosen=["a"], rejected=[[]]), "malformed", "[]"),
    "messages cut off": (dict(prompt="Why?", chosen='[{"role": "assistant", "content": "go', rejected="b"), "malformed", "JSON"),
    "history that is none": (dict(instruction="Why?", history=[["a"]], chosen="a", rejected="b"), "error", "ValueError"),
    "tools that are no list": (dict(prompt="Why?", chosen="a", rejected="b", tools=7), "template", "Tools should"),
    "history of texts": (dict(instruction="So?", history=["Hi", "Yo"], chosen="a", rejected="b"), "malformed", "'Hi'"),
    "history of other objects": (dict(instruction="So?", history=[dict(human="Hi", bot="Yo")], chosen="a", rejected="b"), "malformed", "role"),
    "a system column and another system turn": (dict(system="Be brief.", prompt=[SYSTEM, WHY], chosen="a", rejected="b"), "malformed", "Be brief."),
    "a text prompt that the conversation lacks": (dict(prompt="Lund is windy.", chosen=[WHY, YES], rejected=[WHY, NO]), "prompts differ", "windy"),
    "a tool that is no JSON": (dict(prompt="Why?", chosen="a", rejected="b", tools=["look"]), "malformed", "a tool is not JSON"),
    "a numbered image column": (dict(prompt="Why?", image_0="a.png", chosen="a", rejected="b"), "images", "image_0"),
    "a part that has no text": (dict(prompt=[WHY], chosen=[dict(role="assistant", content=[dict(type="tool_use", name="look")])], rejected=[NO]),
                                "malformed", "tool_use in chosen"),
    "calls as a text of their own, as OLMo writes them": (call_answer(dict(content="So:", function_calls="look(town='Lund')")),
                                                          "function_calls left out by the template", "look(town="),
    "an image part without a type": (dict(prompt=[dict(role="user", content=[dict(image="a.png"), dict(text="x")])], chosen="a", rejected="b"),
                                     "images", "image"),
    "half a surrogate pair in an argument": ('{"prompt": "Why?", "chosen": {"role": "assistant", "content": "x", "tool_calls": [{"function": '
                                             '{"name": "look", "arguments": {"a": "\\ud83d"}}}]}, "rejected": "b"}', "malformed", "ud83d"),
    "half a surrogate pair in a call": ('{"prompt": "Why?", "chosen": {"role": "assistant", "content": "x", "tool_calls": [{"function": '
                                        '{"name": "\\ud83d"}}]}, "rejected": "b"}', "malformed", "ud83d"),
}


@pytest.mark.parametrize("name", DROP_KINDS)
def test_a_kind_of_row_is_dropped_with_its_reason(name, with_tools, tmp_path):
    row, reason, value = DROP_KINDS[name]
    texts, ((found, said),) = one(row, with_tools, tmp_path)
    assert not texts and found == reason and value in said, (found, said)


def test_an_id_that_is_an_object_and_odd_columns_do_no_harm(chat, tmp_path):
    row = dict(id={"a": [1]}, prompt="Why?", chosen=["good"], rejected=["bad"], subset="Ties", extra="\ud83d", images=[], label=["x"])
    texts, dropped = one(row, chat, tmp_path, "--ties")
    assert texts == [(ONE_TURN, *GOOD_BAD)] and not dropped
    assert json.loads((tmp_path / "out/meta.json").read_text())["counts"]["unused"] == {"extra": 1, "label": 1}


def test_many_chosen_and_many_rejected_make_1000_pairs_at_most(chat, tmp_path):
    row = dict(prompt="Why?", chosen=[f"good {i}" for i in range(60)], rejected=[f"bad {i}" for i in range(60)])
    texts, ((reason, value),) = one(row, chat, tmp_path)
    assert 900 < len(texts) <= 1000 and len({t[1] for t in texts}) == 60 and "60 chosen x 60 rejected" in value


def test_the_system_text_opens_the_first_question_if_the_template_has_no_system_turn(tmp_path):
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    silent = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    for i, template in enumerate((picky, silent)):
        model = make_tokenizer(tmp_path / f"model{i}", template)
        row = dict(system="Be kind.", prompt="Why?", chosen="good", rejected="bad")
        texts, ((reason, _),) = one(row, model, tmp_path)
        assert not texts and "--system first_user" in prepare_data.HINTS[reason]
        assert one(row, model, tmp_path, "--system", "first_user") == ([(turns("Be kind.\n\nWhy?"), *GOOD_BAD)], [])


@pytest.mark.parametrize("prompt, rendered", [
    ("<|USER_TOKEN|>Why?", 1), ("<|begin_of_text|>Why?", 1), ("<｜User｜>Why?", 1), ("Human: Why?\nAssistant:", 1), ("[INST] Why? [/INST]", 1),
    ("What is a <| b |> c?", 0), ("Is 1 < 2 | 3 > 2? ## Title", 0)])
def test_a_prompt_with_chat_markers_looks_rendered(prompt, rendered, chat, tmp_path):
    one(dict(prompt=prompt, chosen="good", rejected="bad"), chat, tmp_path)
    assert json.loads((tmp_path / "out/meta.json").read_text())["counts"]["looks_rendered"] == rendered


def test_a_prompt_that_looks_rendered_and_columns_that_are_not_used_are_said(chat, tmp_path, capsys):
    one(dict(prompt="### Instruction: Why?", chosen="good", rejected="bad", source="x", model="y"), chat, tmp_path)
    text = capsys.readouterr().out
    assert "1 prompts look rendered already" in text and "not used: source (1 rows), model (1 rows)" in text


def test_keys_that_the_template_does_not_know_are_said(chat, with_tools, tmp_path, capsys):
    row = dict(prompt=[WHY | dict(country="Sweden")], chosen=["good", YES | dict(reasoning_details=["hm"])], rejected="bad",
               chat_template_kwargs=dict(enable_thinking=False))
    texts, _ = one(row, chat, tmp_path)
    assert len(texts) == 2 and "not used: key enable_thinking (1 rows), key country (1 rows), key reasoning_details (1 rows)\n" in capsys.readouterr().out
    texts, _ = one(dict(prompt="Why?", chosen="good", rejected="bad", chat_template_kwargs=dict(tools=[TOOL])), with_tools, tmp_path)
    assert "Looks." in texts[0][0]


@pytest.mark.parametrize("columns, order", [
    (dict(score_chosen=2, score_rejected=1), "agree"), (dict(rating_chosen="1", rating_rejected="1"), "tie"),
    (dict(chosen_score=1, rejected_score=2.5), "contradict"), (dict(chosen_avg_rating=2, rejected_avg_rating=1), "agree"), ({"chosen-rating": 1, "rejected-rating": 1}, "tie"),
    (dict(margin=-0.1), "contradict"), (dict(margin=0), "tie"), (dict(label=1), "agree"), (dict(label=0), "contradict"),
    (dict(preference="tie"), "tie"), (dict(preference="chosen"), "agree"), (dict(label=" Rejected"), "contradict"),
    (dict(label="math"), "none"), (dict(score_chosen="n/a", score_rejected="n/a"), "none"), (dict(score_chosen=None, score_rejected=1), "none")])
def test_the_scores_of_a_row_agree_tie_or_contradict(columns, order):
    values = {name: value for name, value in columns.items() if value is not None}
    assert prepare_data.own_order(values) == order


# ---- the hook ----

sys.path.insert(0, str(Path(__file__).parent))
import convert_examples  # noqa: E402


@pytest.mark.parametrize("name", convert_examples.EXAMPLES)
def test_a_converter_of_the_examples_reads_its_layout(name, chat, tmp_path):
    row, before, answers = convert_examples.EXAMPLES[name]
    files = [write(tmp_path / name, [row]) for name in ("a.jsonl", "b.jsonl")]
    meta, splits, dropped = run(files[0], chat, tmp_path / "out", "--convert", f"{EXAMPLES}:{name}", "--val", files[1])
    assert not dropped and len(splits["train"]) == len(splits["val"]) == len(answers)
    assert meta["counts"]["prompts_in_both"] == 1
    decode = AutoTokenizer.from_pretrained(chat).decode
    prompt = turns(*(f"system: {text}" if text == "Be kind." else text for text in before))
    found = [[decode(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in splits["train"]]
    assert found == [[prompt, f"{good}<|im_end|>", f"{bad}<|im_end|>"] for good, bad in answers]


def test_the_hook_may_drop_fail_or_make_several_rows_and_errors_in_its_file_are_one_line(chat, tmp_path, capsys):
    (tmp_path / "hook.py").write_text(
        "def f(row):\n    if row['n'] == 0: return None\n    if row['n'] == 1: return row['no']\n"
        "    return [dict(prompt=f'Why {row[\"n\"]}?', chosen=x, rejected='z') for x in 'ab']\n")
    path = write(tmp_path / "a.jsonl", [dict(n=i) for i in range(30)])
    meta, splits, dropped = run(path, chat, tmp_path / "out", "--convert", f"{tmp_path}/hook.py:f", "--val_fraction", 0.3)
    assert [(d["reason"], d["line"]) for d in dropped] == [("convert", 1), ("convert", 2)] and "KeyError" in dropped[1]["value"]
    assert meta["counts"]["pairs_out"] == 56
    for spec, word in ((f"{tmp_path}/hook.py:g", "'g'"), (f"{tmp_path}/no.py:f", "no.py"), ("hook", "FILE.py:FUNCTION")):
        assert word in fails(capsys, path, chat, tmp_path / "x", "--convert", spec)


@pytest.mark.parametrize("bad, columns", [
    ("ties", dict(score_chosen=1, score_rejected=1)), ("a null answer", dict(chosen=None)), ("a weight", dict(weight=-1)),
    ("an answer out of range", dict(chosen=None, rejected=None, question="Why?", options=["a", "b"], answer="E"))])
def test_a_first_chunk_of_known_rows_that_are_all_dropped_does_not_end_the_run(bad, columns, chat, tmp_path):
    rows = [dict(prompt=f"Why {i}?", chosen="good", rejected="bad") for i in range(300)]
    path = write(tmp_path / "a.jsonl", [row | columns for row in rows[:250]] + rows[250:])
    meta, _, dropped = run(path, chat, tmp_path / "out", "--drop_ties", "--val_fraction", 0.3)
    assert meta["counts"]["pairs_out"] == 50 and len(dropped) == 250


def test_the_hook_may_leave_out_all_rows_of_the_first_chunk_and_finds_null_columns(chat, tmp_path):
    (tmp_path / "words.py").write_text("ASK = 'Why %d?'\n")  # a neighbour of the hook
    (tmp_path / "hook.py").write_text("import words\nf = lambda r: r | dict(prompt=words.ASK % r['n']) if r['note'] is None and r['n'] >= 250 else None\n")
    rows = [dict(n=i, chosen="good", rejected="bad", note=None if i % 2 else "x") for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    meta, _, dropped = run(tmp_path / "a.parquet", chat, tmp_path / "out", "--convert", f"{tmp_path}/hook.py:f", "--val_fraction", 0.3)
    assert meta["counts"]["pairs_out"] == 25 and {d["reason"] for d in dropped} == {"convert"}


def test_what_is_left_out_is_said_with_a_way_out_and_nothing_is_said_of_no_drops(cuts_think, chat, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [dict(prompt="Why?", chosen="<think>hm</think>a", rejected="b")] * 3)
    assert "or use --convert" in fails(capsys, path, cuts_think, tmp_path / "out")
    message = fails(capsys, path, chat, tmp_path / "out")
    assert "0 dropped; give more prompts" in message
    path = write(tmp_path / "b.jsonl", [dict(prompt="So?", chosen="", rejected="b")])
    message = fails(capsys, write(tmp_path / "a.jsonl", TABLE), chat, tmp_path / "out", "--val", path)
    assert "no pair for val" in message and "--val_fraction" not in message and "'empty'" in message
    path.write_text("")
    assert "give another --dataset or --val" in fails(capsys, tmp_path / "a.jsonl", chat, tmp_path / "out", "--val", path)


# ---- kinds of files ----

TABLE = [dict(prompt=f"Why, {i}?", chosen="good\nday", rejected='"bad"') for i in range(40)]
COLUMNS = {name: [row[name] for row in TABLE] for name in TABLE[0]}


def as_csv(delimiter):
    lines = [delimiter.join(f'"{row[name]}"' if name != "rejected" else '"""bad"""' for name in row) for row in TABLE]
    return delimiter.join(TABLE[0]) + "\n" + "\n".join(lines) + "\n"


LAYOUTS = {  # name of the file: its text
    "a.csv": as_csv(","), "semicolon.csv": as_csv(";"), "a.tsv": as_csv("\t"), "a.csv.gz": as_csv(","),
    "data.json": json.dumps({"version": 1, "data": TABLE}), "train.json": json.dumps({"train": TABLE, "test": TABLE[:3]}, indent=1),
    "columns.json": json.dumps(COLUMNS), "pandas.json": json.dumps({k: dict(zip(map(str, range(40)), v)) for k, v in COLUMNS.items()}),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in TABLE), "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in TABLE),
    "array.jsonl": json.dumps(TABLE, indent=1), "a.jsonl.zst": "\n".join(map(json.dumps, TABLE)), "a.json.zst": json.dumps(TABLE),
    "utf16.jsonl": "\n".join(map(json.dumps, TABLE)), "utf16.json": json.dumps(TABLE, indent=1), "utf16.csv": as_csv(","),
    "one,two.jsonl": "\n".join(map(json.dumps, TABLE)), "commas.jsonl": ",\n".join(map(json.dumps, TABLE)),
    "line.jsonl": json.dumps(TABLE), "bracket.jsonl": "[" + ",\n".join(map(json.dumps, TABLE)) + "]\n", "spaces.csv": " " + as_csv(",").replace(",c", ", c", 1),
    "by_id.json": json.dumps({f"q{i}": row for i, row in enumerate(TABLE)}), "index.json": json.dumps({str(i): row for i, row in enumerate(TABLE)}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_a_file_gives_the_pairs_of_its_rows(name, chat, tmp_path):
    data = LAYOUTS[name].encode("utf-16" if "utf16" in name else "utf-8")
    data = gzip.compress(data) if name.endswith(".gz") else pa.compress(data, "zstd", asbytes=True) if name.endswith(".zst") else data
    (tmp_path / name).write_bytes(data)
    meta, splits, dropped = run(tmp_path / name, chat, tmp_path / "out", "--val_fraction", 0.3)
    assert not dropped and meta["counts"]["pairs_out"] == 40
    start, chosen, rejected = first_pair(splits, chat)
    assert (start, chosen, rejected) == (turns("Why, 0?"), "good\nday<|im_end|>", '"bad"<|im_end|>')


def test_names_with_commas_are_quoted_and_several_files_of_all_kinds_go_together(chat, tmp_path, capsys):
    write(tmp_path / "one,two.jsonl", TABLE)
    (tmp_path / "a.csv").write_text(as_csv(","))
    meta, splits, _ = run(f'"{tmp_path}/one,two.jsonl", {tmp_path}/a.csv', chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 80 and set(splits["train"]["source"]) == {"one,two.jsonl", "a.csv"}
    assert run(f"{tmp_path}/a.csv,", chat, tmp_path / "b")[0]["counts"]["pairs_out"] == 40
    (tmp_path / "b.csv").write_text(as_csv(","))  # as "$(ls *.csv)" gives names
    assert "No such file" in fails(capsys, f"{tmp_path}/" + "a.csv " * 99, chat, tmp_path / "d")
    assert run(f"{tmp_path}/a.csv\r\n{tmp_path}/b.csv\r\n", chat, tmp_path / "c")[0]["counts"]["pairs_out"] == 80


def test_a_home_and_a_folder_that_is_named_like_a_file_are_found(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", TABLE)
    (tmp_path / "b.parquet").mkdir()  # as Spark writes
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "b.parquet/part-0.parquet")
    assert run("~/a.jsonl", chat, tmp_path / "out")[0]["counts"]["pairs_out"] == 40
    assert run(tmp_path / "b.parquet", chat, tmp_path / "out2")[0]["counts"]["pairs_out"] == 40


@pytest.mark.parametrize("wrong", [r'"Why?","say \"hi\"","b"', '"Why?","Hi" he said,"b"'])
def test_a_row_whose_quotes_are_wrong_is_a_drop(wrong, chat, tmp_path):
    lines = as_csv(",").split("\n", 1)
    (tmp_path / "a.csv").write_text(f"{lines[0]}\n{wrong}\n{lines[1]}")
    meta, _, dropped = run(tmp_path / "a.csv", chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 40 and "expected after" in dropped[0]["value"] and dropped[0]["line"] == 1


def test_a_table_that_ends_too_early_is_a_line(chat, tmp_path, capsys):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(as_csv(",").encode())[:-20])
    assert "end-of-stream" in fails(capsys, tmp_path / "a.csv.gz", chat, tmp_path / "out")


def test_two_datasets_are_not_taken_for_one(chat, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", TABLE)
    assert "--dataset is given twice" in fails(capsys, path, chat, tmp_path / "out", "--dataset", path)


def test_a_broken_object_among_pretty_printed_ones_is_one_drop(chat, tmp_path):
    text = "\n".join(json.dumps(row, indent=2) for row in TABLE[:20]) + '\n{\n "prompt": "Wh\n' + "\n".join(json.dumps(row, indent=2) for row in TABLE[20:])
    (tmp_path / "a.json").write_text(text)
    meta, _, dropped = run(tmp_path / "a.json", chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 40 and [d["reason"] for d in dropped] == ["malformed"]


def test_a_first_line_that_is_a_list_is_one_drop(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", [[USER, GOOD], *TABLE])
    meta, _, dropped = run(path, chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 40 and [d["reason"] for d in dropped] == ["malformed"]


def test_a_folder_of_save_to_disk_and_its_splits(chat, tmp_path, capsys):
    rows = datasets.Dataset.from_list(TABLE)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows.select(range(5))).save_to_disk(str(tmp_path / "two"))
    assert run(tmp_path / "one", chat, tmp_path / "a")[0]["counts"]["pairs_out"] == 40
    meta, splits, _ = run(tmp_path / "two", chat, tmp_path / "b", "--val", "test")
    assert (len(splits["train"]), len(splits["val"]), meta["counts"]["prompts_in_both"]) == (40, 5, 5)
    path = write(tmp_path / "a.jsonl", TABLE)
    assert len(run(tmp_path / "two", chat, tmp_path / "d", "--split", "test", "--val", path)[1]["val"]) == 40  # a file has no splits
    message = fails(capsys, tmp_path / "two", chat, tmp_path / "c", "--split", "no")
    assert "'no'" in message and "train, test" in message


def test_what_is_not_read_is_one_line_with_the_way_out(chat, tmp_path, capsys):
    (tmp_path / "a.xlsx").write_text("x")
    (tmp_path / "two.json").write_text(json.dumps({"a": TABLE, "b": TABLE}))
    assert ".jsonl, .json, .csv" in fails(capsys, tmp_path / "a.xlsx", chat, tmp_path / "out")
    (tmp_path / "comma.json").write_text(json.dumps(TABLE)[:-1] + ",]")
    assert "no list of rows: JSONDecodeError: Expecting value" in fails(capsys, tmp_path / "comma.json", chat, tmp_path / "out")
    assert "a, b: choose one with --split" in fails(capsys, tmp_path / "two.json", chat, tmp_path / "out")
    assert run(tmp_path / "two.json", chat, tmp_path / "out", "--split", "b")[0]["counts"]["pairs_out"] == 40


def test_bytes_that_are_no_text_drop_their_row_only(chat, tmp_path):
    lines = [json.dumps(row).encode() for row in TABLE]
    lines[3] = lines[3].replace(b"good", b"g\xff")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    meta, _, dropped = run(tmp_path / "a.jsonl", chat, tmp_path / "out")
    assert meta["counts"]["pairs_out"] == 39 and (dropped[0]["line"], dropped[0]["reason"]) == (4, "malformed")


# ---- validation, the folder, the summary ----


def test_a_validation_set_that_is_given_is_used_as_it_is(chat, tmp_path, capsys):
    train, val = write(tmp_path / "a.jsonl", TABLE), write(tmp_path / "b.jsonl", TABLE[:2] + ROWS[:3])
    meta, splits, _ = run(train, chat, tmp_path / "out", "--val", val)
    assert (len(splits["train"]), len(splits["val"])) == (40, 5) and meta["counts"]["prompts_in_both"] == 2
    assert "2 prompts are in both" in capsys.readouterr().out


def test_a_validation_split_that_a_file_does_not_have_is_a_line(chat, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", TABLE)
    (tmp_path / "a.json").write_text(json.dumps(TABLE))
    (tmp_path / "b.json").write_text(json.dumps(dict(train=TABLE, test=TABLE[:7])))
    for name in (path, tmp_path / "a.json", tmp_path / "b.json"):
        assert "no split valid" in fails(capsys, name, chat, tmp_path / "out", "--val", "valid")
    _, splits, _ = run(tmp_path / "b.json", chat, tmp_path / "out", "--val", "test")
    assert (len(splits["train"]), len(splits["val"])) == (40, 7)


def test_few_prompts_are_said_with_what_to_do(chat, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [dict(prompt=f"Why {i % 2}?", chosen=f"good {i}", rejected="bad") for i in range(20)])
    message = fails(capsys, path, chat, tmp_path / "out", "--val_fraction", 0.01)
    assert "2 distinct prompts" in message and "--val_fraction" in message and "--val" in message


def test_a_slash_at_the_end_of_out_and_the_drops_of_a_failed_run_are_in_nobodys_way(chat, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", TABLE)
    with pytest.raises(SystemExit):
        run(path, chat, f"{tmp_path}/out/", "--max_length", 3)
    assert (tmp_path / "out.dropped.jsonl").exists() and not (tmp_path / "out").exists()
    assert run(path, chat, f"{tmp_path}/out/")[0]["counts"]["pairs_out"] == 40
    assert run(path, chat, f"{tmp_path}/out/", "--overwrite")[0]["counts"]["pairs_out"] == 40


def test_overwrite_never_deletes_what_it_cannot_replace(chat, tmp_path, monkeypatch):
    path, out = write(tmp_path / "a.jsonl", TABLE), tmp_path / "out"
    run(path, chat, out)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if self.suffix != ".partial" else (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(SystemExit, match="cannot write"):
        run(path, chat, out, "--overwrite")
    monkeypatch.undo()
    assert load(out)[0]["counts"]["pairs_out"] == 40 and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="notes.txt"):
        run(path, chat, out, "--overwrite")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match="thesis.tex"):
        run(path, chat, tmp_path / "new")
    assert (out / "notes.txt").exists() and (tmp_path / "new.partial/thesis.tex").exists()


def test_ids_that_do_not_fit_the_embedding_are_a_line(tmp_path, capsys):
    model, path = make_tokenizer(tmp_path / "model", CHATML), write(tmp_path / "a.jsonl", TABLE)
    size = len(AutoTokenizer.from_pretrained(model))
    for rows, words in ((2, "the end token"), (size - 1, "")):
        Path(model, "config.json").write_text(json.dumps(dict(model_type="llama", vocab_size=rows)))
        if words:
            assert words in fails(capsys, path, model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    last = tokenizer.decode([size - 1])
    texts, ((reason, value),) = one(dict(prompt="Why?", chosen=last, rejected="b"), model, tmp_path)
    assert not texts and reason == "beyond the embedding" and str(size - 1) in value


def test_control_characters_of_the_sample_are_escaped(chat, tmp_path, capsys):
    run(write(tmp_path / "a.jsonl", [row | dict(chosen="a\x1b[2Jb\u202e") for row in TABLE]), chat, tmp_path / "out")
    text = capsys.readouterr().out
    assert "a\\x1b[2Jb\\u202e" in text and "\x1b" not in text


def test_a_chunk_ends_at_a_bound_in_characters(monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK_SIZE", 1000)
    rows = [("", "a", "a:1", 1, 0, dict(prompt="x" * 400))] * 20
    assert {len(chunk) for chunk in prepare_data.chunks(rows)} <= {2, 3}


# ---- no row ends the run ----

HOSTILE = ["", " ", None, 0, -1, 1e400, True, [], {}, [[]], [{}], [[[]]], "\ud83d", {"a": {"b": [None]}}, ["x", None], "\n\nHuman: a",
           "\n\nHuman: a\n\nAssistant: b", '[{"role": "user"', [{"role": "user", "content": "q"}], {"role": "assistant", "content": None},
           [{"from": "gpt", "value": "v"}], [{"role": [], "content": {}}], [{"role": "tool", "content": ["x"]}], "<|im_end|>", "a" * 5000,
           [{"role": "assistant", "tool_calls": [7]}], [{"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}],
           {"type": "function"}, "{", "[]", 10**400, float("nan"), [float("inf")], "\x00", "\u2028"]
NAMES = ["prompt", "chosen", "rejected", "messages", "question", "query", "input", "instruction", "conversations", "history", "system",
         "system_prompt", "tools", "chat_template_kwargs", "initial_reason_steps", "options", "choices", "answer", "context", "images",
         "subset", "category", "weight", "id", "score_chosen", "score_rejected", "margin", "label", "preference", "odd"]


def fuzz(seed, count):
    """Rows of all formats, of which half get one to three hostile values."""
    rng = random.Random(seed)
    good = [row for row, _ in [*FORMATS.values(), *KINDS.values()]] + list(CALL_KINDS.values()) + [
        dict(question="Why?", options=["a", "b"], answer=1, context="x")]
    for number in range(count):
        row = dict(rng.choice(good))
        if isinstance(row.get("prompt"), str) and rng.random() < 0.9:
            row["prompt"] += f" {number}"
        for _ in range(rng.choice((0, 0, 1, 2, 3))):
            row[rng.choice(NAMES)] = rng.choice(HOSTILE)
        yield row


def fuzz_run(count, with_tools, base, tmp_path):
    """Rows in = rows out + rows reported, whatever stands in them, with and without template."""
    path = write(tmp_path / "fuzz.jsonl", fuzz(0, count))
    for model in (with_tools, base):
        meta, splits, dropped = run(path, model, tmp_path / Path(model).name, "--max_length", 500)
        check(meta, splits, dropped, AutoTokenizer.from_pretrained(model))
        kept = {pair["id"].split(":")[1].split("-")[0] for rows in splits.values() for pair in rows}
        lost = {f"{d['line']:06d}" for d in dropped}
        assert kept | lost == {f"{number:06d}" for number in range(1, count + 1)}
        assert len(kept) > count / 4 and len(lost) > count / 4


def test_no_row_ends_the_run_and_every_row_is_kept_or_reported(with_tools, base, tmp_path):
    fuzz_run(1_000, with_tools, base, tmp_path)


@pytest.mark.slow
def test_no_row_of_20000_ends_the_run(with_tools, base, tmp_path):
    fuzz_run(20_000, with_tools, base, tmp_path)


@pytest.mark.slow
def test_a_row_too_deep_for_another_process_is_a_drop(chat, tmp_path):
    deep = "[" * 900 + "]" * 900
    path = write(tmp_path / "a.jsonl", [*TABLE, '{"prompt": %s, "chosen": "a", "rejected": "b"}' % deep])
    meta, _, dropped = run(path, chat, tmp_path / "out", "--num_proc", 2)
    assert meta["counts"]["pairs_out"] == 40 and len(dropped) == 1


# ---- the style of the script ----


def test_the_script_is_written_as_the_others_are():
    """test_copies.py holds the other scripts to the same."""
    import test_copies as style

    text = (ROOT / "prepare_data.py").read_text()
    rule = len(text[:text.index("# ---- helpers")].rstrip().splitlines())
    assert f"Read to line {rule}:" in prepare_data.__doc__
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for name, node in style.functions("prepare_data.py").items():
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 45 and style.depth(node) <= 3, name
        assert lines <= 10 or style.ast.get_docstring(node) or name == "main", name
    style.test_there_are_no_dense_tricks("prepare_data.py")
    style.test_there_are_at_most_36_flags("prepare_data.py")
