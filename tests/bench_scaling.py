# SPDX-License-Identifier: MIT
"""How time and memory of a GRPO step grow with the group, the prompt and the completion.

The model and questions of bench_trl.py at its long shape (448 x 448 pictures, 280 tokens a prompt, 64 new tokens, groups of 8), one
quantity changed at a time, each setting in a process of its own: seconds are the median of `--rounds` steps after one that warms up; MB
is the peak of an update above the process with the model loaded. The exponents are fitted on logarithms: 1 means in proportion.

    python tests/bench_scaling.py                        # prints one JSON line
    python tests/bench_scaling.py --looking --rounds 9   # what condition grounded costs: its steps and standard's alternate in one process
"""
import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
bench = importlib.import_module("bench_trl")
prepare, train = bench.prepare, bench.train

import numpy as np
import torch
from PIL import Image

AXES = {"group": (4, 8, 16, 32), "prompt_tokens": (280, 560, 1120), "new_tokens": (32, 64, 128, 256)}
USUAL = {"group": 8, "prompt_tokens": 280, "new_tokens": 64}


def measure(setting: dict, prompts: int, rounds: int, looking: bool = False) -> dict[str, float]:
    """Seconds of a rollout and of an update, and MB of an update; or seconds of a step of grounded over seconds of standard's beside it."""
    turn = itertools.count()
    prepare.grade = lambda text, question, *_: prepare.Grade(next(turn) % 2 == 1, True, None)
    bench.SHAPES["now"] = ((448, 448), setting["prompt_tokens"], setting["new_tokens"])
    config = train.Config(**train.PRESETS["tiny"] | {"prompts_per_step": prompts, "group_size": setting["group"],
                                                     "max_new_tokens": setting["new_tokens"],
                                                     "micro_batch_tokens": 8 * (setting["prompt_tokens"] + 1 + setting["new_tokens"])})
    with tempfile.TemporaryDirectory() as folder:
        policy = bench.make_policy("now", Path(folder), config.lora_rank)
        questions = bench.make_questions("now", prompts, policy)
        optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0)
        loaded = bench.memory_mb("VmRSS")

        def one(step: int, damaged=()) -> tuple[float, float]:
            start = time.perf_counter()
            batch, _, _ = train.roll_out(policy, questions, step, 0, config, damaged)
            middle = time.perf_counter()
            bench.forget_peak()
            train.update(policy, optimizer, batch, config)
            return middle - start, time.perf_counter() - middle
        if looking:
            blank = [q | {"images": [Image.new("RGB", picture.size, (120, 120, 120)) for picture in q["images"]]} for q in questions]
            pairs = [(sum(one(step, blank)), sum(one(step))) for step in range(rounds + 1)][1:]
            ratios = sorted(grounded / standard for grounded, standard in pairs)
            return {"grounded_s": round(statistics.median(pair[0] for pair in pairs), 3), "rounds": rounds,
                    "standard_s": round(statistics.median(pair[1] for pair in pairs), 3), "ratio": round(statistics.median(ratios), 2),
                    "range": [round(ratios[0], 2), round(ratios[-1], 2)]}
        seconds = [one(step) for step in range(rounds + 1)]
        rollout, update = (statistics.median(column) for column in zip(*seconds[1:]))
        return {"rollout_s": round(rollout, 3), "update_s": round(update, 3), "step_s": round(rollout + update, 3),
                "update_mb": round(bench.memory_mb("VmHWM") - loaded, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help="JSON of one setting: measured in this process")
    parser.add_argument("--looking", action="store_true", help="condition grounded against standard")
    options = parser.parse_args()
    prepare.fix_arithmetic(torch.get_num_threads())  # products as in the stages, for both sides
    warnings.filterwarnings("ignore")
    if options.looking:
        print(json.dumps(measure(USUAL, options.prompts, options.rounds, looking=True)))
        return
    if options.one:
        print(json.dumps(measure(json.loads(options.one), options.prompts, options.rounds)))
        return
    usual, result = None, {"prompts": options.prompts, "rounds": options.rounds}
    for axis, values in AXES.items():
        result[axis] = {}
        for value in values:
            if USUAL[axis] == value and usual:  # one setting, one measurement
                result[axis][value] = usual
                continue
            command = [sys.executable, __file__, "--prompts", str(options.prompts), "--rounds", str(options.rounds), "--one",
                       json.dumps(USUAL | {axis: value})]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result[axis][value] = json.loads(output.splitlines()[-1])
            usual = result[axis][value] if USUAL[axis] == value else usual
        for name in ("step_s", "update_mb"):
            slope = np.polyfit(np.log(values), np.log([result[axis][value][name] for value in values]), 1)[0]
            result[axis][f"exponent_{name}"] = round(float(slope), 2)
    first, last = (result["group"][value] for value in (4, 32))
    result["ratio"] = {name: round(last[name] / first[name], 2) for name in ("step_s", "update_mb")}  # group 32 against group 4
    print(json.dumps(result))


if __name__ == "__main__":
    main()
