# SPDX-License-Identifier: MIT
"""Stage 1, sources: hub layouts become one record, hostile input becomes a reason, and the same command the same bytes."""
import io
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
BUDGET = 112 * 112


@pytest.fixture
def stage(prepare, model, tmp_path, monkeypatch):
    """Run stage 1 on local sources; returns study.json, the questions of each source and the rejected rows."""
    monkeypatch.setattr(prepare, "WORLD_SIZE", {"train": 6, "test": 6})

    def run(data="data", **options):
        folder = tmp_path / data
        config = prepare.Config(**{"data": str(folder), "model": model, "train": "shapes"} | options)
        study = prepare.main(config)
        questions = {name: [dict(row) for row in prepare.read_questions(folder / prepare.input_path(name, "clean"), "")]
                     for name in study["questions"]}
        return study, questions, prepare.read_jsonl(folder / "questions" / "rejected.jsonl")
    return run


def drawing(number: int, size=(60, 40)) -> Image.Image:
    """Pictures that differ visibly by number."""
    rng = random.Random(number)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        draw.line([rng.randrange(k) for k in size * 2], "black", 2)
    return picture


def encoded(picture: Image.Image, format="PNG", **options) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": "1.png"}


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
METADATA = pa.struct([("task", pa.string())])


def write(path: Path, rows: list[dict], **types) -> Path:
    """A parquet with the rows; column types are guessed but for `types`."""
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()}), path)
    return path


def same_picture(one, two) -> bool:
    return one.size == two.size and one.convert("RGB").tobytes() == two.convert("RGB").tobytes()


# The hub's layouts


def test_geometry3k_both_revisions(stage, tmp_path):
    old = [{"images": [encoded(drawing(i))], "problem": f"<image>Find x{i}.", "answer": r"10 \sqrt { 3 }"} for i in range(2)]
    new = [row | {"id": 100 + i, "choices": ["1", "2", "3", "4"], "ground_truth": "B"} for i, row in enumerate(old)]
    for name, rows, ids in (("old", old, ["train-0", "train-1"]), ("new", new, ["100", "101"])):
        path = write(tmp_path / f"{name}.parquet", rows, images=pa.list_(PICTURE))
        _, questions, rejected = stage(name, train="geometry3k", benchmarks=["shapes"], local=[f"geometry3k={path}"])
        assert rejected == []
        assert [row["id"] for row in questions["geometry3k"]] == [f"geometry3k/{id}" for id in ids]
        first = questions["geometry3k"][0]
        assert first["problem"] == "<image>Find x0." and first["answer_type"] == "math" and first["choices"] == []
        assert first["split"] == "train" and first["needs_image"] is None and same_picture(first["images"][0], drawing(0))


def test_a_hub_folder_gives_only_the_files_of_its_split(stage, tmp_path):
    for split in ("train", "validation", "test"):
        rows = [{"images": [encoded(drawing(len(split)))], "problem": f"<image>{split}?", "answer": "3"}]
        write(tmp_path / "geo" / "data" / f"{split}-00000-of-00001.parquet", rows, images=pa.list_(PICTURE))
    _, questions, _ = stage(train="geometry3k", benchmarks=["shapes", "geometry3k"], local=[f"geometry3k={tmp_path / 'geo'}"])
    assert [(row["problem"], row["split"]) for row in questions["geometry3k"]] == [("<image>test?", "test"), ("<image>train?", "train")]


def mathvista(i: int, **changes) -> dict:
    return {"pid": str(i), "question": f"How wide is {i}?", "image": "images/1.jpg", "decoded_image": encoded(drawing(i)), "choices": None,
            "unit": None, "precision": None, "answer": "3", "question_type": "free_form", "answer_type": "integer",
            "metadata": {"task": "figure question answering"}, "query": f"Hint: an integer.\nQuestion: How wide is {i}?"} | changes


def write_mathvista(path, rows):
    return write(path, rows, decoded_image=PICTURE, choices=pa.list_(pa.string()), precision=pa.float64(), unit=pa.string())


def test_mathvista(stage, tmp_path):
    rows = [mathvista(0), mathvista(1, answer="1.5", answer_type="float", precision=1.0, unit="years"),
            mathvista(2, answer="[1, 2]", answer_type="list"),
            mathvista(3, answer="no", question_type="multi_choice", answer_type="text", choices=["yes", "no"],
                      query="Q\nChoices:\n(A) yes\n(B) no"),
            mathvista(4, answer="dup", question_type="multi_choice", answer_type="text", choices=["x", "dup", "dup"])]
    path = write_mathvista(tmp_path / "testmini-0.parquet", rows)
    _, questions, rejected = stage(benchmarks=["mathvista"], local=[f"mathvista={path}"])
    zero, one, two, three, four = questions["mathvista"]
    assert not rejected and [q["answer_type"] for q in questions["mathvista"]] == ["integer", "float", "list", "choice", "choice"]
    assert zero["problem"] == "<image>Hint: an integer.\nQuestion: How wide is 0?" and zero["group"] == "figure question answering"
    assert (one["precision"], one["unit"]) == (1, "years")
    assert (three["answer"], three["choices"]) == ("B", ["yes", "no"]) and three["problem"].endswith("(B) no")
    assert four["answer"] == "B"  # of equal choices the first


def mmmu(i: int, pictures: dict[int, Image.Image], **changes) -> dict:
    row = {"id": f"validation_Art_Theory_{i}", "question": "What does <image 1> show?", "options": "['a', \"b's\", 'c', 'd']",
           "explanation": "",
           "img_type": "['Plots']", "answer": "A", "topic_difficulty": "Easy", "question_type": "multiple-choice", "subfield": "x"}
    return row | {f"image_{k}": encoded(pictures[k]) if k in pictures else None for k in range(1, 8)} | changes


def write_mmmu(path, rows):
    return write(path, rows, **{f"image_{k}": PICTURE for k in range(1, 8)})


def test_mmmu_tags_name_their_pictures(stage, tmp_path):
    p = {k: drawing(k) for k in range(1, 8)}
    rows = [mmmu(1, p, question="See <image 3>, <image 1> and <image 3> again.", options=repr([f"<image {k}>" for k in (2, 7, 4, 5)]),
                 answer="D"),
            mmmu(2, {1: p[1]}, options=repr([f"option {k}" for k in range(10)]), answer="J"),
            mmmu(3, {1: p[1]}, question_type="short-answer", options="[]", answer="['2.5', 'two and a half']"),
            mmmu(4, {1: p[1]}, question="What does <image 2> show?"),
            mmmu(5, {1: p[1]}, options="__import__('os').system('true')"),
            mmmu(6, {1: p[1]}, options="[" * 5000),
            mmmu(7, {1: p[1]}, answer="?"),
            mmmu(8, {2: p[2]}, question="Nothing named.")]
    _, questions, rejected = stage(benchmarks=["mmmu"], local=[f"mmmu={write_mmmu(tmp_path / 'v.parquet', rows)}"])
    many, ten, opened, unnamed = questions["mmmu"]
    assert many["problem"] == ("<image><image>See <image>, <image> and image 3 again.".replace("<image><image>See", "<image>See")
                               + "\n(A) <image>\n(B) <image>\n(C) <image>\n(D) <image>")
    expected = [p[6], p[3], p[1], p[2], p[7], p[4], p[5]]  # the sixth has no tag: it stands first
    assert all(map(same_picture, many["images"], expected)) and len(many["images"]) == 7
    assert many["choices"] == ["image 2", "image 7", "image 4", "image 5"] and many["group"] == "Art_Theory"
    assert ten["answer"] == "J" and ten["choices"][9] == "option 9" and "(J) option 9" in ten["problem"]
    assert opened["answer_type"] == "open" and opened["answer"] == "['2.5', 'two and a half']"
    assert unnamed["problem"].startswith("<image>Nothing") and same_picture(unnamed["images"][0], p[2])
    assert [(row["row"], row["reason"].partition(":")[0]) for row in rejected] == [
        (4, "picture missing"), (5, "not a question"), (6, "not a question"), (7, "gold")]


