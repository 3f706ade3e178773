# SPDX-License-Identifier: MIT
"""Stage 5 on a study of many policies: seconds, memory, size of the page.

The answers are simulated (see test_05_report.py); each policy answers every question of every source under every input. The damaged
questions are copies of the clean ones: stage 5 shows their pictures and does not ask what they are.

    python tests/bench_report.py        # 12 policies x 3 sources x 10 inputs x 1,000 questions; prints one JSON line
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
simulated_answer = importlib.import_module("test_05_report").simulated_answer

INPUTS = ("clean", "blank", "removed", "noise", "blur", "occlude", "irrelevant", "misleading", "unsaid", "mismatch")


def make_study(data: Path, policies: int, sources: list[str], count: int):
    worlds = itertools.chain.from_iterable(prepare.shapes_world(seed, None) for seed in itertools.count())
    world = list(itertools.islice((row for row in worlds if row["split"] == "test"), count))
    study = {"preset": "tiny", "model": "embedded", "model_files": {}, "sources": {"train": sources[0], "benchmarks": sources}, "seed": 0,
             "max_pixels": 12544, "versions": {}, "artifacts": {}}
    for source in sources:
        rows = [row | {"id": f"{source}/{i}", "source": source} for i, row in enumerate(world)]
        for name in INPUTS:
            damaged = [row | {"donor": rows[(i + 7) % len(rows)]["id"]} for i, row in enumerate(rows)] if name == "mismatch" else rows
            prepare.write_questions(data / prepare.input_path(source, name), damaged, {})
        study["artifacts"][prepare.input_path(source, "clean")] = prepare.sha256(data / prepare.input_path(source, "clean"))
    (data / "study.json").write_text(json.dumps(study))
    names = ["base", *(f"{condition}-s{seed}" for seed in range(policies) for condition in ("standard", "hallucination-blank", "mixed-blank"))][:policies]
    for policy in names:
        adapter = data / "policies" / policy / "adapter_model.safetensors"
        if policy != "base":
            adapter.parent.mkdir(parents=True)
            adapter.write_text(policy)
            (adapter.parent / "config.json").write_text(json.dumps({"policy": policy, "settings": {}}))
        for source in sources:
            for name in INPUTS:
                rng = random.Random(f"{policy}|{source}|{name}")
                paths = [data / prepare.input_path(source, name)] + [adapter] * (policy != "base")
                made_from = {str(path.relative_to(data)): prepare.sha256(path) for path in paths}
                prepare.write_jsonl(data / "answers" / policy / source / f"{name}.jsonl", [
                    simulated_answer(row, None, name, rng, 0.5, 0.5, 0.9) | {"id": f"{source}/{i}", "made_from": made_from}
                    for i, row in enumerate(world)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=12)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--data", help="where the study is, or is to be made; stage 5 alone is measured if it is there [a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(options.data or folder)
        if not (data / "study.json").exists():
            make_study(data, options.policies, ["shapes", "mathvista", "mmmu"], options.questions)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        report.main(report.Config(data=str(data)))
        print(json.dumps({"policies": options.policies, "sources": 3, "inputs": len(INPUTS), "questions": options.questions,
                          "seconds": round(time.perf_counter() - start, 1), "before_mb": round(before / 1024),
                          "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                          "page_mb": round((data / "report" / "index.html").stat().st_size / 1e6, 2)}))


if __name__ == "__main__":
    main()
