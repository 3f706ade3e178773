# SPDX-License-Identifier: MIT
"""The smallest study in processes that are killed at random moments, and started again with the same command.

    python tests/kills.py --kills 40 --seed 0

In the end every file must be, byte for byte, what an undisturbed run makes; times and memory aside. Moments are uniform over the time that
the stage took undisturbed; where it ends before, it had less left to do. A stage takes a fifth of the kills at most; those that are left
over fall on another study.
"""
import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from conftest import artifacts
from stage import SMALLEST, Server

SECONDS = 600  # of a processor, for a stage


def undisturbed(server: Server, data: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """What the stages make, and the seconds that each takes."""
    seconds = {}
    for stage, options in SMALLEST.items():
        start = time.monotonic()
        done = server(stage, "--data", data, *options, seconds=SECONDS)
        assert (done.code, done.stderr) == (0, ""), done
        seconds[stage] = time.monotonic() - start
    return artifacts(data), seconds


def kill(server: Server, data: Path, whole: dict[str, bytes], seconds: dict[str, float], kills: int, seed: int) -> int:
    """Studies with `kills` kills in all, in the same folder and each compared in the end; returns how many studies that took."""
    rng, done, studies = random.Random(seed), 0, 0
    while done < kills:
        shutil.rmtree(data)
        for stage, options in SMALLEST.items():
            left = min(kills - done, -(-kills // len(SMALLEST)))
            while True:
                process = server.begin(stage, "--data", data, *options, seconds=SECONDS)
                if ended := server.end(rng.uniform(0, seconds[stage]) if left else None):
                    assert (ended.code, ended.stderr) == (0, ""), ended
                    break
                os.kill(process, signal.SIGKILL)
                killed = server.end().code == -signal.SIGKILL  # unless it ended just now
                left, done = left - killed, done + killed
                print(f"kill {done}: {stage}", flush=True)
        made, studies = artifacts(data), studies + 1
        assert made.keys() == whole.keys(), made.keys() ^ whole.keys()
        assert not (other := [name for name in whole if made[name] != whole[name]]), other
    return studies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, data = Server(), Path(folder) / "data"
        whole, seconds = undisturbed(server, data)
        studies = kill(server, data, whole, seconds, options.kills, options.seed)
        server.close()
    print(f"{options.kills} kills, {studies} studies, each ended in the same {len(whole)} files as an undisturbed one")