def test_scienceqa_takes_the_image_half(stage, tmp_path):
    row = {"image": encoded(drawing(1)), "question": "Which?", "choices": ["left", "right"], "answer": 1, "hint": "Look.", "task": "",
           "grade": "",
           "subject": "natural science", "topic": "", "category": "", "skill": "", "lecture": "It is right.", "solution": "right"}
    rows = [row, row | {"image": None}, row | {"hint": "", "image": encoded(drawing(2))}]
    path = write(tmp_path / "test.parquet", rows, image=PICTURE, answer=pa.int8())
    _, questions, rejected = stage(benchmarks=["scienceqa"], local=[f"scienceqa={path}"])
    first, second = questions["scienceqa"]
    assert first["problem"] == "<image>Context: Look.\nWhich?\n(A) left\n(B) right" and first["answer"] == "B"
    assert second["problem"] == "<image>Which?\n(A) left\n(B) right" and second["id"] == "scienceqa/test-2"
    assert [row["reason"] for row in rejected] == ["no picture"]


def test_mathvision_one_file_shows_all_pictures(stage, tmp_path):
    row = {"id": "1", "question": "A cube:\n<image1>\nWhich?\n<image2>", "options": list("ABCDE"), "image": "images/1.jpg",
           "decoded_image": encoded(drawing(1)), "answer": "D", "solution": None, "level": 1, "subject": "logic"}
    rows = [row, row | {"id": "2", "options": [], "answer": "(3,-4)", "decoded_image": encoded(drawing(2))},
            row | {"id": "3", "options": [f"<image{k}>" for k in range(2, 7)]}]
    path = write(tmp_path / "t.parquet", rows, decoded_image=PICTURE, options=pa.list_(pa.string()), solution=pa.string())
    _, questions, _ = stage(benchmarks=["mathvision"], local=[f"mathvision={path}"])
    letters, free, pictured = questions["mathvision"]
    assert letters["problem"] == "A cube:\n<image>\nWhich?\nimage 2"
    assert letters["choices"] == list("ABCDE") and letters["answer_type"] == "choice"
    assert free["answer_type"] == "math" and free["answer"] == "(3,-4)"
    assert pictured["choices"][0] == "image 2"
    assert pictured["problem"].endswith("(A) image 2\n(B) image 3\n(C) image 4\n(D) image 5\n(E) image 6")


def test_mathverse_wemath_mmk12(stage, tmp_path):
    image = encoded(drawing(1))
    verse = {"sample_index": "1", "problem_index": "1", "problem_version": "Vision Intensive",
             "question": "Find r.\nChoices:\nA:10\nB:12\nC:16\nD:20",
             "image": image, "answer": "D", "question_type": "multi-choice",
             "query_wo": "Question: Find r.\nChoices:\nA:10\nB:12\nC:16\nD:20"}
    only = verse | {"sample_index": "2", "problem_version": "Vision Only", "question": None, "query_wo": "Answer the question shown."}
    free = verse | {"sample_index": "3", "question": "Find s.", "query_wo": "Question: Find s.", "question_type": "free-form",
                    "answer": "12.1"}
    math = {"ID": "3steps_1", "split": "testmini", "knowledge concept": "x", "question": "What area?",
            "option": "A. 3; x;B. 4;C. 5; D. No correct answer",
            "answer": "B", "image_path": image, "key": "3steps_3", "question number": 1, "knowledge concept description": ""}
    k12 = {"id": "a1", "question": "<image>Find y.", "image": image, "answer": r"$\frac{1}{2}$", "subject": "math"}
    local = [f"{name}={write(tmp_path / f'{name}.parquet', rows, image=PICTURE, image_path=PICTURE)}"
             for name, rows in (("mathverse", [verse, only, free]), ("wemath", [math]), ("mmk12", [k12]))]
    _, questions, rejected = stage(train="mmk12", benchmarks=["mathverse", "wemath"], local=local)
    assert [(q["answer_type"], q["choices"], q["group"]) for q in questions["mathverse"]] == [
        ("choice", ["10", "12", "16", "20"], "Vision Intensive"), ("choice", list("ABCD"), "Vision Only"), ("math", [], "Vision Intensive")]
    assert questions["mathverse"][1]["problem"] == "<image>Answer the question shown."
    assert questions["wemath"][0]["choices"] == ["3; x", "4", "5", "No correct answer"]
    assert questions["wemath"][0]["id"] == "wemath/3steps_1-3steps_3"
    assert questions["mmk12"][0]["problem"] == "<image>Find y." and questions["mmk12"][0]["group"] == "math" and not rejected


def test_mmk12_test_questions_list_their_choices(prepare):
    row = {"id": "1", "question": "<image>Which?\nA. one\nB. two\nC. three\nD. four", "image": {"bytes": b"", "path": None},
           "answer": "C", "subject": "physics"}
    question = prepare.SOURCES["mmk12"].convert(**row)
    assert (question["answer_type"], question["choices"]) == ("choice", ["one", "two", "three", "four"])
    assert question["problem"].count("two") == 1


def test_the_hub_is_read_through_datasets(prepare, stage, monkeypatch):
    table = pa.table({"images": pa.array([[encoded(drawing(1))]], pa.list_(PICTURE)), "problem": ["<image>Find x."], "answer": ["3"]})
    asked = []
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **options: asked.append((args, options)) or prepare.Dataset(table))
    _, questions, _ = stage(train="mmr1", benchmarks=["shapes"])
    assert asked[0] == (("MMR1/MMR1-Math-RL-Data-v0", None), {"split": "train"})
    assert questions["mmr1"][0]["problem"] == "<image>Find x." and same_picture(questions["mmr1"][0]["images"][0], drawing(1))


