# SPDX-License-Identifier: MIT
"""Stage 5: every measure finds a truth that is known otherwise, the page is inert and readable, stale answers stop it."""
import copy as copying
import hashlib
import html.parser
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from stage import write_processors

PICTURE = {"clean": 1.0, "blur-0.02": 0.8, "blur-0.05": 0.4, "blur": 0.1, "occlude-0.25": 0.6, "occlude": 0.3,
           "occlude-0.75": 0.1, "misleading": 0.8, "unsaid": 0.9, "mismatch": 1.0, "edited": 1.0}  # how much an input shows; others: nothing
POLICIES = {"base": dict(sees=0.25, reads=0.2, formed=0.6), "standard-s0": dict(sees=0.85, reads=0.9, formed=0.98),
            "hallucination-blank-s0": dict(sees=0.45, reads=0.95, formed=0.99), "mixed-blank-s0": dict(sees=0.7, reads=0.9, formed=0.98)}


def simulated_answer(question, donor_answer, name, rng, sees, reads, formed):
    """A row of stage 4 by a policy that sees, reads and forms with known probability, and guesses the prior otherwise."""
    guess = {"count": "2", "more": "yes", "colour": rng.choice("ABCD"), "both": str(rng.randint(1, 9)), "sum": str(rng.randint(2, 18))}
    shown = donor_answer or question["answer"]
    answer, quality = guess.get(question["group"], "2"), 0.02
    if question["needs_image"] and rng.random() < sees * PICTURE.get(name, 0):
        answer, quality = shown, 0.9
    if not question["needs_image"] and rng.random() < reads:
        answer, quality = question["answer"], 0.9
    good = rng.random() < formed
    response = f"<think>I see {rng.randint(0, 4)} circles.</think>\\boxed{{{answer}}}" if good else "It is what it is, I guess."
    probability = quality if answer == question["answer"] else 0.05
    return {"id": question["id"], "group": question["group"], "needs_image": question["needs_image"], "response": response,
            "answer": answer if good else None, "gold": question["answer"], "correct": good and answer == question["answer"],
            "well_formed": good, "truncated": rng.random() < 0.02, "tokens": len(response) // 4}


def make_study(data, prepare, corrupt, policies=POLICIES, names=("blank", "removed", "mismatch"), limit=100, steps=30, trained=()):
    """A data folder as the stages before leave it, its policies simulated; `trained`: inputs of training questions that are asked."""
    clean = "questions/shapes.parquet"
    questions = list(prepare.shapes_world(0, limit))
    prepare.write_questions(data / clean, questions, {})
    splits = {split: [q for q in questions if q["split"] == split] for split in ("test", "train")}
    study = {"preset": "tiny", "model": "embedded", "model_files": {}, "sources": {"train": "shapes", "benchmarks": ["shapes"]}, "seed": 0, "limit": limit,
             "max_pixels": 12544, "versions": {"torch": importlib.metadata.version("torch")}, "artifacts": {clean: prepare.sha256(data / clean)}}
    (data / "study.json").write_text(json.dumps(study))
    write_processors(data / "model")
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=list(names), preview_rows=0))
    asked = [("test", "", name) for name in ("clean", *names)] + [("train", "train", name) for name in trained]
    for policy, settings_ in policies.items():
        if policy != "base":
            folder = data / "policies" / policy
            folder.mkdir(parents=True)
            (folder / "adapter_model.safetensors").write_text(policy)
            config = {"policy": policy, "settings": {"condition": policy.split("-")[0], "seed": 0, "steps": steps, "made_from": study["artifacts"]}}
            (folder / "config.json").write_text(json.dumps(config))
            rng, way = random.Random(policy), [1 - math.exp(-4 * step / steps) for step in range(steps)]
            prepare.write_jsonl(folder / "train.jsonl", [
                {"step": i + 1, "correct": (c := 0.15 + 0.6 * w * settings_["sees"] + rng.gauss(0, 0.05)),
                 "well_formed": (f := min(1, 0.55 + 0.43 * w + rng.gauss(0, 0.03))), "reward": 0.9 * c + 0.1 * f} for i, w in enumerate(way)])
        for split, folder, name in asked:
            rng, path = random.Random(f"{policy}|{name}|{folder}"), data / "answers" / policy / "shapes" / folder / f"{name}.jsonl"
            donors = {}
            if name in ("mismatch", "edited"):
                table = prepare.read_questions(data / prepare.input_path("shapes", name), "")
                donors = dict(zip(table["id"], table["shown_answer"]))
            inputs = [prepare.input_path("shapes", name)] + [f"policies/{policy}/adapter_model.safetensors"] * (policy != "base")
            made_from = {key: prepare.sha256(data / key) for key in inputs}
            prepare.write_jsonl(path, [simulated_answer(q, donors.get(q["id"]), name, rng, **settings_) | {"made_from": made_from}
                                       for q in splits[split]])
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory, prepare, corrupt):
    data = tmp_path_factory.mktemp("study")
    make_study(data, prepare, corrupt)
    return data


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study, tmp_path / "data")


@pytest.fixture(scope="module")
def results(study, report):
    return report.main(report.Config(data=str(study), resamples=500))


def answers(data, policy, name):
    return [json.loads(line) for line in (data / "answers" / policy / "shapes" / f"{name}.jsonl").read_text().splitlines()]


def rewrite(data, policy, name, change):
    path = data / "answers" / policy / "shapes" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change(answers(data, policy, name))))
    return path


def run(report, data, **options):
    return report.main(report.Config(data=str(data), **{"resamples": 200, "gallery": 1} | options))


def split_gain(report, weights, strata, base, policy):
    """Part -> value, interval."""
    observed = report.split_gain(weights, strata, base, policy, "blank")
    return {part: report.summarise([found]) for (_, part), found in observed.items()}


# Statistics, against scipy and against first principles


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(report, pair):
    hits, n = pair
    low, high = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert report.wilson(hits, n) == pytest.approx([low, high], abs=1e-12)


@given(st.integers(0, 2500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.26, 0.42, 0.5, 0.7]))
@settings(max_examples=60)
def test_tail_is_scipys_of_however_many_questions(report, pair, p):
    k, n = pair
    assert report.tail(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=1e-8, abs=1e-200)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(report, one, two):
    truth = stats.binomtest(one, one + two, 0.5).pvalue if one + two else 1.0
    assert report.mcnemar(one, two) == pytest.approx(truth, rel=1e-9)


@given(st.integers(0, 400), st.integers(1, 400))
@settings(max_examples=60)
def test_wilson_and_mcnemar_are_statsmodels(report, hits, more):
    n = hits + more
    assert report.wilson(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-9)
    table = mcnemar([[7, hits], [more, 5]], exact=True)
    assert report.mcnemar(hits, more) == pytest.approx(table.pvalue, abs=1e-9)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_stepping_down_rejects(report, ps):
    tests = [{"p": p} for p in ps]
    report.holm(tests)
    corrected = [test["p_holm"] for test in tests]
    for alpha in (0.01, 0.05, 0.3, 0.8):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):  # Holm's own procedure
            if ps[i] * (len(ps) - rank) > alpha:
                break
            rejected.add(i)
        assert rejected == {i for i, p in enumerate(corrected) if p <= alpha}


def test_bootstrap_intervals_cover_a_known_mean(report):
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        x = rng.random(80) < 0.3
        low, high = report.over_runs([report.over_resamples(report.resample(80, 400, trial) @ x, 80)])["ci95"]
        covered += low <= 0.3 <= high
    assert covered / 300 == pytest.approx(0.94, abs=0.04)


def test_bootstrap_starts_from_the_sample_and_is_seeded(report):
    weights = report.resample(50, 300, 1, "a")
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[0], 1 / 50)
    assert np.array_equal(weights, report.resample(50, 300, 1, "a")) and not np.array_equal(weights, report.resample(50, 300, 1, "b"))


def test_format_part_by_hand(report):
    """One stratum of 2,000: half formed, of these 80% right, of the others 10%; the policy forms 90%."""
    formed = np.repeat([1.0, 0.0], 1000)
    correct = np.concatenate([np.repeat([1, 0], [800, 200]), np.repeat([1, 0], [100, 900])]) * 1.0
    policy = np.repeat([1.0, 0.0], [1800, 200])
    found = report.form_part(np.full((1, 2000), 1 / 2000), np.ones((2000, 1)), correct[None], formed[None], policy[None])
    assert found[0] == pytest.approx(0.4 * (0.8 - 0.1), abs=1e-3)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
def test_the_parts_add_up_whatever_the_answers(report, seed, n):
    rng = np.random.default_rng(seed)
    draw = lambda: {name: tuple((rng.random(n) < rng.random()) * 1.0 for _ in "cf") for name in ("clean", "blank")}
    base, policy = draw(), draw()
    found = split_gain(report, report.resample(n, 50, seed), np.eye(3)[rng.integers(0, 3, n)], base, policy)
    assert found["total"]["value"] == pytest.approx(policy["clean"][0].mean() - base["clean"][0].mean())
    if found["visual"]["value"] is not None:
        assert sum(found[part]["value"] for part in ("format", "image_free", "visual")) == pytest.approx(found["total"]["value"])


