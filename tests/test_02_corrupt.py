# SPDX-License-Identifier: MIT
"""Stage 2: what each corruption takes away is gone, what it must keep is there, and both are the same on every run."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw

from conftest import ROOT, undecoded
from stage import write_processors

NAMES = "blank noise blur occlude irrelevant removed told misleading unsaid textless mismatch blur-0.05 occlude-0.25".split()
PICTURELESS = ("removed", "told")
PICTURE_ONLY = "blank noise blur occlude irrelevant mismatch".split()


def make(**changes):
    question = {
        "id": "s/1",
        "problem": "<image>A box holds 3 pens. How many pens are red?",
        "images": [scene(1)],
        "answer": "3",
        "answer_type": "integer",
        "choices": [],
        "unit": None,
        "precision": None,
        "source": "s",
        "split": "test",
        "group": "count",
        "needs_image": None,
        "donor": None,
    }
    return question | changes


def scene(seed, size=(90, 70)):
    """A few coloured boxes on white."""
    rng, picture = np.random.default_rng(seed), Image.new("RGB", size, "white")
    for _ in range(5):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        colour = tuple(int(c) for c in rng.integers(0, 200, 3))
        ImageDraw.Draw(picture).rectangle((x, y, x + size[0] // 8, y + size[1] // 8), fill=colour)
    return picture


def choice(texts, answer, text="Which one is it?", **changes):
    lines = "".join(f"\n({chr(65 + i)}) {t}" for i, t in enumerate(texts))
    return make(problem=f"<image>{text}{lines}", choices=texts, answer=answer, answer_type="choice", **changes)


def pixels(question):
    return [np.asarray(image).astype(int) for image in question["images"]]


def content(question):
    return {**question, "images": [(image.size, image.tobytes()) for image in question["images"]]}


odd_questions = st.builds(
    lambda sizes, text, choices, type, answer, unit: make(
        images=[scene(i, size) for i, size in enumerate(sizes)],
        problem="<image>" * len(sizes) + text,
        choices=choices,
        answer_type="choice" if choices else type,
        answer="A" if choices else answer,
        unit=unit,
    ),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3),
    st.text(max_size=60).filter(lambda text: "<image>" not in text),
    st.lists(st.text(max_size=8), max_size=3),
    st.sampled_from(["integer", "float", "list", "text", "math"]),
    st.text(min_size=1, max_size=8),
    st.none() | st.just("cm"),
)


@given(odd_questions)
@settings(max_examples=60)
def test_any_question_stays_a_well_formed_prompt(corrupt, question):
    donor, before = make(id="s/2", answer="7", images=[scene(9)]), content(question)
    for name in NAMES:
        after = corrupt.corrupt(question, donor, 0, name)
        assert content(question) == before, "the question itself was changed"
        assert (
            after["problem"].count("<image>")
            == len(after["images"])
            == (0 if name in PICTURELESS else len(question["images"]))
        )
        kept = set(question) - {"problem", "images", "donor"}
        assert {key: after[key] for key in kept} == {key: question[key] for key in kept}
        assert all(image.mode == "RGB" for image in after["images"])
        if name in PICTURE_ONLY:
            assert after["problem"] == question["problem"]
        if name not in (*PICTURELESS, "mismatch"):
            assert [image.size for image in after["images"]] == [image.size for image in question["images"]]
        if name not in ("removed", "textless") and question["problem"].replace("<image>", "").strip():
            assert after["problem"].replace("<image>", "").strip()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_question_whatever_came_before(corrupt, name):
    questions = [make(id=f"s/{i}", images=[scene(i)]) for i in range(4)]
    donor = make(id="s/d", answer="8")
    there = [content(corrupt.corrupt(q, donor, 5, name)) for q in questions]
    back = [content(corrupt.corrupt(q, donor, 5, name)) for q in reversed(questions)]
    assert there == back[::-1]


@pytest.mark.slow
def test_other_processes_make_the_same_bytes(prepare, corrupt, tmp_path):
    """However many processes there are, and whatever seed of hashes or number of threads they have, the files are the same."""
    written = []
    for process, threads in ("1", "1"), ("2", "2"):
        data = tmp_path / process
        prepare.write_questions(data / "questions/shapes.parquet", prepare.shapes_world(0, 12), {})
        digest = prepare.sha256(data / "questions/shapes.parquet")
        (data / "study.json").write_text(json.dumps({"preset": "tiny", "model": "embedded", "model_files": {}, "max_pixels": 12544,
                                                     "versions": prepare.versions(), "seed": 0, "limit": 12,
                                                     "sources": {"train": "shapes", "benchmarks": ["shapes"]}, "artifacts": {"questions/shapes.parquet": digest}}))
        write_processors(data / "model")
        subprocess.run([sys.executable, str(ROOT / "02_corrupt.py"), "--data", str(data), "--preview_rows", "1", "--workers", process,
                        "--corruptions", *corrupt.CORRUPTIONS], check=True,
                       capture_output=True, env=os.environ | {"PYTHONHASHSEED": process, "OMP_NUM_THREADS": threads})
        written.append({path.name: path.read_bytes() for path in (data / "corrupted").rglob("*.*") if path.suffix != ".lock"})
    assert written[0] == written[1] and len(written[0]) == 1 + len(corrupt.CORRUPTIONS)


@pytest.mark.parametrize("name", ["noise", "irrelevant"])
def test_random_pictures_depend_on_seed_and_id_and_on_nothing_in_the_picture(corrupt, name):
    one = corrupt.corrupt(make(), None, 0, name)
    assert content(one) == content(corrupt.corrupt(make(images=[scene(2)]), None, 0, name))
    assert content(one)["images"] != content(corrupt.corrupt(make(), None, 1, name))["images"]
    assert content(one)["images"] != content(corrupt.corrupt(make(id="s/2"), None, 0, name))["images"]


def test_blank_depends_on_the_mean_only(corrupt):
    picture = scene(3)
    shuffled = np.random.default_rng(0).permutation(np.asarray(picture).reshape(-1, 3)).reshape(70, 90, 3)
    one, two = (
        corrupt.corrupt(make(images=[image]), None, 0, "blank") for image in (picture, Image.fromarray(shuffled))
    )
    assert content(one)["images"] == content(two)["images"]
    assert len(np.unique(pixels(one)[0].reshape(-1, 3), axis=0)) == 1
    assert np.abs(pixels(one)[0][0, 0] - np.asarray(picture).reshape(-1, 3).mean(0)).max() <= 0.5


def test_blur_takes_more_of_the_fine_detail_the_stronger_it_is(corrupt):
    def fine(question):
        return sum((np.diff(pixels(question)[0], axis=axis) ** 2).sum() for axis in (0, 1))

    levels = [fine(make())] + [
        fine(corrupt.corrupt(make(), None, 0, f"blur-{s}")) for s in (0.01, 0.02, 0.05, 0.1, 0.2)
    ]
    assert all(a > b for a, b in itertools.pairwise(levels)) and levels[-1] < levels[0] / 100


def test_blur_means_the_same_at_every_resolution(corrupt):
    small, large = scene(1), scene(1).resize((360, 280), Image.Resampling.NEAREST)
    one, two = (corrupt.corrupt(make(images=[p]), None, 0, "blur-0.05")["images"][0] for p in (small, large))
    difference = np.abs(np.asarray(one).astype(int) - np.asarray(two.resize(small.size, Image.Resampling.BOX)))
    assert difference.mean() < 2 < np.abs(np.asarray(one).astype(int) - np.asarray(small)).mean()


def hidden_cells(clean, damaged):
    """Pixels that changed; on pictures whose mean colour occurs nowhere that is what was covered."""
    return (pixels(clean)[0] != pixels(damaged)[0]).any(-1)


@pytest.mark.parametrize("size", [(90, 70), (64, 200), (33, 17), (300, 300)])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1])
def test_occlude_hides_the_share(corrupt, size, share):
    noisy = Image.fromarray(np.random.default_rng(1).choice([0, 255], (*size[::-1], 3)).astype(np.uint8))
    question = make(images=[noisy])
    hidden = hidden_cells(question, corrupt.corrupt(question, None, 0, f"occlude-{share}")).mean()
    cell = (round(min(size) / 10) ** 2) / (size[0] * size[1])
    assert share <= hidden < share + cell + 1e-9


def test_occlude_takes_what_has_detail_first(corrupt):
    picture = Image.new("RGB", (100, 100), "white")
    texture = np.random.default_rng(0).choice([0, 255], (30, 30, 3)).astype(np.uint8)
    picture.paste(Image.fromarray(texture), (60, 10))
    question = make(images=[picture])
    hidden = hidden_cells(question, corrupt.corrupt(question, None, 0, "occlude-0.09"))
    assert hidden[10:40, 60:90].mean() > 0.6  # 9% of the area, and all of the detail is in these 9%
    wider = hidden_cells(question, corrupt.corrupt(question, None, 0, "occlude-0.25"))
    assert wider[10:40, 60:90].all() and (wider | ~hidden).all(), "a higher severity hides what a lower one hides"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_occlude_removes_more_of_the_world_than_random_boxes(prepare, corrupt, share):
    """On shapes what answers the questions is whatever is not background."""
    rng, ours, random = np.random.default_rng(0), [], []
    for question in itertools.islice(prepare.shapes_world(3, 40), 40):
        picture = pixels(question)[0]
        shapes = (picture != picture[0, 0]).any(-1)
        covered = (pixels(corrupt.corrupt(question, None, 0, f"occlude-{share}"))[0] != picture).any(-1)
        boxes = np.zeros_like(shapes)
        while boxes.mean() < share:
            y, x = rng.integers(0, np.array(shapes.shape) - 7)
            boxes[y : y + 8, x : x + 8] = True
        if shapes.any():
            ours.append((shapes & covered).sum() / shapes.sum())
            random.append((shapes & boxes).sum() / shapes.sum())
    assert np.mean(ours) > np.mean(random) + min(0.2, (1 - share) / 2)


def test_removed_leaves_no_trace_of_the_picture(corrupt):
    question = choice(
        ["<image>", "a <image> b"],
        "A",
        "As shown in <image>, it  turns.\n<image>\nWhich is it?",
        images=[scene(i) for i in range(5)],
    )
    after = corrupt.corrupt(question, None, 0, "removed")
    assert after["images"] == [] and "<image>" not in after["problem"]
    assert after["problem"] == "As shown in, it turns.\nWhich is it?\n(A)\n(B) a b"


def test_told_says_that_there_is_no_picture_and_is_removed_otherwise(corrupt):
    question = make(problem="<image>How many?", images=[scene(0)])
    bare, told = (corrupt.corrupt(question, None, 0, name) for name in ("removed", "told"))
    assert told["images"] == [] and told["problem"].removeprefix(bare["problem"]).strip() == corrupt.GUESS


@pytest.mark.parametrize("problem, tags", [
    ("<image>If $AB=5$, find $x$.\n(A) 1\n(B) 2", 1), ("As in <image> and <image>: which?", 2), ("No picture. Why?", 0)])
def test_textless_leaves_the_pictures_and_nothing_of_the_text(corrupt, problem, tags):
    """The paper's third corruption: what remains is the picture, and the instruction that every prompt ends with."""
    question = make(problem=problem, images=[scene(i) for i in range(tags)])
    after = corrupt.corrupt(question, None, 0, "textless")
    assert after["problem"].split() == ["<image>"] * tags and content(after)["images"] == content(question)["images"]


