# SPDX-License-Identifier: MIT
"""What the README says about using policies and damaged questions in other tools, and how long a real study takes.

Commands and code are taken out of README.md and run, or held against what the other tool publishes: names and defaults
of vLLM, SGLang, EasyR1 and verl stand here as facts, none of their code does.
"""
import json
import re
import shutil
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLProcessor

from conftest import ROOT, VISION, tiny_model, undecoded

README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = README.partition("## Outgrowing the kit\n")[2].partition("\n## ")[0]
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def code_block(word):
    """The Python block of that section that says this."""
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", ELSEWHERE, re.S) if word in text]
    return block


def command(start):
    """The words of the command that starts like this."""
    line = re.search(rf"^{re.escape(start)}(?:.*\\\n)*.*", ELSEWHERE, re.M)[0]
    return line.replace("\\\n", " ").split()


# A policy in a server: the names of matrices, and the settings

# vLLM: the prefix of PEFT goes, then the first prefix that fits is exchanged; its layers are packed.
# (vllm/lora/utils.py, hf_to_vllm_mapper and packed_modules_mapping of vllm/model_executor/models/qwen2_5_vl.py)
VLLM_PREFIXES = {"model.language_model.": "language_model.model.", "model.visual.": "visual.",
                 "lm_head.": "language_model.lm_head.", "model.": "language_model.model."}
# SGLang: a layer's number decides where a matrix goes, the module's name in it with which others it is packed;
# it wraps no layer of the vision tower. (python/sglang/srt/lora/, should_apply_lora of models/qwen2_5_vl.py)
SERVED = {"q_proj": "self_attn.qkv_proj", "k_proj": "self_attn.qkv_proj", "v_proj": "self_attn.qkv_proj",
          "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_up_proj", "up_proj": "mlp.gate_up_proj",
          "down_proj": "mlp.down_proj"}


def name_in_vllm(name):
    """Of a saved matrix: (module of vLLM's model, A or B)."""
    inner, matrix = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
    for old, new in VLLM_PREFIXES.items():
        if inner.startswith(old):
            return new + inner.removeprefix(old), matrix
    return inner, matrix


