"""How long until `eosin --help` has answered and `import eosin` is done, against Python doing nothing?

    python benchmarks/startup.py

Every command is a process of its own, ten times, in interleaved rounds after one round that is not counted (it fills
the file cache and writes bytecode). Wall seconds from start to exit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from end_to_end import commit, machine

HERE = Path(__file__).resolve().parent
BASELINE = "python -c pass"


def commands() -> dict[str, list[str]]:
    """Return what is timed, by the name of the table."""
    python = sys.executable
    script = str(Path(python).parent / "eosin")
    return {
        BASELINE: [python, "-c", "pass"],
        'python -c "import eosin"': [python, "-c", "import eosin"],
        "eosin --help": [script, "--help"],
        "eosin extract --help": [script, "extract", "--help"],
    }


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "startup.json")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    timed: dict[str, list[float]] = {name: [] for name in commands()}
    for number in range(given.repeats + 1):
        for name, command in commands().items():
            took = seconds(command)
            if number:
                timed[name].append(round(took, 4))
    base = statistics.median(timed[BASELINE])
    rows = {
        name: {
            "seconds": values,
            "median": round(statistics.median(values), 4),
            "min": min(values),
            "max": max(values),
            "over_baseline": round(statistics.median(values) - base, 4),
            "ratio": round(statistics.median(values) / base, 2),
        }
        for name, values in timed.items()
    }
    result = {
        "command": " ".join(["python benchmarks/startup.py", *sys.argv[1:]]),
        "question": "wall seconds of a whole process",
        "commit": commit(),
        "machine": machine() | {"python": sys.version.split()[0], "load_average_before": load},
        "versions": {name: importlib.metadata.version(name) for name in ("eosin", "typer", "rich")},
        "baseline": BASELINE,
        "commands": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:28s} {row['median']:.3f} s ({row['min']:.3f}-{row['max']:.3f})  {row['ratio']:.1f}x")


if __name__ == "__main__":
    main()
