# SPDX-License-Identifier: MIT
"""Questions per second of stage 4 against `model.generate` of transformers: the same model, batch size and answers.

Both greedily answer the clean test questions of a finished study with one of its policies, in the same batches, longest first; the
rounds alternate. Grading and the likelihood of the gold answer, which stage 4 adds, are left out on both sides.

    python 01_prepare.py && python tests/bench_evaluate.py --data data        # prints one JSON line
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


def ours(policy, questions, new: int) -> list[list[int]]:
    with torch.no_grad(), train.unpacked(policy, merged=True):
        prompts = [policy.encode(question) for question in questions]
        done = train.generate(policy, train.encode_prompts(policy, prompts, train.look(policy, prompts)), new)
    return [row[:length] for row, length in zip(done.tokens.tolist(), done.lengths.tolist())]


def theirs(policy, questions, new: int) -> list[list[int]]:
    prompts = [policy.encode(question) for question in questions]
    length, pad = max(len(prompt.input_ids) for prompt in prompts), policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(prompt.input_ids)) + prompt.input_ids for prompt in prompts], device=policy.device)
    types = (ids == policy.full.config.image_token_id).int()
    out = policy.model.generate(
        input_ids=ids, attention_mask=(ids != pad).long(), mm_token_type_ids=types, max_new_tokens=new, do_sample=False,
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]).to(policy.device),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]).to(policy.device),
        suppress_tokens=policy.banned.tolist(), eos_token_id=policy.eos.tolist(), pad_token_id=pad)
    ends = set(policy.eos.tolist())
    answers = []
    for row in out[:, length:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--policy", default="base", help="base, or a folder of DATA/policies")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = Path(options.data)
    study = prepare.load_study(data)
    new = train.PRESETS[study["preset"]]["max_new_tokens"]
    adapter = None if options.policy == "base" else data / "policies" / options.policy
    policy = train.load_policy(prepare.model_path(data, study), study["max_pixels"], adapter)
    source = study["sources"]["benchmarks"][0]
    table = prepare.read_questions(data / prepare.input_path(source, "clean"), "run 01_prepare.py")
    questions = sorted((row for row in table if row["split"] == "test"), key=lambda row: -row["prompt_tokens"])
    batches = [questions[i:i + options.batch] for i in range(0, len(questions), options.batch)]
    seconds, answers = {"ours": [], "generate": []}, {}
    for _ in range(options.rounds + 1):
        for name, answer in (("ours", ours), ("generate", theirs)):
            start = time.perf_counter()
            answers[name] = [row for batch in batches for row in answer(policy, batch, new)]
            seconds[name].append(time.perf_counter() - start)
    mid = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"][1:], seconds["generate"][1:])]
    print(json.dumps({"policy": options.policy, "questions": len(questions), "batch": options.batch, "rounds": options.rounds, "max_new_tokens": new,
                      "same_answers": sum(map(list.__eq__, answers["ours"], answers["generate"])),
                      "ours_per_s": round(len(questions) / mid["ours"], 1), "generate_per_s": round(len(questions) / mid["generate"], 1),
                      "ratio": round(mid["generate"] / mid["ours"], 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
                      "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"}))


if __name__ == "__main__":
    main()
