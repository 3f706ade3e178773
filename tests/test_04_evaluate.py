# SPDX-License-Identifier: MIT
"""Stage 4: the same answers however they are batched or interrupted, and log-probabilities as a plain forward gives them."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def data(study, tmp_path):
    """A copy of the smallest study that a test may damage; answers are not copied."""
    shutil.copytree(study[0], tmp_path / "data", ignore=shutil.ignore_patterns("answers", "report"))
    return tmp_path / "data"


def config(evaluate, data, **changes):
    return evaluate.Config(**{"data": str(data), "workers": 1, "policies": ["base"], "corruptions": ["clean"], "splits": ["test"], "max_new_tokens": 24} | changes)


@pytest.mark.parametrize("memory", [{"cache_gb": 0.003}, {"cache_gb": 1e-9}, {"memory_gb": 0.45}])
def test_batches_change_no_answer(study, evaluate, data, memory):
    key = ("base", "shapes", "clean")
    again = evaluate.main(config(evaluate, data, **memory))[key]
    for row, expected in zip(again, study[1][key], strict=True):
        assert row.pop("token_nats") == pytest.approx(expected["token_nats"], abs=2e-3)
        assert row == {name: value for name, value in expected.items() if name != "token_nats"}


@pytest.mark.parametrize("call", range(6))
def test_an_interrupted_evaluation_continues_to_the_same_files(evaluate, data, monkeypatch, whole_batches, call):
    """Two policies, three batches, stopped at every call; the file under way loses half a line."""
    whole, files, settings = whole_batches
    real, calls = evaluate.answer, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(evaluate, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config(evaluate, data, **settings))
    there = list((data / "answers").glob("*/shapes/*"))
    assert any(path.suffix == ".part" for path in there) and len(there) == 2
    for part in (path for path in there if path.suffix == ".part" and path.stat().st_size):
        part.write_text(part.read_text()[:-40])  # a kill in the middle of a line
    assert evaluate.main(config(evaluate, data, **settings)) == whole
    assert {path.relative_to(data): path.read_bytes() for path in (data / "answers").glob("*/*/*")} == files


@pytest.fixture(scope="module")
def whole_batches(study, evaluate, tmp_path_factory):
    data = tmp_path_factory.mktemp("undisturbed") / "data"
    shutil.copytree(study[0], data, ignore=shutil.ignore_patterns("answers", "report"))
    settings = {"policies": ["base", "standard-s0"], "cache_gb": 0.006}
    whole = evaluate.main(config(evaluate, data, **settings))
    return whole, {path.relative_to(data): path.read_bytes() for path in (data / "answers").glob("*/*/*")}, settings


def test_answers_that_were_not_joined_are_joined(evaluate, data, monkeypatch):
    """A kill between the last line and the joining; beside it lies nothing, or an older, shorter file."""
    whole = evaluate.main(config(evaluate, data))
    path = data / "answers" / "base" / "shapes" / "clean.jsonl"
    lines = path.read_text().splitlines(True)
    monkeypatch.setattr(evaluate, "answer", None)  # nothing is answered anew
    for older in ([], lines[:2]):
        path.unlink()
        if older:
            path.write_text("".join(older))
        path.with_name("clean.jsonl.part").write_text("".join(lines))
        assert evaluate.main(config(evaluate, data)) == whole
        assert path.read_text() == "".join(lines) and [*path.parent.iterdir()] == [path]


def test_answers_made_from_other_input_are_made_again(evaluate, data, prepare):
    evaluate.main(config(evaluate, data))
    path = data / "answers" / "base" / "shapes" / "clean.jsonl"
    rows = prepare.read_jsonl(path)
    prepare.write_jsonl(path, [row | {"response": "stale", "made_from": {**row["made_from"], "model/model.safetensors": "0"}} for row in rows])
    assert evaluate.main(config(evaluate, data))["base", "shapes", "clean"] == rows == prepare.read_jsonl(path)
    shorter = evaluate.main(config(evaluate, data, max_new_tokens=3))["base", "shapes", "clean"]
    assert max(row["tokens"] for row in shorter) <= 3 < max(row["tokens"] for row in rows)


def test_only_the_ids_of_a_file_are_asked_and_other_answers_stay(evaluate, prepare, data, tmp_path):
    """Eight of the questions, then four of which two are new: the file keeps all ten; who samples otherwise asks anew."""
    ids, file = [f"shapes/test-{i:04d}" for i in range(10)], tmp_path / "ids.json"
    rows = {}
    for some in ids[:8], ids[6:]:
        file.write_text(json.dumps({"ids": some}))
        rows |= {row["id"]: row for row in evaluate.main(config(evaluate, data, only=str(file)))["base", "shapes", "clean"]}
    kept = prepare.read_jsonl(data / "answers/base/shapes/clean.jsonl")
    assert {row["id"] for row in kept} == set(ids) and all(rows[row["id"]] == row for row in kept)
    for text, says in ('{"ids": []}', "an --only that names questions"), ("[]", "no proper ids.*a file of ids"), ('{"ids": 3}', "no proper ids"), ("{", "cannot be read"):
        file.write_text(text)
        with pytest.raises(prepare.UserError, match=says):
            evaluate.main(config(evaluate, data, only=str(file)))


@pytest.mark.parametrize("options, says", [
    (dict(benchmarks=["shapes", "shapes"]), "--benchmarks has shapes twice"), (dict(corruptions=["clean", "clean"]), "--corruptions has clean twice"),
    (dict(memory_gb=math.inf), "--memory_gb inf is")])
def test_what_cannot_work_is_one_sentence(evaluate, prepare, data, options, says):
    with pytest.raises(prepare.UserError, match=says):
        evaluate.main(config(evaluate, data, **options))


def test_a_policy_is_named_by_its_folder_too(evaluate, data):
    by_name = evaluate.main(config(evaluate, data, policies=["standard-s0"]))
    assert evaluate.main(config(evaluate, data, policies=[str(data / "policies" / "standard-s0")])) == by_name


def test_drawn_answers_are_those_of_one_question_alone(evaluate, prepare, train, data):
    """What is drawn without a picture: as many as asked for, by numbers that depend on question and place alone, graded like any answer."""
    rows = evaluate.main(config(evaluate, data, corruptions=["blank"], samples=6))["base", "shapes", "blank"]
    study = prepare.load_study(data)
    policy, questions = train.load_policy(str(data / "model"), study["max_pixels"]), {
        q["id"]: q for q in prepare.read_questions(data / prepare.input_path("shapes", "blank"), "")}
    for row in rows[::13]:
        question = questions[row["id"]]
        prompts = [policy.encode(question)]
        with torch.no_grad(), train.dequantized(policy):
            prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
            draws = torch.from_numpy(np.stack([train.uniforms(0, 0, row["id"], i, 24) for i in range(6)]))
            texts, _ = train.grade_completions(policy, [question], train.generate(policy, prefix, 24, draws))
        assert row["drawn_right"] == sum(prepare.grade(text, question).correct for text in texts) and row["samples"] == 6
    assert "drawn_right" not in evaluate.main(config(evaluate, data, corruptions=["removed"]))["base", "shapes", "removed"][0]


def test_training_questions_are_asked_clean_and_as_they_were_damaged_in_training(evaluate, prepare, data):
    """The paper's settings of the train split: a stratified sample, of no question of the test split, in files of their own."""
    done = evaluate.main(config(evaluate, data, corruptions=[], splits=["train"], limit=10))
    assert done.keys() == {("base", "shapes", "train", name) for name in ("blank", "clean", "mismatch")}  # grounded: mismatch
    rows = done["base", "shapes", "train", "blank"]
    questions = {q["id"]: q for q in prepare.read_questions(data / "questions" / "shapes.parquet", "")}
    assert len(rows) == 10 and all(questions[row["id"]]["split"] == "train" for row in rows)
    assert rows == prepare.read_jsonl(data / "answers" / "base" / "shapes" / "train" / "blank.jsonl")
    assert all("token_nats" not in row and "drawn_right" not in row for rows in done.values() for row in rows)


