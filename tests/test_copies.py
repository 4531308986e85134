"""Claim: a script is read from the top, in plain code, and differs from dpo.py in its algorithm only.

- Order: a docstring that says how far to read, the settings, the algorithm, main(), what happens to a micro-batch, a
  rule. Below the rule stand helpers that are the same in every script: dpo.py holds the original, and
  `python tests/test_copies.py --fix` writes it over the copies.
- Size: lines of a file, lines above the rule, lines of a function, levels of nesting, columns, flags.
- Plain code: no walrus, no comprehension with two `for`, no lambda bound to a name.
- No script keeps a helper or an import that it does not use, or lacks one that it does.
- Differences: the lines of code (no blank lines, comments, docstrings) of a script that dpo.py does not have. A helper
  that a script can do without is no difference. The README prints the numbers; --fix writes them.

`python tests/test_copies.py` prints the table of all these numbers.
"""

import ast
import builtins
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RULE = "# ---- helpers, "
OWN = {"Args", "preference_loss", "pair_losses", "main"}
README = ROOT / "README.md"
DEFINITION = (ast.FunctionDef, ast.ClassDef, ast.Assign)
BLOCK = (ast.For, ast.While, ast.If, ast.With, ast.Try)

#             lines of the file, above the rule, that dpo.py does not have
LIMITS = {
    "dpo.py": (990, 215, 0),
    "dpo_norm.py": (992, 215, 6),
    "simpo.py": (977, 215, 30),
    "wpo.py": (1006, 220, 20),
    "auxdpo.py": (1198, 400, 160),
    "compo.py": (942, 357, 250),
    "cache_ref.py": (983, None, None),
    "evaluate.py": (800, None, None),
}
ALGORITHMS = [name for name in LIMITS if name not in ("dpo.py", "cache_ref.py", "evaluate.py")]
TRAINING = ["dpo.py", *ALGORITHMS]


def text_of(name):
    return (ROOT / name).read_text()


def name_of(node):
    return node.targets[0].id if isinstance(node, ast.Assign) else node.name


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def top_level(name):
    """{name: (first line, last line, source)} of the functions, classes and constants of a script."""
    lines, found = text_of(name).splitlines(), {}
    for node in ast.parse(text_of(name)).body:
        if isinstance(node, DEFINITION):
            source = "\n".join(lines[first_line(node) - 1 : node.end_lineno])
            found[name_of(node)] = first_line(node), node.end_lineno, source
    return found


def functions(name):
    """{name: node} of all functions of a script, methods and inner ones too."""
    nodes = ast.walk(ast.parse(text_of(name)))
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def rule_line(name):
    return text_of(name)[: text_of(name).index(RULE)].count("\n") + 1


def scripts():
    return [path.name for path in sorted(ROOT.glob("*.py")) if path.name != "dpo.py"]


def last_to_read(name):
    """The line that the docstring names: the one above the rule, in evaluate.py the end of main."""
    if name == "evaluate.py":
        return top_level(name)["main"][1]
    return len(text_of(name)[: text_of(name).index(RULE)].rstrip().splitlines())


# ---- the copies


def originals():
    """Names of dpo.py, and names that only other scripts share, from the first of them."""
    found = {}
    for script in ["dpo.py", *scripts()]:
        for name, (_, _, source) in top_level(script).items():
            if name not in OWN:
                found.setdefault(name, source)
    return found


def drifted():
    source = originals()
    found = []
    for script in scripts():
        for name, (_, _, text) in top_level(script).items():
            if name not in OWN and text != source[name]:
                found.append((script, name))
    return found


def test_every_helper_has_the_same_source_in_every_script():
    assert not drifted(), "run: python tests/test_copies.py --fix"


@pytest.mark.parametrize("name", ["dpo.py", *scripts()])
def test_a_script_has_what_it_uses_and_uses_what_it_has(name):
    tree = ast.parse(text_of(name))
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    defined = {name_of(node) for node in tree.body if isinstance(node, DEFINITION)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    local = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    local |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.ExceptHandler, ast.FunctionDef))}
    assert not (imported | defined) - read, "is there and never used"
    assert not read - imported - defined - local - {*dir(builtins), "__file__", "__name__"}, "is used and not there"


@pytest.mark.parametrize("name", [*ALGORITHMS, "cache_ref.py", "evaluate.py"])
def test_below_the_rule_stand_helpers_of_dpo_in_their_order_and_what_several_scripts_share(name):
    """So that a newer version of all of them can be pasted over."""
    ours = [helper for helper, (first, _, _) in top_level("dpo.py").items() if first > rule_line("dpo.py")]
    theirs = [helper for helper, (first, _, _) in top_level(name).items() if first > rule_line(name)]
    assert [helper for helper in theirs if helper in ours] == [helper for helper in ours if helper in theirs]
    for helper in set(theirs) - set(ours):
        assert sum(helper in top_level(script) for script in scripts()) > 1, helper


