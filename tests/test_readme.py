"""Claim: the README, and the pages of results that it leads to, can be pasted. Every command names a script that exists
with flags that it has, every flag that the README's text names is one of some script, every link with the name of a
function leads to a file that has it, every file and heading that is linked is there, and every table of results is the
generated one, or some columns of it.

`python tests/test_readme.py --fix` writes the tables anew."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "results/README.md"
PAGES = [README, RESULTS, ROOT / "results/commands.md", ROOT / "results/auxdpo.md", ROOT / "results/LOG.md"]
TABLE = re.compile(r"<!-- (results/[\w/]+\.md)(: [^>]*)? -->\n((?:\|.*\n)*)")
LINK = re.compile(r"\[`(\w+)`\]\(((?:\.\./)?\w+\.py)\)")
ALL = "".join(page.read_text() for page in PAGES)


def flags_of(script):
    """Fields of the Args class of a script, or the flags of its argparse parser."""
    text = (ROOT / script).read_text()
    body = next((node for node in ast.parse(text).body if getattr(node, "name", "") == "Args"), None)
    if body is None:
        return set(re.findall(r'add_argument\("--(\w+)"', text))
    return {node.target.id for node in body.body if isinstance(node, ast.AnnAssign)}


def commands():
    """[(script, [flags])] of the code blocks, with continued lines joined."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", ALL, re.S)).replace("\\\n", " ")
    lines = [line.split("#")[0] for line in blocks.splitlines()]
    found = []
    for line in lines:
        script = re.search(r"(?<![$\w/])((?:tests/)?\w+\.py)", line)
        if script and script[1] not in ("mine.py", "my.py"):  # the reader's own
            found.append((script[1], re.findall(r" --(\w+)", line[script.end():])))
    return found


def test_every_command_names_a_real_script_and_real_flags():
    assert len(commands()) >= 5
    for script, flags in commands():
        assert (ROOT / script).exists(), script
        known = flags_of(script)
        assert not [flag for flag in flags if flag.removeprefix("no-") not in known], (script, flags)


def test_every_flag_that_the_text_names_is_a_flag_of_some_script():
    scripts = [path.relative_to(ROOT) for folder in (ROOT, ROOT / "tests/bench", ROOT / "tests/demo") for path in folder.glob("*.py")]
    known = {"run", "help", "ntasks", "nproc_per_node"}.union(*map(flags_of, scripts))
    named = re.findall(r"--(\w+)", re.sub(r"```.*?```", "", README.read_text(), flags=re.S))
    assert len(named) > 20 and not {flag.removeprefix("no_") for flag in named} - known


def test_every_link_with_the_name_of_a_function_leads_to_a_file_that_has_it():
    links = LINK.findall(ALL)
    assert len(links) >= 30
    for name, script in links:
        tree = ast.parse((ROOT / script.removeprefix("../")).read_text())
        assert name in [getattr(node, "name", "") for node in tree.body], (name, script)


def table_of(path, columns):
    """A generated table, or the columns ": a, b" of it; of subsets, if it has them, only "all"."""
    rows = [line.strip("|\n ").split("|") for line in (ROOT / path).read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows]
    if "subset" in rows[0]:
        place = rows[0].index("subset")
        rows = rows[:2] + [row for row in rows[2:] if row[place] == "all"]
    wanted = columns.removeprefix(": ").split(", ") if columns else rows[0]
    places = [rows[0].index(name) for name in wanted]
    lines = [" | ".join(row[place] if place < len(row) else "" for place in places) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def test_every_table_of_results_is_the_generated_one():
    tables = TABLE.findall(ALL)
    assert len(tables) >= 4
    for path, columns, text in tables:
        assert text.count("\n") > 3 and text == table_of(path, columns), "run: python tests/test_readme.py --fix"


def test_tables_of_the_readme_have_at_most_eight_columns():
    assert max(line.count("|") - 1 for line in README.read_text().splitlines() if line.startswith("|")) <= 8


def test_every_recipe_of_launch_sh_is_described():
    names = re.findall(r"^recipe +([\w-]+)$", (ROOT / "tests/recipes.txt").read_text(), re.M)
    described = re.findall(r"^\| `([\w-]+)` \| `\w+\.py`[ ,]", RESULTS.read_text(), re.M)
    assert names == described and len(names) >= 8


def test_every_linked_file_exists():
    for page in PAGES:
        targets = re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", page.read_text())
        assert targets and not [target for target in targets if not (page.parent / target).exists()]


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_to_a_heading_finds_it():
    found = 0
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text()):
            linked = page.parent / target if target else page
            assert anchor in anchors_of(linked), (page.name, target, anchor)
            found += 1
    assert found > 20


def test_the_readme_is_at_most_220_lines_of_a_readable_width():
    lines = README.read_text().splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 200


if __name__ == "__main__":
    assert sys.argv[1:] == ["--fix"], "usage: python tests/test_readme.py --fix"
    for page in PAGES:
        def anew(match):
            return f"<!-- {match[1]}{match[2] or ''} -->\n{table_of(match[1], match[2])}"
        page.write_text(TABLE.sub(anew, page.read_text()))