def test_inputs_beside_the_core_are_asked_of_a_sample(evaluate, data, monkeypatch):
    monkeypatch.setattr(evaluate, "STRESS_LIMIT", 10)
    done = evaluate.main(config(evaluate, data, corruptions=["blank", "removed", "blur-0.05"]))
    assert [len(done["base", "shapes", name]) for name in ("blank", "removed", "blur-0.05")] == [40, 10, 10]


def test_the_plan_says_what_is_done_and_does_nothing(evaluate, data, capsys, monkeypatch):
    settings = {"policies": ["base", "standard-s0"], "corruptions": ["clean", "blank"], "samples": 3}
    assert evaluate.main(config(evaluate, data, plan=True, **settings)) == {} and not (data / "answers").exists()
    amount, time = capsys.readouterr().out.splitlines()
    asked_alone, real = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *arguments: asked_alone.append(1) or real(*arguments))
    done = evaluate.main(config(evaluate, data, **settings))
    asked = sum(map(len, done.values()))
    drawn = sum(row["samples"] for rows in done.values() for row in rows if "drawn_right" in row)
    assert amount == f"2 policies x 2 inputs: {asked} greedy answers and {drawn} drawn ones of at most 24 tokens"
    minutes = r"about \d+\.\d minutes with 1 workers, each of which takes \d\.\d GB"
    assert re.fullmatch(minutes, time)
    told = capsys.readouterr().out.splitlines()  # the real run says both, and asks nothing twice for it
    assert told[0] == amount and re.fullmatch(minutes, told[1]) and len(told) == 4 and len(asked_alone) == len(done)
    evaluate.main(config(evaluate, data, **settings))
    assert "minutes" not in capsys.readouterr().out  # nothing is left to do


