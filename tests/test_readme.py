"""Claim: the README can be pasted. Every command in it names a script that exists with flags that it has, every flag
that its text names is one of some script, every link to a line points at the function it names, every file it names is
there, and every table of results is that of evaluate.py (the rows of the whole split).

`python tests/test_readme.py --fix` moves the line numbers of the links and writes the tables anew."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- (results/[\w/]+\.md) -->\n)((?:\|.*\n)*)")
LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)")


def flags_of(script):
    """Fields of the Args class of a script, or the flags of its argparse parser."""
    text = (ROOT / script).read_text()
    body = next((node for node in ast.parse(text).body if getattr(node, "name", "") == "Args"), None)
    if body is None:
        return set(re.findall(r'add_argument\("--(\w+)"', text))
    return {node.target.id for node in body.body if isinstance(node, ast.AnnAssign)}


def commands():
    """[(script, [flags])] of the code blocks, with continued lines joined."""
    blocks = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", README.read_text(), re.S)).replace("\\\n", " ")
    lines = [line.split("#")[0] for line in blocks.splitlines()]
    found = []
    for line in lines:
        script = re.search(r"((?:tests/)?\w+\.py)", line)
        if script:
            found.append((script[1], re.findall(r" --(\w+)", line[script.end():])))
    return found


def line_of(script, name):
    tree = ast.parse((ROOT / script).read_text())
    return next(node.lineno for node in tree.body if getattr(node, "name", "") == name)


def test_every_command_names_a_real_script_and_real_flags():
    assert len(commands()) >= 5
    for script, flags in commands():
        assert (ROOT / script).exists(), script
        known = flags_of(script)
        assert not [flag for flag in flags if flag.removeprefix("no-") not in known], (script, flags)


def test_every_flag_that_the_text_names_is_a_flag_of_some_script():
    scripts = [path.relative_to(ROOT) for folder in (ROOT, ROOT / "tests") for path in folder.glob("*.py")]
    known = {"run", "help", "ntasks"}.union(*map(flags_of, scripts))
    named = re.findall(r"--(\w+)", re.sub(r"```.*?```", "", README.read_text(), flags=re.S))
    assert len(named) > 20 and not {flag.removeprefix("no_") for flag in named} - known


def test_every_link_to_a_line_points_at_the_function_that_it_names():
    links = LINK.findall(README.read_text())
    assert len(links) >= 10
    wrong = [(name, int(line), line_of(script, name)) for name, script, line in links
             if int(line) != line_of(script, name)]
    assert not wrong, "run: python tests/test_readme.py --fix"


def table_of(path):
    """Heading, rule and rows of a generated table; of subsets, if it has them, only "all"."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("|")]
    keep = lambda line: "subset" not in lines[0] or line.split("|")[2].strip() == "all"
    return "".join(f"{line}\n" for i, line in enumerate(lines) if i < 2 or keep(line))


def test_every_table_of_results_is_the_one_that_evaluate_wrote():
    tables = TABLE.findall(README.read_text())
    assert len(tables) >= 3
    for _, path, text in tables:
        assert text.count("\n") > 3 and text == table_of(path), "run: python tests/test_readme.py --fix"
    results = README.read_text().partition("## Results")[2].partition("## Metrics")[0]
    assert TABLE.sub("", results).count("\n|") == 0  # no table by hand


def test_every_recipe_of_launch_sh_is_described():
    names = re.findall(r"^([\w-]+) (?:dpo|dpo_norm|simpo|wpo|auxdpo)(?:\+compo)? ", (ROOT / "launch.sh").read_text(), re.M)
    described = re.findall(r"^\| `([\w-]+)` \| `\w+\.py`[ ,]", README.read_text(), re.M)
    assert names == described and len(names) >= 8


def test_every_linked_file_exists():
    targets = re.findall(r"\]\(([\w./-]+?)(?:#L\d+)?\)", README.read_text())
    assert targets and not [target for target in targets if not (ROOT / target).exists()]


def test_the_readme_is_at_most_300_lines():
    assert len(README.read_text().splitlines()) <= 300


if __name__ == "__main__":
    assert sys.argv[1:] == ["--fix"], "usage: python tests/test_readme.py --fix"
    made = LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[2], m[1])})", README.read_text())
    README.write_text(TABLE.sub(lambda m: m[1] + table_of(m[2]) if (ROOT / m[2]).exists() else m[0], made))