# misleading


def hint(question, corrupt, donor=None, seed=0):
    after = corrupt.corrupt(question, donor, seed, "misleading")
    assert after["problem"].startswith(question["problem"]) and after["images"] == question["images"]
    return after["problem"].removeprefix(question["problem"]).strip()


def test_misleading_names_another_choice(corrupt):
    texts = ["4 cm", "5 cm", " 4  cm", "7 cm"]  # the third is the first again: right as well
    hints = {hint(choice(texts, "A", id=f"s/{i}"), corrupt) for i in range(40)}
    named = {re.search(r"\((\w)\) (.*?)\.?$", said).groups() for said in hints}
    assert named == {("B", "5 cm"), ("D", "7 cm")}


def test_misleading_where_a_choice_is_a_picture_or_the_only_one(corrupt):
    said = hint(choice(["<image> of a dog", "<image> of a cat"], "A", images=[scene(i) for i in range(3)]), corrupt)
    assert "(B) of a cat" in said and "<image>" not in said
    only = hint(choice(["4 cm"], "A"), corrupt)
    assert "4 cm" not in only and "(A)" not in only


@given(st.integers(-(10**6), 10**6), st.integers(0, 4), st.integers(0, 100))
@settings(max_examples=150)
def test_misleading_shifts_a_number_and_keeps_its_decimals(corrupt, digits, decimals, seed):
    gold = f"{digits / 10**decimals:.{decimals}f}"
    said = hint(
        make(answer=gold, answer_type="float" if decimals else "integer", precision=decimals or None),
        corrupt,
        seed=seed,
    )
    wrong = re.search(r"-?[0-9]+(?:\.[0-9]+)?", said)[0]
    assert float(wrong) != float(gold) and len(wrong.partition(".")[2]) == decimals
    assert abs(float(wrong) - float(gold)) <= max(
        0.4 * abs(float(gold)), 3.5 * 10**-decimals
    )  # near enough to be believed