def learners(rng, n):
    """Base and learner with known truth; group 0 is hard and rarely formed, group 1 easy and often formed."""
    group = rng.integers(0, 2, n)
    knows, knows_blank = rng.random(n) < np.array([0.3, 0.8])[group], rng.random(n) < np.array([0.1, 0.5])[group]
    formed = [rng.random(n) < np.array([0.3, 0.9])[group] for _ in range(2)]
    sees = rng.random(n) < 0.5
    outcome = lambda right, form: ((right & form) * 1.0, form * 1.0)
    base = {"clean": outcome(knows, formed[0]), "blank": outcome(knows_blank, formed[1])}
    always = np.ones(n, bool)
    policies = {"format": {"clean": outcome(knows, always), "blank": outcome(knows_blank, always)},
                "visual": {"clean": outcome(knows | sees, formed[0]), "blank": base["blank"]},
                "image_free": {"clean": outcome(knows | sees, formed[0]), "blank": outcome(knows_blank | sees, formed[1])}}
    return np.eye(2)[group], base, policies


@pytest.mark.parametrize("learnt, truth", [
    ("format", {"format": np.mean([0.7 * 0.3, 0.1 * 0.8]), "image_free": 0, "visual": 0}),
    ("visual", {"format": 0, "image_free": 0, "visual": np.mean([0.3 * 0.7 * 0.5, 0.9 * 0.2 * 0.5])}),
    ("image_free", {"format": 0, "image_free": np.mean([0.3 * 0.9 * 0.5, 0.9 * 0.5 * 0.5]),
                    "visual": np.mean([0.3 * 0.7 * 0.5, 0.9 * 0.2 * 0.5]) - np.mean([0.3 * 0.9 * 0.5, 0.9 * 0.5 * 0.5])})])
def test_gain_split_is_unbiased_and_covers(report, learnt, truth):
    rng, found = np.random.default_rng(3), []
    for trial in range(120):
        strata, base, policies = learners(rng, 300)
        found.append(split_gain(report, report.resample(300, 200, trial), strata, base, policies[learnt]))
    for part, expected in truth.items():
        values = np.array([f[part]["value"] for f in found])
        assert values.mean() == pytest.approx(expected, abs=4 * values.std() / 120**0.5 + 1e-3), part
        if values.std():
            assert np.mean([f[part]["ci95"][0] <= expected <= f[part]["ci95"][1] for f in found]) > 0.88, part


def test_unstratified_form_would_blame_the_picture(report):
    """Why strata: form and difficulty go together here, and without strata the learner of form seems to unlearn."""
    rng, biased = np.random.default_rng(4), []
    for trial in range(40):
        strata, base, policies = learners(rng, 300)
        found = split_gain(report, report.resample(300, 2, trial), np.ones((300, 1)), base, policies["format"])
        biased.append(found["image_free"]["value"])
    assert np.mean(biased) < -0.03


# Several seeds


def without_questions(values):
    """Runs that were asked so many questions that their choice counts for nothing."""
    from_all = importlib.import_module("05_report").Measured
    return [from_all(float(value), np.zeros(1), 10**12) for value in values]


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=2, max_size=9))
@settings(max_examples=60)
def test_were_all_questions_asked_it_would_be_the_paired_t_test(report, values):
    if np.std(values) < 1e-6:
        return
    truth = stats.ttest_rel(values, np.zeros(len(values)))
    runs = without_questions(values)
    assert report.p_over_runs(runs) == pytest.approx(truth.pvalue, rel=1e-5, abs=1e-12)
    low, high = report.over_runs(runs, (-math.inf, math.inf))["ci95"]
    assert [low, high] == pytest.approx(list(truth.confidence_interval(0.95)), rel=1e-6, abs=1e-9)


@given(st.integers(1, 60), st.floats(0, 40))
@settings(max_examples=60)
def test_student_is_scipys(report, df, t):
    assert report.student(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-9, abs=1e-7)
    assert report.student_95(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)


def test_runs_that_agree_leave_the_choice_of_questions(report):
    """Five runs with the same answers are one run: a normal interval of its mean over questions."""
    right = (np.random.default_rng(0).random(400) < 0.3) * 1.0
    found = report.over_runs([report.over_questions(right)] * 5, (0.0, 1.0))
    error = right.std(ddof=1) / 20
    assert found["ci95"] == pytest.approx([right.mean() - stats.norm.ppf(0.975) * error, right.mean() + stats.norm.ppf(0.975) * error])
    assert (found["n"], found["seeds"]) == (400, 5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=50)
def test_p_is_below_5_percent_where_the_interval_leaves_out_0(report, seed, k):
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 0.1, k) + rng.normal(0, 0.1)
    shared = rng.random(200)
    runs = []
    for one in shift:
        difference = 1.0 * (shared < 0.3 + one) - (rng.random(200) < 0.3)
        runs.append(report.over_questions(difference))
    low, high = report.over_runs(runs)["ci95"]
    assert (report.p_over_runs(runs) < 0.05) == (low > 0 or high < 0)


FORMED, RIGHT_IF_READ = np.array([0.4, 0.8]), np.array([0.3, 0.5])  # of two groups of questions: a base's form and knowledge


class World:
    """Conditions whose runs differ from seed to seed by known distributions, on questions that are hard for all of them or for none."""

    def __init__(self, rng, n, luck):
        self.rng, self.luck = rng, luck
        self.group = rng.integers(0, 2, n)  # drawn, as all that a question is
        self.hard = {name: rng.random(n) for name in ("sees", "blind", "form")}  # shared by all policies
        self.strata = np.eye(2)[self.group]

    def mixed(self, name, chance):
        """With that chance; half of the questions fall the same way for all policies."""
        own = self.rng.random(len(self.group))
        shared = self.rng.random(len(self.group)) < 0.5
        return np.where(shared, self.hard[name], own) < chance

    def run(self, sees, knows, formed):
        """Input -> (correct, formed). A malformed answer cannot be read; knowledge needs no picture."""
        sees, knows, formed = (x + self.luck * self.rng.standard_normal() for x in (sees, knows, formed))
        formed = self.mixed("form", np.clip(FORMED[self.group] + formed, 0, 1))
        knowledge = self.mixed("blind", RIGHT_IF_READ[self.group] + knows)
        sight = self.mixed("sees", sees)
        return {"clean": (1.0 * (formed & (knowledge | sight)), 1.0 * formed), "blank": (1.0 * (formed & knowledge), 1.0 * formed),
                "effect": 1.0 * sight}


def truths(base, policy):
    """Expected measures of a policy, in closed form (nothing is clipped at these settings; luck has mean 0 and is independent)."""
    def accuracy(form, sees, knows):
        known = RIGHT_IF_READ + knows
        return (FORMED + form) * (known + (1 - known) * sees), (FORMED + form) * known
    clean, blank = accuracy(policy["formed"], policy["sees"], policy["knows"])
    before, before_blank = accuracy(base["formed"], base["sees"], base["knows"])
    form = (policy["formed"] - base["formed"]) * before / (FORMED + base["formed"])  # what it makes of the base's knowledge
    form_blank = (policy["formed"] - base["formed"]) * before_blank / (FORMED + base["formed"])
    image_free = blank - before_blank - form_blank
    found = {"clean": clean, "blank": blank, "causal_effect": np.full(2, policy["sees"]), "total": clean - before, "format": form,
             "image_free": image_free, "visual": clean - before - form - image_free}
    return {name: x.mean() for name, x in found.items()}


def measured_runs(report, world, weights, base, runs):
    """Measure -> each run's `Observed`."""
    found = {name: [report.Observed("accuracy", run[name][0]) for run in runs] for name in ("clean", "blank")}
    found["causal_effect"] = [report.Observed("effect", run["effect"]) for run in runs]
    parts = [report.split_gain(weights, world.strata, base, run, "blank") for run in runs]
    for _, name in parts[0]:
        found[name] = [part["gains", name] for part in parts]
    return found