# ---- order and size


@pytest.mark.parametrize("name", TRAINING)
def test_the_settings_the_algorithm_main_and_the_micro_batch_stand_above_the_rule_in_this_order(name):
    places = {key: first for key, (first, _, _) in top_level(name).items()}
    order = ["Args", "preference_loss", "main", "pair_losses"]
    order = [key for key in order if key in places]
    assert len(order) == (2 if name == "compo.py" else 4)  # which has no loss
    assert [places[key] for key in order] == sorted(places[key] for key in order)
    assert places[order[-1]] < rule_line(name)


@pytest.mark.parametrize("name", LIMITS)
def test_the_docstring_says_how_far_to_read(name):
    last = last_to_read(name)
    found = re.search(r"Read to line (\d+)", ast.get_docstring(ast.parse(text_of(name))))
    assert found and int(found[1]) == last, f"it is line {last}; run: python tests/test_copies.py --fix"


def test_evaluate_goes_from_the_settings_over_what_is_measured_to_main_and_then_the_rest():
    first = {key: place[0] for key, place in top_level("evaluate.py").items()}
    order = ["Args", "COLUMNS", "pair_metrics", "answer_metrics", "main", "load_pairs", "load_model", "score", "summarise",
             "result_table", "draw"]
    assert [first[key] for key in order] == sorted(first[key] for key in order)
    assert first["draw"] < rule_line("evaluate.py")


@pytest.mark.parametrize("name", LIMITS)
def test_a_script_is_as_short_as_agreed(name):
    lines, above, _ = LIMITS[name]
    assert len(text_of(name).splitlines()) <= lines
    assert above is None or rule_line(name) <= above


@pytest.mark.parametrize("name", LIMITS)
def test_a_function_fits_on_a_screen(name):
    lengths = {key: node.end_lineno - node.lineno + 1 for key, node in functions(name).items()}
    assert {key: n for key, n in lengths.items() if n > (90 if key == "main" else 45)} == {}


def depth(node):
    """How many blocks stand within each other in a function. An elif is on the level of its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        inner = depth(child)
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, inner + (isinstance(child, BLOCK) and not is_elif))
    return deepest


@pytest.mark.parametrize("name", LIMITS)
def test_blocks_are_nested_three_deep_at_most(name):
    assert {key: depth(node) for key, node in functions(name).items() if depth(node) > 3} == {}


@pytest.mark.parametrize("name", LIMITS)
def test_lines_have_at_most_100_columns(name):
    assert [line for line in text_of(name).splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("name", LIMITS)
def test_there_are_no_dense_tricks(name):
    found = []
    for node in ast.walk(ast.parse(text_of(name))):
        walrus = isinstance(node, ast.NamedExpr)
        nested = len(getattr(node, "generators", [])) > 1
        named_lambda = isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
        named_lambda = named_lambda and isinstance(node.targets[0], ast.Name)
        if walrus or nested or named_lambda:
            found.append(ast.unparse(node))
    assert found == []


@pytest.mark.parametrize("name", LIMITS)
def test_every_function_of_more_than_a_few_lines_says_what_it_is_for(name):
    silent = []
    for key, node in functions(name).items():
        short = node.end_lineno - node.lineno < 10
        if not ast.get_docstring(node) and not short and key not in ("main", "__init__"):
            silent.append(key)
    assert silent == []


@pytest.mark.parametrize("name", LIMITS)
def test_there_are_at_most_36_flags(name):
    assert len(settings(name)) <= (37 if name == "auxdpo.py" else 36)  # it has eight of its own


@pytest.mark.parametrize("name", LIMITS)
def test_no_helper_and_no_default_names_an_algorithm(name):
    tree = ast.parse(text_of(name))
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | functions(name).keys()
    words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            words.discard(node.value.value)  # a docstring
    assert not [word for word in words if re.search("(?<![a-z])(aux)?(dpo|simpo|wpo|compo)(?![a-z])", word, re.I)]


# ---- differences


def code_lines(name):
    """The lines of a script without blank ones, comments, docstrings, and what the module says of itself."""
    tree, skip = ast.parse(text_of(name)), set()
    for node in [tree, *ast.walk(tree)]:
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            skip.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text_of(name).splitlines(), 1)
    return [line for number, line in lines if number not in skip and line.strip() and line.strip()[0] != "#"]


def new_lines(name):
    """How many lines of code this script has that dpo.py has not."""
    matcher = difflib.SequenceMatcher(None, code_lines("dpo.py"), code_lines(name), autojunk=False)
    return sum(d - c for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_within_its_budget_of_new_lines(name):
    assert 0 < new_lines(name) <= LIMITS[name][2]


def settings(name):
    """{field: its line in Args} of a script."""
    args = next(node for node in ast.parse(text_of(name)).body if getattr(node, "name", "") == "Args")
    lines = text_of(name).splitlines()
    return {field.target.id: lines[field.lineno - 1] for field in args.body}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_setting_of_dpo_means_the_same_in_every_algorithm(name):
    ours, theirs = settings("dpo.py"), settings(name)
    assert [field for field in ours if field in theirs and ours[field] != theirs[field]] in ([], ["beta"], ["seed"])
    order = [field for field in theirs if field in ours]
    assert order == [field for field in ours if field in theirs]
    assert len(order) > (12 if name == "compo.py" else 22)  # it has no optimiser to set


def readme_row(name):
    """The README's table row of a script -> (everything before the last cell, the last cell)."""
    row = re.search(rf"^(\| \[`{name}`\]\({name}\) .*\| )([^|\n]*) \|$", README.read_text(), re.M)
    assert row, f"the table of README.md has no row for {name}"
    return row


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_readme_prints_the_measured_difference(name):
    assert readme_row(name)[2] == str(new_lines(name)), "run: python tests/test_copies.py --fix"


