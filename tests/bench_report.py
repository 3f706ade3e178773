# SPDX-License-Identifier: MIT
"""Stage 5 on a study of many policies: seconds, memory, size of the page.

The answers are simulated (see test_05_report.py): a base and five seeds of three conditions answer every question of every source
under every input. The damaged questions are copies of the clean ones: stage 5 shows their pictures and does not ask what they are.

    python tests/bench_report.py                                                    # 16 policies x 5 inputs x 320 questions
    python tests/bench_report.py --sources shapes mathvista mmmu --questions 1000   # each prints one JSON line
"""
import argparse
import importlib
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
prepare = importlib.import_module("01_prepare")
report = importlib.import_module("05_report")
test_report = importlib.import_module("test_05_report")

INPUTS = ("clean", "blank", "mismatch", "edited", "kept")


def make_study(data: Path, seeds: int, sources: list[str], count: int):
    worlds = itertools.chain.from_iterable(prepare.shapes_world(seed, None) for seed in itertools.count())
    world = list(itertools.islice((row for row in worlds if row["split"] == "test"), count))
    study = {"preset": "tiny", "model": "embedded", "model_files": {}, "sources": {"train": sources[0], "benchmarks": sources}, "seed": 0,
             "max_pixels": 12544, "versions": {}, "artifacts": {}}
    for source in sources:
        rows = [row | {"id": f"{source}/{i}", "source": source} for i, row in enumerate(world)]
        for name in INPUTS:
            shown = [row | {"donor": f"{source}/{i}", "shown_answer": other(world, i)["answer"]} for i, row in enumerate(rows)]
            prepare.write_questions(data / prepare.input_path(source, name), shown if name in ("edited", "mismatch") else rows, {})
        study["artifacts"][prepare.input_path(source, "clean")] = prepare.sha256(data / prepare.input_path(source, "clean"))
    (data / "study.json").write_text(json.dumps(study), encoding="utf-8")
    answer(data, "base", test_report.POLICIES["base"], sources, world)
    for run, skill in test_report.POLICIES.items():
        for seed in range(seeds if run != "base" else 0):
            policy = f"{run.removesuffix('-s0')}-s{seed}"
            luck = random.Random(policy).gauss(0, 0.05)
            answer(data, policy, skill | {"sees": skill["sees"] + luck}, sources, world)


def other(world: list[dict], i: int) -> dict:
    """The next question of the same group: what an edited or swapped picture shows."""
    return next(world[(i + k) % len(world)] for k in range(1, len(world) + 1) if world[(i + k) % len(world)]["group"] == world[i]["group"])


def answer(data: Path, policy: str, skill: dict, sources: list[str], world: list[dict]):
    """What stages 3 and 4 leave of one policy."""
    adapter = data / "policies" / policy / "adapter_model.safetensors"
    if policy != "base":
        adapter.parent.mkdir(parents=True)
        adapter.write_text(policy, encoding="utf-8")
        (adapter.parent / "config.json").write_text(json.dumps({"policy": policy, "settings": {}}), encoding="utf-8")
        prepare.write_jsonl(adapter.parent / "train.jsonl", [
            {"step": step, "reward": skill["sees"] * step / 60, "correct": skill["sees"] * step / 60, "well_formed": 1 - 0.4 / step} for step in range(1, 61)])
    for source in sources:
        for name in INPUTS:
            rng, rows = random.Random(f"{policy}|{source}|{name}"), []
            paths = [data / prepare.input_path(source, name)] + [adapter] * (policy != "base")
            made_from = {path.relative_to(data).as_posix(): prepare.sha256(path) for path in paths}
            for i, row in enumerate(world):
                shown = other(world, i)["answer"] if name in ("edited", "mismatch") else None
                rows.append(test_report.simulated_answer(row, shown, name, rng, **skill) | {"id": f"{source}/{i}", "made_from": made_from})
            prepare.write_jsonl(data / "answers" / policy / source / f"{name}.jsonl", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sources", nargs="+", default=["shapes"])
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--data", help="where the study is, or is to be made; stage 5 alone is measured if it is there [a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(options.data or folder)
        if not (data / "study.json").exists():
            make_study(data, options.seeds, options.sources, options.questions)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        report.main(report.Config(data=str(data)))
        print(json.dumps({"policies": 1 + 3 * options.seeds, "sources": len(options.sources), "inputs": len(INPUTS), "questions": options.questions,
                          "seconds": round(time.perf_counter() - start, 1), "before_mb": round(before / 1024),
                          "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                          "page_mb": round((data / "report" / "index.html").stat().st_size / 1e6, 2)}))


if __name__ == "__main__":
    main()
