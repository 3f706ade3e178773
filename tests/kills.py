# SPDX-License-Identifier: MIT
"""The smallest study, killed at random moments, and started again with the same command.

    python tests/kills.py --kills 40 --seed 0

SIGKILL meets the process of a stage, one of its two workers, or all of them. In the end every file must
be, byte for byte, what an undisturbed run makes; times and memory aside. Moments are uniform over the
time that the stage took undisturbed. A stage takes a fifth of the kills at most; those that are left
over fall on another study.
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from conftest import ROOT, artifacts
from stage import SMALLEST


def start(stage: str, data: Path) -> subprocess.Popen:
    options = [*SMALLEST[stage], "--data", str(data)]
    if "--workers" in options:
        options += ["--workers", "2"]  # the last one counts
    line = [sys.executable, str(ROOT / "tests" / "stage_by_hash.py"), stage, *options]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def undisturbed(data: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """What the stages make, and the seconds that each takes."""
    seconds = {}
    for stage in SMALLEST:
        begin = time.monotonic()
        process = start(stage, data)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        seconds[stage] = time.monotonic() - begin
    return artifacts(data), seconds


def strike(process: subprocess.Popen, victim: str) -> bool:
    """Kill the stage, a worker or all; whether there was anything to kill."""
    parent = psutil.Process(process.pid)
    try:
        workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return False
    victims = {"stage": [parent], "worker": workers[:1], "all": [parent, *workers]}[victim]
    for one in victims:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            return False
    said = process.communicate()[1]
    psutil.wait_procs(workers, timeout=10)
    assert "Traceback" not in said, said
    if victim == "worker" and victims and process.returncode:
        assert process.returncode == 2 and "error: the worker process of" in said, said
    return bool(victims)


def study_with_kills(data: Path, seconds: dict[str, float], kills: int, most: int, rng) -> int:
    """One study from its beginning to its end; returns how many kills it took."""
    done = 0
    for stage in SMALLEST:
        left = min(kills - done, most)
        while True:
            process = start(stage, data)
            if left:
                try:
                    said = process.communicate(timeout=rng.uniform(0, seconds[stage]))[1]
                except subprocess.TimeoutExpired:
                    victim = rng.choice(("stage", "worker", "all"))
                    if strike(process, victim):
                        left, done = left - 1, done + 1
                        print(f"kill {done}: {stage}, {victim}", flush=True)
                    if process.returncode != 0:
                        continue
                    break
            else:
                said = process.communicate()[1]
            assert process.returncode == 0, said
            break
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, done, studies = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        whole, seconds = undisturbed(data)
        while done < options.kills:
            shutil.rmtree(data)
            done += study_with_kills(data, seconds, options.kills - done, -(-options.kills // len(SMALLEST)), rng)
            studies += 1
            made = artifacts(data)
            assert made.keys() == whole.keys(), made.keys() ^ whole.keys()
            assert not (other := [name for name in whole if made[name] != whole[name]]), other
    print(f"{done} kills, {studies} studies, each ended in the same {len(whole)} files as an undisturbed one")
