"""python -m crystal: the commands, one line each; with a command's name and its flags, that command."""
import importlib.util
import runpy
import sys

COMMANDS = ["train", "evaluate", "generate", "export", "visualize", "serve", "compare", "demo", "bench"]


def main(argv=None):
    """argv (list of str, or None for sys.argv): a command and its flags, --version, or nothing to list all.

    `crystal-latents train ..` and `python -m crystal train ..` are `python -m crystal.train ..`.
    """
    asked = sys.argv[1:] if argv is None else argv
    if not asked or asked[0] in ("-h", "--help"):
        print(listing())
        sys.exit(0)
    if asked[0] == "--version":
        print(sys.modules[__package__].__version__)
        sys.exit(0)

    name, *flags = asked
    if name not in COMMANDS:
        print(f"error: {name}: no such command; known are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [name, *flags]
    runpy.run_module(f"crystal.{name}", run_name="__main__", alter_sys=True)


def listing():
    """What the commands do, each by the first line of its file."""
    lines = ["python -m crystal COMMAND --help tells the flags of each:\n"]
    for name in COMMANDS:
        module = importlib.util.find_spec(f"crystal.{name}")
        assert module is not None and module.origin is not None
        with open(module.origin, encoding="utf-8") as file:
            says = file.readline().strip().removeprefix('"""').removesuffix('"""')
        lines.append(f"  {name:10} {says}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
