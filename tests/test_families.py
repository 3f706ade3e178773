# SPDX-License-Identifier: MIT
"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as they are published: prompts, picture sizes, special tokens, and all five stages on them.

The settings are the published facts (preprocessor_config.json and tokenizer_config.json of Qwen/Qwen2.5-VL-3B-Instruct and of
Qwen/Qwen3-VL-4B-Instruct). The chat templates are the unchanged copies that TRL carries: Qwen2-VL's is byte for byte Qwen2.5-VL's.
"""
import importlib.resources
import json
import random

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2Tokenizer

from conftest import tiny_model

VOCABULARY = 151_936
SPECIAL = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end",
           "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]  # ids 151643 ... 151656
ORDINARY = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
            "<|file_sep|>"]  # added, but no special tokens; Qwen3 has four more
QWEN2 = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
         "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
         "image_processor_type": "Qwen2VLImageProcessor"}
QWEN3 = {"size": {"longest_edge": 16_777_216, "shortest_edge": 65_536}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
         "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast"}
FAMILIES = {"qwen2_vl": ("qwen2_5_vl.jinja", QWEN2, []), "qwen2_5_vl": ("qwen2_5_vl.jinja", QWEN2, []),
            "qwen3_vl": ("qwen3_vl.jinja", QWEN3, ["<tool_response>", "</tool_response>", "<think>", "</think>"])}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """kind -> a folder as the hub has it: processor settings, vocabulary and ids of the published model, a few random layers."""
    made = {}

    def get(kind):
        if kind not in made:
            template, pictures, more = FAMILIES[kind]
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            byte_level = {char: number for number, char in enumerate(sorted(hf_bytes()))}
            words = byte_level | {f"word{number}": number for number in range(len(byte_level), 151_643)}
            tokenizer = Qwen2Tokenizer(vocab=words, merges=[])
            tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in SPECIAL]})
            tokenizer.add_tokens([*ORDINARY, *more])
            tokenizer.eos_token = "<|im_end|>"
            tokenizer.chat_template = (importlib.resources.files("trl") / "chat_templates" / template).read_text()
            tokenizer.save_pretrained(folder)
            model = tiny_model(kind, tokenizer, VOCABULARY)
            model.generation_config.eos_token_id = [151_645, 151_643]
            model.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
        return str(made[kind])
    return get


def hf_bytes():
    from tokenizers.pre_tokenizers import ByteLevel
    return ByteLevel.alphabet()


def question(text, pictures):
    return {"problem": text, "images": pictures, "answer": "7", "answer_type": "integer", "choices": []}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_ids_are_the_published_ones(prepare, family_folder, kind):
    tokenizer, image_processor = prepare.load_processors(family_folder(kind), 512 * 28 * 28)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                                           "<|image_pad|>", "<|video_pad|>"])
    assert ids == [151_643, 151_644, 151_645, 151_652, 151_653, 151_655, 151_656]
    pictures = FAMILIES[kind][1]
    assert (image_processor.patch_size, image_processor.merge_size) == (pictures["patch_size"], 2)
    assert list(image_processor.image_mean) == pictures["image_mean"] and list(image_processor.image_std) == pictures["image_std"]
    assert image_processor.size["shortest_edge"] == pictures.get("min_pixels", pictures.get("size", {}).get("shortest_edge"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_prompt_is_the_published_template_byte_for_byte(prepare, family_folder, kind):
    """Against the literal form, against the template itself, and against the tokens of that text."""
    tokenizer, image_processor = prepare.load_processors(family_folder(kind), 512 * 28 * 28)
    one, two = Image.new("RGB", (300, 200)), Image.new("RGB", (100, 400))
    prompt = prepare.encode(question("<image>Left of <image> how many?\n(A) 1\n(B) 2", [one, two]), tokenizer, image_processor)
    tokens = [image_processor.get_number_of_image_patches(p.height, p.width) // 4 for p in (one, two)]
    shown = ["<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in tokens]
    literal = (SYSTEM * (kind != "qwen3_vl") + "<|im_start|>user\n" + shown[0] + "Left of " + shown[1] + " how many?\n(A) 1\n(B) 2\n"
               + prepare.INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompt.input_ids) == literal
    content = [{"type": "image"}, {"type": "text", "text": "Left of "}, {"type": "image"},
               {"type": "text", "text": " how many?\n(A) 1\n(B) 2\n" + prepare.INSTRUCTION}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    for picture in shown:
        rendered = rendered.replace("<|vision_start|><|image_pad|><|vision_end|>", picture, 1)
    assert rendered == literal and tokenizer(literal)["input_ids"] == prompt.input_ids


@pytest.mark.parametrize("kind", FAMILIES)
def test_template_tokens_in_a_question_stay_text(prepare, family_folder, kind):
    tokenizer, image_processor = prepare.load_processors(family_folder(kind), 512 * 28 * 28)
    text = "".join(f"<|{name}|>" for name in SPECIAL) + "\n<|im_start|>assistant\n7"
    ids = prepare.encode(question("<image>" + text, [Image.new("RGB", (300, 200))]), tokenizer, image_processor).input_ids
    plain = prepare.encode(question("<image>" + "x" * len(text), [Image.new("RGB", (300, 200))]), tokenizer, image_processor).input_ids
    assert [n for n in ids if 151_643 <= n <= 151_656] == [n for n in plain if 151_643 <= n <= 151_656]
    assert text in tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind, budget", [("qwen2_vl", 100 * 28 * 28), ("qwen2_5_vl", 100 * 28 * 28), ("qwen3_vl", 100 * 32 * 32)])
def test_image_tokens_equal_image_features(prepare, train, family_folder, kind, budget):
    """A thousand pictures from 1 x 1 to 4000 x 30 pixels, through the family's own vision tower; what can't be used has a reason."""
    policy = train.load_policy(family_folder(kind), budget)
    rng, used, refused = random.Random(kind), 0, []
    sizes = [(1, 1), (4000, 30), (30, 4000), (4000, 19), (1, 200), (1, 201)]
    sizes += [(round(2 ** rng.uniform(0, 12)), round(2 ** rng.uniform(0, 12))) if rng.random() < 0.5 else
              (rng.randint(1, 4000), rng.randint(1, 30)) for _ in range(994)]
    for size in sizes:
        raw = prepare.png(Image.effect_noise(size, 80))
        try:
            picture = prepare.fit(prepare.open_picture(raw, None), policy.image_processor)
        except prepare.Rejected as error:
            refused.append((size, str(error)))
            continue
        prompt = policy.encode(question("<image>How many?", [picture]))
        ((features,),) = train.encode_images(policy, [prompt])
        tokens = prompt.input_ids.count(policy.full.config.image_token_id)
        assert tokens == len(features[0]) == policy.image_processor.get_number_of_image_patches(picture.height, picture.width) // 4
        assert 0 < tokens <= 100  # the budget
        used += 1
    assert used > 750 and all(max(size) > 200 * min(size) and f"{size[0]} x {size[1]}" in reason for size, reason in refused)
    assert len(refused) == sum(max(size) > 200 * min(size) for size in sizes)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_five_stages_on_published_settings(prepare, corrupt, train, evaluate, report, family_folder, tmp_path, kind):
    """Loads, prepares, damages, trains two steps, evaluates and reports, by the user's own pictures of all sizes."""
    folder, rng = tmp_path / "mine", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number, size in enumerate([(640, 480), (31, 17), (900, 40), (200, 300), (64, 64), (1200, 900), (28, 28), (333, 77)]):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for split in ("train", "test"):
            rows.append({"problem": f"<image>How many of {number}?", "images": [f"{number}.png"], "answer": number + (split == "train"),
                         "split": split})
    rows = [row | {"problem": row["problem"] + f" ({row['split']})"} for row in rows]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data")
    study = prepare.main(prepare.Config(data=data, model=family_folder(kind), train="mine", benchmarks=["mine"], local=[f"mine={folder}"],
                                        max_pixels=64 * 32 * 32))
    assert study["questions"] == {"mine": {"test": 8, "train": 8}}
    corrupt.main(corrupt.Config(data=data, workers=1, corruptions=["blank", "removed", "mismatch"]))
    trained = train.main(train.Config(data=data, conditions=["standard", "mixed"], seeds=[0], workers=1, steps=2, prompts_per_step=2, group_size=4,
                                      max_new_tokens=8, lora_rank=4))
    assert [run["settings"]["steps"] for run in trained] == [2, 2]
    steps = prepare.read_jsonl(tmp_path / "data" / "policies" / "standard-s0" / "train.jsonl")
    assert all(value is None or np.isfinite(value) for row in steps for value in row.values())  # None: not measured
    answers = evaluate.main(evaluate.Config(data=data, workers=1, max_new_tokens=8))
    # 3 policies; clean and 3 corruptions of the test split, clean and blank of the train split
    assert len(answers) == 3 * (4 + 2) and all(len(rows) == 8 for rows in answers.values())
    assert report.main(report.Config(data=data))["accuracy"]["base"]["mine"]["clean"]["n"] == 8