def test_nothing_to_ask_is_one_sentence(evaluate, prepare, data):
    with pytest.raises(prepare.UserError, match="^nothing is asked: "):
        evaluate.main(config(evaluate, data, splits=["train"], corruptions=["noise"]))


def test_limit_takes_the_same_share_of_every_group(evaluate, data):
    rows = evaluate.main(config(evaluate, data, limit=10))["base", "shapes", "clean"]
    groups = [row["group"] for row in rows]
    assert len(rows) == 10 and {groups.count(group) for group in groups} == {2}


def test_information_of_tokens_is_the_difference_of_two_plain_forwards(study, evaluate, prepare, train):
    """Whole sequences, picture and blank, through the model's own forward; the recorded rows have the same numbers and all of the text."""
    data, answers, _ = study
    record = json.loads((data / "study.json").read_text())
    policy = train.load_policy(str(data / "model"), record["max_pixels"])
    tables = [{q["id"]: q for q in prepare.read_questions(data / prepare.input_path("shapes", name), "")} for name in ("clean", "blank")]
    for row in answers["base", "shapes", "clean"][::9]:
        prompts = [policy.encode(table[row["id"]]) for table in tables]
        prefix = train.encode_prompts(policy, prompts[:1], train.encode_images(policy, prompts[:1]))
        tokens = train.generate(policy, prefix, 24).tokens[0, :row["tokens"]].tolist()
        logprobs = []
        for prompt in prompts:
            ids = torch.tensor([prompt.input_ids + tokens])
            with torch.no_grad():
                logits = policy.model(input_ids=ids, pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw, use_cache=False,
                                      mm_token_type_ids=(ids == policy.full.config.image_token_id).int()).logits[0, -len(tokens) - 1:-1].float()
            logits[:, policy.banned] = -torch.inf
            logprobs.append(logits.log_softmax(-1)[range(len(tokens)), tokens])
        assert row["token_nats"] == pytest.approx((logprobs[0] - logprobs[1]).tolist(), abs=2e-3)
        assert "".join(row["token_texts"]).rstrip("\ufffd") == row["response"].rstrip("\ufffd") and len(row["token_texts"]) == row["tokens"]


