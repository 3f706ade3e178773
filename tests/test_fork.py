# SPDX-License-Identifier: MIT
"""The README's fork table and exercises: each change is made in a copy of its stage and works; each blanked function is missed."""
import ast
import difflib
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from PIL import Image

from conftest import ROOT, VISION, sharpen
from test_05_report import POLICIES, answers, make_study

PIXELS = 112 * 112


@dataclass
class Change:
    """What a class would change: lines of a stage, each with what comes into its place."""
    file: str
    lines: dict[str, str]


CHANGES = {
    "a corruption": Change("02_corrupt.py", {
        "CORRUPTIONS = {function.__name__: function for function in (": '''\
def turned(question, donor, rng, severity):
    """Each picture stands on its head."""
    def turn(picture):
        return picture.rotate(180)
    return repaint(question, turn)


CORRUPTIONS = {function.__name__: function for function in (
    turned,'''}),
    "a reward term": Change("03_train_grpo.py", {
        "    return 0.9 * grade.correct + 0.1 * grade.well_formed":
            "    return 0.9 * grade.correct + 0.1 * grade.well_formed - 0.001 * len(text)"}),
    "a loss": Change("03_train_grpo.py", {
        'LOSSES = ("dapo", "grpo", "dr_grpo")':
            'LOSSES = ("dapo", "grpo", "dr_grpo", "root")',
        '    if loss == "grpo":': '''\
    if loss == "root":  # a completion counts by the root of its length: between dapo and grpo
        return lengths.rsqrt() / lengths.sqrt().sum()
    if loss == "grpo":'''}),
    "a condition": Change("03_train_grpo.py", {
        '    "standard": 0.0,': '''\
    "standard": 0.0,
    "quarter": 0.25,'''}),
    "a benchmark": Change("01_prepare.py", {
        "SOURCES = {": '''\
def from_aokvqa(question_id, image, question, choices, correct_choice_idx):
    """Everyday photographs; the gold is the place of a choice."""
    return record(question, [image], LETTERS[correct_choice_idx], choices, id=question_id)


SOURCES = {
    "aokvqa": Source("HuggingFaceM4/A-OKVQA", None, "validation", from_aokvqa),'''}),
    "a model family": Change("01_prepare.py", {
        'FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")':
            'FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")'}),
    "a measure": Change("05_report.py", {
        '    found["well_formed",] = Observed("share", panel.column(policy, "clean", "well_formed"))': '''\
    found["well_formed",] = Observed("share", panel.column(policy, "clean", "well_formed"))
    for name in panel.withouts:  # answers that stay when the picture goes
        same = panel.said(policy, "clean") == panel.said(policy, name)
        found["stays_without", name] = Observed("share", same)
    found["length",] = Observed("mean", panel.column(policy, "clean", "tokens"))'''}),
    "the prompt": Change("01_prepare.py", {
        'INSTRUCTION = "Think inside <think> </think>, then answer in \\\\boxed{}."':
            'INSTRUCTION = "Look first, think inside <think> </think>, then answer in \\\\boxed{}."'}),
}