def check_served(folder, layers, max_rank):
    """Every linear layer of the language model is served with both matrices, and nothing is left over."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    matrices = load_file(folder / "adapter_model.safetensors")
    assert sorted(settings["target_modules"]) == sorted(SERVED)  # SGLang: a list, not a regular expression
    assert settings["exclude_modules"] == ".*visual.*"
    assert settings["r"] <= max_rank and settings["lora_alpha"] == 2 * settings["r"] and settings["bias"] == "none"
    for name in ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern"):
        assert not settings[name]
    expected = {(f"language_model.model.layers.{layer}.{packed.partition('.')[0]}.{part}", matrix)
                for layer in range(layers) for part, packed in SERVED.items() for matrix in "AB"}
    assert {name_in_vllm(name) for name in matrices} == expected and len(matrices) == len(expected)
    for name, values in matrices.items():
        layer, module, part, matrix = re.fullmatch(
            r"base_model\.model\.model\.language_model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight",
            name).groups()
        assert int(layer) < layers and SERVED[part].startswith(module)
        assert values.shape["AB".index(matrix)] == settings["r"]


@pytest.fixture(scope="module")
def policy_folder(train, study_folder, tmp_path_factory):
    """What stage 3 leaves behind after a step."""
    data = shutil.copytree(study_folder, tmp_path_factory.mktemp("trained") / "data")
    config = train.Config(data=str(data), conditions=["standard"], seeds=[0], steps=1, prompts_per_step=2, group_size=2,
                          max_new_tokens=8, lora_rank=32, workers=1)
    train.main(config)
    return data / "policies" / "standard-s0"


def test_servers_find_every_matrix_of_a_policy(base_folder, policy_folder):
    config = json.loads((base_folder / "config.json").read_text())
    check_served(policy_folder, config["text_config"]["num_hidden_layers"], max_rank=32)


@pytest.mark.parametrize("kind", KINDS)
def test_servers_find_every_matrix_of_each_family(train, tokenizer, tmp_path, kind):
    rank = train.PRESETS["3b"]["lora_rank"]
    policy = train.make_policy(tiny_model(kind, tokenizer), tokenizer, None, lora_rank=rank)
    train.save_adapter(tmp_path, policy, "the base")
    check_served(tmp_path, 3, max_rank=rank)


@pytest.mark.parametrize("start, paths", [("vllm serve", "--lora-modules"), ("python -m sglang.launch_server", "--lora-paths")])
def test_the_commands_of_servers_take_the_rank_of_every_preset(train, prepare, start, paths):
    words = command(start)
    assert "--enable-lora" in words and prepare.PRESETS["3b"]["model"] in words
    assert int(words[words.index("--max-lora-rank") + 1]) == max(preset["lora_rank"] for preset in train.PRESETS.values())
    name, _, folder = words[words.index(paths) + 1].partition("=")
    assert name and folder == f"data/policies/{train.run_name('standard', 0, train.Config())}"


def first_logits(model, prompt):
    ids = torch.tensor([prompt.input_ids])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values,
                     image_grid_thw=prompt.image_grid_thw,
                     mm_token_type_ids=(ids == model.config.image_token_id).int()).logits


def test_a_policy_merged_by_peft_answers_alike(prepare, study_folder, base_folder, policy_folder, tmp_path):
    """The README's lines, on an adapter whose B is large enough to change logits a thousand times as much."""
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    matrices, generator = load_file(folder / "adapter_model.safetensors"), torch.Generator().manual_seed(0)
    for name, values in matrices.items():
        if "lora_B" in name:
            values += 0.02 * torch.randn(values.shape, generator=generator)
    save_file(matrices, folder / "adapter_model.safetensors", {"format": "pt"})
    code = code_block("merge_and_unload").replace(prepare.PRESETS["3b"]["model"], str(base_folder))
    code = code.replace("data/policies/standard-s0", str(folder)).replace('"merged"', repr(str(tmp_path / "merged")))
    exec(code, {})
    merged, base, other = [AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
                           for path in (tmp_path / "merged", base_folder, base_folder)]
    unmerged = PeftModel.from_pretrained(other, folder).eval()
    tokenizer, image_processor = prepare.load_processors(str(base_folder), 112 * 112)
    table = prepare.read_questions(study_folder / "questions" / "shapes.parquet", "")
    for question in table.select(range(4)):
        prompt = prepare.encode(question, tokenizer, image_processor)
        truth, without = first_logits(unmerged, prompt), first_logits(base, prompt)
        assert (truth - without).abs().max() > 0.1
        assert (first_logits(merged, prompt) - truth).abs().max() < 1e-4


# Damaged questions in other trainers

# The keys of EasyR1's examples/config.yaml that the README sets, with the values that stand there
EASYR1 = {"data.train_files": "hiyouga/math12k@train", "data.val_files": "hiyouga/math12k@test", "data.max_pixels": "4194304",
          "data.min_pixels": "262144", "worker.actor.model.model_path": "Qwen/Qwen2.5-7B-Instruct",
          "trainer.n_gpus_per_node": "8", "worker.rollout.tensor_parallel_size": "2"}
EASYR1_COLUMNS = {"data.prompt_key": "problem", "data.answer_key": "answer", "data.image_key": "images"}


