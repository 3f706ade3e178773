# SPDX-License-Identifier: MIT
"""A GRPO step of this kit against one of TRL's GRPOTrainer: seconds and memory, side by side.

Both get the same NF4 model (the embedded architecture with random weights), LoRA of the same rank on the same layers, the same
prompts and pictures, group size, micro-batch and number of new tokens; end-of-sequence is never sampled, so that every completion
has all of them, and rewards alternate, so that no group can be skipped. Steps alternate in one process; peak memory, above that of
the process with the model loaded, is measured in a process for each. TRL generates with transformers, as it does on a machine without vLLM.

    pip install -r tests/requirements.txt
    python tests/bench_trl.py --shape short|long|very_long      # prints one JSON line
"""
import argparse
import importlib
import importlib.metadata
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
prepare = importlib.import_module("01_prepare")
train = importlib.import_module("03_train_grpo")

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

# name -> width and height of the pictures in pixels, tokens of a prompt with its picture, new tokens
SHAPES = {"short": ((56, 56), 40, 40), "long": ((448, 448), 280, 64), "very_long": ((896, 896), 1050, 64)}


def make_policy(shape: str, folder: Path, rank: int, seed: int = 0):
    """The embedded architecture with random weights, saved and loaded as NF4 with an adapter."""
    tokenizer = prepare.make_tokenizer(seed)
    torch.manual_seed(seed)
    width, height = SHAPES[shape][0]
    image_processor = prepare.Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": width * height})
    for part in (prepare.make_model(tokenizer), tokenizer, image_processor):
        part.save_pretrained(folder)
    policy = train.load_policy(str(folder), width * height, lora_rank=rank)
    policy.eos = torch.tensor([-1], device=policy.device)  # no token: completions take all their tokens
    return policy


def make_questions(shape: str, count: int, policy) -> list[dict]:
    """Prompts of the shape's length, one picture each, no two alike."""
    (width, height), tokens, _ = SHAPES[shape]
    rng, numbers = random.Random(0), np.random.default_rng(0)
    questions = []
    for number in range(count):
        picture = Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8))
        question = {"id": f"q{number}", "problem": "<image>", "images": [picture], "answer": "1", "answer_type": "integer", "choices": []}
        while len(policy.encode(question).input_ids) < tokens:
            question["problem"] += rng.choice((" circle", " square", " triangle", " red", " blue"))
        questions.append(question)
    return questions


def our_step(policy, optimizer, questions, step: int, config) -> None:
    batch, _, _ = train.roll_out(policy, questions, step, 0, config)
    train.update(policy, optimizer, batch, config)