@pytest.mark.parametrize(
    "gold, type",
    [
        ("10 \\sqrt { 3 }", "math"),
        ("[2, 5]", "list"),
        ("red", "text"),
        ('["New York", "NYC"]', "open"),
        ("(3,-4)", "math"),
    ],
)
def test_misleading_never_says_the_gold_answer(corrupt, gold, type):
    for seed in range(20):
        said = hint(
            make(answer=gold, answer_type=type), corrupt, make(id="s/2", answer="blue", answer_type="text"), seed
        )
        assert not any(right in said for right in [gold, "New York", "NYC"])
        if type in ("text", "open"):
            assert "blue" in said


# unsaid: sentences in the manner of each benchmark


@pytest.mark.parametrize(
    "told, left",
    [
        # the embedded world
        (
            "<image>Ann has 3 cards and gets 4 more. How many cards does Ann have?",
            "<image> How many cards does Ann have?",
        ),
        ("<image>Eva has 2 hats and gets 9 more. Give the number of hats.", "<image> Give the number of hats."),
        ("<image>Say yes or no: more circles than squares.", "<image>Say yes or no: more circles than squares."),
        ("<image>Count the triangles.", "<image>Count the triangles."),
        # Geometry3K
        ("<image>Find $y$.", "<image>Find $y$."),
        ("<image>If $PQ=14$ and $QR=2x+1$, find $PR$.", "<image> Find $PR$."),
        (
            "<image>Rhombus $KLMN$ has $m\\angle K=52$. Find $m\\angle L$. Round to the nearest tenth.",
            "<image> Find $m\\angle L$. Round to the nearest tenth.",
        ),
        ("<image>Find the area of the kite if $d_1 = 6.5$ and $d_2 = 4$.", "<image>Find the area of the kite."),
        ("<image>In $\\odot E$, $EF=8$. What is the length of $FG$?", "<image> What is the length of $FG$?"),
        # MathVista, with hint and unit
        (
            "Hint: Please answer with an integer and put the final value, e.g., 1, 2, 3, at the end.\n"
            "<image>Question: The bars show sales in No. 4 Dr. Lee's shop. How many bars exceed 3.5? (Unit: boxes)",
            "Hint: Please answer with an integer and put the final value, e.g., 1, 2, 3, at the end.\n"
            "<image> How many bars exceed 3.5? (Unit: boxes)",
        ),
        (
            "<image>As shown in the figure, AB is a diameter of circle O, angle ABC is 41.0, then angle CAB equals",
            "<image> Angle CAB equals",
        ),
        ("<image>图中有三个圆。阴影面积是多少？", "<image>阴影面积是多少？"),
        # MMMU: tags within the text, blanks, orders
        (
            "A beam rests as in <image> on 2 props. The load of Fig. 3 is 5 kN.It is long. Determine the moment at B.",
            "<image> Determine the moment at B.",
        ),
        ("Judging by <image>, which organ is enlarged?", "<image> Which organ is enlarged?"),
        (
            "<image> The sonata was composed in ______ by this man. He lived in Bonn.",
            "<image> The sonata was composed in ______ by this man.",
        ),
        # ScienceQA: context and question
        (
            "<image>Context: Two jars hold 10 ml of solvent each. A ball is a particle.\nWhich jar has more particles?",
            "<image>\nWhich jar has more particles?",
        ),
        # MathVision
        (
            "Lena folds a sheet twice.\n<image>\nShe cuts one corner. How many holes appear, if the sheet is square?",
            "<image>\nHow many holes appear?",
        ),
        (
            "<image>If two tiles weigh 30 g, then the weight of the wall shown is:",
            "<image> The weight of the wall shown is:",
        ),
        ("<image>A hexagon has side 2. The dark area is\nequal to", "<image> The dark area is\nequal to"),
        (
            "<image>What do you see if you look at the tower, which stands on its head, from above?",
            "<image>What do you see?",
        ),
        (
            "<image>Each dot is a tree. Can you find out if the path is closed?",
            "<image> Can you find out if the path is closed?",
        ),
        ("", ""),
        ("<image>", "<image>"),
    ],
)
def test_unsaid_leaves_the_question(corrupt, told, left):
    question = make(problem=told, images=[scene(i) for i in range(told.count("<image>"))])
    assert corrupt.corrupt(question, None, 0, "unsaid")["problem"] == left


