"""Claims of tests/bench/questions.py: letters are read from answers as a person would, each subject is counted, and answers
for AlpacaEval and Arena-Hard have the keys of their files and the texts of generate() without padding."""
import json
import shutil
import sys

import pytest
import torch
import transformers
from conftest import ROOT, run_as_program

sys.path.insert(0, str(ROOT / "tests/bench"))
import evaluate
import questions


@pytest.fixture(scope="module")
def world(tiny_model):
    return dict(one=tiny_model("llama", 0))


@pytest.fixture
def run(process_group, monkeypatch, tmp_path, capsys):
    """run(--flags) -> what is printed; the program in this process."""
    def main(*flags):
        argv = ["questions.py", "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(evaluate, "start_process_group",
                            lambda dtype: (0, 1, torch.device("cpu"), torch.float32))
        monkeypatch.setattr(evaluate.dist, "destroy_process_group", lambda: None)
        run_as_program(questions)
        return capsys.readouterr().out
    return main


@pytest.mark.parametrize("template", [None, "{% for m in messages %}w9 {{ m.content }} w8{% endfor %}"])
def test_answers_to_alpaca_eval_and_arena_hard_have_the_keys_of_their_files(template, run, world, tmp_path):
    folder = shutil.copytree(world["one"], tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    asked = ["w4 w5 w6", "w7", "w4 w5 w6"]
    alpaca = [dict(instruction=text, dataset="helpful", output="reference", generator="other") for text in asked]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    arena = [dict(question_id="a1", turns=[dict(content=asked[0])]), dict(uid="b2", prompt=asked[1])]
    (tmp_path / "arena.jsonl").write_text("\n".join(map(json.dumps, arena)) + "\n")
    flags = ["--models", folder, "--temperature", 0, "--max_new_tokens", 5]
    run(*flags, "--prompts", tmp_path / "alpaca.json")
    run(*flags, "--prompts", tmp_path / "arena.jsonl")
    model, truth = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for text in asked:
        text = text if template is None else f"w9 {text} w8"
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=2)[0, ids["input_ids"].shape[1]:]
        truth.append(tokenizer.decode(output, skip_special_tokens=True))
    name, place = str(folder), tmp_path / "out/answers"
    answers = json.loads((place / (name.replace("/", "_") + ".json")).read_text())
    assert answers == [dict(instruction=a, dataset="helpful", output=b, generator=name) for a, b in zip(asked, truth)]
    answers = [json.loads(line) for line in (place / (name.replace("/", "_") + ".jsonl")).read_text().splitlines()]
    assert [a["choices"][0]["turns"][0]["content"] for a in answers] == truth[:2]
    assert answers[0]["question_id"] == "a1" and answers[1]["uid"] == "b2" and answers[0]["model_id"] == name
    assert all(0 < a["choices"][0]["turns"][0]["token_len"] <= 5 and a["tstamp"] > 0 for a in answers)


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(C)", "C"), ("C) because it is", "C"), ("D\nThe others are wrong", "D"), ("**B**", "B"),
    ("The answer is (D).", "D"), ("Answer: B", "B"), ("the correct answer is C because A is wrong", "C"),
    ("At first A. But the answer is B.", "B"), ("The answer is A... no, the answer is (C)", "C"), ("answer is **D**", "D"),
    ("It must be (B), I think", "B"), ("(A) or (B)", None), ("A good question has many sides", None), ("", None),
    ("I do not know", None), ("E", None), ("The answer is E", None), ("the answer is b", None), ("[B]", "B")])
def test_the_letter_of_an_answer(text, letter):
    found = questions.letter_of(text, 4)
    assert (found if found is None else "ABCD"[found]) == letter


def test_multiple_choice_by_letters_counts_right_and_unreadable_answers_per_subject(run, world, tmp_path, monkeypatch):
    rows = [dict(question=f"w{5 + i}", options=["w3", "w4", "w5"], answer=answer, category=subject) for i, (answer, subject) in
            enumerate([("A", "law"), ("B", "law"), (2, "maths"), ("C", "maths"), ("A", "maths")])]
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said, asked = ["A", "The answer is C", "(C)", "no idea", "B"], []

    def answer(model, tokenizer, prompts, end, name, args):
        asked.extend(tokenizer.batch_decode(prompts))
        assert args.temperature == 0
        return [dict(response=text) for text in said[:len(prompts)]]
    monkeypatch.setattr(evaluate, "answer", answer)
    printed = run("--models", world["one"], "--choices", tmp_path / "mc.jsonl")
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in printed.splitlines()[2:] if line]
    assert cells == [["all", "5", "40.0 ± 24.5", "80.0 ± 20.0"], ["law", "2", "50.0 ± 50.0", "100.0 ± 0.0"],
                     ["maths", "3", "33.3 ± 33.3", "66.7 ± 33.3"]]
    assert printed == (tmp_path / "out/choices.md").read_text() and asked[1].startswith("w6")
    assert " 2 |" in run("--models", world["one"], "--choices", tmp_path / "mc.jsonl", "--limit", 2)
    (tmp_path / "mc.jsonl").write_text(json.dumps(rows[0] | dict(answer="D")))
    with pytest.raises(SystemExit, match="^error: --choices .*w5.*answer"):
        run("--models", world["one"], "--choices", tmp_path / "mc.jsonl")


def test_prompts_that_are_none_are_one_line(run, world, tmp_path):
    for text in ('[{"question": "?"}]', "no json", "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SystemExit, match="^error: --prompts .*bad.json"):
            run("--models", world["one"], "--prompts", tmp_path / "bad.json")



def test_all_rows_of_the_mmlu_pro_sample_are_asked_with_their_options(run, world, tmp_path, monkeypatch):
    file = ROOT.parent / "shared/data/mc/mmlu_pro_sample.jsonl"
    if not file.exists():
        pytest.skip("no shared data here")
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def ask(model, tokenizer, texts, name, args):  # every right letter but one, in five styles
        styles = ["{}", "({})", "The answer is {}.", "{}. because", "Answer: ({})"]
        return [dict(response=styles[i % 5].format(rows[i]["answer"]) if i else "Z") for i in range(len(texts))]
    monkeypatch.setattr(questions, "ask", ask)
    printed = run("--models", world["one"], "--choices", file).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed[2:]]
    assert cells[0][2] == str(len(rows)) == "3000" and cells[0][3].startswith("100.0") and len(cells) == 15
    assert sum(int(line[2]) for line in cells[1:]) == 3000 and all(row["options"][row["answer_index"]] for row in rows)