def test_without_a_network_local_is_named(prepare, stage, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network")
    monkeypatch.setattr(prepare, "get_dataset_config_names", offline)
    with pytest.raises(prepare.UserError, match="--local mmmu=PATH"):
        stage(benchmarks=["mmmu"])


def test_virl39k_and_mmr1(stage, tmp_path):
    """Boxed golds are unwrapped; a letter is a choice where the text lists them, a word is no maths."""
    rows = [("Find x.", r"\boxed{\frac{1}{2}}"), ("Which?\nA. red\nB. blue", "B"), ("Who?", "Evelyn"), ("Is it?", r"\text{No}"), ("Find.", "10 cm")]
    rows = [{"images": [encoded(drawing(n))], "problem": f"<image>{text}", "answer": gold, "id": n, "category": "geometry", "qid": str(n)}
            for n, (text, gold) in enumerate(rows)]
    for source in ("virl39k", "mmr1"):
        path = write(tmp_path / f"{source}.parquet", rows, images=pa.list_(PICTURE))
        _, questions, rejected = stage(source, train=source, benchmarks=["shapes"], local=[f"{source}={path}"])
        asked = questions[source]
        assert not rejected and [q["answer_type"] for q in asked] == ["math", "choice", "text", "text", "math"]
        assert asked[0]["answer"] == r"\frac{1}{2}" and asked[1]["choices"] == ["red", "blue"] and asked[1]["problem"] == "<image>" + rows[1][
            "problem"].removeprefix("<image>") and asked[0]["group"] == "geometry"


def test_clevr_count(stage, tmp_path):
    """Counts as integers or as texts; the question names no picture, or begins with its tag."""
    rows = [{"images": [encoded(drawing(n))], "problem": f"{tag}How many items are there in the image?", "answer": 3 + n}
            for n, tag in enumerate(("<image>", ""))]
    texts = [row | {"answer": str(row["answer"])} for row in rows]
    for name, each in (("integers", rows), ("texts", texts)):
        path = write(tmp_path / f"{name}.parquet", each, images=pa.list_(PICTURE))
        _, questions, rejected = stage(name, train="clevr_count", benchmarks=["shapes"], local=[f"clevr_count={path}"])
        assert not rejected and [row["answer"] for row in questions["clevr_count"]] == ["3", "4"]
        assert {row["problem"] for row in questions["clevr_count"]} == {"<image>How many items are there in the image?"}


def test_choices_that_cannot_be_read_make_no_free_form_question(stage, tmp_path, prepare):
    """Each would else be asked without its choices, its gold a letter that nobody could know."""
    row = mathvista(1, answer="no", question_type="multi_choice", answer_type="text", choices=[])
    wemath = {"ID": "1", "question": "Which?", "option": "A.3;C.4", "answer": "A", "image_path": encoded(drawing(1)), "key": "one"}
    science = {"image": encoded(drawing(1)), "question": "Which?", "choices": [], "answer": 1, "hint": "", "subject": "natural science"}
    for name, path in {"mathvista": write_mathvista(tmp_path / "t.parquet", [row]), "wemath": write(tmp_path / "w.parquet", [wemath], image_path=PICTURE),
                       "scienceqa": write(tmp_path / "s.parquet", [science], image=PICTURE, choices=pa.list_(pa.string()))}.items():
        with pytest.raises(prepare.UserError, match=f"source {name} has no test question left: choices 1"):
            stage(name, benchmarks=[name], local=[f"{name}={path}"])


# The user's own


def own_folder(path: Path, rows: list) -> Path:
    path.mkdir(exist_ok=True)
    (path / "questions.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    for i in range(8):
        drawing(i).save(path / f"{i}.png")
    return path


def test_own_questions(stage, tmp_path):
    q = {"problem": "How many?", "answer": 3, "images": ["0.png"]}
    rows = [q, q | {"problem": "How far?", "answer": "2.50"}, q | {"problem": "Which?", "answer": "red", "choices": ["blue", "red"]},
            q | {"problem": "Which one?", "answer": "A", "choices": ["B", "A"], "group": "letters", "id": "x"},
            q | {"problem": "First <image>, then <image>?", "answer": r"\frac{1}{2}", "images": ["1.png", "2.png"]},
            q | {"problem": "Who?", "answer": "Anna", "needs_image": True}, q | {"problem": "Say.", "answer": ["yes", "aye"]}]
    folder = own_folder(tmp_path / "mine", rows)
    _, questions, rejected = stage(benchmarks=["mine"], local=[f"mine={folder}"])
    mine = questions["mine"]
    assert not rejected and [row["answer_type"] for row in mine] == ["integer", "float", "choice", "choice", "math", "text", "open"]
    assert [row["answer"] for row in mine[2:4]] == ["B", "A"]  # a letter is a letter, even where a choice has that text
    assert mine[2]["problem"] == "<image>Which?\n(A) blue\n(B) red" and mine[3]["id"] == "mine/x" and mine[5]["needs_image"] is True
    assert mine[4]["problem"] == "First <image>, then <image>?" and same_picture(mine[4]["images"][1], drawing(2))


@pytest.mark.parametrize("gold, other, kind", [
    ("x + y", "y+x", "math"), ("a/b", r"\frac{a}{b}", "math"), ("x - y", "-y + x", "math"), ("2x", "x+x", "math"),
    ("yes/no", "Yes/no", "text"), ("well-known", "Well-known", "text"), ("x", "$x$", "text"), ("N/A", "N/A.", "text")])
def test_a_formula_of_letters_alone_is_compared_as_maths(prepare, own, gold, other, kind):
    question = own("What is it?", gold)
    assert question["answer_type"] == kind
    assert prepare.grade(f"\\boxed{{{other}}}", question).correct


def test_what_the_kit_wrote_it_reads(prepare, stage, tmp_path):
    """Splits stay apart, and nothing changes on the second way through."""
    _, first, _ = stage("one", benchmarks=["shapes"])
    path = tmp_path / "one" / "questions" / "shapes.parquet"
    _, second, rejected = stage("two", train="mine", benchmarks=["mine"], local=[f"mine={path}"])
    assert not rejected and len(second["mine"]) == len(first["shapes"]) == 12
    for one, two in zip(first["shapes"], second["mine"]):
        assert {k: v for k, v in one.items() if k not in ("images", "id", "source")} == {
            k: v for k, v in two.items() if k not in ("images", "id", "source")}
        assert same_picture(one["images"][0], two["images"][0])


# Rows: what is read otherwise than it is meant is taken rightly or rejected


@pytest.fixture
def own(prepare):
    """A row of the user's own, of `problem`, `answer` and more, as a question or as its reason."""
    def read(problem="Which?", answer="3", images=("0.png",), **more):
        row = {"problem": problem, "answer": answer, "images": list(images)} | more
        try:
            return prepare.to_question("mine", "test", json.dumps(row), 0)
        except prepare.Rejected as error:
            return str(error)
    return read


PICTURES = ("0.png", "1.png", "2.png")


def test_pictures_as_choices_keep_their_letters_apart(prepare, own):
    """Bare or numbered, each choice is the number of its picture, so that one letter alone is right."""
    bare = own("Like <image>?", "B", PICTURES, choices=["<image>", "<image>"])
    assert bare["choices"] == ["image 2", "image 3"] and bare["images"] == list(PICTURES)
    assert bare["problem"] == "Like <image>?\n(A) <image>\n(B) <image>"
    numbered = own("Like <image 2>?", "B", PICTURES, choices=["<image 3> left", "<image1> right"])
    assert numbered["choices"] == ["image 3 left", "image 1 right"]
    assert numbered["images"] == ["1.png", "2.png", "0.png"]
    mixed = own("Like <image 2>?", "A", PICTURES, choices=["<image>", "<image>"])
    assert mixed["choices"] == ["image 1", "image 3"]
    assert mixed["images"] == ["1.png", "0.png", "2.png"]
    listed = own("<image> is like:\n(A) <image>\n(B) <image>", "B", PICTURES)
    assert listed["choices"] == ["image 2", "image 3"] and listed["answer"] == "B"
    again = own(listed["problem"], "B", PICTURES, choices=listed["choices"])
    assert [again[key] for key in ("problem", "choices")] == [listed[key] for key in ("problem", "choices")]
    for question in (bare, numbered, mixed, listed):
        right = [letter for letter in "AB" if prepare.grade(f"\\boxed{{{letter}}}", question).correct]
        assert right == [question["answer"]]


def test_pictures_of_choices_that_could_be_others_are_rejected(own):
    """Of three pictures two have tags, all in the choices and without a number: which are meant?"""
    for more in ({"choices": ["<image>", "<image>"]}, {"problem": "Which?\n(A) <image>\n(B) <image>"}):
        assert own(**{"problem": "Which?", "answer": "B", "images": PICTURES} | more).startswith("picture: one has no tag")
    assert own("Which?", "B", PICTURES, choices=["<image 2>", "<image 3>"])["choices"] == ["image 2", "image 3"]


def test_a_list_is_a_gold_of_type_list(prepare, own):
    question = own("Which?", [1, 2.5], answer_type="list")
    assert question["answer"] == "[1, 2.5]"
    assert [answer for answer in ("[1, 2.5]", "1, 2.5", "[2.5, 1]") if prepare.grade(f"\\boxed{{{answer}}}", question).correct] == ["[1, 2.5]", "1, 2.5"]


def test_a_training_set_without_an_answer_is_rejected(prepare):
    for gold in (None, float("nan")):
        with pytest.raises(prepare.Rejected, match="gold: the answer is no text"):
            prepare.SOURCES["geometry3k"].convert("Find x.", [{"bytes": b"", "path": None}], gold)


def test_one_file_with_all_pictures_keeps_choices_apart(prepare):
    question = prepare.SOURCES["mathvision"].convert(
        "1", "Which?", ["<image>"] * 4, {"bytes": b"", "path": None}, "C", "logic")
    assert question["choices"] == ["image 1", "image 2", "image 3", "image 4"]


@pytest.mark.parametrize("choices, reason", [
    (["red", None], "choices: one is no text or finite number"), ([None, None], "choices: one is no text"),
    (["red", ["blue"]], "choices: one is no text or finite number"), ([["red", "blue"], ["green"]], "choices: one is no text"),
    (["red", {"text": "blue"}], "choices: one is no text or finite number"), (["red", ""], "choices: one is empty"),
    ([1, float("nan")], "choices: one is no text"), ([2, float("inf")], "choices: one is no text"),
    (["red", "red"], "choices: all are the same"), (["red", " red "], "choices: all are the same"),
    (["red"], "choices: all are the same"), (["<image 1>", "<image 1>"], "choices: all are the same"),
    ([str(i) for i in range(27)], "not a question: more choices than letters")])
def test_choices_that_are_none_are_rejected(own, choices, reason):
    assert own("Which?", "A", choices=choices).startswith(reason)


@pytest.mark.parametrize("row, reason", [
    ({"answer": [None]}, "gold: one of the answers is no text"), ({"answer": ["yes", ["no"]]}, "gold: one of the answers is no text"),
    ({"answer": None, "choices": ["None", "x"]}, "gold: the answer is no text"), ({"answer": None}, "gold: the answer is no text"),
    ({"answer": ["a"], "answer_type": "text"}, "gold: several answers"), ({"answer": [1, 2], "answer_type": "integer"}, "gold: several answers"),
    ({"answer": "\u200b"}, "gold: the answer is empty"), ({"problem": " "}, "not a question: it has no text"),
    ({"problem": "<image>\u200b"}, "not a question: it has no text"), ({"precision": 2.5}, "not a question: precision"),
    ({"precision": -1}, "not a question: precision"), ({"precision": "two"}, "not a question: precision")])
def test_a_row_with_nothing_to_ask_or_to_compare_is_rejected(own, row, reason):
    assert own(**row).startswith(reason)


def test_a_null_among_a_benchmarks_choices_is_rejected(prepare):
    with pytest.raises(prepare.Rejected, match="choices: one is no text"):
        prepare.SOURCES["scienceqa"].convert({"bytes": b"", "path": None}, "Which?", ["left", None], 0, "", "x")


@pytest.mark.parametrize("gold, choices, letter", [
    ("B", ["red", "blue"], "B"), ("b", ["red", "blue"], "B"), ("(B)", ["red", "blue"], "B"), ("B.", ["red", "blue"], "B"),
    ("(b)", ["red", "blue"], "B"), ("blue", ["red", "blue"], "B"), ("Blue.", ["red", "blue"], "B"),
    (r"\boxed{B}", ["red", "blue"], "B"), ("a", ["b", "a"], "B"), ("A", ["B", "A"], "A"), (3, [2, 3], "B"), ("3", [2, 3], "B"),
    (2.5, [1, 2.5], "B"), ("red", ["red", "red", "blue"], "A"), ("C", ["red", "blue", "green"], "C"),
    ("5 mw", ["5 MW", "5 mW"], None), ("C", ["red", "blue"], None), ("green", ["red", "blue"], None),
    (0, ["red", "blue"], None), (["A", "B"], ["red", "blue"], None), ("AB", ["red", "blue"], None)])
def test_the_gold_of_a_choice_question(own, gold, choices, letter):
    """By letter or by text; what names none of the choices, or several, is no gold."""
    question = own("Which?", gold, choices=choices)
    if letter is None:
        assert question.startswith("gold: the answer")
    else:
        assert (question["answer"], question["answer_type"]) == (letter, "choice")
        assert question["choices"] == [str(choice) for choice in choices]


@pytest.mark.parametrize("text", [
    "Points (A) and (B) lie on it. Which is red?", "Is (A) red?", "f(A) is?", "Which of A. and B. is it?", "Is it (A) or (B)?",
    "Which?\n(A)"])
def test_a_mention_of_a_letter_hides_no_choices(own, text):
    question = own(text, "B", choices=["red", "blue"])
    assert question["problem"] == f"<image>{text}\n(A) red\n(B) blue" and question["choices"] == ["red", "blue"]


LISTS = ["Which?\nA. red\nB. blue", "Which?\n(A) red\n(B) blue", "Which?\n(a) red\n(b) blue", "Which?\na) red\nb) blue",
         "Which? (A) red (B) blue", "Which? (a) red; (b) blue", "See (A).\nWhich?\n(A) red\n(B) blue", "Which?\nA、red\nB、blue",
         "Which?\nChoices:\nA:red\nB:blue", "Which?\nA.\nred\nB.\nblue", "Which?\n  A: red\n\n  B: blue\nAnswer with the letter."]


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("gold", ["B", "b", "(B)", "blue", "B. blue", r"\boxed{B}"])
def test_choices_that_the_text_lists(own, text, gold):
    """With `choices` or without, they are shown once, and the gold is a letter."""
    for more in ({}, {"choices": ["red", "blue"]}, {"choices": ["A", "B"]}, {"choices": ["A. red", "B. blue"]},
                 {"answer_type": "choice"}):
        question = own(text, gold, **more)
        assert (question["answer_type"], question["choices"], question["answer"]) == ("choice", ["red", "blue"], "B"), more
        assert question["problem"] == f"<image>{text}"


@pytest.mark.parametrize("text, choices", [
    ("Is there a triangle or a circle?", ["circle", "triangle"]), ("What is a red shape?", ["blue", "red"]), ("a = 5 and b = 3. Which is b?", ["3", "5"]),
    ("Is A 3 and B 4?", ["4", "3"]), ("Which is at point D: red or blue?", ["blue", "red"]), ("f(c) = 3. What is c?", ["3", "4"]), ("Which operation?", ["*", "+"]),
    ("Which?", ["E. coli", "B. subtilis"]), ("Which?", ["C. elegans", "D. melanogaster"])])
def test_a_text_that_mentions_choices_lists_none(own, text, choices):
    for gold in (choices[1], "B") if not choices[0].endswith(("coli", "elegans")) else choices[1:]:
        question = own(text, gold, choices=choices)
        assert (question["choices"], question["answer"]) == (choices, "B")


def test_three_choices_on_one_line(own):
    for text in ("Which? A. red B. blue C. green", "Which? A) red B) blue C) green", "Which?\n(A) red (B) blue (C) green"):
        assert own(text, "C")["choices"] == ["red", "blue", "green"]


@pytest.mark.parametrize("text, gold, kind", [
    ("Which point is highest?", "B", "text"), ("Is (A) left of (B)? Which?", "B", "text"), ("From A. to B. is?", "B", "text"),
    ("Look:\nA. one\nC. three", "C", "text"), ("Look:\nA. a dog\nB. a cat\nHow many?", 7, "integer"),
    ("Say.\nA. x\nB. y", ["B", "b"], "open")])
def test_a_gold_that_is_no_listed_choice_is_asked_freely(own, text, gold, kind):
    question = own(text, gold)
    assert (question["answer_type"], question["choices"]) == (kind, []) and question["problem"] == f"<image>{text}"


def test_letters_whose_choices_the_picture_shows(own):
    for text, more in (("Which?\nA.\nB.\nC.", {}), ("Which?", {"choices": ["A", "B", "C"]}), ("Which?", {"choices": ["A.", "B.", "C."]})):
        question = own(text, "C", **more)
        assert (question["choices"], question["answer"], question["problem"]) == (["A", "B", "C"], "C", f"<image>{text}")


def test_more_choices_than_a_list_is_read_for(own):
    """What the kit wrote it reads, also where no reader of lists would: ten letters, several lines."""
    for choices in ([f"no. {i}" for i in range(12)], ["one\nor two", "three\nor four"]):
        written = own("Which?", "B", choices=choices)
        assert own(written["problem"], "B", choices=choices)["problem"] == written["problem"]


@pytest.mark.parametrize("text, more, reason", [
    ("Which?\nA. red\nB. blue", {"answer": "C"}, "gold: the answer 'C' is not a letter of its 2 choices"),
    ("Which?\nA. red\nB. blue", {"choices": ["blue", "red"]}, "choices: the text lists others"),
    ("Which? (A) red (B) blue", {"choices": ["blue", "red"]}, "choices: the text lists others"),
    ("Which?\nA. red\nB. blue", {"choices": ["red", "blue", "green"]}, "choices: the text lists others"),
    ("Which? (A) red (B) blue", {"choices": ["red", "blue", "green"]}, "choices: the text lists others"),
    ("Which?\n(A) red\n(B) blue\n(C) green", {"choices": ["red", "blue"]}, "choices: the text lists others"),
    ("Which?\n(A) red\n(B) blue", {"choices": ["red", "blu"]}, "choices: the text lists others"),
    *[(text, {"choices": ["blue", "red"]}, "choices: the text lists others") for text in (
        "Which? A. red B. blue", "Which? A. red, B. blue", "Which? A: red; B: blue", "Which? [A] red [B] blue", "Which?\n**A.** red\n**B.** blue",
        "Which?\n- A. red\n- B. blue", "Which?\nA - red\nB - blue", "Which? A．red B．blue")],
    ("Which?", {"choices": ["B. blue", "A. red"]}, "choices: their letters are not A, B"),
    ("Which?", {"choices": ["A. red", "C. blue"]}, "choices: their letters are not A, B"),
    ("Which?", {"answer_type": "choice"}, "choices: none could be read"), ("Which?", {"choices": []}, None)])
def test_lists_that_contradict(own, text, more, reason):
    """Two lists of letters, or none: which choice an answer means, nobody could say."""
    question = own(text, **{"answer": "B"} | more)
    assert question["answer_type"] == "text" if reason is None else question.startswith(reason)


def test_boxed_and_marked_letters_of_training_sets(prepare):
    for gold in ("B", "b", r"\boxed{B}", "(B)", r"$\text{B}$", "B.", "blue"):
        row = {"problem": "<image>Which? (A) red (B) blue", "images": [{"bytes": b"", "path": None}], "answer": gold}
        question = prepare.to_question("virl39k", "train", row, 0)
        assert (question["answer"], question["answer_type"], question["choices"]) == ("B", "choice", ["red", "blue"])


LATEX = (r"\frac{1}{2} \theta \rho \neq \nabla \nu \ne \times \text{m} \triangle \beta \bar \right \rangle \forall \tan \tau \tfrac12 \notin "
         r"\not= \to \textbf{x} \underline{x} \alpha \sqrt2 \pi \( \{ \, \% \rm \nexists").split()


@pytest.mark.parametrize("latex", LATEX)
def test_one_backslash_is_rejected_and_two_are_taken(prepare, latex):
    """JSON reads \\f, \\t, \\r, \\n, \\b as white space or control characters, and refuses most others."""
    line = '{"problem": "Find $x %s y$.", "answer": "3", "images": ["0.png"]}'
    with pytest.raises(prepare.Rejected, match=r"^backslash: .* double it"):
        prepare.to_question("mine", "test", line % latex, 0)
    assert prepare.to_question("mine", "test", line % latex.replace("\\", "\\\\"), 0)["text"] == f"Find $x {latex} y$."
    for field in ('"choices": ["%s", "b"]', '"group": "%s"', '"unit": "%s"'):
        with pytest.raises(prepare.Rejected, match="^backslash"):
            prepare.to_question("mine", "test", '{"problem": "Which?", "answer": "A", "images": ["0.png"], %s}' % (field % latex), 0)


@pytest.mark.parametrize("text", [
    "Find x.\nA. red\nB. blue", "name\tage\nAnna\t7", "first\r\nsecond", "Which?\na. x\nb. y\nc. z\nd. p\ne. q", "i) one\nii) two",
    "Look.\nNow say.", "more or\nless", "a\n\nb", 'He said "no\nway".', "tab\there", "\\\\ a double one", "caf\u00e9 \u6c42 \N{SNOWMAN}",
    "C:\\new\\table", "a/b"])
def test_what_json_escapes_rightly_is_taken(own, text):
    assert own(text, "7")["text"] == text


# Encodings: what the kit reads is what was written, or it says so

SENTENCES = ["How many?", "图?", "求面积。", "Où est l'été?", "¿Cuántos?", "Größe?", "三角形ABC的面积是多少?"]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "gbk", "gb18030", "latin-1", "cp1252", "shift-jis", "big5"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_is_read_as_it_was_written_or_not_at_all(prepare, tmp_path, encoding, end):
    """A lone 图 in GBK is two bytes that are another letter in UTF-8: no such line may be taken."""
    lines = []
    for text in SENTENCES:
        line = json.dumps({"problem": text, "answer": "3", "images": ["0.png"]}, ensure_ascii=False)
        try:
            line.encode(encoding)
        except UnicodeEncodeError:
            continue  # this encoding lacks these letters
        lines.append(line)
    (tmp_path / "questions.jsonl").write_bytes(end.join(lines).encode(encoding))
    taken = []
    for place, line in prepare.read_rows("mine", tmp_path, "test"):
        text = json.loads(lines[place["row"] - 1])["problem"]
        try:
            assert prepare.to_question("mine", "test", line, 0)["text"] == text
            taken.append(text)
        except prepare.Rejected as error:
            assert str(error).startswith("not UTF-8: ") and not text.isascii()
    unicode = encoding.startswith("utf")
    assert len(taken) == (len(SENTENCES) if unicode else 1)


def test_a_file_of_two_encodings_gives_only_its_ascii_lines(prepare, tmp_path):
    """Also where it begins with the mark of UTF-8."""
    lines = ['{"problem": "How many?"}'.encode(), '{"problem": "图?"}'.encode(), '{"problem": "求?"}'.encode("gbk"), b'{"problem": "a"}']
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "questions.jsonl").write_bytes(mark + b"\n".join(lines))
        read = [line for _, line in prepare.read_rows("mine", tmp_path, "test")]
        assert [bool(prepare.UNDECODED.search(line)) for line in read] == [False, True, True, False]


def test_lost_letters_are_rejected(own):
    assert own("What is \ufffd?").startswith("not UTF-8")
    assert own("Which?", "A", choices=["\ufffd", "b"]).startswith("not UTF-8")


def test_golds_compared_as_text_are_counted(prepare, stage, tmp_path, monkeypatch, capsys):
    """However the grader decides it, the count stands in what stage 1 prints and in study.json."""
    monkeypatch.setattr(prepare, "reads_as_maths", lambda question: question["problem"] not in ("<image>How many 1?", "<image>How many 3?"))
    folder = own_folder(tmp_path / "mine", [
        {"problem": f"How many {i}?", "answer": str(6 + i % 2), "images": [f"{i}.png"]} for i in range(5)])
    study, _, _ = stage(benchmarks=["mine"], local=[f"mine={folder}"])
    assert study["golds_as_text"] == {"mine": {"test": 2}, "shapes": {"train": 0}}
    assert "5 test questions (golds compared as text: 2)" in capsys.readouterr().out


# Pictures


def test_any_mode_becomes_rgb_on_white(prepare):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    transparent = [(encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0))), (255,) * 3), (encoded(palette, transparency=1), (255,) * 3),
                   (encoded(palette), (0, 0, 255)), (encoded(Image.new("LA", (8, 8), (0, 0))), (255,) * 3), (encoded(half), (127,) * 3),
                   (encoded(Image.new("L", (8, 8), 7)), (7,) * 3), (encoded(Image.new("1", (8, 8), 1)), (255,) * 3),
                   (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), (255,) * 3),
                   (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "GIF"), (1, 2, 3))]
    for raw, colour in transparent:
        picture = prepare.open_picture(raw, None)
        assert picture.mode == "RGB" and np.abs(np.array(picture.getpixel((4, 4))) - colour).max() <= 1
    grey = np.asarray(prepare.open_picture(encoded(Image.fromarray(ramp)), None))[..., 0]
    assert np.abs(grey - ramp / 257).max() <= 1  # 16 bits: scaled, not clipped