@pytest.mark.slow
def test_the_word_that_depends_on_the_picture_has_the_information_and_the_form_has_none(study, evaluate, prepare, train):
    """A policy taught to say A to one picture, B to another, either to a blank one, in the same form: about log 2 at the letter, 0 elsewhere."""
    data, *_ = study
    policy = train.load_policy(str(data / "model"), json.loads((data / "study.json").read_text())["max_pixels"], lora_rank=16)
    pictures = [q["images"][0] for q in prepare.shapes_world(0, 2)][:2]
    ask = lambda picture: policy.encode({"problem": "<image>Which is it?", "images": [picture]})
    clean, blank = [ask(picture) for picture in pictures], [ask(Image.new("RGB", pictures[0].size, (120, 120, 120)))] * 2
    said = [policy.tokenizer(f"<think>I look.</think>\\boxed{{{letter}}}<|im_end|>")["input_ids"] for letter in "AB"]
    tokens, letter = torch.tensor(said), next(i for i, (a, b) in enumerate(zip(*said)) if a != b)
    optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], 5e-3)
    features = [train.encode_images(policy, prompts) for prompts in (clean, blank)]
    for _ in range(120):
        loss = 0
        for prompts, seen, order in ((clean, features[0], [0, 1]), (blank, features[1], [0, 1])):
            prefix = train.encode_prompts(policy, prompts, seen)
            loss = loss - train.score_tokens(policy, prefix, torch.tensor([0, 1]), tokens[order]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        done = train.generate(policy, train.encode_prompts(policy, clean, features[0]), tokens.shape[1])
        found = evaluate.token_information(policy, train.encode_prompts(policy, blank, features[1]), done, 4096)
    assert done.tokens.tolist() == said
    for nats in found:
        assert 0.35 < nats[letter] < 2 and all(abs(x) < 0.1 for i, x in enumerate(nats) if i != letter)
    assert 0 < sum(math.exp(-nats[letter]) for nats in found) < 1.05  # what a blank picture leaves for A and for B


def test_fewer_questions_leave_the_file_and_another_grader_gives_other_verdicts(evaluate, prepare, data, monkeypatch):
    whole = evaluate.main(config(evaluate, data))["base", "shapes", "clean"]
    path = data / "answers" / "base" / "shapes" / "clean.jsonl"
    before = path.read_bytes()
    monkeypatch.setattr(evaluate, "answer", None)  # nothing is answered anew
    fewer = evaluate.main(config(evaluate, data, limit=10))["base", "shapes", "clean"]
    assert len(fewer) == 10 and path.read_bytes() == before and all(row in whole for row in fewer)
    monkeypatch.setattr(prepare, "grade", lambda response, question, **_: prepare.Grade(True, True, "all right"))
    again = evaluate.main(config(evaluate, data))["base", "shapes", "clean"]
    assert all(row["correct"] for row in again) and prepare.read_jsonl(path) == again


@pytest.mark.parametrize("changes, says", [
    ({"policies": ["nobody-s0"]}, "nobody-s0 holds no finished policy"),
    ({"benchmarks": ["mathvista"]}, r"mathvista\.parquet is missing: run 01_prepare\.py"),
    ({"corruptions": ["fog"]}, "run 02_corrupt.py --corruptions fog"),
    ({"limit": 0}, "--limit 0"), ({"cache_gb": -1.0}, "--cache_gb -1"), ({"max_new_tokens": 0}, "--max_new_tokens 0"),
    ({"splits": ["exam"]}, "--splits exam is unknown")])
def test_what_cannot_be_evaluated_is_named(evaluate, prepare, data, changes, says):
    with pytest.raises(prepare.UserError, match=says):
        evaluate.main(config(evaluate, data, **changes))


def test_a_run_on_a_severity_has_a_point_in_its_name(evaluate, prepare, data):
    old, new = (data / "policies" / name for name in ("standard-s0", "hallucination-blur-0.05-s0"))
    old.rename(new)
    done = evaluate.main(config(evaluate, data, policies=["base", new.name]))
    assert done[new.name, "shapes", "clean"] != done["base", "shapes", "clean"]


def adapter_of_ones_own(data, tmp_path, **changes):
    """The standard run's adapter as somebody else may have it: in a folder of its own, without this kit's config.json."""
    folder = tmp_path / "my_adapter"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(data / "policies" / "standard-s0" / name, folder)
    settings = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("base, noted", [("elsewhere/model", True), ("embedded", False), ("Qwen/Qwen2-VL-2B", True), (None, True)])
def test_an_adapter_of_another_base_is_noted(evaluate, prepare, data, tmp_path, capsys, base, noted):
    folder = adapter_of_ones_own(data, tmp_path, base_model_name_or_path=base)
    evaluate.find_policies(evaluate.Config(data=str(data), policies=[str(folder)]), prepare.load_study(data))
    assert ("was trained on" in capsys.readouterr().out) is noted


def test_an_adapter_from_elsewhere_answers_as_it_should(evaluate, report, data, tmp_path):
    """Without any training here: stages 1, 2, 4, 5 say whether it depends on the picture. Its dropout is off."""
    folder = adapter_of_ones_own(data, tmp_path, lora_dropout=0.5)
    own = evaluate.main(config(evaluate, data, policies=["standard-s0"], corruptions=["clean", "blank"]))
    shutil.rmtree(data / "policies")
    shutil.rmtree(data / "answers")
    done = evaluate.main(config(evaluate, data, policies=["base", str(folder)], corruptions=["clean", "blank"]))
    strip = lambda rows: [{key: value for key, value in row.items() if key != "made_from"} for row in rows]
    for name in ("clean", "blank"):
        assert strip(done["my_adapter", "shapes", name]) == strip(own["standard-s0", "shapes", name]) != strip(done["base", "shapes", name])
    results = report.main(report.Config(data=str(data), resamples=50, gallery=1))
    assert "my_adapter" in results["gains"] and "my_adapter" in (data / "report" / "index.html").read_text()
    folder.rename(folder.with_name("moved"))
    with pytest.raises(report.UserError, match="my_adapter.* or delete .*answers/my_adapter"):
        report.main(report.Config(data=str(data), resamples=50, gallery=1))
    folder.with_name("moved").rename(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(report.UserError, match="my_adapter"):
        report.main(report.Config(data=str(data), resamples=50, gallery=1))


def answers_of(rows):
    return [(row["id"], row["response"], row.get("token_nats")) for row in rows]


def test_policies_may_adapt_other_layers(evaluate, data, tmp_path):
    """One of all linear layers and one of two kinds of them, asked together, answer as each alone."""
    folder = adapter_of_ones_own(data, tmp_path, target_modules=["q_proj", "v_proj"])
    matrices = load_file(folder / "adapter_model.safetensors")
    save_file({name: value for name, value in matrices.items() if "q_proj" in name or "v_proj" in name}, folder / "adapter_model.safetensors")
    alone = [evaluate.main(config(evaluate, data, policies=[policy])) for policy in ("standard-s0", str(folder))]
    shutil.rmtree(data / "answers")
    together = evaluate.main(config(evaluate, data, policies=["standard-s0", str(folder)]))
    for one in alone:
        ((place, rows),) = one.items()
        assert answers_of(together[place]) == answers_of(rows)


def test_an_adapter_that_was_replaced_answers_anew_in_one_process(evaluate, data, tmp_path):
    folder = adapter_of_ones_own(data, tmp_path)
    base = evaluate.main(config(evaluate, data))["base", "shapes", "clean"]
    before = evaluate.main(config(evaluate, data, policies=[str(folder)]))["my_adapter", "shapes", "clean"]
    matrices = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * ("lora_A" in name) for name, value in matrices.items()}, folder / "adapter_model.safetensors")
    after = evaluate.main(config(evaluate, data, policies=[str(folder)]))["my_adapter", "shapes", "clean"]
    assert [row["response"] for row in after] == [row["response"] for row in base] != [row["response"] for row in before]


