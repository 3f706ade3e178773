# SPDX-License-Identifier: MIT
"""Two workers against one, after the default study (or with --data of another): steps and answers a
second, from the first that is there to the last.

    python tests/bench_workers.py --rounds 3

Prints one JSON line; a ratio is two workers' rate over one worker's, in the same round.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT

TRAIN = ["03_train_grpo.py", "--conditions", "standard", "hallucination", "--seeds", "0", "1", "--steps", "20"]
EVALUATE = ["04_evaluate.py", "--corruptions", "clean", "blank", "--samples", "0"]


def count_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*.jsonl*") if path.name != "rollouts.jsonl")


def rate(command: list[str], data: Path, folder: str, workers: int) -> float:
    """Lines a second that appear below data/folder, from the first seen to the last."""
    shutil.rmtree(data / folder, ignore_errors=True)
    process = subprocess.Popen([sys.executable, ROOT / command[0], "--data", data, "--workers", str(workers), *command[1:]],
                               stdout=subprocess.DEVNULL)
    seen = []
    while process.poll() is None:
        time.sleep(0.05)
        lines = count_lines(data / folder) if (data / folder).exists() else 0
        if lines and (not seen or lines > seen[-1][1]):
            seen.append((time.monotonic(), lines))
    assert process.returncode == 0
    (first, before), (last, after) = seen[0], seen[-1]
    return (after - before) / (last - first)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="a study with questions, model and damaged questions; it is not changed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = {"steps": [], "answers": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        shutil.copytree(options.data, data, ignore=shutil.ignore_patterns("policies", "answers", "report"))
        for _ in range(options.rounds):
            for what, command, made in ("steps", TRAIN, "policies"), ("answers", EVALUATE, "answers"):
                one, two = (rate(command, data, made, workers) for workers in (1, 2))
                found[what].append(two / one)
    print(json.dumps({f"{what}_ratio": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios), "n": len(ratios)}
                      for what, ratios in found.items()}))