def test_exif_rotation_is_applied(prepare):
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = prepare.open_picture(encoded(picture, "JPEG", exif=exif, quality=95), None)
    assert turned.size == (20, 40) and turned.getpixel((10, 5))[1] < 60 < 200 < turned.getpixel((10, 35))[1]


@pytest.mark.parametrize("budget, smallest, patch", [(BUDGET, 56 * 56, 14), (401_408, 56 * 56, 14), (28 * 28, 28 * 28, 14),
                                                     (401_408, 65_536, 16)])  # the last as Qwen3-VL has it
def test_the_image_processor_finds_nothing_left_to_resize(prepare, budget, smallest, patch):
    """Scaled here or there: the same pixels, and as many tokens as the arithmetic says."""
    image_processor = prepare.Qwen2VLImageProcessorPil(size={"shortest_edge": smallest, "longest_edge": budget}, patch_size=patch)
    rng, numbers = random.Random(0), np.random.default_rng(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (1, 200), (84, 84), (113, 111), (112, 112), (28, 28)]
    sizes += [(w, max(1, min(900, round(w * 2 ** rng.uniform(-4, 4))))) for w in (rng.randint(1, 900) for _ in range(25))]
    for size in sizes:
        picture = Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        fitted = prepare.fit(picture, image_processor)
        seen = image_processor([fitted], return_tensors="pt")
        tokens = image_processor.get_number_of_image_patches(fitted.height, fitted.width) // image_processor.merge_size**2
        assert tokens == int(seen["image_grid_thw"].prod()) // 4 == len(seen["pixel_values"]) // 4
        within = lambda grid: int(grid.prod()) * patch**2 <= budget
        assert fitted.width * fitted.height <= budget and within(seen["image_grid_thw"])
        direct = image_processor([picture], return_tensors="pt")
        if math.prod(size) <= budget and within(direct["image_grid_thw"]):
            assert fitted is picture
            continue
        assert tuple((seen["image_grid_thw"][0, [2, 1]] * patch).tolist()) == fitted.size  # nothing left to resize
        if within(direct["image_grid_thw"]):  # all but strips that the processor leaves above the budget
            assert (direct["pixel_values"] == seen["pixel_values"]).all()


