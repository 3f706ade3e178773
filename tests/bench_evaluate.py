# SPDX-License-Identifier: MIT
"""Questions per second of stage 4 against `model.generate` of transformers: the same model, batch size and answers.

Both greedily answer the clean test questions of a finished study under its policies, in the same batches, longest first; the rounds
alternate. Both prepare the pictures once; stage 4 also runs the vision tower once for all policies, `generate` for each. Grading and the likelihood of the gold answer, which stage 4 adds, are left out on both sides.

    python tests/bench_evaluate.py --data data        # prints one JSON line
"""
import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
prepare = importlib.import_module("01_prepare")
train = importlib.import_module("03_train_grpo")

import torch


def ours(policy, questions, new: int, names: list[str]) -> list[list[int]]:
    prompts, answers = [policy.encode(question) for question in questions], []
    features = train.encode_images(policy, prompts)
    for name in names:
        policy.use(None if name == "base" else name)
        with torch.no_grad(), train.dequantized(policy):
            done = train.generate(policy, train.encode_prompts(policy, prompts, features), new)
        answers += [row[:length] for row, length in zip(done.tokens.tolist(), done.lengths.tolist())]
    return answers


def theirs(policy, questions, new: int, names: list[str]) -> list[list[int]]:
    pad, ends, answers = policy.tokenizer.pad_token_id, set(policy.eos.tolist()), []
    prompts = [policy.encode(question) for question in questions]
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.tensor([[pad] * (length - len(prompt.input_ids)) + prompt.input_ids for prompt in prompts], device=policy.device)
    inputs = {"input_ids": ids, "attention_mask": (ids != pad).long(), "mm_token_type_ids": (ids == policy.full.config.image_token_id).int(),
              "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]).to(policy.device),
              "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]).to(policy.device)}
    for name in names:
        policy.use(None if name == "base" else name)
        out = policy.model.generate(**inputs, max_new_tokens=new, do_sample=False, suppress_tokens=policy.banned.tolist(),
                                    eos_token_id=policy.eos.tolist(), pad_token_id=pad)
        for row in out[:, length:].tolist():
            answers.append(row[:next((i + 1 for i, token in enumerate(row) if token in ends), len(row))])
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--policies", nargs="+", help="base, or folders of DATA/policies [all]")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare.fix_arithmetic(torch.get_num_threads())  # products as in the stages, for both sides
    warnings.filterwarnings("ignore")
    data = Path(options.data)
    study = prepare.load_study(data)
    new = train.PRESETS[study["preset"]]["max_new_tokens"]
    names = options.policies or ["base", *sorted(path.parent.name for path in (data / "policies").glob("*/config.json"))]
    load = lambda: train.load_policy(prepare.model_path(data, study), study["max_pixels"],
                                     {name: data / "policies" / name for name in names if name != "base"})
    policies = {ours: load(), theirs: load()}
    del policies[theirs].full.model.visual.patch_embed.proj.forward  # as transformers has it
    source = study["sources"]["benchmarks"][0]
    table = prepare.read_questions(data / prepare.input_path(source, "clean"), "run 01_prepare.py")
    questions = sorted((row for row in table if row["split"] == "test"), key=lambda row: -row["prompt_tokens"])
    batches = [questions[i:i + options.batch] for i in range(0, len(questions), options.batch)]
    seconds, answers = {ours: [], theirs: []}, {}
    for _ in range(options.rounds + 1):  # the first warms up
        for side, policy in policies.items():
            start = time.perf_counter()
            answers[side] = [row for batch in batches for row in side(policy, batch, new, names)]
            seconds[side].append(time.perf_counter() - start)
    mid = {side: statistics.median(times[1:]) for side, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds[ours][1:], seconds[theirs][1:])]
    count = len(answers[ours])
    print(json.dumps({"policies": names, "answers": count, "batch": options.batch, "rounds": options.rounds, "max_new_tokens": new,
                      "same_answers": sum(map(list.__eq__, answers[ours], answers[theirs])),
                      "ours_per_s": round(count / mid[ours], 1), "generate_per_s": round(count / mid[theirs], 1),
                      "ratio": round(mid[theirs] / mid[ours], 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
                      "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"}))


if __name__ == "__main__":
    main()
