# SPDX-License-Identifier: MIT
"""The embedded world: what its questions say about their pictures is read off the pixels here, by other means than drew them."""
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def world(prepare):
    return list(prepare.shapes_world(seed=3, limit=None))


def read_picture(picture, colours):
    """(kind, colour) of each patch of colour, by its extent: a square fills its box, a circle 3/4 of it, a triangle half."""
    pixels, found = np.asarray(picture).astype(int), []
    for name, rgb in colours.items():
        mask = (np.abs(pixels - rgb).sum(-1) == 0)
        for y in range(0, mask.shape[0], 28):
            for x in range(0, mask.shape[1], 28):
                cell = np.argwhere(mask[y:y + 28, x:x + 28])
                if len(cell):
                    height, width = cell.max(0) - cell.min(0) + 1
                    filled = len(cell) / (height * width)
                    found.append(("square" if filled > 0.95 else "circle" if filled > 0.65 else "triangle", name))
    return found


def truth(question, seen):
    """The answer to a question of the world, from its words and from what `seen` says is in the picture."""
    text = question["problem"].removeprefix("<image>").split("\n")[0]
    counts = Counter(kind for kind, _ in seen)
    kinds = re.findall(r"(circle|square|triangle)s?\b", text)
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if question["group"] == "sum":
        return str(sum(numbers))
    if question["group"] == "count":
        return str(counts[kinds[0]])
    if question["group"] == "both":
        return str(counts[kinds[0]] + numbers[0])
    if question["group"] == "more":
        return "yes" if counts[kinds[0]] > counts[kinds[1]] else "no"
    (colour,) = [colour for kind, colour in seen if kind == kinds[0]]
    return re.search(rf"\(([A-D])\) {colour}", question["problem"])[1]


def test_every_answer_is_what_words_and_pixels_say(prepare, world):
    for question in world:
        assert truth(question, read_picture(question["images"][0], prepare.COLOURS)) == question["answer"], question["problem"]


def test_needs_image_is_true_where_another_picture_gives_another_answer(prepare, world):
    """Under the pictures of other questions an answer changes for some donor, or for none, as `needs_image` says."""
    pictures = [read_picture(question["images"][0], prepare.COLOURS) for question in world[:150]]
    for question in world[:100]:
        answers = set()
        for seen in pictures:
            try:
                answers.add(truth(question, seen))
            except ValueError:  # no such shape there, or several: the question could not be asked
                pass
        assert (len(answers) > 1) == question["needs_image"]


def test_train_and_test_share_no_question(world):
    asked = [(q["problem"], q["images"][0].tobytes() if q["needs_image"] else None) for q in world]
    assert len(set(asked)) == len(world) == 960 + 320
    assert Counter(q["split"] for q in world) == {"train": 960, "test": 320}
    assert set(Counter(q["group"] for q in world if q["split"] == "test").values()) == {64}


def test_priors_are_as_said_so_a_policy_that_never_looks_stays_below_75_percent(world):
    """The best guess per question text, learnt on this very set: an upper bound for any policy that is blind."""
    majority, by_text = Counter(), {}
    for question in world:
        by_text.setdefault((question["group"], len(question["choices"])), Counter())[question["answer"]] += 1
    share = {group: counts.most_common(1)[0][1] / counts.total() for (group, _), counts in by_text.items()}
    assert share["count"] == pytest.approx(0.4, abs=0.08) and share["more"] == pytest.approx(0.7, abs=0.08)  # skewed
    assert share["colour"] < 0.35  # flat
    for question in world:  # the words may help a guess: group by them too
        majority[re.sub(r"circle|square|triangle", "kind", question["problem"]), question["answer"]] += 1
    best = Counter()
    for (text, _), n in majority.items():
        best[text] = max(best[text], n)
    assert best.total() / len(world) < 0.75


def test_same_seed_same_world_and_another_seed_another(prepare):
    def content(seed):
        return [(q["id"], q["problem"], q["answer"], q["images"][0].tobytes()) for q in prepare.shapes_world(seed, 30)]
    assert content(0) == content(0) != content(1)