@pytest.mark.parametrize("label", ["", "Choices:\n", "Options:\n"])
def test_unsaid_keeps_choices_as_they_are(corrupt, label):
    block = f"{label}(A) It has 3 legs. Really\n(B) <image>\n(C)  two"
    question = make(
        problem=f"<image>A stool is shown. What is wrong?\n{block}",
        choices=["It has 3 legs. Really", "<image>", " two"],
        answer="A",
        answer_type="choice",
        images=[scene(1), scene(2)],
    )
    assert corrupt.corrupt(question, None, 0, "unsaid")["problem"] == f"<image> What is wrong?\n{block}"


@pytest.mark.parametrize(
    "text", ["a " * 200_000, "What? " * 50_000, ", " * 200_000, "if " * 100_000, " " * 500_000, "x" * 500_000]
)
def test_long_text_takes_linear_time(corrupt, text):
    import time

    start = time.process_time()
    corrupt.corrupt(make(problem="<image>" + text), None, 0, "unsaid")
    assert time.process_time() - start < 5


# mismatch


def rows(answers, **changes):
    return [
        make(id=f"s/{i:03d}", answer=answer, answer_type="text", problem="<image>?", group=None) | changes
        for i, answer in enumerate(answers)
    ]


def donors(corrupt, questions):
    return corrupt.pair(questions, corrupt.random(0, "mismatch"))


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=6))
@settings(max_examples=200)
def test_mismatch_shares_answers_only_where_every_permutation_does(corrupt, answers):
    fewest = min(
        sum(answers[i] == answers[j] for i, j in enumerate(order))
        for order in itertools.permutations(range(len(answers)))
    )
    donor = donors(corrupt, rows(answers))
    assert sorted(donor) == list(range(len(answers))) and all(i != j for i, j in enumerate(donor))
    assert sum(answers[i] == answers[j] for i, j in enumerate(donor)) == fewest


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdefg"),
            st.sampled_from(["p", "q"]),
            st.sampled_from(["train", "test"]),
            st.sampled_from("xyz"),
        ),
        min_size=4,
        max_size=80,
    )
)
@settings(max_examples=100)
def test_mismatch_is_a_derangement_within_each_split(corrupt, entries):
    questions = [
        make(id=f"s/{i}", answer=a, answer_type="text", group=g, split=s, problem=f"<image>{p}?")
        for i, (a, g, s, p) in enumerate(entries)
    ]
    donor = donors(corrupt, questions)
    assert sorted(donor) == list(range(len(entries)))
    assert all(questions[i]["split"] == questions[j]["split"] for i, j in enumerate(donor))
    for split in ("train", "test"):
        answers = Counter(q["answer"] for q in questions if q["split"] == split)
        size = answers.total()
        shared = sum(
            questions[i]["answer"] == questions[j]["answer"]
            for i, j in enumerate(donor)
            if questions[i]["split"] == split
        )
        assert shared == max([0, *(2 * n - size for n in answers.values())])  # Hall: a class of n needs n others
        assert size < 2 or all(i != j for i, j in enumerate(donor) if questions[i]["split"] == split)


