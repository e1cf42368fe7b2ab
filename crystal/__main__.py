"""python -m crystal: the commands, one line each."""
import importlib.util
import sys

COMMANDS = ["train", "evaluate", "generate", "export", "visualize", "serve", "compare", "demo", "bench"]


def main():
    print("python -m crystal.COMMAND --help tells the flags of each:\n")
    for name in COMMANDS:
        module = importlib.util.find_spec(f"crystal.{name}")
        assert module is not None and module.origin is not None
        with open(module.origin, encoding="utf-8") as file:
            says = file.readline().strip().removeprefix('"""').removesuffix('"""')
        print(f"  {name:10} {says}")
    sys.exit(0)


if __name__ == "__main__":
    main()
