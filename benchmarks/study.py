"""A whole study: its wall time, and the share of the workers' time outside the trainer.

python -m benchmarks.study [--study mvp13] [--n-trials 50] [--data PATH] [--set key=value]...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default="mvp13")
    parser.add_argument("--n-trials", default="50")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "tuner", "run", "--study", options.study, "--n-trials", options.n_trials]
        command += ["--runs", runs, "--storage", f"sqlite:///{runs}/tuner.db", "--devices", "auto"]
        command += ["--data", options.data] if options.data else []
        for override in options.overrides:
            command += ["--set", override]
        subprocess.run(command, check=True)
        results = json.loads(next(Path(runs).glob("*/results.json")).read_text())
    spent = results["this_run"]
    outside = 1 - spent["fit_s"] / spent["serve_s"]
    print(f"wall time                {spent['wall_s']:>10.1f} s")
    print(f"workers, claim to end    {spent['serve_s']:>10.1f} s")
    print(f"inside the trainer       {spent['fit_s']:>10.1f} s")
    print(f"share outside            {100 * outside:>10.2f} %")
    print(f"trials                   {results['counts']}")


if __name__ == "__main__":
    main()
