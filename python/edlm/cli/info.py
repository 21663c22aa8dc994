"""``edlm info``: what is installed and compiled."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from .. import __version__

HELP = "versions, what is compiled for which device and instruction set, and the flags of the build"
EXAMPLES = """edlm info                 # versions, and what is compiled for which device and instruction set"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    import torch

    from .. import ops
    from ..ops._library import LOADED

    try:
        from .. import _build

        build = _build.info()
    except ImportError:
        build = None
    facts = {
        "edlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda or "none",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "package": list(sys.modules["edlm"].__path__),
        "libraries": {device: str(Path(path)) for device, path in LOADED.items()},
        "build": build,
        "ops": ops.backends(),
    }
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key in ("edlm", "python", "torch", "torch cuda", "platform", "package"):
        print(f"{key:12}{', '.join(facts[key]) if isinstance(facts[key], list) else facts[key]}")
    for device, path in facts["libraries"].items():
        print(f"{'library':12}{device}: {path}")
    if build is None:
        print(
            f"{'build':12}nothing is compiled: the pure-torch references run. Install with a C++20 compiler at hand: pip install ."
        )
    else:
        for key, value in build.items():
            print(f"{key.replace('_', ' '):18}{', '.join(value) if isinstance(value, list) else value}")
    print("ops" + "".join(f"\n  {op:28}cpu: {kinds['cpu']:12}cuda: {kinds['cuda']}" for op, kinds in facts["ops"].items()))
    return 0