def table(heading):
    """The rows of the README's table under a heading, each a dict by the table's head."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def code(cell):
    """What stands between backticks."""
    return re.findall("`([^`]+)`", cell)


def import_from(path, monkeypatch):
    """The stage at a path, under its name, as long as the test takes; stages that it imports are those of the session."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """change -> its stage, changed, from a copy."""
    def make(name):
        change = CHANGES[name]
        source = (ROOT / change.file).read_text(encoding="utf-8").splitlines()
        for old, new in change.lines.items():
            assert source.count(old) == 1, old
            place = source.index(old)
            source[place:place + 1] = new.splitlines()
        copy = tmp_path / "stages" / change.file
        copy.parent.mkdir()
        copy.write_text("\n".join(source) + "\n", encoding="utf-8")
        return import_from(copy, monkeypatch)
    return make


@pytest.fixture
def data(study_folder, tmp_path):
    return shutil.copytree(study_folder, tmp_path / "data")


# The fork table


def test_the_table_has_these_changes():
    assert [row["to change"] for row in table("Change it")] == [*CHANGES]


@pytest.mark.parametrize("name", CHANGES)
def test_the_table_says_file_place_and_line_of_a_small_change(name):
    change = CHANGES[name]
    (row,) = [row for row in table("Change it") if row["to change"] == name]
    source = (ROOT / change.file).read_text(encoding="utf-8")
    assert code(row["file"]) == [change.file]
    assert sorted(code(row["the line"])) == sorted(line.strip() for line in change.lines)

    found = set()  # the functions and tables in which the lines stand
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        names += [node.name] if isinstance(node, ast.FunctionDef) else []
        for line in source.splitlines()[node.lineno - 1:node.end_lineno]:
            if line in change.lines:
                found.update(names)
    assert found == set(code(row["where"]))

    new_lines = "\n".join(change.lines.values()).splitlines()
    compared = difflib.ndiff("\n".join(change.lines).splitlines(), new_lines)
    assert sum(line.startswith("+ ") and line[2:].strip() != "" for line in compared) <= 10
    assert all(len(line) <= 100 for line in new_lines)


def test_a_corruption(changed, prepare, evaluate, train, data):
    """It damages questions, may be trained on, and stage 4 asks it without being told."""
    corrupt = changed("a corruption")
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=["turned"], preview_rows=1))
    clean, turned = (prepare.read_questions(data / prepare.input_path("shapes", name), "") for name in ("clean", "turned"))
    assert turned["problem"][:] == clean["problem"][:] and turned["answer"][:] == clean["answer"][:]
    for one, two in zip(clean, turned):
        for before, after in zip(one["images"], two["images"], strict=True):
            assert np.array_equal(np.asarray(before)[::-1, ::-1], np.asarray(after))

    study = prepare.load_study(data)
    config = train.Config(data=str(data), conditions=["hallucination"], corruption=["turned"], group_size=2)
    train.check_config(config)
    assert train.Questions(study, "hallucination", 0, config).at(0, 8)[0] in list(turned)
    assert "turned" in evaluate.input_names(evaluate.Config(data=str(data)), "shapes")
    policies = {"base": (None, {})}
    inputs = evaluate.find_inputs(evaluate.Config(data=str(data), max_new_tokens=8), study, policies)
    assert "shapes turned" in [asked.name for asked in inputs]


def test_a_reward_term(changed, prepare, data, base_folder, monkeypatch):
    """Random weights are never right, and so paid for being brief alone; a step learns from that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train = changed("a reward term")
    config = train.Config(data=str(data), prompts_per_step=4, group_size=4, max_new_tokens=12, learning_rate=1e-2,
                          micro_batch_tokens=96, cache_gb=1.0)
    policy = train.load_policy(str(base_folder), PIXELS, lora_rank=4)
    questions = train.Questions(prepare.load_study(data), "standard", 0, config)
    row, samples = train.train_step(policy, train.make_optimizer(policy, config), questions, 1, config)
    assert row["correct"] == row["well_formed"] == 0
    rewards = [sample["reward"] for sample in samples]
    assert rewards == pytest.approx([-0.001 * len(sample["response"]) for sample in samples], abs=6e-4)
    assert len(set(rewards)) > 1 and row["reward"] < 0 and row["reward_std"] > 0 and row["grad_norm"] > 0


def test_a_loss(changed, train, prepare):
    """--loss takes it; completions count by the roots of their lengths, and all together 1."""
    new = changed("a loss")
    new.check_config(new.Config(loss="root", group_size=2))
    with pytest.raises(prepare.UserError, match="root is unknown"):
        train.check_config(train.Config(loss="root", group_size=2))
    lengths = torch.tensor([1, 4, 9])
    weights = new.token_weights(lengths, "root", 16)
    assert (weights * lengths).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    for loss in train.LOSSES:
        assert torch.equal(new.token_weights(lengths, loss, 16), train.token_weights(lengths, loss, 16))