def test_mismatch_prefers_the_same_question_then_the_same_group(corrupt):
    questions = [
        make(id=f"{kind}{i}", problem=problem.format(i), answer=str(i % 5), group=group)
        for i in range(15)
        for kind, group, problem in [
            ("a", "g", "<image>Count the dots."),
            ("b", "g", "<image>Count the rings."),
            ("c", "h", "<image>Is line {} straight?"),
        ]
    ]
    for i, j in enumerate(donors(corrupt, questions)):
        assert questions[i]["id"][0] == questions[j]["id"][0] and questions[i]["answer"] != questions[j]["answer"]


def test_mismatch_compares_what_choices_say_and_their_letters(corrupt):
    questions = [choice(["yes", "no"] if i % 2 else ["no", "yes"], "AB"[i // 2 % 2], f"{i}?") for i in range(16)]
    questions = [question | {"id": f"s/{i:02d}"} for i, question in enumerate(questions)]
    said = [q["choices"]["AB".index(q["answer"])] for q in questions]
    assert not any(said[i] == said[j] for i, j in enumerate(donors(corrupt, questions)))
    varied = [choice([f"{i}p", f"{i}q", f"{i}r"], "ABC"[i % 3], id=f"s/{i}") for i in range(12)]
    assert not any(varied[i]["answer"] == varied[j]["answer"] for i, j in enumerate(donors(corrupt, varied)))


def test_mismatch_gives_as_many_pictures_as_there_are_tags(corrupt):
    question = make(problem="<image>a<image>b<image>?", images=[scene(i) for i in range(3)])
    after = corrupt.corrupt(question, make(id="s/9", images=[scene(7), scene(8)]), 0, "mismatch")
    assert after["images"] == [scene(7), scene(8), scene(7)] and after["donor"] == "s/9" and after["answer"] == "3"


# names and files


@pytest.mark.parametrize(
    "name, meaning", [("blank", ("blank", None)), ("blur-0.05", ("blur", 0.05)), ("occlude-1", ("occlude", 1.0))]
)
def test_names(corrupt, name, meaning):
    assert corrupt.parse_corruption(name) == meaning


@pytest.mark.parametrize(
    "name",
    [
        "",
        "clean",
        "fog",
        "blank-0.5",
        "blur-0",
        "blur-0.0",
        "blur-1.5",
        "blur-0.050",
        "blur-.5",
        "blur--1",
        "occlude-nan",
        "occlude-1e-3",
        "blur-",
        "../blank",
    ],
)
def test_unknown_names_and_severities_are_refused_with_the_list(prepare, corrupt, name):
    with pytest.raises(prepare.UserError, match="blank, noise, blur"):
        corrupt.parse_corruption(name)


@pytest.fixture
def data(prepare, tmp_path):
    """Two sources: one that is trained on and evaluated on, one with rows of several pictures."""
    sources = {
        "world": [
            make(
                id=f"world/{i}",
                images=[scene(i)],
                answer=str(i % 4),
                group="ab"[i % 2],
                split=("train", "test")[i % 3 == 0],
            )
            for i in range(24)
        ],
        "school": [
            choice(
                ["p", "q", "r"],
                "ABC"[i % 3],
                f"Jar {i} is here. Which jar?",
                id=f"school/{i}",
                images=[scene(i, (1, 1))],
            )
            for i in range(5)
        ]
        + [
            make(
                id="school/three",
                problem="<image><image><image>How many?",
                images=[scene(i, (20, 9)) for i in range(3)],
            ),
        ],
    }
    artifacts = {}
    for source, questions in sources.items():
        path = prepare.input_path(source, "clean")
        prepare.write_questions(tmp_path / path, questions, {})
        artifacts[path] = prepare.sha256(tmp_path / path)
    study = {"preset": "tiny", "model": "embedded", "model_files": {}, "seed": 0, "max_pixels": 12544, "versions": prepare.versions(),
             "sources": {"train": "world", "benchmarks": ["world", "school"]}, "artifacts": artifacts}
    (tmp_path / "study.json").write_text(json.dumps(study))
    write_processors(tmp_path / "model")
    return tmp_path


def read(prepare, path):
    return list(prepare.read_questions(path, ""))


def test_main_writes_every_file_with_the_same_rows(prepare, corrupt, data, capsys):
    written = corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=NAMES))
    assert set(written) == {f"corrupted/{source}/{name}.parquet" for source in ("world", "school") for name in NAMES}
    for path, count in written.items():
        _, source, _ = path.split("/")
        clean, damaged = (read(prepare, data / p) for p in (f"questions/{source}.parquet", path))
        assert len(damaged) == count and [row["id"] for row in damaged] == [row["id"] for row in clean]
        assert [row["answer"] for row in damaged] == [row["answer"] for row in clean]
        origin = f"questions/{source}.parquet"
        assert {origin: prepare.sha256(data / origin), "seed": 0}.items() <= prepare.made_from(data / path).items()
    by_id = {row["id"]: row for row in read(prepare, data / "questions/world.parquet")}
    for row in read(prepare, data / "corrupted/world/mismatch.parquet"):
        donor = by_id[row["donor"]]
        assert donor["answer"] != row["answer"] and donor["split"] == row["split"]
        assert row["images"][0].tobytes() == donor["images"][0].tobytes()
    assert "school/blank.parquet: 6 questions\n" in capsys.readouterr().out
    assert Image.open(data / "corrupted/preview.png").width > 180 * len(NAMES)


@pytest.mark.parametrize("name", ["clean", "blank", "mismatch", "unsaid", "removed"])
def test_easyr1_reads_the_same_files(prepare, corrupt, data, name, tmp_path):
    """As its RLHFDataset does by default: the parquet builder of datasets, split train; columns problem, answer and images, the
    pictures as PIL or as bytes, the problem cut at <image>. (github.com/hiyouga/EasyR1, verl/utils/dataset.py and examples/config.yaml)
    """
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=[name] if name != "clean" else ["blank"], preview_rows=0))
    for source in ("world", "school"):
        file = data / prepare.input_path(source, name)
        table = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(table) == len(read(prepare, file)) > 0
        for row, raw in zip(table, undecoded(table)):
            assert isinstance(row["problem"], str) and isinstance(row["answer"], str) and row["answer"]
            assert len(row["problem"].split("<image>")) - 1 == len(row["images"])
            for picture, stored in zip(row["images"], raw["images"], strict=True):
                assert picture.mode == "RGB" and Image.open(io.BytesIO(stored["bytes"])).tobytes() == picture.tobytes()