def trl_trainer(policy, questions, shape: str, config, micro_batch: int, steps: int, folder: Path, callback):
    """TRL's trainer on that model: its own tokenisation, generation, loss and optimizer."""
    from datasets import Dataset
    from transformers import Qwen2_5_VLProcessor
    from trl import GRPOConfig, GRPOTrainer

    class Processor(Qwen2_5_VLProcessor):
        """Without the video part, which needs torchvision."""
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    processor = Processor(policy.image_processor, policy.tokenizer, chat_template=policy.tokenizer.chat_template)
    new = SHAPES[shape][2]
    rows = [{"prompt": [{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": question["problem"].removeprefix("<image>") + "\n" + prepare.INSTRUCTION}]}],
        "images": question["images"]} for question in questions]
    for row, question in zip(rows, questions):
        text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert processor(text=text, images=row["images"])["input_ids"][0] == policy.encode(question).input_ids, "TRL's prompts are others"
    turn = itertools.count()

    def reward(completion_ids, **_):
        assert {len(ids) for ids in completion_ids} == {new}, "TRL's completions are of another length"
        return [float(next(turn) % 2) for _ in completion_ids]
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=micro_batch, num_generations=config.group_size,
        gradient_accumulation_steps=len(questions) * config.group_size // micro_batch, max_completion_length=new, max_steps=steps,
        generation_kwargs={"min_new_tokens": new, "suppress_tokens": policy.banned.tolist()}, learning_rate=config.learning_rate,
        lr_scheduler_type="constant", beta=0.0, loss_type="dapo", epsilon=config.clip_low, epsilon_high=config.clip_high, bf16=False,
        gradient_checkpointing=config.checkpoint, save_strategy="no", report_to=[], logging_steps=1000, disable_tqdm=True, dataloader_pin_memory=False,
        use_cpu=policy.device.type == "cpu", optim="adamw_torch", weight_decay=0.0)
    trainer = GRPOTrainer(model=policy.model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=processor,
                          reward_funcs=reward, callbacks=[callback])
    for parameter in policy.model.parameters():  # it makes the adapter of a quantised model bfloat16, which is slow on a CPU
        if parameter.requires_grad:
            parameter.data = parameter.data.to(policy.dtype)
    return trainer


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since `forget_peak`) of this process, in MB; on a card what torch holds of it."""
    if torch.cuda.is_available():
        return (torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()) / 1e6
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


class Watch(TrainerCallback):
    """Seconds of each of TRL's steps; between them `between` runs."""
    def __init__(self, between=lambda: None):
        self.seconds, self.between = [], between

    def on_train_begin(self, *arguments, **_):
        self.start = time.perf_counter()

    def on_step_end(self, *arguments, **_):
        self.seconds.append(time.perf_counter() - self.start)
        self.between()
        self.start = time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="short")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=("ours", "trl"), help="one side alone, two steps: prints MB above the loaded model")
    options = parser.parse_args()
    prepare.fix_arithmetic(torch.get_num_threads())  # products as in the stages, for both sides
    warnings.filterwarnings("ignore")
    turn = itertools.count()
    prepare.grade = lambda text, question, *_: prepare.Grade(next(turn) % 2 == 1, True, None)  # every group has both rewards
    new = SHAPES[options.shape][2]
    config = train.Config(**train.PRESETS["tiny"] | {"prompts_per_step": options.prompts, "group_size": options.group,
                                                     "micro_batch_tokens": options.micro_batch * (SHAPES[options.shape][1] + 1 + new),
                                                     "max_new_tokens": new})
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(options.shape, Path(folder), config.lora_rank)
        questions = make_questions(options.shape, options.prompts, policy)
        optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0)
        if options.memory:
            if options.memory == "trl":
                del policy.full.model.visual.patch_embed.proj.forward
            trainer = trl_trainer(policy, questions, options.shape, config, options.micro_batch, 2, Path(folder), Watch()) if options.memory == "trl" else None
            before = memory_mb("VmRSS")
            forget_peak()
            if trainer:
                trainer.train()
            else:
                for step in range(2):
                    our_step(policy, optimizer, questions, step, config)
            print(json.dumps(round(memory_mb("VmHWM") - before, 1)))
            return
        ours = []

        def between():
            start = time.perf_counter()
            our_step(policy, optimizer, questions, len(ours), config)
            ours.append(time.perf_counter() - start)
        watch = Watch(between)
        other = train.load_policy(folder, policy.image_processor.size["longest_edge"], lora_rank=config.lora_rank)
        del other.full.model.visual.patch_embed.proj.forward  # as transformers has it
        trl_trainer(other, questions, options.shape, config, options.micro_batch, options.rounds + 1, Path(folder), watch).train()
        trl, ours = watch.seconds[1:], ours[1:]  # the first of each warms up
        ratios = [b / a for a, b in zip(ours, trl)]
    mb = {side: json.loads(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory", side], check=True, capture_output=True,
                                          text=True).stdout.splitlines()[-1]) for side in ("ours", "trl")}
    tokens = options.prompts * options.group * new
    seconds = {"ours": statistics.median(ours), "trl": statistics.median(trl)}
    print(json.dumps({
        "shape": options.shape, "prompts": options.prompts, "group": options.group, "micro_batch": options.micro_batch, "new_tokens": new,
        "rounds": options.rounds, "ours_s": round(seconds["ours"], 3), "trl_s": round(seconds["trl"], 3),
        "ratio": round(seconds["trl"] / seconds["ours"], 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
        "ours_tokens_per_s": round(tokens / seconds["ours"]), "trl_tokens_per_s": round(tokens / seconds["trl"]),
        "ours_mb": mb["ours"], "trl_mb": mb["trl"], "memory_ratio": round(mb["ours"] / mb["trl"], 3),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "trl": importlib.metadata.version("trl"), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
