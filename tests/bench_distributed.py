# SPDX-License-Identifier: MIT
"""Steps of stage 3 on two processes of one thread each against one process of two threads, on the same two cores.

Rounds alternate; each is a new run of the stage on a copy of a finished study's questions, and counts the completion tokens a second of all
steps but the first two. The ratio of each round is of runs that followed each other: on a machine that others use too it varies widely.

    python tests/bench_distributed.py --data data        # prints one JSON line
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STAGE = Path(__file__).resolve().parents[1] / "03_train_grpo.py"
SIDES = {"one_process": (1, "2"), "two_processes": (2, "1")}  # processes, threads of each


def tokens_per_s(data: Path, processes: int, threads: str, options: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        study = shutil.copytree(data, Path(folder) / "data", ignore=shutil.ignore_patterns("policies", "answers", "report"))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        subprocess.run([sys.executable, *launcher, str(STAGE), "--data", str(study), "--conditions", "standard", *options],
                       env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (study / "policies" / "standard-s0" / "train.jsonl").read_text().splitlines()[2:]]
    return sum(row["completion_tokens"] for row in rows) / sum(row["rollout_s"] + row["update_s"] for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--rounds", type=int, default=5)
    options, more = parser.parse_known_args()  # what is not for this goes to the stage
    speeds = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in (list(SIDES) if number % 2 else list(SIDES)[::-1]):
            speeds[side].append(tokens_per_s(Path(options.data), *SIDES[side], more or ["--steps", "22"]))
    ratios = [two / one for one, two in zip(*speeds.values())]
    print(json.dumps({"rounds": options.rounds, **{f"{side}_tokens_per_s": round(statistics.median(all_)) for side, all_ in speeds.items()},
                      "ratio": round(statistics.median(ratios), 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
                      "load": [round(load, 1) for load in os.getloadavg()]}))


if __name__ == "__main__":
    main()