def test_main_twice_writes_nothing_and_another_order_writes_the_same(prepare, corrupt, data, capsys):
    config = corrupt.Config(data=str(data), workers=1, corruptions=["noise", "mismatch", "misleading"], preview_rows=0)
    paths = [data / path for path in corrupt.main(config)]
    first, stamps = [path.read_bytes() for path in paths], [path.stat().st_mtime_ns for path in paths]
    capsys.readouterr()
    corrupt.main(config)
    assert capsys.readouterr().out.count("up to date") == len(paths)
    assert [path.stat().st_mtime_ns for path in paths] == stamps and not (data / "corrupted/preview.png").exists()
    for path in paths:
        path.unlink()
    config.corruptions.reverse()
    corrupt.main(config)
    assert [path.read_bytes() for path in paths] == first
    shuffled = [
        q | {"images": [i.convert("RGB") for i in q["images"]]} for q in read(prepare, data / "questions/world.parquet")
    ][::-1]
    donors = {row["id"]: row["donor"] for row in read(prepare, data / "corrupted/world/mismatch.parquet")}
    prepare.write_questions(data / "questions/world.parquet", shuffled, {})
    table = prepare.read_questions(data / "questions/world.parquet", "")
    processors = prepare.load_processors(str(data / "model"), 12544)
    damaged = corrupt.damage(table, {"seed": 0, "limit": None}, "mismatch", Counter(), processors)
    assert {row["id"]: row["donor"] for row in damaged} == donors