# Which rows


def test_limit_keeps_the_shares_of_groups(stage, tmp_path):
    rows = [mathvista(i, metadata={"task": "abc"[0 if i < 60 else 1 if i < 90 else 2]}, query=f"How wide is {i}?",
                      decoded_image=encoded(drawing(i)))
            for i in range(100)]
    local = [f"mathvista={write_mathvista(tmp_path / 't.parquet', rows)}"]
    _, some, _ = stage("some", benchmarks=["mathvista"], local=local, limit=20)
    assert Counter(row["group"] for row in some["mathvista"]) == {"a": 12, "b": 6, "c": 2}
    _, fewer, _ = stage("fewer", benchmarks=["mathvista"], local=local, limit=10)
    assert {row["id"] for row in fewer["mathvista"]} <= {row["id"] for row in some["mathvista"]}
    random.Random(1).shuffle(rows)
    _, shuffled, _ = stage("shuffled", benchmarks=["mathvista"], local=[f"mathvista={write_mathvista(tmp_path / 's.parquet', rows)}"],
                           limit=20)
    assert {row["id"] for row in some["mathvista"]} == {row["id"] for row in shuffled["mathvista"]}


def test_duplicates_go_from_training_and_stay_in_benchmarks(stage, tmp_path):
    """A benchmark's score is over all its rows; what comes again under the same id gets a number."""
    rows = [mathvista(1), mathvista(2), mathvista(1), mathvista(3) | {k: mathvista(2)[k] for k in ("query", "decoded_image", "question")},
            mathvista(4, pid="1"), mathvista(5, pid="1-4"), mathvista(6, pid="1")]
    train = [{"images": [encoded(drawing(n))], "problem": f"<image>Find {n}.", "answer": "3", "id": n} for n in (1, 2, 1, 3)]
    local = [f"mathvista={write_mathvista(tmp_path / 't.parquet', rows)}",
             f"geometry3k={write(tmp_path / 'g.parquet', train, images=pa.list_(PICTURE))}"]
    _, questions, rejected = stage(train="geometry3k", benchmarks=["mathvista"], local=local)
    assert [row["id"] for row in questions["mathvista"]] == [f"mathvista/{id}" for id in ("1", "2", "1-2", "3", "1-3", "1-4", "1-5")]
    assert [row["id"] for row in questions["geometry3k"]] == [f"geometry3k/{id}" for id in (1, 2, 3)]
    assert [(row["row"], row["id"], row["reason"]) for row in rejected] == [(3, "geometry3k/1-2", "duplicate: of geometry3k/1")]


