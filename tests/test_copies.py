"""Claim: a helper that stands in several scripts has the same source in all of them.

dpo.py holds the original; `python tests/test_copies.py --fix` writes it over the copies. Exempt by name:
Args, preference_loss, main. Nothing else is, so nobody can forget a marker."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = {"Args", "preference_loss", "main"}


def top_level(path):
    """{name: (first line, last line, source)} of the functions and classes of a script."""
    text = path.read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = first, node.end_lineno, "\n".join(lines[first - 1:node.end_lineno])
    return found


def scripts():
    return [path for path in sorted(ROOT.glob("*.py")) if path.name != "dpo.py"]


def originals():
    """Names of dpo.py, and names that only other scripts share, from the first of them."""
    found = {}
    for path in [ROOT / "dpo.py", *scripts()]:
        for name, (_, _, source) in top_level(path).items():
            found.setdefault(name, source)
    return found


def drifted():
    source = originals()
    return [(path, name) for path in scripts() for name, (_, _, text) in top_level(path).items()
            if text != source[name]]


def test_every_helper_has_the_same_source_in_every_script():
    assert not drifted(), "run: python tests/test_copies.py --fix"


def fix():
    source = originals()
    for path in scripts():
        lines = path.read_text().splitlines()
        copies = sorted(top_level(path).items(), key=lambda item: -item[1][0])  # from the bottom up
        for name, (first, last, _) in copies:
            lines[first - 1:last] = source[name].splitlines()
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--fix"], "usage: python tests/test_copies.py --fix"
    fix()