BASE = dict(sees=0.2, knows=0.0, formed=0.0)
STANDARD, BLIND = dict(sees=0.55, knows=0.1, formed=0.1), dict(sees=0.25, knows=0.25, formed=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seeds, luck, most", [(5, 0.03, 0.98), (5, 0.0, 0.98), (3, 0.03, 0.99)])
def test_intervals_over_seeds_cover_the_truth_in_500_simulated_studies(report, seeds, luck, most):
    """Of each condition, and of differences paired by seed: between 92 and 98 of 100 intervals hold the mean of all seeds on all questions.

    With three seeds they may be somewhat too wide: two errors of like size each have their own quantile.
    """
    of, covered = {"standard": STANDARD, "blind": BLIND}, {}
    truth = {name: truths(BASE, settings_) for name, settings_ in of.items()}
    for study in range(500):
        world = World(np.random.default_rng(study), 400, luck)
        weights = report.resample(400, 300, study)
        base = World.run(world_without_luck(world), **BASE)
        measured = {}
        for name, settings_ in of.items():
            runs = [world.run(**settings_) for _ in range(seeds)]
            measured[name] = measured_runs(report, world, weights, base, runs)
        for name in of:
            for measure, runs in measured[name].items():
                note(covered, f"{name}: {measure}", report.over_runs([run.measured for run in runs]), truth[name][measure])
        for measure in measured["blind"]:
            pairs = [(one - two).measured for one, two in zip(measured["blind"][measure], measured["standard"][measure])]
            note(covered, f"blind - standard: {measure}", report.over_runs(pairs), truth["blind"][measure] - truth["standard"][measure])
    share = {what: np.mean(hits) for what, hits in covered.items()}
    assert len(share) == 21 and all(len(hits) == 500 for hits in covered.values())
    assert all(0.92 <= value <= most for value in share.values()), {what: float(x) for what, x in share.items()}


def world_without_luck(world):
    """The base is one: no other is drawn."""
    still = copying.copy(world)
    still.luck = 0.0
    return still


def note(covered, what, found, truth):
    low, high = found["ci95"]
    covered.setdefault(what, []).append(low <= truth <= high)


def test_the_closed_forms_are_what_is_simulated(report):
    """One study of 200,000 questions, without luck."""
    world = World(np.random.default_rng(0), 200_000, 0.0)
    base, weights = world.run(**BASE), np.full((2, 200_000), 1 / 200_000)
    for settings_ in STANDARD, BLIND:
        found = measured_runs(report, world, weights, base, [world.run(**settings_)])
        for name, truth in truths(BASE, settings_).items():
            assert found[name][0].measured.value == pytest.approx(truth, abs=0.006), name


# The check of the instrument


def test_instrument_check_finds_the_truth_and_notices_a_broken_measure(report, monkeypatch):
    entries = report.check_measures()
    assert all(e["passed"] for e in entries) and len({e["check"] for e in entries}) == len(entries) > 30
    monkeypatch.setattr(report, "form_part", lambda weights, *_: np.zeros(len(weights)))
    assert {"learns the form alone: format"} <= {e["check"] for e in report.check_measures() if not e["passed"]}


@pytest.mark.slow
def test_intervals_cover_the_truth_in_500_simulated_studies(report):
    """Every measure, for every type of policy: between 92 and 98 of 100 intervals hold the truth."""
    covered = {}
    for study in range(500):
        for e in report.check_measures(n=1000, resamples=500, seed=study):
            covered.setdefault(e["check"], []).append(e["ci95"][0] - 1e-9 <= e["truth"] <= e["ci95"][1] + 1e-9)
    share = {check: np.mean(hits) for check, hits in covered.items()}
    assert len(share) > 30
    assert all(0.92 <= value <= 0.98 for value in share.values()), {
        check: value for check, value in share.items() if not 0.92 <= value <= 0.98}


def test_swapped_answers_are_noticed(report, prepare, copy):
    """Two policies' files change places: each row names the adapter that gave it."""
    one, two = (copy / "answers" / policy / "shapes" / "clean.jsonl" for policy in ("standard-s0", "mixed-blank-s0"))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b), two.write_bytes(a)
    with pytest.raises(prepare.UserError, match="is by standard-s0, not by mixed-blank-s0|is by mixed-blank-s0, not by standard-s0"):
        run(report, copy)
    one.write_bytes((copy / "answers" / "base" / "shapes" / "clean.jsonl").read_bytes())
    two.write_bytes(b)
    with pytest.raises(prepare.UserError, match="is by base, not by standard-s0"):
        run(report, copy)


def test_clean_pictures_in_the_place_of_blank_ones_are_noticed(report, prepare, copy):
    """After the answers were given, by the hash; before, by what nobody can get right without a picture."""
    blank, clean = (copy / prepare.input_path("shapes", name) for name in ("blank", "clean"))
    blank.write_bytes(clean.read_bytes())
    with pytest.raises(prepare.UserError, match="blank"):
        run(report, copy)
    digest, key = prepare.sha256(blank), prepare.input_path("shapes", "blank")
    for policy in POLICIES:
        seen = {row["id"]: row for row in answers(copy, policy, "clean")}
        rewrite(copy, policy, "blank", lambda rows: [seen[row["id"]] | {"made_from": row["made_from"] | {key: digest}} for row in rows])
    check = run(report, copy)["instrument_check"]
    assert not check["passed"] and any("without the picture" in e["check"] for e in check["entries"] if not e["passed"])


def test_a_grader_that_accepts_everything_is_noticed(report, copy):
    for policy in POLICIES:
        for name in ("clean", "blank", "removed", "mismatch"):
            rewrite(copy, policy, name, lambda rows: [row | {"correct": True, "well_formed": True} for row in rows])
    check = run(report, copy)["instrument_check"]
    assert not check["passed"] and sum(not e["passed"] for e in check["entries"]) >= len(POLICIES)


def test_answers_that_were_cut_differently_are_not_compared(report, prepare, copy):
    rewrite(copy, "standard-s0", "blank", lambda rows: [row | {"max_new_tokens": 99} for row in rows])
    for policy in POLICIES:
        for name in ("clean", "blank", "removed", "mismatch"):
            if (policy, name) != ("standard-s0", "blank"):
                rewrite(copy, policy, name, lambda rows: [row | {"max_new_tokens": 40} for row in rows])
    with pytest.raises(prepare.UserError, match="cut after 40 tokens, others after 99"):
        run(report, copy)


def test_instrument_check_notices_a_policy_that_sees_without_picture(report, copy):
    assert run(report, copy)["instrument_check"]["passed"]
    rewrite(copy, "standard-s0", "blank", lambda rows: [row | {"correct": True, "answer": row["gold"]} for row in rows])
    check = run(report, copy)["instrument_check"]
    assert not check["passed"]
    assert all("standard-s0" in e["check"] for e in check["entries"] if not e["passed"])
    page = (copy / "report" / "index.html").read_text()
    assert 'role="alert"' in page and "did not pass" in page


def test_instrument_check_notices_a_picture_that_disturbs(report, copy):
    rewrite(copy, "standard-s0", "blank", lambda rows: [row | {"correct": row["correct"] and row["needs_image"]} for row in rows])
    failed = [e["check"] for e in run(report, copy)["instrument_check"]["entries"] if not e["passed"]]
    assert failed == ["standard-s0: worth of the picture (blank) where the text suffices"]


def test_nobody_guesses_shapes_better_than_the_check_allows(report, prepare):
    rng, counts, total = random.Random(2), {}, {}
    for i in range(20000):
        name = list(report.BLIND_BEST)[i % len(report.BLIND_BEST)]
        asked = prepare.ask(name, prepare.draw_scene(rng)[0], rng)
        if asked:
            text = re.split(r"\n", asked[0]["problem"])[0]
            counts.setdefault((name, text), {}).setdefault(asked[0]["answer"], []).append(1)
            total[name] = total.get(name, 0) + 1
    for name, best in report.BLIND_BEST.items():
        right = sum(max(map(len, c.values())) for (n, _), c in counts.items() if n == name) / total[name]
        assert right == pytest.approx(best, abs=0.03), name


@pytest.mark.parametrize("rows, kept", [
    ([{"correct": False, "drawn_right": 0}], True), ([{"correct": True, "drawn_right": 0}], False), ([{"correct": False, "drawn_right": 1}], False)])
def test_a_question_without_choices_goes_out_once_it_was_answered_blind(report, rows, kept):
    answers_ = {"base": {"clean": rows, "blank": [rows[0] | {"samples": 4}]}}
    panel = report.Panel("s", [{"id": "s/1", "choices": []}], answers_, np.ones((1, 1)))
    assert (report.strict_subset(panel) == ["s/1"]) is kept


@pytest.mark.parametrize("choices", [2, 3, 4, 5])
@pytest.mark.parametrize("samples", [0, 2, 8])
def test_a_blind_choice_keeps_19_of_20_questions(report, choices, samples):
    """Policies that choose blindly: few questions go out by luck. Where twelve of sixteen know half of the questions, these go out."""
    rng, n = np.random.default_rng([choices, samples]), 3000
    questions = [{"id": str(i), "choices": ["x"] * choices} for i in range(n)]

    def row(p):
        return {"correct": bool(rng.random() < p), "drawn_right": int(rng.binomial(samples, p)), "samples": samples}

    luck = {f"p{k}": {"clean": [], "blank": [row(1 / choices) for _ in range(n)]} for k in range(16)}
    panel = report.Panel("s", questions, luck, np.ones((1, 1)))
    assert 0.94 <= len(report.strict_subset(panel)) / n <= 1
    for k in range(12):
        luck[f"p{k}"]["blank"] = [row(1 / choices if i % 2 else 0.95) for i in range(n)]
    kept = [int(i) % 2 for i in report.strict_subset(panel)]
    assert sum(kept) > 0.94 * n / 2 and len(kept) - sum(kept) < 0.2 * n / 2


@pytest.mark.parametrize("looks", [0.0, 0.5, 1.0])
def test_causal_effect_is_the_share_that_looks(report, looks):
    """Whoever looks says what either picture shows; whoever does not says the same to both, and may well be right."""
    rng, n = np.random.default_rng(1), 4000
    gold, fits, guess = (rng.integers(0, 3, n) for _ in range(3))
    fits = (gold + 1 + rng.integers(0, 2, n)) % 3
    sees = rng.random(n) < looks
    effect = report.causal_effect(np.where(sees, gold, guess), np.where(sees, fits, guess), gold, fits)
    assert effect.mean() == pytest.approx(sees.mean()) and set(effect) <= {0.0, 0.5, 1.0}


# A whole study


def test_accuracy_is_what_the_files_say(results, study):
    for policy in POLICIES:
        for name in ("clean", "blank", "removed", "mismatch"):
            rows, cell = answers(study, policy, name), results["accuracy"][policy]["shapes"][name]
            right = sum(row["correct"] for row in rows)
            assert (cell["n"], cell["correct"], cell["accuracy"]) == (len(rows), right, right / len(rows))
            assert cell["ci95"][0] < cell["accuracy"] < cell["ci95"][1]


def test_training_questions_may_be_asked_damaged_alone(report, prepare, corrupt, tmp_path):
    make_study(tmp_path, prepare, corrupt, {p: POLICIES[p] for p in ("base", "standard-s0", "hallucination-blank-s0")}, names=("blank",), limit=20,
               trained=("blank",))
    found = run(report, tmp_path)["s1_to_s8"]["shapes"]["hallucination-blank"]
    assert found["S1"] is None and found["S3"]["n"] == found["S7"]["n"] == 20