def test_leaks_need_the_same_text_and_a_like_picture(stage, tmp_path):
    picture = drawing(1, (240, 160))
    bench = mathvista(1, question="Find  $x$.", query="Hint: a number.\nQuestion: Find  $x$.", decoded_image=encoded(picture))
    train = [("<image>find x", encoded(picture.resize((180, 120)), "JPEG", quality=80)), ("<image>Find y.", encoded(picture)),
             ("<image>Find x.", encoded(drawing(2, (240, 160)))), ("<image>Find x.", encoded(picture))]
    rows = [{"images": [raw], "problem": text, "answer": "3"} for text, raw in train]
    local = [f"mathvista={write_mathvista(tmp_path / 't.parquet', [bench])}",
             f"geometry3k={write(tmp_path / 'g.parquet', rows, images=pa.list_(PICTURE))}"]
    _, questions, rejected = stage(train="geometry3k", benchmarks=["mathvista"], local=local)
    assert [row["problem"] for row in questions["geometry3k"]] == ["<image>Find y.", "<image>Find x."]
    assert [(row["row"], row["reason"]) for row in rejected] == [(1, "leak: also mathvista/1"), (4, "leak: also mathvista/1")]


def test_nothing_left_is_an_error(prepare, stage, tmp_path):
    path = write_mathvista(tmp_path / "t.parquet", [mathvista(1, answer=" ")])
    with pytest.raises(prepare.UserError, match="mathvista has no test question left: gold 1"):
        stage(benchmarks=["mathvista"], local=[f"mathvista={path}"])
    (row,) = prepare.read_jsonl(tmp_path / "data" / "questions" / "rejected.jsonl")
    assert row["row"] == 1 and row["reason"] == "gold: the answer is empty"


