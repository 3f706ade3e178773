# SPDX-License-Identifier: MIT
"""The smallest study in processes that are killed at random moments, and started again with the same command.

    python tests/kills.py --kills 40 --seed 0

In the end every file must be, byte for byte, what an undisturbed run makes; times and memory aside. Moments are uniform over the time that
the stage took undisturbed after its imports; where it ends before, it had less left to do. A stage takes a fifth of the kills at most; those
that are left over fall on another study.
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, artifacts
from stage import SMALLEST


def begin(stage: str, data: Path) -> subprocess.Popen:
    """A stage with its options, once its imports are done and it holds the folder."""
    command = [sys.executable, str(ROOT / "tests" / "stage.py"), stage, "--data", str(data), *SMALLEST[stage]]
    process, lock = subprocess.Popen(command, stdout=subprocess.DEVNULL), data / ".lock"
    while process.poll() is None and not (lock.exists() and lock.read_text() == f"{process.pid}\n"):
        time.sleep(0.005)
    return process


def undisturbed(folder: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """What the stages make, and the seconds that each takes."""
    seconds = {}
    for stage in SMALLEST:
        process, start = begin(stage, folder / "data"), time.monotonic()
        assert process.wait() == 0, stage
        seconds[stage] = time.monotonic() - start
    return artifacts(folder / "data"), seconds


def kill(folder: Path, whole: dict[str, bytes], seconds: dict[str, float], kills: int, seed: int) -> int:
    """Studies with `kills` kills in all, in the same folder and each compared in the end; returns how many studies that took."""
    rng, done, studies = random.Random(seed), 0, 0
    while done < kills:
        shutil.rmtree(folder / "data", ignore_errors=True)
        for stage in SMALLEST:
            left = min(kills - done, -(-kills // len(SMALLEST)))
            while True:
                process = begin(stage, folder / "data")
                try:
                    assert process.wait(rng.uniform(0, seconds[stage]) if left else None) == 0, stage
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    left, done = left - 1, done + 1
                    print(f"kill {done}: {stage}", flush=True)
        made, studies = artifacts(folder / "data"), studies + 1
        assert made.keys() == whole.keys(), made.keys() ^ whole.keys()
        assert not (other := [name for name in whole if made[name] != whole[name]]), other
    return studies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = undisturbed(Path(folder))
        studies = kill(Path(folder), whole, seconds, options.kills, options.seed)
    print(f"{options.kills} kills, {studies} studies, each ended in the same {len(whole)} files as an undisturbed one")