def test_an_input_asked_of_a_sample_takes_no_question_from_the_others(report, results, copy, prepare):
    kept = {}
    for path in copy.glob("answers/*/shapes/removed.jsonl"):
        rows = sorted(prepare.read_jsonl(path), key=lambda row: row["id"])[:30]
        prepare.write_jsonl(path, rows)
        kept[path.parent.parent.name] = sum(row["correct"] for row in rows)
    found = run(report, copy)
    assert not any("removed" in note for note in found["notes"])
    for policy, right in kept.items():
        there = found["accuracy"][policy]["shapes"]
        assert (there["removed"]["n"], there["removed"]["correct"]) == (30, right)
        assert there["clean"] == results["accuracy"][policy]["shapes"]["clean"]


def test_every_number_has_its_n_and_interval(study, results):
    def walk(x):
        if isinstance(x, dict):
            if {"value", "share", "accuracy"} & x.keys() and not isinstance(x.get("accuracy"), dict):
                assert {"n", "ci95"} <= x.keys(), x
            for key, child in x.items():
                walk(child) if key != "provenance" else None
        elif isinstance(x, list):
            for child in x:
                walk(child)
    walk(json.loads((study / "report" / "results.json").read_text()))


def test_the_same_answers_give_the_same_bytes(report, copy):
    run(report, copy)
    first = {path.name: path.read_bytes() for path in (copy / "report").iterdir()}
    run(report, copy)
    assert first == {path.name: path.read_bytes() for path in (copy / "report").iterdir()} and len(first) == 4


def test_seeds_are_pooled_and_their_spread_shows(report, prepare, corrupt, tmp_path):
    policies = {"base": POLICIES["base"], "standard-s0": POLICIES["standard-s0"], "standard-s1": dict(sees=0.1, reads=0.2, formed=0.6)}
    make_study(tmp_path, prepare, corrupt, policies, names=("blank",), limit=80)
    found = run(report, tmp_path, resamples=1000)
    pooled, single = found["pooled"]["standard"]["shapes"], found["gains"]
    assert pooled["runs"] == ["standard-s0", "standard-s1"]
    both = [single[run]["shapes"]["total"]["value"] for run in pooled["runs"]]
    assert pooled["gains"]["total"]["value"] == pytest.approx(np.mean(both))
    low, high = pooled["gains"]["total"]["ci95"]
    assert low < min(both) + 0.1 and high > max(both) - 0.1  # the runs differ by more than the questions do
    assert pooled["accuracy"]["clean"]["value"] == pytest.approx(
        np.mean([found["accuracy"][run]["shapes"]["clean"]["accuracy"] for run in pooled["runs"]]))
    assert "standard (2 seeds)" in (tmp_path / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def seeds_study(tmp_path_factory, prepare, corrupt):
    """Three seeds of standard, four of hallucination, one of mixed; seeds differ."""
    data = tmp_path_factory.mktemp("seeds")
    policies = {"base": POLICIES["base"], "mixed-blank-s1": POLICIES["mixed-blank-s0"]}
    for seed in range(4):
        if seed < 3:
            policies[f"standard-s{seed}"] = dict(sees=0.75 + 0.08 * seed, reads=0.9, formed=0.98)
        policies[f"hallucination-blank-s{seed}"] = dict(sees=0.25 + 0.08 * seed, reads=0.95, formed=0.9)
    make_study(data, prepare, corrupt, policies, names=("blank", "edited", "kept"), limit=80, trained=("clean", "blank"))
    return data


@pytest.fixture(scope="module")
def seeds_results(seeds_study, report):
    return report.main(report.Config(data=str(seeds_study), resamples=500))


def test_conditions_are_compared_seed_by_seed(seeds_results, seeds_study, report):
    found = seeds_results["differences"]["hallucination-blank"]["standard"]["shapes"]
    assert list(found) == ["clean", "blank", "causal_effect", "format", "image_free", "visual"]
    right = {run: np.array([row["correct"] for row in answers(seeds_study, run, "clean")], float)
             for seed in range(3) for run in (f"standard-s{seed}", f"hallucination-blank-s{seed}")}
    pairs = np.array([right[f"hallucination-blank-s{seed}"] - right[f"standard-s{seed}"] for seed in range(3)])
    clean, n = found["clean"], pairs.shape[1]
    assert (clean["n"], clean["seeds"]) == (n, 3) and list(clean["by_seed"]) == ["0", "1", "2"]
    assert list(clean["by_seed"].values()) == pytest.approx(pairs.mean(1)) and clean["value"] == pytest.approx(pairs.mean())
    shared = np.cov(pairs)[np.triu_indices(3, 1)].mean() / n  # variance of what the choice of questions does to all seeds
    shared = max(shared, 1 / (n + 2) ** 2)
    truth = stats.ttest_1samp(pairs.mean(1), 0)
    t_half = np.diff(truth.confidence_interval(0.95))[0] / 2
    half = math.hypot(t_half, stats.norm.ppf(0.975) * shared**0.5)
    assert clean["ci95"] == pytest.approx([max(-1, clean["value"] - half), min(1, clean["value"] + half)])
    for seed, one in clean["within_seed"].items():
        table = [[0, (pairs[int(seed)] > 0).sum()], [(pairs[int(seed)] < 0).sum(), 0]]
        assert one["p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    one = seeds_results["differences"]["mixed-blank"]["base"]["shapes"]["clean"]  # of one seed alone
    runs = [np.array([row["correct"] for row in answers(seeds_study, run, "clean")]) for run in ("mixed-blank-s1", "base")]
    table = [[0, (runs[0] & ~runs[1]).sum()], [(runs[1] & ~runs[0]).sum(), 0]]
    assert one["p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    for name, x in found.items():
        assert x["p"] >= stats.ttest_1samp(list(x["by_seed"].values()), 0).pvalue * (1 - 1e-6), name  # questions were chosen, too
    effects = [seeds_results["causal_effect"][run]["shapes"]["value"] for run in ("hallucination-blank-s1", "standard-s1")]
    assert found["causal_effect"]["by_seed"]["1"] == pytest.approx(effects[0] - effects[1])
    for one, references in seeds_results["differences"].items():
        for two, sources in references.items():
            expected = {"base": {"standard": 3, "hallucination-blank": 4, "mixed-blank": 1}[one]}
            seeds = expected.get(two, 1 if one == "mixed-blank" else 3)
            assert all(len(x["by_seed"]) == seeds for x in sources["shapes"].values()), (one, two)
    (claim,) = [c for c in seeds_results["claims"] if c["id"] == "damaged-beats-clean"]
    assert claim["found"]["value"] == pytest.approx(clean["value"]) and claim["found"]["ci95"] == pytest.approx(clean["ci95"])


def test_the_fingerprint_is_of_the_answers_alone(seeds_results, seeds_study, report, tmp_path, monkeypatch, capsys):
    lines = []
    for path in (seeds_study / "answers").rglob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            policy, *where = path.parent.relative_to(seeds_study / "answers").parts
            said = [policy, "/".join(where), path.stem, *(row[key] for key in ("id", "response", "answer", "correct", "well_formed"))]
            lines.append(hashlib.sha256(json.dumps(said).encode()).digest())
    found = seeds_results["fingerprint"]
    assert found == hashlib.sha256(b"".join(sorted(lines))).hexdigest()
    data = shutil.copytree(seeds_study, tmp_path / "data")
    for change, same in ((lambda row: row | {"tokens": 99}, True), (lambda row: row | {"response": "other"}, False)):
        rewrite(data, "base", "blank", lambda rows: [change(row) for row in rows[::-1]])
        assert (run(report, data)["fingerprint"] == found) is same
    (tmp_path / "README.md").write_text(f"as in {found[:16]}")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "05_report.py"))
    assert report.same_study(found) == f"Fingerprint {found[:16]}: the README speaks of these answers"
    monkeypatch.setattr(report.platform, "machine", lambda: "x86_64")
    assert report.same_study("0" * 64).endswith("speaks of other answers")
    monkeypatch.setattr(report.platform, "machine", lambda: "arm64")
    assert report.same_study("0" * 64).endswith("other answers, by an x86-64 processor, and arm64 rounds sums otherwise")
    run(report, seeds_study)
    assert f"Fingerprint {found[:16]}: the README speaks of these answers" in capsys.readouterr().out
    assert found[:16] in (seeds_study / "report" / "index.html").read_text() and found[:16] in (seeds_study / "report" / "tables.md").read_text()


@pytest.mark.slow
def test_neither_hash_seed_nor_threads_change_a_number(seeds_study, tmp_path):
    """As `python -P` runs it, which leaves the script's folder out of the module path."""
    script, found = Path(__file__).resolve().parents[1] / "05_report.py", []
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "8")):
        data = shutil.copytree(seeds_study, tmp_path / seed)
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}  # as stage 1 sets it
        subprocess.run([sys.executable, "-P", script, "--data", data, "--resamples", "100"], env=environment, cwd=tmp_path, check=True)
        found.append((data / "report" / "results.json").read_bytes())
    assert found[0] == found[1] == found[2]


def test_too_few_differences_are_no_difference(report, prepare, corrupt, tmp_path):
    """Five questions that only the picture's owner gets right, of 20: an exact test does not call that a difference, nor does the page."""
    make_study(tmp_path, prepare, corrupt, {p: POLICIES[p] for p in ("base", "standard-s0")}, names=("blank",), limit=20)
    for policy, name, right in ("base", "clean", 5), ("base", "blank", 0), ("standard-s0", "clean", 10), ("standard-s0", "blank", 10):
        rewrite(tmp_path, policy, name, lambda rows: [row | {"correct": i < right, "answer": row["gold"] if i < right else "?"}
                                                      for i, row in enumerate(rows)])
    found, page = run(report, tmp_path), (tmp_path / "report" / "index.html").read_text()
    assert found["picture_worth"]["base"]["shapes"]["blank"]["p"] == 0.0625 and "base is not shown to depend on the picture" in page
    assert "the model is not shown to have gained anything (+25 points)" in page and found["differences"]["standard"]["base"]["shapes"]["clean"]["p"] == 0.0625