def test_what_was_rejected_is_always_written(stage, tmp_path):
    stage(benchmarks=["shapes"])
    assert (tmp_path / "data" / "questions" / "rejected.jsonl").read_bytes() == b""


# The command


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_gives_the_same_bytes(stage, tmp_path, capsys):
    rows = [mathvista(i) for i in range(6)]
    local = [f"mathvista={write_mathvista(tmp_path / 't.parquet', rows)}"]
    for name in ("one", "two"):
        stage(name, benchmarks=["mathvista", "shapes"], local=local)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    stage("one", benchmarks=["mathvista", "shapes"], local=local)
    assert "up to date" in capsys.readouterr().out and before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    write_mathvista(tmp_path / "t.parquet", rows[:5])
    _, questions, _ = stage("one", benchmarks=["mathvista", "shapes"], local=local)
    assert len(questions["mathvista"]) == 5


def test_study_records_what_later_stages_read(prepare, stage, tmp_path, model):
    study, questions, _ = stage(benchmarks=["shapes"])
    assert study["sources"] == {"train": "shapes", "benchmarks": ["shapes"]} and study["model"] == model
    assert study["model_files"] == {str(file.resolve()): prepare.sha256(file) for file in Path(model).iterdir()}
    assert study["max_pixels"] == BUDGET and study["preset"] == "tiny" and study["seed"] == 0 and study["versions"] == prepare.versions()
    for name, digest in study["artifacts"].items():
        assert prepare.sha256(tmp_path / "data" / name) == digest
    assert prepare.load_study(tmp_path / "data") == study
    tokenizer, image_processor = prepare.load_processors(model, BUDGET)
    for row in questions["shapes"]:
        prompt = prepare.encode(row, tokenizer, image_processor)
        assert (row["image_tokens"], row["prompt_tokens"]) == (9, len(prompt.input_ids))


def test_the_embedded_model_is_made_once_per_recipe(prepare, tmp_path, monkeypatch):
    made = []

    def make(folder, seed, max_pixels):
        made.append((seed, max_pixels))
        folder.mkdir()
        (folder / "weights").write_text(str(seed))
    monkeypatch.setattr(prepare, "make_embedded_model", make)
    for seed in (0, 0, 1):
        prepare.embedded_model(tmp_path, seed, BUDGET)
    assert made == [(0, BUDGET), (1, BUDGET)] and (tmp_path / "model" / "weights").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kill_leaves_no_half_model(prepare, tmp_path, monkeypatch):
    def make(folder, seed, max_pixels):
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text("half")
        if killed:
            raise KeyboardInterrupt
        (folder / "weights").write_text("whole")
    monkeypatch.setattr(prepare, "make_embedded_model", make)
    killed = True
    with pytest.raises(KeyboardInterrupt):
        prepare.embedded_model(tmp_path, 0, BUDGET)
    assert not (tmp_path / "model").exists()
    killed = False
    prepare.embedded_model(tmp_path, 0, BUDGET)
    assert (tmp_path / "model" / "weights").read_text() == "whole"


@pytest.mark.parametrize("options, said", [
    ({"preset": "13b"}, "--preset 13b is unknown"), ({"train": "nope"}, "source nope is unknown"),
    ({"benchmarks": ["nope"]}, "source nope is unknown"),
    ({"train": "mathvista"}, "mathvista has no train split: benchmarks are for --benchmarks"), ({"train": "mmmu"}, "has no train split"),
    ({"train": "scienceqa"}, "has no train split"),
    ({"benchmarks": ["virl39k"]}, "virl39k has no test split"), ({"local": ["mine"]}, "is not NAME=PATH"),
    ({"local": ["../x=y"]}, "is not NAME=PATH"),
    ({"local": ["shapes=y"]}, "is not NAME=PATH"), ({"local": ["mine=y"]}, "neither --train nor among --benchmarks"),
    ({"limit": 0}, "--limit 0"),
    ({"benchmarks": ["mine"], "local": ["mine=/nowhere/at/all"]}, "/nowhere/at/all"), ({"max_pixels": 100}, "choose at least 784"),
    ({"model": "/nowhere/at/all"}, "--model FOLDER")])