def test_only_passes_over_a_source_of_which_it_names_no_question(evaluate, data, tmp_path):
    file = tmp_path / "only.json"
    file.write_text('{"ids": ["elsewhere/1"]}')
    assert evaluate.choose_rows(data / "questions/shapes.parquet", "test", 5, str(file)) == {}
    with pytest.raises(evaluate.UserError, match="has no question of the dev split"):
        evaluate.choose_rows(data / "questions/shapes.parquet", "dev", 5, str(file))


@pytest.mark.parametrize("changes, says", [
    ({"peft_type": "IA3"}, "no plain LoRA.*IA3"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "olora"}, "init_lora_weights olora"), ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"of_tomorrow": 1}, "of_tomorrow"),
    ("visual", "no plain LoRA.*visual"), ("nan", "my_adapter cannot be asked: its logits are not finite"), ("rank", "does not fit"), ("fewer", "does not fit.*no counterpart"),
    ("missing", "is no adapter"), ("pickle", "is no adapter"), ("name", "rename the folder"), ("twice", "two names of one matrix"),
    ("fp8", "my_adapter cannot be asked: its logits are not finite"), ("huge", "my_adapter cannot be asked: its logits are not finite"), ({"r": "eight"}, "does not fit"),
    ({"rank_pattern": 3}, "does not fit"), ({"lora_alpha": float("nan")}, "my_adapter cannot be asked: its logits are not finite")])
