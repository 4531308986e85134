"""Converters for layouts that prepare_data.py does not know: --convert tests/convert_examples.py:NAME

Each takes a raw row and returns a row of a known format, a list of such rows, or None to leave the row out. Copy the
line that fits, and change the names of the columns. tests/test_prepare_data.py runs every one on its row in EXAMPLES."""


def either(prompt, first, second, first_is_better):
    """The row of two answers and a label."""
    chosen, rejected = (first, second) if first_is_better else (second, first)
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def best_first(prompt, scored):
    """The rows of many answers [(score, text)]: the best is preferred to each that scores less."""
    scored = sorted(scored, key=lambda pair: -pair[0])
    best, chosen = scored[0]
    return [dict(prompt=prompt, chosen=chosen, rejected=text) for score, text in scored if score < best]


# two answers, and a column that says which is better
labelled_ab = lambda r: either(r["prompt"], r["response_a"], r["response_b"], r["preferred"] == "a")

# Intel/orca_dpo_pairs: system, question, chosen, rejected; is read without a converter too
orca_dpo_pairs = lambda r: dict(system=r["system"], prompt=r["question"], chosen=r["chosen"], rejected=r["rejected"])

# nvidia/HelpSteer2, preference/: prompt, response_1, response_2, preference_strength (below 0: the first is better)
helpsteer2 = lambda r: either(r["prompt"], r["response_1"], r["response_2"], r["preference_strength"] < 0) if r["preference_strength"] else None

# nvidia/HelpSteer3: context (a conversation), response1, response2, overall_preference (below 0: the first is better)
helpsteer3 = lambda r: either(r["context"], r["response1"], r["response2"], r["overall_preference"] < 0) if r["overall_preference"] else None

# stanfordnlp/SHP: history, human_ref_A, human_ref_B, labels (1: A is better)
shp = lambda r: either(r["history"], r["human_ref_A"], r["human_ref_B"], r["labels"] == 1) | dict(subset=r["domain"])

# PKU-Alignment/PKU-SafeRLHF: prompt, response_0, response_1, better_response_id, safer_response_id
pku_safe_rlhf = lambda r: either(r["prompt"], r["response_0"], r["response_1"], r["safer_response_id"] == 0)

# openbmb/UltraFeedback, as published: instruction, completions: [{response, overall_score}]
ultrafeedback = lambda r: best_first(r["instruction"], [(c["overall_score"], c["response"]) for c in r["completions"]])

# berkeley-nest/Nectar: prompt "\n\nHuman: ... \n\nAssistant: ", answers: [{answer, rank}], rank 1 is the best
nectar = lambda r: best_first(r["prompt"], [(-a["rank"], a["answer"]) for a in r["answers"]])

# OpenAI's preference fine-tuning: input: {messages, tools}, preferred_output, non_preferred_output: lists of messages
openai_preference = lambda r: dict(prompt=r["input"]["messages"], tools=r["input"].get("tools"), chosen=r["preferred_output"], rejected=r["non_preferred_output"])

EXAMPLES = {  # name: (raw row, the turns before the answer, [(chosen, rejected)])
    "labelled_ab": (dict(prompt="Why?", response_a="bad", response_b="good", preferred="b"), ["Why?"], [("good", "bad")]),
    "orca_dpo_pairs": (dict(system="Be kind.", question="Why?", chosen="good", rejected="bad"), ["Be kind.", "Why?"], [("good", "bad")]),
    "helpsteer2": (dict(prompt="Why?", response_1="bad", response_2="good", preference_strength=2, split="train"),
                   ["Why?"], [("good", "bad")]),
    "helpsteer3": (dict(domain="general", context=[dict(role="user", content="Why?")], response1="good", response2="bad",
                        overall_preference=-3), ["Why?"], [("good", "bad")]),
    "shp": (dict(domain="askphysics_train", history="Why?", human_ref_A="bad", human_ref_B="good", labels=0, score_A=2,
                 score_B=9), ["Why?"], [("good", "bad")]),
    "pku_safe_rlhf": (dict(prompt="Why?", response_0="bad", response_1="good", better_response_id=0, safer_response_id=1),
                      ["Why?"], [("good", "bad")]),
    "ultrafeedback": (dict(instruction="Why?", completions=[dict(response="bad", overall_score=3.0),
                                                            dict(response="good", overall_score=8.5),
                                                            dict(response="worst", overall_score=1)]),
                      ["Why?"], [("good", "bad"), ("good", "worst")]),
    "nectar": (dict(prompt="\n\nHuman: Why? \n\nAssistant: ", answers=[dict(answer="bad", rank=2), dict(answer="good", rank=1)]),
               ["Why?"], [("good", "bad")]),
    "openai_preference": (dict(input=dict(messages=[dict(role="user", content="Why?")]),
                               preferred_output=[dict(role="assistant", content="good")],
                               non_preferred_output=[dict(role="assistant", content="bad")]), ["Why?"], [("good", "bad")]),
}
