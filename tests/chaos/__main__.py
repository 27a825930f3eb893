"""Kill workers at random moments, let every call meet faults, and count the rows in the end.

Exit code 0 means that every row of every job stands in the committed results once and is right.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Before torch is imported: the cores are for the workers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def main() -> int:
    """The command."""
    # What transformers and PEFT say of each other is nothing about us.
    warnings.simplefilter("ignore", FutureWarning)
    from tests.chaos.run import Options, run

    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=defaults.jobs, help="of 1 to MAX_ROWS rows")
    add("--max-rows", type=int, default=defaults.max_rows)
    add("--workers", type=int, default=defaults.workers)
    add("--kills", type=int, default=defaults.kills)
    add("--faults", type=float, default=defaults.faults, help="share of the calls that meet one")
    add("--seed", type=int, default=defaults.seed)
    add("--large", type=int, default=defaults.large, help="jobs whose rows lie in an object")
    add("--large-rows", type=int, default=defaults.large_rows, help="rows of such a job")
    add("--rows-per-part", type=int, default=defaults.rows_per_part, help="the workers' setting")
    add("--deadline-seconds", type=float, default=defaults.deadline_seconds)
    add("--json", type=Path, metavar="FILE", help="write the tally there too")
    add("--keep", type=Path, metavar="FOLDER", help="keep the workers' logs there")
    given = vars(parser.parse_args())
    file, kept = given.pop("json"), given.pop("keep")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally = run(Options(**given), folder, say)
    print(tally.text())
    if file is not None:
        import msgspec

        file.write_text(json.dumps(msgspec.to_builtins(tally, str_keys=True), indent=2) + "\n")
    return 0 if tally.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
