"""Data preparation: raw KuaiLive CSVs to memory-mapped arrays, and a second start from the cache.

    python -m benchmarks.prepare [--scale 1.0] [--folder DIR]

Simulates the files once, then prepares them in a fresh process (time, peak memory) and opens them in another. The
physical limit beside it is reading every raw byte once and writing every prepared byte once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_CHILD = """
import json, resource, sys, time
from pathlib import Path
started = time.perf_counter()
import models
from models.trainer import SEARCH_ROLES, DataSpec
from tuner.spec_checks import load_spec
trainer = models.get_trainer("gift")
imported = time.perf_counter()
options = trainer.Data.model_validate(load_spec("mvp13").data)
dataset = trainer.load(DataSpec(options, Path(sys.argv[1]), Path(sys.argv[2]), True), SEARCH_ROLES)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"import_s": imported - started, "load_s": time.perf_counter() - imported, "peak_gb": peak,
                  "rows": sum(dataset.manifest.rows.values())}))
"""


def child(data: Path, cache: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, str(data), str(cache)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def copy_floor_s(data: Path, cache: Path) -> tuple[float, int]:
    """Seconds to read all raw files and all prepared files once (page cache warm), and their size in bytes."""
    files = [path for folder in (data, cache) for path in folder.rglob("*") if path.is_file()]
    started = time.perf_counter()
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return time.perf_counter() - started, sum(path.stat().st_size for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-prepare"))
    options = parser.parse_args()
    data, cache = options.folder / f"kuailive-{options.scale}", options.folder / "cache"
    if not data.exists():
        from models.gift.simulate import simulate

        started = time.perf_counter()
        simulate(data, options.scale, 42)
        print(f"simulated scale {options.scale} in {time.perf_counter() - started:.1f} s")
    shutil.rmtree(cache, ignore_errors=True)
    first = child(data, cache)
    second = child(data, cache)
    floor_s, size = copy_floor_s(data, cache)
    print(f"rows                     {first['rows']:>12,}")
    print(f"first load               {first['load_s']:>10.1f} s   peak {first['peak_gb']:.2f} GB")
    print(f"second load              {second['load_s']:>10.2f} s   peak {second['peak_gb']:.2f} GB")
    print(f"imports                  {second['import_s']:>10.2f} s")
    print(f"floor: read {size / 2**30:.1f} GB     {floor_s:>10.1f} s")


if __name__ == "__main__":
    main()