@pytest.fixture
def mapped(study_folder, tmp_path, monkeypatch):
    """What the README's lines make of damaged questions, by the name that they have there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name="blank"):
        path = study_folder / "corrupted" / "shapes" / f"{name}.parquet"
        names = {}
        exec(code_block("for_trl").replace("data/corrupted/geometry3k/blank.parquet", str(path)), names)
        return SimpleNamespace(**names)
    return run


def test_the_command_of_easyr1_sets_keys_that_it_has(prepare):
    words = command("python3 -m verl.trainer.main")
    given = dict(word.split("=", 1) for word in words[3:])
    assert given.pop("config") == "examples/config.yaml"
    assert set(given) == set(EASYR1) and not any(given[key] == value for key, value in EASYR1.items())
    preset = prepare.PRESETS["3b"]
    assert given["data.train_files"] == f"KIT/data/{prepare.input_path(preset['train'], 'blank')}"
    assert given["data.val_files"] == f"KIT/data/{prepare.input_path(preset['benchmarks'][0], 'clean')}"
    assert given["worker.actor.model.model_path"] == preset["model"]
    assert int(given["data.max_pixels"]) == preset["max_pixels"]
    # then its floor enlarges no picture that the kit keeps as it is, but to a tile that each family needs
    assert int(given["data.min_pixels"]) == 56 * 56
    assert f"{int(EASYR1['data.min_pixels']):,}" in ELSEWHERE
    assert set(EASYR1_COLUMNS.values()) <= set(prepare.FEATURES)


def test_the_instruction_is_that_of_the_kit(prepare, mapped):
    assert mapped().INSTRUCTION == prepare.INSTRUCTION


@pytest.mark.parametrize("name", ["blank", "misleading", "removed"])
def test_the_mapped_questions_are_the_training_questions(prepare, study_folder, mapped, name):
    """All of the train split in order, pictures byte for byte, and the gold where each trainer looks for it."""
    table = undecoded(prepare.read_questions(study_folder / "corrupted" / "shapes" / f"{name}.parquet", ""))
    truth = [row for row in table if row["split"] == "train"]
    assert 0 < len(truth) < len(table)
    made = mapped(name)
    for rows in (made.verl_rows, made.trl_rows):
        assert rows["id"][:] == [row["id"] for row in truth]
        assert rows["answer"][:] == [row["answer"] for row in truth]
        assert undecoded(rows)["images"][:] == [row["images"] for row in truth]
    for row in made.verl_rows:
        assert row["reward_model"] == {"style": "rule", "ground_truth": row["answer"]}
        assert row["data_source"] == "hiyouga/geometry3k"  # for which verl's rule reads maths in the box


class Processor(Qwen2_5_VLProcessor):
    """Without the video part, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


@pytest.fixture
def processor(prepare, base_folder):
    tokenizer, image_processor = prepare.load_processors(str(base_folder), 112 * 112)
    tokenizer.padding_side = "left"  # as TRL sets it in the processor that it loads itself
    return Processor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def as_verl(messages, images):
    """Its messages: text is split at <image>, and a placeholder put there. (verl/utils/dataset/rl_dataset.py)"""
    parts = re.split("(<image>)", messages[0]["content"])
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def as_trl(messages, images):
    """TRL's own; a batch without any picture keeps its text as it is."""
    from trl.data_utils import prepare_multimodal_messages
    return prepare_multimodal_messages(messages, images=images) if images else messages


@pytest.mark.parametrize("rows, messages_of", [("verl_rows", as_verl), ("trl_rows", as_trl)])
@pytest.mark.parametrize("name", ["blank", "misleading", "removed"])
def test_the_prompts_there_are_those_of_the_kit(prepare, study_folder, mapped, processor, rows, messages_of, name):
    """To the token, pictures included."""
    table = prepare.read_questions(study_folder / "corrupted" / "shapes" / f"{name}.parquet", "")
    originals = {row["id"]: row for row in table}
    for row in getattr(mapped(name), rows):
        messages = messages_of(row["prompt"], row["images"])
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        there = processor(text=[text], images=row["images"] or None)
        here = prepare.encode(originals[row["id"]], processor.tokenizer, processor.image_processor)
        assert list(there["input_ids"][0]) == here.input_ids
        if row["images"]:
            assert torch.equal(torch.as_tensor(there["pixel_values"]), torch.as_tensor(here.pixel_values))


