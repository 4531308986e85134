"""Print dpo.py, or simpo.py, with a loss of README.md beside this file:

    python tests/losses/fork.py ipo > ipo.py

The lines are read from that page, where they are explained. It needs no package.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("README.md").read_text()
NO_REFERENCE = {"orpo"}  # goes into simpo.py

def blocks(language):
    """{heading: its block of code} of the sections of the page."""
    found = {}
    for section in PAGE.split("\n### ")[1:]:
        code = re.search(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        if code:
            found[section.splitlines()[0]] = code[1]
    return found

LOSSES, EDITS = blocks("python"), blocks("diff")

def with_loss(name):
    """The source of a script whose two lines `losses = ...` are those of the loss instead."""
    text = (ROOT / ("simpo.py" if name in NO_REFERENCE else "dpo.py")).read_text()
    old = re.search(r"(?:^    losses = .*\n){2}", text, re.MULTILINE)
    return text[:old.start()] + LOSSES[name] + text[old.end():]

def with_edit(name):
    """The source of dpo.py after a diff of the page; a line @@ stands between its parts."""
    text = (ROOT / "dpo.py").read_text()
    for part in EDITS[name].split("@@\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"dpo.py does not have these lines exactly once:\n{old}"
        text = text.replace(old, new)
    return text

if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"error: give the name of a loss: {' '.join(LOSSES)}")
    if sys.argv[1] not in LOSSES:
        raise SystemExit(f"error: there is no loss {sys.argv[1]}; there are: {' '.join(LOSSES)}")
    print(with_loss(sys.argv[1]), end="")