@pytest.mark.parametrize("name", ["mismatch", "misleading", "removed", "unsaid", "blank"])
def test_a_damaged_row_says_how_long_its_own_prompt_is(prepare, corrupt, data, name):
    """Memory is planned by it: a donor may have more pictures, a hint makes the text longer."""
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=[name], preview_rows=0))
    processors = prepare.load_processors(str(data / "model"), 12544)
    rows = [row for source in ("world", "school") for row in read(prepare, data / f"corrupted/{source}/{name}.parquet")]
    encoded = [prepare.encode(row, *processors) for row in rows]
    assert [row["prompt_tokens"] for row in rows] == [len(prompt.input_ids) for prompt in encoded]
    pad = processors[0].convert_tokens_to_ids("<|image_pad|>")
    assert [row["image_tokens"] for row in rows] == [prompt.input_ids.count(pad) for prompt in encoded]


def test_no_question_needs_a_donor_where_all_are_choices(prepare, corrupt, data):
    """ScienceQA: a wrong choice is at hand for each."""
    path = data / prepare.input_path("school", "clean")
    choices = [row for row in read(prepare, path) if row["answer_type"] == "choice"]
    prepare.write_questions(path, choices, {})
    study = json.loads((data / "study.json").read_text())
    study["artifacts"][prepare.input_path("school", "clean")] = prepare.sha256(path)
    (data / "study.json").write_text(json.dumps(study))
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=["misleading"], preview_rows=0))
    rows = read(prepare, data / "corrupted/school/misleading.parquet")
    assert len(rows) == len(choices) > 0 and corrupt.pair([], None) == []
    assert all(row["problem"] != clean["problem"] for row, clean in zip(rows, choices))