def test_what_verl_reads_survives_its_file(mapped, tmp_path):
    rows = mapped().verl_rows
    rows.to_parquet(tmp_path / "train.parquet")
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train",
                                  cache_dir=str(tmp_path / "read"))
    assert len(table) == len(rows) > 0
    for row, original in zip(table, rows):
        assert all(row[name] == original[name] for name in ("prompt", "data_source", "reward_model"))
        assert all(isinstance(picture, Image.Image) for picture in row["images"]) and len(row["images"]) == 1


@pytest.mark.parametrize("name", ["blank", "removed"])
def test_trl_trains_on_the_mapped_questions(prepare, base_folder, mapped, processor, tmp_path, name):
    """Two real steps of its trainer: the adapter moves, and rewards are paid by the gold of the questions."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    rows = mapped(name).trl_rows
    golds, asked = dict(zip(rows["id"][:], rows["answer"][:])), []

    def reward(completions, answer, id, **_):
        asked.extend(zip(id, answer))
        return [float(number % 2) for number in range(len(completions))]

    model = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    # random weights would draw tokens of pictures, and such as the tokenizer has not
    unused = range(len(processor.tokenizer), model.get_input_embeddings().num_embeddings)
    unwanted = [*processor.tokenizer.convert_tokens_to_ids(VISION), *unused]
    trainer = GRPOTrainer(
        model=model, train_dataset=rows, processing_class=processor, reward_funcs=reward,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=".*visual.*"),
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=8, learning_rate=1e-3, bf16=False, use_cpu=True, gradient_checkpointing=False,
            save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
            generation_kwargs={"suppress_tokens": unwanted}))
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    losses = [row for row in trainer.state.log_history if "loss" in row]
    assert trainer.state.global_step == len(losses) == 2 and all(row["grad_norm"] > 0 for row in losses)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert len(asked) == 8 and all(golds[id] == answer for id, answer in asked)


@pytest.mark.parametrize("name", ["edited", "kept"])
def test_edits_are_for_asking_not_for_training(train, prepare, study_folder, name):
    """Their gold is the answer to the picture before the edit."""
    config = train.Config(data=str(study_folder), conditions=["hallucination"], corruption=["blank", name], steps=1)
    with pytest.raises(prepare.UserError, match=f"{name} is for asking, not for training"):
        train.main(config)
    assert "`edited` and `kept` are for asking, not for training" in ELSEWHERE


# A night or a weekend: what the preset for the 3B does, by the stages' own counting

QUESTIONS = {"geometry3k": ("train", 2101), "mathvista": ("test", 1000), "mmmu": ("test", 900),
             "scienceqa": ("test", 2017)}


def question(source, split, number):
    """A row of a question that has no picture."""
    return {"id": f"{source}/{split}/{number}", "problem": f"What is {number}?", "images": [], "answer": "1",
            "answer_type": "integer", "choices": [], "source": source, "split": split,
            "group": f"subject {number % 7}", "image_tokens": 0, "prompt_tokens": 20}


@pytest.fixture(scope="module")
def real_study(prepare, corrupt, tmp_path_factory):
    """A study of preset 3b as stages 1 and 2 leave it; the damaged questions are copies of the clean ones."""
    data, preset = tmp_path_factory.mktemp("real"), prepare.PRESETS["3b"]
    assert {preset["train"], *preset["benchmarks"]} == set(QUESTIONS)
    study = {"preset": "3b", "model": preset["model"], "seed": 0, "limit": None, "max_pixels": preset["max_pixels"],
             "versions": prepare.versions(), "artifacts": {}, "model_files": {},
             "sources": {"train": preset["train"], "benchmarks": preset["benchmarks"]}}
    for source, (split, count) in QUESTIONS.items():
        clean = prepare.input_path(source, "clean")
        prepare.write_questions(data / clean, (question(source, split, number) for number in range(count)), {})
        study["artifacts"][clean] = prepare.sha256(data / clean)
    (data / "study.json").write_text(json.dumps(study))

    def leave_as_it_is(data, source, digest, study, model, name):
        clean, path = prepare.input_path(source, "clean"), data / prepare.input_path(source, name)
        table = pq.read_table(data / clean)
        origin = json.dumps({clean: digest, "seed": study["seed"]}).encode()
        table = table.replace_schema_metadata({**table.schema.metadata, b"made_from": origin})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, write_page_checksum=True)
        return len(table), f"{path}: a copy"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrupt, "write_damaged", leave_as_it_is)
        corrupt.main(corrupt.Config(data=str(data), workers=1, preview_rows=0))
    return data


@pytest.fixture(scope="module")
def counted(prepare, train, evaluate, real_study):
    """What stages 3 and 4 would do there with their defaults, as they count it: the base and three policies."""
    config = train.Config(data=str(real_study), **train.PRESETS["3b"])
    policies = {"base": (None, {})}
    for condition in config.conditions:
        run = train.run_name(condition, 0, config)
        policies[run] = None, {}
        folder = real_study / "policies" / run
        folder.mkdir(parents=True)
        settings = {"made_from": {}, "max_new_tokens": config.max_new_tokens,
                    "corruption": train.corruptions_of(condition, config)}
        (folder / "config.json").write_text(json.dumps({"settings": settings}))
    inputs = evaluate.find_inputs(evaluate.Config(data=str(real_study)), prepare.load_study(real_study), policies)
    runs = len(config.conditions) * len(config.seeds)
    return SimpleNamespace(policies=policies, inputs=inputs, runs=runs, config=config,
                           training=train.amount(runs, config), asking=evaluate.amount(inputs, policies))


def number_before(word, text):
    return int(re.search(rf"([\d,]+) {word}", text)[1].replace(",", ""))


def test_the_study_of_the_3b_is_bounded(counted, corrupt):
    """By stage 4's own counting, against counting by hand."""
    greedy, drawn = number_before("greedy answers", counted.asking), number_before("drawn ones", counted.asking)
    assert greedy <= 100_000 and drawn <= 40_000
    tested = sum(count for split, count in QUESTIONS.values() if split == "test")
    in_full = {"clean", "blank", "mismatch"}
    assert {asked.name.split()[-1] for asked in counted.inputs} == in_full | set(corrupt.STRESS)
    assert greedy == 4 * (tested * len(in_full) + 3 * 300 * len(corrupt.STRESS) + 2 * 160)
    assert drawn == 4 * 2 * tested
    assert number_before("completions of at most 1024", counted.training) == 3 * 500 * 8 * 8