@pytest.mark.parametrize("gain, says", [(0.2, "reproduced"), (-0.2, "contradicted"), (0.005, "undecided")])
def test_verdicts_follow_from_the_interval(report, gain, says):
    """A policy that is better by a known amount on 400 of 400 questions."""
    rng, n = np.random.default_rng(0), 400
    flip = rng.permutation(n) < abs(round(gain * n))
    row = lambda correct: {"correct": bool(correct), "well_formed": True}
    base, policy = [row(f and gain < 0) for f in flip], [row(f and gain > 0) for f in flip]
    panel = report.Panel("shapes", [{"group": "g"}] * n, {"base": {"clean": base}, "standard-s0": {"clean": policy}},
                         report.resample(n, 300, 0))
    (entry,) = report.judge(report.Claim("c", "t", "s", report.gain_of("standard")), panel)
    assert entry["verdict"] == says and entry["n"] == n and entry["found"]["value"] == pytest.approx(gain, abs=0.002)


@pytest.mark.parametrize("of, also, says", [
    (0.1, [0.2], "reproduced"), (0.1, [-0.1], "undecided"), (-0.1, [0.2], "contradicted"), (0.0, [0.2], "undecided")])
def test_of_two_losses_neither_helps(report, of, also, says):
    part = lambda value: {"value": value, "ci95": [value - 0.05, value + 0.05], "n": 100}
    claim = next(c for c in report.CLAIMS if c.id == "damaged-at-least-half")
    assert report.verdict_on(claim, part(of), [part(x) for x in also]) == says
    sometimes = next(c for c in report.CLAIMS if c.sometimes)
    assert report.verdict_on(sometimes, part(-0.2), []) == "undecided"


@pytest.mark.parametrize("claim, value, says", [
    ("table-mathvision-7b-standard", (0.0, 0.0), "undecided"), ("table-mathvista-3b-standard", (0.04, 0.09), "reproduced"),
    ("table-mathvista-3b-standard", (-0.04, 0.01), "contradicted"), ("table-mathvista-3b-standard", (-0.01, 0.06), "undecided"),
    ("mathvista-range", (0.125, 0.145), "reproduced"), ("mathvista-range", (0.149, 0.45), "undecided"), ("mathvista-range", (0.005, 0.125), "undecided"),
    ("mathvista-range", (0.16, 0.45), "contradicted"),
    ("table-mathvision-7b-hallucination-mismatch", (-0.02, -0.001), "reproduced")])
def test_whoever_learns_nothing_reproduces_nothing(report, claim, value, says):
    """A published number is met only on its own side of 0."""
    (claim,) = [c for c in report.CLAIMS if c.id == claim]
    assert report.verdict_on(claim, {"value": sum(value) / 2, "ci95": list(value), "n": 1000}, []) == says


def test_a_published_number_is_about_the_damage_that_it_names(report):
    row = lambda correct: {"correct": correct, "well_formed": True}
    answers_ = {policy: {"clean": [row(policy != "base")] * 50} for policy in ("base", "hallucination-blank-s0", "hallucination-mismatch-s0")}
    panel = report.Panel("mathvista", [{"group": "g"}] * 50, answers_, report.resample(50, 50, 0))
    (claim,) = [claim for claim in report.CLAIMS if claim.id == "table-mathvista-3b-hallucination-blank"]
    (judged,) = report.judge(claim, panel)
    assert judged["damage"] is None and judged["found"]["value"] == 1.0


def test_damage_that_leaves_the_picture_is_no_training_without_it(report):
    row = lambda correct: {"correct": correct, "well_formed": True}
    answers_ = {policy: {"clean": [row(policy != "base")] * 50} for policy in ("base", "hallucination-misleading-s0", "hallucination-blank+removed-s0")}
    panel = report.Panel("shapes", [{"group": "g"}] * 50, answers_, report.resample(50, 50, 0))
    judged = report.judge(report.CLAIMS[0], panel)
    assert [entry["damage"] for entry in judged] == ["hallucination-blank+removed"]


def test_two_adapters_of_one_name_are_not_one_policy(report, prepare, copy, tmp_path):
    other = tmp_path / "elsewhere" / "standard-s0"
    shutil.copytree(copy / "policies" / "standard-s0", other)
    (other / "adapter_model.safetensors").write_text("another one")
    digest, path = prepare.sha256(other / "adapter_model.safetensors"), other / "adapter_model.safetensors"
    key = prepare.input_path("shapes", "blank")
    rewrite(copy, "standard-s0", "blank", lambda rows: [row | {"made_from": {key: row["made_from"][key], str(path): digest}} for row in rows])
    with pytest.raises(prepare.UserError, match="by another standard-s0 than its answers elsewhere"):
        run(report, copy)


def test_who_lacks_answers_is_named(report, copy):
    rewrite(copy, "standard-s0", "blank", lambda rows: rows[:60])
    found = run(report, copy)
    (note,) = [note for note in found["notes"] if "lack an answer" in note]
    assert "40 questions of shapes lack an answer" in note and "--limit" in note and found["sources"]["shapes"]["n"] == 60


def test_who_was_not_asked_without_the_picture_is_named(report, copy):
    (copy / "answers" / "mixed-blank-s0" / "shapes" / "blank.jsonl").unlink()
    found = run(report, copy)
    (note,) = [note for note in found["notes"] if "rests on that input" in note]
    assert note.startswith("mixed-blank-s0: no answers to shapes under blank")
    assert found["sources"]["shapes"]["without_picture"] == "removed"


def test_too_few_resamples_give_no_interval(report, prepare, copy):
    with pytest.raises(prepare.UserError, match="choose at least 40"):
        run(report, copy, resamples=1)


def test_every_claim_has_a_test_a_verdict_and_an_n(report, results):
    claims = results["claims"]
    assert {c["id"] for c in claims} == {c.id for c in report.CLAIMS} and len(report.CLAIMS) == len({c.id for c in report.CLAIMS}) == 31
    assert all(c["verdict"] in ("reproduced", "contradicted", "undecided") and {"id", "text", "source", "test", "verdict", "n"} <= c.keys() for c in claims)
    asked = {c["id"]: c for c in claims if c["n"]}
    assert [c["input"] for c in claims if c["id"] == "clean-gains-blind"] == ["blank", "removed"]
    assert set(asked) == {"damaged-helps", "damaged-beats-clean", "damaged-at-least-half", "clean-gains-blind"}
    assert asked["damaged-helps"]["verdict"] == "reproduced" and asked["damaged-beats-clean"]["verdict"] == "undecided"
    assert all(c["verdict"] == "undecided" and c["reason"] for c in claims if not c["n"])


# Bad input


@pytest.mark.parametrize("policy, name, message", [("base", "clean", "04_evaluate.py"), ("standard-s0", "clean", "04_evaluate.py")])
def test_missing_answers_name_the_stage(report, prepare, copy, policy, name, message):
    (copy / "answers" / policy / "shapes" / f"{name}.jsonl").unlink()
    with pytest.raises(prepare.UserError, match=message):
        run(report, copy)


def test_no_study_names_stage_1(report, prepare, tmp_path):
    with pytest.raises(prepare.UserError, match="01_prepare.py"):
        run(report, tmp_path)


@pytest.mark.parametrize("path", ["policies/standard-s0/adapter_model.safetensors", "corrupted/shapes/blank.parquet"])
def test_stale_answers_stop_the_report(report, prepare, copy, path):
    with open(copy / path, "ab") as file:
        file.write(b"x")
    with pytest.raises(prepare.UserError, match="run 04_evaluate.py"):
        run(report, copy)


@pytest.mark.parametrize("change", [
    lambda rows: [{**row, "correct": "yes"} for row in rows], lambda rows: [{**row, "made_from": {}} for row in rows],
    lambda rows: [{k: v for k, v in row.items() if k != "response"} for row in rows], lambda rows: [*rows, rows[0]], lambda rows: [],
    lambda rows: [{**row, "samples": "2", "drawn_right": 0} for row in rows], lambda rows: [{**row, "samples": 2} for row in rows],
    lambda rows: [{**row, "token_texts": 5} for row in rows],
    lambda rows: [*rows, ["no row"]],
    lambda rows: [{**row, "made_from": row["made_from"] | {"model/a": ["y"]}} for row in rows],
    lambda rows: [{**row, "made_with": ["t"]} for row in rows],
    lambda rows: [{**rows[0], "made_with": "torch 1"}, *rows[1:]]])
def test_malformed_answers_stop_the_report(report, prepare, copy, change):
    path = rewrite(copy, "base", "blank", change)
    with pytest.raises(prepare.UserError, match=re.escape(str(path))):
        run(report, copy)