# ---- python tests/test_copies.py [--fix]


def pieces(name):
    """[(helper, its heading or "", its source)] below the rule of a script, comments above a helper with it."""
    text = text_of(name)
    text = text[text.index(RULE) :].partition("\n")[2]
    lines, found, last, heading = text.splitlines(), [], 0, ""
    for node in ast.parse(text).body:
        if isinstance(node, DEFINITION):
            above = "\n".join(lines[last : node.end_lineno]).strip("\n")
            if above.startswith("# -- "):
                heading, _, above = above.partition("\n")
            found.append((name_of(node), heading, above))
            last = node.end_lineno
    return found


def needed(name, helpers):
    """Names of the helpers that the part above the rule uses, and that these use."""
    wanted, sources = set(), [text_of(name)[: text_of(name).index(RULE)]]
    while sources:
        for node in ast.walk(ast.parse(sources.pop())):
            if isinstance(node, ast.Name) and node.id in helpers and node.id not in wanted:
                wanted.add(node.id)
                sources.append(helpers[node.id])
    return wanted | {"explain"}  # which the last lines use


def helper_half(name):
    """What should stand below the rule: helpers of dpo.py, and after them those that this script shares with others."""
    own, before = {}, {}  # helpers that dpo.py has not: their source, the helper that they stand behind
    ours = {helper for helper, _, _ in pieces("dpo.py")}
    last = None
    for helper, _, source in pieces(name):
        if helper not in ours:
            own[helper], before[helper] = originals()[helper], last
        last = helper
    wanted = needed(name, {helper: source for helper, _, source in pieces("dpo.py")} | own)
    blocks, heading = [], ""
    for helper, title, source in pieces("dpo.py"):
        if helper in wanted:
            blocks.append(source if title == heading else f"{title}\n{source}")
            heading = title
        blocks += [own[other] for other, place in before.items() if place == helper]
    return "\n\n".join(blocks)


def write(path, text):
    if path.read_text() != text:
        path.write_text(text)


def fix():
    source = originals()
    for script in scripts():
        if script in LIMITS and RULE in text_of(script):
            head, _, tail = text_of(script).partition(RULE)
            rule, last = tail.splitlines()[0], tail[tail.index('\nif __name__ == "__main__"') :]
            write(ROOT / script, f"{head}{RULE}{rule}\n\n{helper_half(script)}\n{last}")
            continue
        lines = text_of(script).splitlines()
        copies = sorted(top_level(script).items(), key=lambda item: -item[1][0])  # from the bottom up
        for name, (first, last, _) in copies:
            if name not in OWN:
                lines[first - 1 : last] = source[name].splitlines()
        write(ROOT / script, "\n".join(lines) + "\n")
    for name in LIMITS:
        text = re.sub(r"Read to line \d+", f"Read to line {last_to_read(name)}", text_of(name), count=1)
        write(ROOT / name, text)
    for name in ALGORITHMS:
        row = readme_row(name)
        text = README.read_text().replace(row[0], f"{row[1]}{new_lines(name)} |")
        write(README, text)


def table():
    print("| script | lines | read to line | longest helper | main | flags | lines that dpo.py has not |")
    print("|---|---|---|---|---|---|---|")
    for name in LIMITS:
        lengths = {key: node.end_lineno - node.lineno + 1 for key, node in functions(name).items()}
        longest = max((n, key) for key, n in lengths.items() if key != "main")
        above = rule_line(name) - 2 if RULE in text_of(name) else "-"
        new = new_lines(name) if name in ALGORITHMS else "-"
        print(f"| {name} | {len(text_of(name).splitlines())} | {above} | {longest[0]} ({longest[1]}) | "
              f"{lengths['main']} | {len(settings(name))} | {new} |")


if __name__ == "__main__":
    assert sys.argv[1:] in ([], ["--fix"]), "usage: python tests/test_copies.py [--fix]"
    fix() if sys.argv[1:] else table()
