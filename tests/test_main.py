"""python -m crystal lists the commands, and importing the package costs nothing."""

import subprocess
import sys


def test_import_is_light_and_the_commands_are_listed():
    code = "import sys, crystal; assert crystal.__version__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "crystal"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["train", "evaluate", "generate", "export", "visualize", "serve", "compare", "demo", "bench"]  # noqa: E501
    assert all(len(line) < 160 for line in done.stdout.splitlines())