def test_adapters_that_cannot_be_compared_are_named(evaluate, prepare, data, tmp_path, changes, says):
    folder = adapter_of_ones_own(data, tmp_path, **(changes if isinstance(changes, dict) else {}))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    if changes == "visual":
        save_file(tensors | {"base_model.model.model.visual.blocks.0.mlp.down_proj.lora_A.weight": torch.ones(2, 2)}, path)
    if changes == "nan":
        save_file(tensors | {first: tensors[first] * torch.nan}, path)
    if changes == "fp8":
        save_file(tensors | {first: torch.full_like(tensors[first], torch.nan).to(torch.float8_e4m3fn)}, path)
    if changes == "huge":
        save_file({name: value * 1e30 for name, value in tensors.items()}, path)
    if changes == "twice":
        save_file(tensors | {first.replace("model.language_model.", "model."): tensors[first].clone()}, path)
    if changes == "rank":
        save_file(tensors | {first: torch.ones(3, tensors[first].shape[1])}, path)
    if changes == "fewer":
        save_file({name: value for name, value in tensors.items() if name != first}, path)
    if changes in ("missing", "pickle"):
        path.rename(path.with_name("adapter_model.bin" if changes == "pickle" else "x.safetensors"))
    if changes == "name":
        folder = folder.rename(folder.with_name("standard-s0"))
    with pytest.raises(prepare.UserError, match=says):
        evaluate.main(config(evaluate, data, policies=["base", str(folder)]))


@pytest.mark.parametrize("older", ["model.", "language_model.model."])
def test_an_adapter_with_the_names_of_an_older_transformers_answers_the_same(evaluate, data, tmp_path, older):
    folder = adapter_of_ones_own(data, tmp_path)
    path = folder / "adapter_model.safetensors"
    renamed = {name.replace("model.language_model.", older): value for name, value in load_file(path).items()}
    assert all(f"base_model.model.{older}layers." in name for name in renamed)
    save_file(renamed, path)
    done = evaluate.main(config(evaluate, data, policies=["standard-s0", str(folder)]))
    own, other = (done[who, "shapes", "clean"] for who in ("standard-s0", "my_adapter"))
    assert [row["response"] for row in own] == [row["response"] for row in other]


@pytest.mark.parametrize("name", ["train", "eval", "half", "type", "keys", "forward", "default", "0", "a.b"])
def test_an_adapter_may_lie_in_a_folder_of_any_name(evaluate, data, tmp_path, name):
    folder = adapter_of_ones_own(data, tmp_path)
    folder = folder.rename(folder.with_name(name))
    done = evaluate.main(config(evaluate, data, policies=["base", str(folder)], limit=5))
    assert done[name, "shapes", "clean"] != done["base", "shapes", "clean"]


def test_stale_questions_and_policies_stop_with_the_stage_to_run(evaluate, prepare, corrupt, data):
    prepare.write_questions(data / "corrupted" / "shapes" / "blank.parquet", [], {"questions/shapes.parquet": "0"})
    with pytest.raises(prepare.UserError, match="run 02_corrupt.py"):
        evaluate.main(config(evaluate, data, corruptions=["blank"]))
    with pytest.raises(prepare.UserError, match="run 03_train_grpo.py"):
        evaluate.main(config(evaluate, data, policies=["hallucination-blank-s0"]))
    (data / "questions" / "shapes.parquet").write_bytes(b"")
    with pytest.raises(prepare.UserError, match="run 01_prepare.py"):
        evaluate.main(config(evaluate, data))