def test_order_and_question_both_occur_and_only_the_reasoned_answer_shows_the_work(prepare):
    import random
    rng, styles = random.Random(0), Counter()
    for _ in range(400):
        cells, _ = prepare.draw_scene(rng)
        asked = prepare.ask(rng.choice(list(prepare.WORLD)), cells, rng)
        if asked:
            record, answers, _ = asked
            styles[answers["style"]] += 1
            assert prepare.grade(answers["reasoned"], record).correct and prepare.grade(answers["reasoned"], record).well_formed
            assert prepare.grade(answers["guessed"], record).well_formed and not prepare.grade(answers["prose"], record).well_formed
            assert not prepare.grade(answers["prose"], record).correct
    assert set(styles) == {"reasoned", "guessed", "prose"}


@pytest.mark.parametrize("changes", [True, False])
def test_an_edit_of_one_shape_changes_the_answer_or_not(prepare, world, changes):
    clean, found = {q["id"]: q for q in world}, prepare.counterfactuals(3, None, changes)
    needs = {name for name, q in clean.items() if q["needs_image"]}
    assert set(found) <= needs if changes else set(found) == set(clean)  # no edit changes what the text says
    for name in needs - set(found) if changes else ():  # which of two is more takes two edits where they differ by two or more
        counts = Counter(kind for kind, _ in read_picture(clean[name]["images"][0], prepare.COLOURS))
        kinds = re.findall(r"(circle|square|triangle)s", clean[name]["problem"])
        assert clean[name]["group"] == "more" and abs(counts[kinds[0]] - counts[kinds[1]]) >= 2
    for name, question in found.items():
        before, after = (Counter(read_picture(q["images"][0], prepare.COLOURS)) for q in (clean[name], question))
        assert max((before - after).total(), (after - before).total()) == 1  # one shape went, one came, or both
        assert truth(question, list(after.elements())) == question["answer"] and question["problem"] == clean[name]["problem"]
        assert (question["answer"] != clean[name]["answer"]) is changes
        pixels = (np.asarray(clean[name]["images"][0]) != np.asarray(question["images"][0])).any(-1)
        assert 0 < pixels.sum() <= 28 * 28  # within one cell


PRODUCTS = """
import importlib, itertools, sys
prepare = importlib.import_module("01_prepare")
import torch
plain = torch.library.get_kernel("aten::mm", "CPU")
prepare.fix_arithmetic(1)
layouts = [lambda rows, columns: torch.randn(rows, columns), lambda rows, columns: torch.randn(columns, rows).t(),
           lambda rows, columns: torch.randn(rows, 2 * columns)[:, ::2], lambda rows, columns: torch.randn(3 * rows, columns)[::3],
           lambda rows, columns: torch.randn(1, columns).expand(rows, columns), lambda rows, columns: torch.ones(()).expand(rows, columns)]
biases = [lambda columns: torch.randn(columns), lambda columns: torch.randn(1).expand(columns), lambda columns: torch.randn(2 * columns)[::2]]
for (rows, between, columns), first, second, bias in itertools.product(
        [(1, 128, 128), (65, 130, 300), (700, 64, 3), (3, 2000, 50)], layouts, layouts, biases):
    a, b, c = first(rows, between), second(between, columns), bias(columns)
    truth = a.double() @ b.double()
    for found, right in ((a @ b, truth), (torch.addmm(c, a, b), truth + c), (torch.addmm(c, a, b, beta=2, alpha=3), 3 * truth + 2 * c)):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-3)
a = torch.randn(300, 40, requires_grad=True)
weight = torch.randn(90, 40, requires_grad=True)
(torch.nn.functional.linear(a, weight).sin().sum()).backward()
inner = (a.double() @ weight.double().t()).cos()
torch.testing.assert_close(a.grad, (inner @ weight.double()).float(), rtol=1e-4, atol=1e-3)
torch.testing.assert_close(weight.grad, (inner.t() @ a.double()).float(), rtol=1e-4, atol=1e-3)
assert (torch.randn(9, 0) @ torch.randn(0, 4) == 0).all() and (torch.ones(64, 64, dtype=torch.long) @ torch.ones(64, 64, dtype=torch.long) == 64).all()
print(torch.get_num_threads())
"""


def test_products_of_matrices_are_right_wherever_they_are_computed():
    """In a process of its own: kernels are replaced for the whole process. Truth: products in fp64."""
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", ""), done.stderr