def test_the_readme_shows_this_arithmetic(counted):
    """Counts are those of the stages, products and sums are right, and both cards are within what is said."""
    lines = re.findall(r"^\|.*\|$", README.partition("**A night or a weekend.**")[2], re.M)
    training, asking, drawing, together = [line.split("|")[1:-1] for line in lines[2:6]]
    steps = counted.runs * counted.config.steps
    batches = sum(len(asked.batches()) for asked in counted.inputs) * len(counted.policies)
    drawn_batches = sum(len(asked.batches()) for asked in counted.inputs if asked.samples) * len(counted.policies)
    assert number_before("completions; ", training[0]) == number_before("completions of", counted.training)
    assert number_before("steps$", training[0].strip()) == steps
    assert number_before("greedy answers", asking[0]) == number_before("greedy answers", counted.asking)
    assert number_before("batches of 64", asking[0]) == batches
    assert number_before("answers;", drawing[0]) == number_before("drawn ones", counted.asking)
    assert number_before("batches", drawing[0]) == drawn_batches
    for column, most in ((1, 16), (2, 60)):
        total = 0
        for row, count in ((training, steps), (asking, batches), (drawing, drawn_batches)):
            times, seconds, hours = re.search(r"([\d,]+) x (\d+) s = ([\d.]+) h", row[column]).groups()
            assert int(times.replace(",", "")) == count
            assert round(count * int(seconds) / 3600, 1) == float(hours)
            total += float(hours)
        assert float(re.search(r"([\d.]+) h", together[column])[1]) == round(total, 1) <= most