@pytest.mark.parametrize("junk", [b"{\"id\": 1", b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_unreadable_answers_stop_the_report(report, prepare, copy, junk):
    path = copy / "answers" / "base" / "shapes" / "blank.jsonl"
    path.write_bytes(path.read_bytes() + junk + b"\n{}\n")
    with pytest.raises(prepare.UserError, match=re.escape(str(path))):
        run(report, copy)


def test_unfinished_and_unevaluated_are_noted(report, copy):
    (copy / "answers" / "base" / "shapes" / "noise.jsonl.part").write_text("{")
    (copy / "policies" / "mixed-noise-s3").mkdir()
    (copy / "policies" / "mixed-noise-s3" / "config.json").write_text("{}")
    notes = run(report, copy)["notes"]
    assert any("noise.jsonl.part" in note for note in notes) and any("mixed-noise-s3" in note for note in notes)


def test_policies_are_compared_on_the_questions_that_all_answered(report, prepare, copy):
    rewrite(copy, "standard-s0", "clean", lambda rows: rows[10:])
    rewrite(copy, "base", "blank", lambda rows: rows[::-1][5:])
    found = run(report, copy)
    assert {cell["n"] for x in found["accuracy"].values() for cell in x["shapes"].values()} == {85}
    assert any("15 questions" in note for note in found["notes"])
    rewrite(copy, "standard-s0", "clean", lambda rows: rows[-3:])
    with pytest.raises(prepare.UserError, match="no question"):
        run(report, copy)


class Page(html.parser.HTMLParser):
    """What could act, what is said, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.acting, self.text, self.open, self.unbalanced = [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "iframe", "object", "embed", "form", "base", "foreignobject", "link"):
            self.acting.append(tag)
        self.acting += [name for name, value in attributes if name.startswith("on") or (value or "").strip().lower().startswith("javascript:")]
        self.acting += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith(("data:image/png", "#"))]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text += data


HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "'; --", "\u202eesrever\u2066", "null\x00byte\x1b[31m", "\ud800 alone",
           "</svg></style></details><b onclick=x>", "{{ 7 * 7 }}{% raw %}", "]]>&lt;&#60;", "| pipe \\ `tick`\n# head"]


def test_hostile_text_is_shown_as_text(report, prepare, copy):
    def poison(rows):
        return [row | {"response": " ".join(HOSTILE) + "z" * (1_000_000 if i == 0 else 0), "answer": HOSTILE[i % 10], "gold": HOSTILE[0]}
                for i, row in enumerate(rows)]
    for name in ("clean", "blank"):
        rewrite(copy, "standard-s0", name, poison)
    for source, target in (("standard-s0", "standard-<img src=x onerror=alert(1)>-s1"),
                           ("hallucination-blank-s0", "hallucination-blank+[a](javascript:alert(1))|<b>-s1")):
        shutil.copytree(copy / "answers" / source, copy / "answers" / target)
        shutil.copytree(copy / "policies" / source, copy / "policies" / target)
        for name in ("clean", "blank", "removed", "mismatch"):
            rewrite(copy, target, name, lambda rows: [row | {"made_from": {k.replace(source, target): v for k, v in row["made_from"].items()}}
                                                      for row in rows])
    found = run(report, copy, gallery=6)
    text = (copy / "report" / "index.html").read_text()
    page = Page(text)
    assert page.acting == [] and page.unbalanced == [] and page.open == []
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text) and "<U+202E>" in page.text
    assert len(text) < 5_000_000 and len(found["gains"]) == 5
    tables = (copy / "report" / "tables.md").read_text()
    assert not re.search(r"(?<!\\)<b>|(?<!\\)<img|(?<!\\)\[a(?<!\\)\]\(", tables)
    assert all(len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1
               for block in re.findall(r"(?:^\|.*\n)+", (copy / "report" / "tables.md").read_text(), re.M))


def test_hostile_questions_are_shown_as_text(report, prepare, corrupt, tmp_path):
    make_study(tmp_path, prepare, corrupt, {p: POLICIES[p] for p in ("base", "standard-s0")}, names=("blank",), limit=20)
    for name in ("clean", "blank"):
        path = tmp_path / prepare.input_path("shapes", name)
        rows = list(prepare.read_questions(path, ""))
        for i, row in enumerate(rows):
            row["problem"] = f"<image>{HOSTILE[i % 4]}{name}" + "y" * 100_000 * (i == 20)
            row["group"] = HOSTILE[i % 4]
            row["answer"] = HOSTILE[1]
        prepare.write_questions(path, rows, prepare.made_from(path))
        for policy in ("base", "standard-s0"):
            digest = {prepare.input_path("shapes", name): prepare.sha256(path)}
            rewrite(tmp_path, policy, name, lambda old: [row | {"made_from": row["made_from"] | digest} for row in old])
    run(report, tmp_path, gallery=6)
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert page.acting == [] and page.unbalanced == [] and page.text.count("<script>alert(1)</script>") > 2


# What is measured, recounted from the files


@pytest.mark.parametrize("policy", POLICIES)
def test_worth_of_the_picture_and_mirage_score_recount(results, study, policy):
    condition = policy.removesuffix("-s0")
    about = results["pooled"][condition]["shapes"]
    right = {name: np.array([row["correct"] for row in answers(study, policy, name)], int) for name in ("clean", "blank", "removed")}
    for name in ("blank", "removed"):
        worth, difference = about["picture_worth"][name], right["clean"] - right[name]
        assert worth["value"] == pytest.approx(difference.mean())
        assert worth["p"] == pytest.approx(stats.binomtest(int((difference > 0).sum()), int((difference != 0).sum())).pvalue)
        score = results["mirage"][policy]["shapes"][name]
        assert score["value"] == pytest.approx(right[name].sum() / right["clean"].sum())
        paired = stats.bootstrap((right[name], right["clean"]), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True,
                                 vectorized=True, method="percentile", rng=np.random.default_rng(0)).confidence_interval
        assert score["ci95"] == pytest.approx(list(paired), abs=0.25 * (paired[1] - paired[0]))
    ps = [(x["p"], x["p_holm"]) for sources in results["pooled"].values() for x in sources["shapes"]["picture_worth"].values()]
    assert [p for _, p in ps] == pytest.approx(multipletests([p for p, _ in ps], method="holm")[1])


def test_differences_recount(results, study):
    base, mixed = (answers(study, policy, "clean") for policy in ("base", "mixed-blank-s0"))
    differences = results["differences"]
    test = differences["mixed-blank"]["base"]["shapes"]["clean"]
    assert test["only_one"] == sum(a["correct"] > b["correct"] for a, b in zip(mixed, base))
    assert {(one, two) for one, x in differences.items() for two in x} == {
        ("standard", "base"), ("hallucination-blank", "base"), ("hallucination-blank", "standard"), ("mixed-blank", "base"),
        ("mixed-blank", "standard"), ("mixed-blank", "hallucination-blank")}
    for name in ("clean", "blank", "removed", "format", "image_free", "visual"):
        tests = [x["shapes"][name] for references in differences.values() for x in references.values() if name in x["shapes"]]
        assert len(tests) == (6 if name in ("clean", "blank", "removed") else 3)
        assert [x["p_holm"] for x in tests] == pytest.approx(multipletests([x["p"] for x in tests], method="holm")[1])
    parts = [results["gains"][run]["shapes"]["visual"]["value"] for run in ("mixed-blank-s0", "standard-s0")]
    assert differences["mixed-blank"]["standard"]["shapes"]["visual"]["value"] == pytest.approx(parts[0] - parts[1])


def test_gains_find_the_simulated_policies(results):
    gains = {policy: x["shapes"] for policy, x in results["gains"].items()}
    assert set(gains) == set(POLICIES) - {"base"}
    for gain in gains.values():
        assert set(gain) == {"total", "format", "image_free", "visual"}
        assert sum(gain[part]["value"] for part in ("format", "image_free", "visual")) == pytest.approx(gain["total"]["value"])
    assert gains["standard-s0"]["visual"]["value"] > gains["hallucination-blank-s0"]["visual"]["value"]


def test_a_base_that_is_never_well_formed_has_no_parts(report):
    strata, base, policies = learners(np.random.default_rng(5), 300)
    never = {name: (0 * correct, 0 * formed) for name, (correct, formed) in base.items()}
    found = split_gain(report, report.resample(300, 300, 0), strata, never, policies["format"])
    assert found["format"]["value"] is None and found["visual"]["value"] is None and found["total"]["value"] > 0


def test_answers_are_compared_by_what_they_mean(report):
    assert [report.canonical(text) for text in ("No", " no ", "10.0", "10", "a", "A", None)] == ["no", "no", "10", "10", "a", "A", ""]


# The paper's eight settings


def test_eight_settings_recount(seeds_results, seeds_study):
    found = seeds_results["s1_to_s8"]["shapes"]["hallucination-blank"]
    of = {"clean": [f"standard-s{seed}" for seed in range(3)], "damaged": [f"hallucination-blank-s{seed}" for seed in range(4)]}
    order = [(trained, asked, split) for trained in of for asked in ("clean", "blank") for split in ("train/", "")]
    for k, (trained, asked, split) in enumerate(order, 1):
        right = [[row["correct"] for row in answers(seeds_study, run, f"{split}{asked}")] for run in of[trained]]
        cell = found[f"S{k}"]
        assert (cell["value"], cell["seeds"], cell["n"]) == (pytest.approx(np.mean(right)), len(right), len(right[0])), k
    base = [np.mean([row["correct"] for row in answers(seeds_study, "base", name)]) for name in ("train/clean", "clean")]
    assert found["memorised"]["value"] == pytest.approx(found["S1"]["value"] - base[0] - found["S2"]["value"] + base[1])
    assert found["carried"]["value"] == pytest.approx(found["S6"]["value"] - base[1])
    assert found["picture"]["value"] == pytest.approx(found["S2"]["value"] - found["S4"]["value"])
    page, tables = ((seeds_study / "report" / name).read_text() for name in ("index.html", "tables.md"))
    assert found["sentence"] in " ".join(Page(page).text.split()) and "S1 to S8" in tables and found["sentence"][:40] in tables


def test_what_was_memorised_adds_up_two_choices_of_questions(report):
    """Two independent samples of questions: the variance of a difference is the sum of theirs (Welch)."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(0.3, 1, 400), rng.normal(0.1, 2, 150)
    found = report.over_runs([report.apart(old, new)], (-math.inf, math.inf))
    error = stats.ttest_ind(old, new, equal_var=False)
    half = stats.norm.ppf(0.975) * (old.var(ddof=1) / 400 + new.var(ddof=1) / 150) ** 0.5
    assert found["ci95"] == pytest.approx([old.mean() - new.mean() - half, old.mean() - new.mean() + half])
    assert abs(found["value"] / half * stats.norm.ppf(0.975)) == pytest.approx(abs(error.statistic))


def test_without_training_questions_four_settings_are_left(results):
    found = results["s1_to_s8"]["shapes"]["hallucination-blank"]
    assert [found[f"S{k}"] is None for k in range(1, 9)] == [True, False] * 4 and "memorised" not in found
    assert "carry" not in found["sentence"] and "need the picture" in found["sentence"]


def test_a_run_that_was_not_asked_about_its_training_is_left_out_of_what_was_memorised(seeds_study, seeds_results, report, tmp_path):
    data = shutil.copytree(seeds_study, tmp_path / "data")
    shutil.rmtree(data / "answers" / "standard-s1" / "shapes" / "train")
    found = run(report, data)["s1_to_s8"]["shapes"]["hallucination-blank"]
    assert found["S1"]["seeds"] == found["memorised"]["seeds"] == 2 and found["picture"]["seeds"] == 3
    for seed in range(3):
        shutil.rmtree(data / "answers" / f"standard-s{seed}" / "shapes" / "train", ignore_errors=True)
    assert "memorised" not in run(report, data)["s1_to_s8"]["shapes"]["hallucination-blank"]


def test_damaged_text_takes_no_picture_away(report, prepare, corrupt, tmp_path):
    """The paper's TR: what is worth the text is not said to need the picture."""
    policies = {"base": POLICIES["base"], "standard-s0": POLICIES["standard-s0"], "hallucination-textless-s0": POLICIES["mixed-blank-s0"]}
    make_study(tmp_path, prepare, corrupt, policies, names=("blank", "textless"), trained=("clean", "textless"))
    found = run(report, tmp_path)
    settings_ = found["s1_to_s8"]["shapes"]["hallucination-textless"]
    assert "picture" not in settings_ and settings_["S4"] and "need the picture" not in settings_["sentence"]
    assert report.on_what("hallucination-textless") == "on questions damaged by textless only"


# The sentences


def test_the_page_opens_with_three_sentences_that_follow_from_tests(results, study):
    said = results["sentences"]["shapes"]
    gains = {run: results["gains"][run]["shapes"]["total"] for run in ("hallucination-blank-s0", "standard-s0")}
    blind, seeing = (round(100 * x["value"]) for x in gains.values())
    assert said[0]["text"].startswith(f"Trained on blank pictures only, the model gained {blind} points; trained on the real pictures, it "
                                      f"gained {seeing} points. So ") and said[0]["text"].endswith("came without ever seeing the questions\u2019 pictures.")
    ratio = gains["hallucination-blank-s0"]["value"] / gains["standard-s0"]["value"]
    assert f"share {100 * ratio:.1f}%" in said[0]["numbers"]
    parts = results["gains"]["standard-s0"]["shapes"]
    assert said[1]["text"].startswith(f"Of the {seeing} points gained by training on the real pictures, {100 * parts['visual']['value']:.0f} need the "
                                      f"picture, {100 * parts['format']['value']:.0f} are the asked-for form alone, ")
    page = Page((study / "report" / "index.html").read_text())
    text = " ".join(page.text.split())
    assert len(said) == 3 and text.index(said[0]["text"]) < text.index(said[1]["text"]) < text.index(said[2]["text"]) < text.index("Trained on, asked")
    assert all("[" in x["numbers"] and "n = 100" in x["numbers"] for x in said)


def test_an_edit_says_whether_the_answer_follows_the_picture(seeds_results):
    text = seeds_results["sentences"]["shapes"][2]["text"]
    effect = seeds_results["pooled"]["standard"]["shapes"]["causal_effect"]
    assert text.startswith("How often does the answer change with the picture, where an edit makes another one right? Trained on the real "
                           f"pictures, in {100 * effect['value']:.0f} of 100 cases; ")
    assert "before training" in text


def test_the_share_of_a_gain_is_a_ratio_over_seeds(report, seeds_results, seeds_study):
    """Value recounted; the interval as wide as the delta method says of the seeds' luck alone, or wider."""
    right = lambda run: np.mean([row["correct"] for row in answers(seeds_study, run, "clean")])
    tops, bottoms = ([right(f"{condition}-s{seed}") - right("base") for seed in range(3)] for condition in ("hallucination-blank", "standard"))
    ratio = sum(tops) / sum(bottoms)
    linear = (np.array(tops) - ratio * np.array(bottoms)) / np.mean(bottoms)
    panel = report.Panel("shapes", [{}] * 80, {run: {"clean": answers(seeds_study, run, "clean")} for run in (
        "base", *(f"{condition}-s{seed}" for condition in ("standard", "hallucination-blank") for seed in range(3)))}, None)
    found = report.share_of_gain(panel, "hallucination-blank", "standard")
    assert found["value"] == pytest.approx(ratio)
    assert found["ci95"][1] - ratio >= stats.t.ppf(0.975, 2) * linear.std(ddof=1) / 3**0.5


def test_no_share_of_a_gain_over_other_seeds(seeds_results):
    """Four seeds of one condition, three of the other: their gains stand beside each other, and no share of them."""
    said = seeds_results["sentences"]["shapes"][0]
    assert said["text"].count("gained") == 2 and "share" not in said["numbers"] and "So " not in said["text"]


@pytest.mark.parametrize("ratio, says", [((0.83, 0.75, 0.9), "about five sixths"), ((0.5, 0.1, 1.3), "between about a tenth and more than all"),
                                         ((1.02, 0.99, 1.04), "about all")])
def test_shares_are_said_as_surely_as_they_are_known(report, ratio, says):
    assert report.in_words({"value": ratio[0], "ci95": ratio[1:]}) == says


@pytest.mark.parametrize("worths, says", [
    ([(0.2, 0.01), (0.1, 0.04)], "depends on the picture"), ([(0.2, 0.01), (0.1, 0.06)], "is not shown to depend on the picture"),
    ([(0.2, 0.01), (-0.1, 0.01)], "is not shown to depend on the picture"), ([(-0.2, 0.01)], "does better without the picture"),
    ([], "cannot be said to depend on the picture or not")])
def test_dependence_claims_what_every_test_shows(report, worths, says):
    names, cell = ("blank", "removed")[:len(worths)], {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 80}
    about = {"accuracy": {name: cell for name in ("clean", *names)},
             "picture_worth": {name: {"value": x, "ci95": [x, x], "p_holm": p, "n": 80} for name, (x, p) in zip(names, worths)}}
    said = report.depends("a", about, "s")
    assert said["text"] == f"a {says} on s." and "50.0% [40.0, 60.0]" in said["numbers"] and "n = 80" in said["numbers"]


def test_someone_elses_adapter_is_said_to_depend_on_the_picture_or_not(report, prepare, corrupt, tmp_path):
    """Policies that are no runs of this study: no claim about training, one about looking."""
    make_study(tmp_path, prepare, corrupt, {"base": POLICIES["base"], "my_adapter": POLICIES["standard-s0"]}, names=("blank", "noise"))
    (tmp_path / "policies" / "my_adapter" / "config.json").unlink()
    found = run(report, tmp_path)
    said = found["sentences"]["shapes"]
    assert [x["text"] for x in said][0] == "my_adapter depends on the picture on shapes." and said[1]["text"].startswith("base ")
    assert said[0]["text"] in (tmp_path / "report" / "index.html").read_text()


def test_base_alone_and_no_blank_input_still_give_a_page(report, prepare, corrupt, tmp_path):
    make_study(tmp_path / "alone", prepare, corrupt, {"base": POLICIES["base"]}, names=("noise",), limit=20)
    found = run(report, tmp_path / "alone")
    assert found["gains"] == {} and "base cannot be said to depend on the picture or not on shapes" in (tmp_path / "alone" / "report" / "index.html").read_text()
    make_study(tmp_path / "clean", prepare, corrupt, {p: POLICIES[p] for p in ("base", "standard-s0")}, names=("noise", "blur-0.05"), limit=20)
    found = run(report, tmp_path / "clean")
    assert "visual" not in found["gains"]["standard-s0"]["shapes"]
    page = (tmp_path / "clean" / "report" / "index.html").read_text()
    assert "blur-0.05" in page and "damaged</th>" in page and "taken away</th>" not in page


# The page and the tables


def test_what_was_said_of_several_seeds_is_on_the_page(seeds_results, seeds_study):
    page = Page((seeds_study / "report" / "index.html").read_text())
    text, tables = " ".join(page.text.split()), (seeds_study / "report" / "tables.md").read_text()
    assert page.acting == [] and page.unbalanced == []
    x = seeds_results["differences"]["hallucination-blank"]["standard"]["shapes"]["clean"]
    low, high = (f"{100 * end:.1f}".replace("-", "\N{MINUS SIGN}") for end in x["ci95"])
    said = f"{100 * x['value']:+.1f}".replace("-", "\N{MINUS SIGN}") + f" [{low}, {high}]"
    assert said in text and said in tables and "n = 80, 3 seeds" in text
    pooled = seeds_results["pooled"]["standard"]["shapes"]
    clean = seeds_results["differences"]["standard"]["base"]["shapes"]["clean"]
    assert pooled["gains"]["total"]["ci95"] == pytest.approx(clean["ci95"])
    for key in ("accuracy", "mirage", "causal_effect", "picture_worth", "well_formed"):
        assert key in pooled, key


def test_tables_hold_the_matrix_and_the_split(study, results):
    text = (study / "report" / "tables.md").read_text()
    cell = results["accuracy"]["standard-s0"]["shapes"]["blank"]
    assert f"{100 * cell['accuracy']:.1f}%" in text and "n = 100" in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert len(tables) == 5 and all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_another_number_of_questions_is_told(seeds_study, report, prepare, tmp_path):
    """The captions say n = 80; of training questions fewer were asked, and fewer edits may have changed the answer."""
    data = shutil.copytree(seeds_study, tmp_path / "data")
    for path in data.glob("answers/*/shapes/train/*.jsonl"):
        prepare.write_jsonl(path, prepare.read_jsonl(path)[:33])
    found = run(report, data)
    found["pooled"]["standard"]["shapes"]["causal_effect"]["n"] = found["differences"]["standard"]["base"]["shapes"]["causal_effect"]["n"] = 44
    tables = {title: "\n".join(map(str, table["rows"])) for title, (table, *_) in report.tables_of(found, "shapes").items()}
    (settings_,) = report.tables_of(found, "shapes")["settings"]
    assert "(trained on, n = 33)" in settings_["caption"] and "n = 44" in tables["looking"] and "n = 44" in tables["differences"]
    assert "n = " not in tables["matrix"] + tables["gains"]


def test_tables_hold_the_sentences_whole(seeds_results, seeds_study):
    text = (seeds_study / "report" / "tables.md").read_text()
    assert seeds_results["sentences"]["shapes"][2]["numbers"].replace("<", r"\<") in text and "\N{HORIZONTAL ELLIPSIS}" not in text


@pytest.mark.parametrize("text", ["[1](https:x)", "[1]: https:x", "~~x~~", "a|b", "<b>", "[x]", "`x`"])
def test_what_comes_from_outside_is_no_markdown(report, text):
    from markdown_it import MarkdownIt
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(report.plain(text))
    assert html.unescape(rendered) == f"<p>{text}</p>\n"


def test_tokens_are_shaded_by_what_the_picture_did_for_them(report, copy):
    """In the gallery; every character stays, none acts."""
    texts = ["<b>", "I", " see", " \u202e", "", "3", "</script>"]
    tokens = {"response": "".join(texts), "token_texts": texts, "token_nats": [0, 0.2, -1, 3, 9, 5, 0.0]}
    rewrite(copy, "standard-s0", "clean", lambda rows: [row | tokens for row in rows])
    run(report, copy)
    page = (copy / "report" / "index.html").read_text()
    assert "&lt;b&gt;" in page and "<b>I" not in page and "\u202e" not in page
    shades = re.findall(r'<span style="--v:(\d+)[.0]*"( class="visual")?>([^<]*)</span>', page)
    assert ("2", "", "I") in shades or ("7", "", "I") in shades
    assert {text.strip() for _, visual, text in shades if visual} == {"&lt;U+202E&gt;", "", "3"}
    rewrite(copy, "standard-s0", "clean", lambda rows: [row | {"token_nats": ["much"]} for row in rows])
    with pytest.raises(report.UserError, match="row 1 has no proper token_nats"):
        run(report, copy)


def test_being_told_to_guess_stands_beside_the_inputs_without_a_picture(report, prepare, copy):
    """Input `told`: as removed, and the text says that there is no picture."""
    told, removed = (prepare.input_path("shapes", name) for name in ("told", "removed"))
    shutil.copy(copy / removed, copy / told)
    digest = {told: prepare.sha256(copy / told)}
    for policy in POLICIES:
        rows = answers(copy, policy, "removed")
        prepare.write_jsonl(copy / "answers" / policy / "shapes" / "told.jsonl", [row | {"made_from": row["made_from"] | digest} for row in rows])
    found = run(report, copy)
    assert found["accuracy"]["base"]["shapes"]["told"] == found["accuracy"]["base"]["shapes"]["removed"]
    page = (copy / "report" / "index.html").read_text()
    assert '<th scope="col">told</th>' in page and '<th scope="col" colspan="3">taken away</th>' in page


def test_the_strict_subset_says_how_it_differs_from_b_clean(study, results):
    found = json.loads((study / "report" / "strict-shapes.json").read_text())
    assert found["source"] == "shapes" and "B-Clean (arXiv 2603.21687)" in found["made_by"]
    assert found["ids"] == results["strict_subset"]["shapes"]["ids"] and found["count"] == len(found["ids"]) > 0


def test_page_is_self_contained_and_accessible(study):
    text = (study / "report" / "index.html").read_text()
    page = Page(text)
    assert page.acting == [] and page.unbalanced == [] and page.open == [] and len(text) < 5_000_000
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    assert all(a.get("alt") for tag, a in page.tags if tag == "img") and sum(tag == "img" for tag, _ in page.tags) > 10
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert len(drawings) == 3 and all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert page.text.count("✓ right") and page.text.count("✗ wrong")


def test_a_step_that_is_none_stops_the_report(report, prepare, copy):
    path = copy / "policies" / "standard-s0" / "train.jsonl"
    path.write_text(path.read_text() + '{"step": 31, "reward": "much"}\n')
    with pytest.raises(prepare.UserError, match="train.jsonl has a row that is no step of a training: delete"):
        run(report, copy)



def test_no_gain_is_not_divided(report):
    """What is not shown to be a gain has no parts; a part whose interval holds 0 may be chance."""
    part = lambda value, low, high: {"value": value, "ci95": [low, high], "n": 50}
    gain = {"visual": part(0.1, 0.05, 0.2), "format": part(0.1, 0.02, 0.2), "image_free": part(-0.02, -0.1, 0.1)}
    test = part(0.18, 0.1, 0.3)
    text = report.say_parts("standard", test | {"p_holm": 0.01}, gain)["text"]
    assert text == ("Of the 18 points gained by training on the real pictures, 10 need the picture, 10 are the asked-for form alone, "
                    "\N{MINUS SIGN}2 (may be chance) are right without the picture too.")
    assert "is not shown to have left a gain to divide" in report.say_parts("standard", test | {"p_holm": 0.06}, gain)["text"]
    assert "cannot be told" in report.say_parts("standard", test | {"p_holm": 0.01}, {"format": gain["format"]})["text"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync --disable-dev-shm-usage --remote-debugging-pipe").split()
INSPECT = """(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  const poor = [], seen = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = seen.nextNode(); n; n = seen.nextNode()) {
    const e = n.parentElement, style = getComputedStyle(e);
    if (!n.data.trim() || e.closest('title,desc')) continue;
    const [a, b] = [light(rgba(e.closest('svg') ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push([n.data.trim().slice(0, 40), ((a + .05) / (b + .05)).toFixed(2)]);
  }
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
  return JSON.stringify({width: document.documentElement.scrollWidth, inner: innerWidth, wide: wide.slice(0, 5), poor: poor.slice(0, 8),
                         dark: light(rgba(getComputedStyle(document.body).backgroundColor)) < .2});
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A function that sends a command of the DevTools protocol and returns its answer, and the events that came in."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "about:blank"]
    shell = f"exec 3<&{read_there} 4>&{write_there}; exec \"$@\""
    process = subprocess.Popen(["bash", "-c", shell, "-", *command], pass_fds=(read_there, write_there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(read_there), os.close(write_there)
    buffer, events, count = b"", [], itertools.count(1)

    def read():
        nonlocal buffer
        while b"\0" not in buffer:
            if not select.select([read_here], [], [], 60)[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(read_here, 1 << 16)
            assert chunk, "the browser has gone"
            buffer += chunk
        message, _, buffer = buffer.partition(b"\0")
        return json.loads(message)

    def send(method, until=None, session=None, **params):
        number = next(count)
        os.write(write_here, json.dumps({"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})).encode() + b"\0")
        answer = None
        while answer is None or (until and not any(e["method"] == until for e in events)):
            message = read()
            if message.get("id") == number:
                answer = message.get("result", message.get("error"))
            elif "method" in message:
                events.append(message)
        return answer

    yield send, events
    process.terminate()
    process.wait()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_reads_well_in_a_browser(browser, study, results, width, scheme):
    send, events = browser
    events.clear()
    target = send("Target.createTarget", url="about:blank")["targetId"]
    session = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        send(f"{domain}.enable", session=session)
    send("Emulation.setDeviceMetricsOverride", session=session, width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    send("Emulation.setEmulatedMedia", session=session, features=[{"name": "prefers-color-scheme", "value": scheme}])
    events.clear()
    send("Page.navigate", until="Page.loadEventFired", session=session, url=(study / "report" / "index.html").as_uri())
    found = json.loads(send("Runtime.evaluate", session=session, expression=INSPECT, returnByValue=True)["result"]["value"])
    said = [e["params"] for e in events if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    asked = {url for url in asked if not url.startswith("data:")}
    send("Target.closeTarget", targetId=target)
    assert found["width"] <= width and found["wide"] == [], "the page scrolls sideways"
    assert found["poor"] == [] and found["dark"] == (scheme == "dark")
    assert said == [] and asked == {(study / "report" / "index.html").as_uri()}