def test_what_cannot_work_is_said_in_one_sentence(prepare, stage, options, said):
    with pytest.raises(prepare.UserError) as error:
        stage(**{"benchmarks": ["shapes"]} | options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_wrong_files_are_named(prepare, stage, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    path = write_mathvista(tmp_path / "t.parquet", [mathvista(1)])
    (tmp_path / "empty").mkdir()
    for name, file, said in (("mathvista", tmp_path / "broken.parquet", "broken.parquet cannot be read"),
                             ("wemath", path, "lacks the columns ID, option, image_path, key"),
                             ("mine", path, "lacks the columns problem, images"),
                             ("mmmu", tmp_path / "empty", "no parquet of split validation"),
                             ("mine", tmp_path / "empty", "no questions.jsonl")):
        with pytest.raises(prepare.UserError, match=said):
            stage(benchmarks=[name], local=[f"{name}={file}"])


def test_another_family_of_models_is_refused(prepare, stage, tmp_path, model):
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": config.get("eos_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(prepare.UserError, match="is a llama model"):
        stage(benchmarks=["shapes"], model=str(tmp_path))


@pytest.mark.skipif(not REAL.exists(), reason="no real parquets beside the repository")
def test_real_parquets(stage):
    local = [f"mathvision={REAL / 'mathvision_testmini.parquet'}", f"mmmu={REAL / 'mmmu_pro_sample.parquet'}"]
    _, questions, rejected = stage(benchmarks=["mathvision", "mmmu"], local=local)
    assert len(questions["mathvision"]) == 304 and len(set(row["group"] for row in questions["mathvision"])) == 16
    assert Counter(row["answer_type"] for row in questions["mathvision"]) == {"choice": 190, "math": 114}
    assert len(questions["mmmu"]) == 20 and [(row["row"], row["reason"]) for row in rejected] == [(6, "picture missing: <image 4>")]
    assert [row["id"] for row in questions["mmmu"]][-10:] == ["mmmu/ai2d", *(f"mmmu/ai2d-{k}" for k in range(2, 11))]


def test_the_example_of_the_readme(stage, tmp_path):
    """The lines of questions.jsonl that the README shows, beside pictures of these names."""
    lines = re.findall(r'^\{"problem": .*\}$', (Path(__file__).resolve().parents[1] / "README.md").read_text(), re.M)
    assert len(lines) == 2
    folder = own_folder(tmp_path / "birds", lines)
    for number, row in enumerate(map(json.loads, lines)):
        drawing(number).save(folder / row["images"][0])
    _, questions, rejected = stage(benchmarks=["birds"], local=[f"birds={folder}"])
    assert not rejected and [(row["answer_type"], row["answer"]) for row in questions["birds"]] == [("integer", "7"), ("choice", "B")]
    assert questions["birds"][1]["problem"] == "<image>Which bird is this?\n(A) a robin\n(B) a wren"


def test_without_a_chat_template_the_remedy_is_named(prepare, stage, tmp_path, model):
    for file in Path(model).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(prepare.UserError, match="has no chat template for pictures .*: copy"):
        stage(benchmarks=["shapes"], model=str(tmp_path))


def test_hashes_tell_drawings_apart(prepare):
    """Of random triangles, nearly white, no two look alike; each still looks like itself, saved as JPEG at half the size."""
    hashes, again = [], []
    for number in range(60):
        rng, picture = random.Random(number), Image.new("RGB", (400, 300), "white")
        ImageDraw.Draw(picture).polygon([(rng.randrange(390), rng.randrange(290)) for _ in range(3)], outline="black")
        hashes.append(prepare.difference_hash(picture))
        saved = prepare.open_picture(encoded(picture.resize((200, 150), Image.Resampling.BICUBIC), "JPEG", quality=85), None)
        again.append(prepare.difference_hash(saved))
    assert not any(prepare.alike([a], [b]) for i, a in enumerate(hashes) for b in hashes[:i])
    assert sum(prepare.alike([a], [b]) for a, b in zip(hashes, again)) >= 54


def test_a_message_is_text_or_a_list_of_parts(tokenizer):
    """Trainers send either; with generation prompt or without."""
    def shown(content, **options):
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, **options)
    parts = [{"type": "text", "text": "How many?"}]
    assert shown("How many?") == shown(parts) == "<|im_start|>user\nHow many?<|im_end|>\n"
    assert shown("How many?", add_generation_prompt=True) == shown(parts, add_generation_prompt=True)
    assert shown([{"type": "image"}, *parts]).count("<|image_pad|>") == 1


def test_presets_of_real_models_share_their_data(prepare):
    data = [{key: value for key, value in preset.items() if key != "model"} for name, preset in prepare.PRESETS.items() if name != "tiny"]
    assert all(each == data[0] for each in data) and prepare.PRESETS["2b"]["model"] == "Qwen/Qwen3-VL-2B-Instruct"


def test_a_changed_template_is_another_model(prepare, stage, tmp_path, model):
    """Prompts depend on the processors as answers do on the weights."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in Path(model).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    stage(benchmarks=["shapes"], model=str(copy))
    template = copy / "chat_template.jinja"
    template.write_text("Look. " + template.read_text())
    with pytest.raises(prepare.UserError, match="run 01_prepare.py again"):
        prepare.model_path(tmp_path / "data", prepare.load_study(tmp_path / "data"))


@pytest.mark.parametrize("file, content", [("tokenizer.json", '{"a": 1}'), ("preprocessor_config.json", '{"patch_size": "x"}'), ("config.json", "{"),
                                           ("chat_template.jinja", "{% for %}"), ("chat_template.jinja", "no picture")])
def test_a_broken_model_folder_is_one_sentence(prepare, stage, tmp_path, model, file, content):
    for part in Path(model).iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(prepare.UserError, match="could not be loaded|has no chat template"):
        stage(benchmarks=["shapes"], model=str(tmp_path))


def test_deep_greys_keep_their_shades(prepare):
    """16-bit and 32-bit grey, and floats: as bright as their own scale says, not clipped."""
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for values, kind in (((ramp * 65535).astype(np.uint16), "TIFF"), ((ramp * 255).astype(np.int32), "TIFF"), (ramp, "TIFF")):
        picture = prepare.open_picture(encoded(Image.fromarray(values), kind), None)
        assert np.abs(np.asarray(picture)[..., 0] / 255 - ramp).max() < 0.01
    half = prepare.open_picture(encoded(Image.fromarray((ramp * 32768).astype(np.uint16)), "PNG"), None)  # not stretched to white
    assert np.abs(np.asarray(half)[..., 0] / 255 - ramp / 2).max() < 0.01


def test_another_instruction_makes_other_questions(stage, prepare, monkeypatch):
    """It is part of every prompt, so what was trained on or answered before must not pass as made from these, even at the same length."""
    made = [stage("one", benchmarks=["shapes"])[0]["artifacts"]]
    made.append(stage("two", benchmarks=["shapes"])[0]["artifacts"])
    monkeypatch.setattr(prepare, "INSTRUCTION", prepare.INSTRUCTION.replace("then", "and"))
    made.append(stage("three", benchmarks=["shapes"])[0]["artifacts"])
    first, again, other = (each["questions/shapes.parquet"] for each in made)
    assert first == again != other