def test_a_condition(changed, prepare, data):
    """A run of its own name, a quarter of whose questions are blank, and the others as they were."""
    train = changed("a condition")
    assert train.Config().conditions == ["standard", "hallucination", "mixed"]
    config = train.Config(data=str(data), conditions=["quarter"], group_size=2)
    train.check_config(config)
    assert train.run_name("quarter", 1, config) == "quarter-blank-s1"
    questions = train.Questions(prepare.load_study(data), "quarter", 1, config)
    pictures = {name: {row["id"]: [image.tobytes() for image in row["images"]] for row in table}
                for name, table in questions.tables.items()}
    damaged = []
    for step in range(50):
        for question in questions.at(step, 8):
            shown = [image.tobytes() for image in question["images"]]
            damaged.append(shown == pictures["blank"][question["id"]])
            assert damaged[-1] or shown == pictures["clean"][question["id"]]
    assert abs(np.mean(damaged) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_a_benchmark(changed, base_folder, tmp_path):
    """Rows in the columns of the hub become questions of the study; one that cannot be is rejected with its reason."""
    prepare = changed("a benchmark")
    pictures = []
    for colour in ("red", "green", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (80, 60), colour).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": f"{colour}.png"})
    pq.write_table(pa.table({
        "image": pictures, "question_id": ["a", "b", "c"], "question": ["Which colour is it?"] * 3,
        "choices": [["red", "green"], ["red", "green"], ["blue", "blue"]], "correct_choice_idx": [0, 1, 0],
        "rationales": [["it is"]] * 3}), tmp_path / "validation.parquet")
    data = tmp_path / "data"
    study = prepare.main(prepare.Config(data=str(data), model=str(base_folder), limit=10, benchmarks=["aokvqa"],
                                        local=[f"aokvqa={tmp_path / 'validation.parquet'}"]))
    assert study["sources"]["benchmarks"] == ["aokvqa"] and study["questions"]["aokvqa"] == {"test": 2}
    rows = list(prepare.read_questions(data / prepare.input_path("aokvqa", "clean"), ""))
    assert [(row["id"], row["answer"], row["answer_type"], row["split"]) for row in rows] == [
        ("aokvqa/a", "A", "choice", "test"), ("aokvqa/b", "B", "choice", "test")]
    assert rows[1]["problem"] == "<image>Which colour is it?\n(A) red\n(B) green"
    assert prepare.grade("\\boxed{green}", rows[1]).correct
    (rejected,) = prepare.read_jsonl(data / "questions" / "rejected.jsonl")
    assert rejected["id"] is None and rejected["reason"].startswith("choices: all are the same")


def mixture_of_experts(tokenizer, folder):
    """A few layers of Qwen3-VL whose feed-forward parts are experts, as save_pretrained writes them."""
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in VISION}
    text = dict(vocab_size=576, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]})
    vision = dict(depth=2, num_heads=4, hidden_size=64, intermediate_size=128, out_hidden_size=64,
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1], patch_size=14)
    model = hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"]))
    sharpen(model).save_pretrained(folder)