def test_a_file_stays_where_other_code_makes_the_same_rows(prepare, corrupt, data, monkeypatch, capsys):
    """Policies are made from it: a comment or one more corruption in stage 2 must not void them, another row must."""
    settings_ = corrupt.Config(data=str(data), workers=1, corruptions=["noise"], preview_rows=0)
    path = data / "corrupted/world/noise.parquet"
    corrupt.main(settings_)
    before, real, code = path.read_bytes(), prepare.sha256, ["second"]
    monkeypatch.setattr(prepare, "sha256", lambda file: code[0] if file.name == "02_corrupt.py" else real(file))
    corrupt.main(settings_)
    assert path.read_bytes() == before and "the same rows as before" in capsys.readouterr().out
    assert {file.name for file in path.parent.iterdir()} == {path.name, ".noise.parquet.lock"}
    with open(path, "r+b") as file:  # damage is no reason to stop: the file is made anew
        file.seek(len(before) // 2)
        file.write(bytes([before[len(before) // 2] ^ 1]))
    corrupt.main(settings_)
    assert prepare.made_from(path)["code"] == "second" and len(read(prepare, path)) > 0
    code[0] = "third"
    noise = corrupt.CORRUPTIONS["noise"]
    monkeypatch.setitem(corrupt.CORRUPTIONS, "noise", lambda question, donor, rng, severity: noise(question, donor, rng, severity) | {"problem": question["problem"] + " Why?"})
    corrupt.main(settings_)
    assert all(row["problem"].endswith(" Why?") for row in read(prepare, path)) and prepare.made_from(path)["code"] == "third"


def test_another_seed_is_noticed(corrupt, data):
    config = corrupt.Config(data=str(data), workers=1, corruptions=["noise"], preview_rows=0)
    path = data / "corrupted/world/noise.parquet"
    corrupt.main(config)
    before, study = path.read_bytes(), json.loads((data / "study.json").read_text())
    (data / "study.json").write_text(json.dumps(study | {"seed": 1}))
    corrupt.main(config)
    assert path.read_bytes() != before


def test_stale_or_missing_questions_stop_with_the_stage_to_run(prepare, corrupt, data):
    config = corrupt.Config(data=str(data), workers=1, corruptions=["blank"])
    prepare.write_questions(data / "questions/world.parquet", [make()], {})
    with pytest.raises(prepare.UserError, match="01_prepare.py"):
        corrupt.main(config)
    (data / "questions/world.parquet").unlink()
    with pytest.raises(prepare.UserError, match="01_prepare.py"):
        corrupt.main(config)
    (data / "study.json").unlink()
    with pytest.raises(prepare.UserError, match="01_prepare.py"):
        corrupt.main(config)
    assert not (data / "corrupted").exists()


def test_unknown_corruption_stops_before_any_work(prepare, corrupt, data):
    with pytest.raises(prepare.UserError, match="'fog'"):
        corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=["blank", "fog"]))
    assert not (data / "corrupted").exists()


def test_where_no_other_answer_exists_it_is_said(prepare, corrupt, data, capsys):
    path = data / "questions/world.parquet"
    prepare.write_questions(
        path, [make(id=f"world/{i}", images=[scene(i)], answer="no" if i else "yes") for i in range(6)], {}
    )
    study = json.loads((data / "study.json").read_text())
    study["artifacts"]["questions/world.parquet"] = prepare.sha256(path)
    (data / "study.json").write_text(json.dumps(study | {"sources": {"train": "world", "benchmarks": []}}))
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=["mismatch"], preview_rows=0))
    assert "6 questions, 4 with a picture of the same answer" in capsys.readouterr().out  # one of the five finds "yes"
