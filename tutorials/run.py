"""Runs the Python blocks of a tutorial page, from its first line to its last.

    python tutorials/run.py 03        the page whose name begins with 03
    python tutorials/run.py           lists the pages

The blocks share their names, as in a notebook; what they print is printed. Run it from the repository's root.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)


def pages():
    """The numbered pages, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.md"))


def blocks(page):
    """The page's Python blocks -> [(number of the line before the first, source)]."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text[: match.start(1)].count("\n")
        found.append((line, match.group(1)))
    return found


def run(page):
    """Runs a page. A block that fails raises with the page's own line numbers."""
    names = {"__name__": "__main__"}
    for line, source in blocks(page):
        code = compile("\n" * line + source, str(page), "exec")
        exec(code, names)


def main(argv):
    wanted = [page for page in pages() if argv and page.name.startswith(argv[0])]
    if len(wanted) == 1:
        run(wanted[0])
        return 0
    print("python tutorials/run.py NUMBER, one of:")
    for page in pages():
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"  {title}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