def test_a_model_family(changed, prepare, train, tokenizer, base_folder, data, tmp_path, monkeypatch):
    """Stage 1 takes what it refused, and stage 3 trains it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(base_folder / name, folder / name)
    mixture_of_experts(tokenizer, folder)
    with pytest.raises(prepare.UserError, match="is a qwen3_vl_moe model"):
        prepare.load_model_parts(str(folder), PIXELS)
    changed("a model family").load_model_parts(str(folder), PIXELS)

    config = train.Config(data=str(data), prompts_per_step=2, group_size=2, max_new_tokens=6, learning_rate=1e-2,
                          micro_batch_tokens=96, cache_gb=1.0, kl=0.1, updates_per_batch=2)
    policy = train.load_policy(str(folder), PIXELS, lora_rank=4)
    questions = train.Questions(prepare.load_study(data), "standard", 0, config)
    row, _ = train.train_step(policy, train.make_optimizer(policy, config), questions, 1, config)
    assert not row["skipped"] and row["completion_tokens"] > 0


def test_a_measure(changed, prepare, corrupt, tmp_path):
    """It stands in results.json for a policy and for a condition, and is what the answers say."""
    policies = {name: POLICIES[name] for name in ("base", "standard-s0")}
    make_study(tmp_path / "data", prepare, corrupt, policies, names=("blank",), limit=20, steps=3)
    report = changed("a measure")
    report.main(report.Config(data=str(tmp_path / "data"), resamples=40, gallery=0))
    results = json.loads((tmp_path / "data" / "report" / "results.json").read_text())
    for policy in policies:
        said = {}  # what each answer means: a right one is the gold, however it is written
        for name in ("clean", "blank"):
            said[name] = {row["id"]: row["gold"] if row["correct"] else row["answer"]
                          for row in answers(tmp_path / "data", policy, name)}
        same = [said["clean"][key] == said["blank"][key] for key in said["clean"]]
        found = results["stays_without"][policy]["shapes"]["blank"]
        assert (found["count"], found["n"]) == (sum(same), len(same)) and 0 < sum(same) < len(same)
        tokens = [row["tokens"] for row in answers(tmp_path / "data", policy, "clean")]
        length = results["length"][policy]["shapes"]
        assert length["value"] == pytest.approx(sum(tokens) / len(tokens)) and length["ci95"][0] < length["value"] < length["ci95"][1]
    assert results["pooled"]["standard"]["shapes"]["stays_without"]["blank"]["n"] == len(same)


def test_the_prompt(changed, prepare, tokenizer):
    """The new line ends every prompt, and nothing of the old one is left."""
    new = changed("the prompt")
    old_text, new_text = (tokenizer.decode(stage.tokenize_prompt("<image>How many?", [4], tokenizer)) for stage in (prepare, new))
    assert new_text == old_text.replace("Think inside", "Look first, think inside") != old_text


def test_the_report_shows_what_is_new(changed, prepare, report, tmp_path):
    """An input and a condition that stage 5 has never heard of stand in its tables."""
    corrupt = changed("a corruption")
    policies = {name: POLICIES["standard-s0"] for name in ("base", "standard-s0", "quarter-blank-s0")}
    make_study(tmp_path / "data", prepare, corrupt, policies, names=("blank", "turned"), limit=20, steps=3)
    results = report.main(report.Config(data=str(tmp_path / "data"), resamples=40, gallery=1))
    assert results["accuracy"]["quarter-blank-s0"]["shapes"]["turned"]["n"] == 20
    page = (tmp_path / "data" / "report" / "index.html").read_text(encoding="utf-8")
    assert "turned" in page and "quarter-blank" in page


# Exercises


EXERCISES = [(function, row) for row in table("Exercises") for function in code(row["write"])]
QUICK = ("group_advantages", "wilson")


class Recorder:
    """Which tests a pytest within pytest selected, and the tracebacks of those that failed."""

    def __init__(self):
        self.collected, self.failed = [], []

    def pytest_collection_finish(self, session):
        self.collected = [item.name for item in session.items]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.longreprtext)


def run_test(row, *options):
    """Run an exercise's command in this process, which has imported torch already."""
    python, dash_m, pytest_, *arguments = shlex.split(*code(row["test"]))
    assert [python, dash_m, pytest_] == ["python", "-m", "pytest"]
    file, *selection = arguments
    recorder = Recorder()
    pytest.main([str(ROOT / file), *selection, "-x", "-q", "-p", "no:cacheprovider", *options], plugins=[recorder])
    return recorder


def test_the_exercises_are_six_functions_with_an_equation_and_a_time():
    rows = table("Exercises")
    assert len(rows) == 6
    for row in rows:
        (file,) = code(row["file"])
        functions = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
                     if isinstance(node, ast.FunctionDef)}
        assert functions >= set(code(row["write"])) and row["equation"] and re.fullmatch(r"\d+ s", row["takes"])


@pytest.mark.parametrize("row", table("Exercises"), ids=lambda row: code(row["write"])[0])
def test_the_command_of_an_exercise_selects_a_test(row):
    assert run_test(row, "--collect-only").collected


@pytest.mark.parametrize("function, row", [
    pytest.param(function, row, id=function, marks=[] if function in QUICK else [pytest.mark.slow]) for function, row in EXERCISES])
def test_a_missing_body_is_noticed(function, row, tmp_path, monkeypatch):
    (file,) = code(row["file"])
    source = (ROOT / file).read_text(encoding="utf-8")
    (node,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function]
    lines = source.splitlines()
    lines[node.body[1].lineno - 1:node.end_lineno] = ["    raise NotImplementedError"]  # behind the docstring
    copy = tmp_path / file
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    import_from(copy, monkeypatch)
    failed = run_test(row).failed
    assert failed and "NotImplementedError" in failed[0]
