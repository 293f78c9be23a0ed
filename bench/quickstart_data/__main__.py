"""Write the quickstart's shipped data, or check that it is what the generator writes.

python -m bench.quickstart_data [FOLDER]     # writes; without FOLDER the shipped files, fastrlhf/quickstart/data
python -m bench.quickstart_data --check      # writes nothing; exit code 1 and the files' names when one differs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.quickstart_data.generate import differing, write
from fastrlhf.quickstart.content import DATA_DIR


def main(arguments: list[str] | None = None) -> int:
    """The command above -> its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.quickstart_data", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DATA_DIR)
    parser.add_argument("--check", action="store_true", help="compare the folder's files, write none")
    options = parser.parse_args(arguments)
    if not options.check:
        print(f"wrote {', '.join(write(options.folder))} to {options.folder}")
        return 0
    names = differing(options.folder)
    print(f"{options.folder}: {', '.join(names) or 'nothing'} differs from what the generator writes")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
