# SPDX-License-Identifier: MIT
"""Stage 5: what it all says: how much of each gain needs the picture.

A policy that learned to look loses its gain when the picture is taken away; one that learned to guess, or to write in
the asked-for form, keeps it. So each gain over the base is split into format, image-free and visual, on the same
questions, with intervals; and before anyone believes the split, it must find the truth where the truth is known.

reads   data/study.json, data/questions/, data/corrupted/, data/policies/RUN/{config.json,train.jsonl}, data/answers/
writes  data/report/index.html (open it), results.json (shares, not percent), tables.md
run     python 05_report.py
takes   10 s for four policies on 320 questions under fourteen inputs, on a laptop core
"""
import base64
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P does not look there by itself
prepare = importlib.import_module("01_prepare")  # before numpy, for it pins how numpy computes

import jinja2
import mpmath
import numpy as np
from markupsafe import Markup
from PIL import Image

UserError, option = prepare.UserError, prepare.option

PARTS = {"format": "format: answered in the asked-for form",
         "image_free": "image-free: right without the picture", "visual": "visual: needs the picture"}
INPUTS = "clean blank removed noise blur occlude irrelevant mismatch edited kept misleading unsaid".split()  # order of columns
BLIND_BEST = {"count": 0.42, "colour": 0.26, "more": 0.70, "both": 0.42}  # shapes: as often as a guess can be right
SAYS = {"claims to see": r"\bI (?:can )?(?:see|observe)\b|\b(?:image|picture|figure|diagram) (?:shows|depicts|contains)\b",
        "sees nothing": r"\b(?:blank|no (?:image|picture)|(?:cannot|can't) see)\b",
        "goes step by step": r"\b(?:step \d|steps?:|first(?:ly)?,|let's break|we need to)",
        "checks itself": r"\b(?:wait|let me (?:check|verify)|double.check|verify)\b",
        "recalls a rule": r"\b(?:recall|remember|theorem|formula|by definition|we know that|states that)\b",
        "admits a guess": r"\b(?:guess(?:ing)?|probably|assum(?:e|ing))\b"}
NO_PICTURE = prepare.NO_PICTURE
CLUSTERED = ("mathverse", "wemath")  # versions of a problem, steps of a problem
COMMON = 5  # an answer that is right to fewer questions of its group is one of the others
Z = 1.959963984540054  # of a normal distribution, 95% lie within so many standard deviations
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")
GALLERY_CHARACTERS = 2_500_000  # of pictures: the page stays below 5 MB


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    resamples: int = option(2000, "bootstrap resamples behind an interval")
    gallery: int = option(6, "questions of each source in the gallery, each of another group")


# Intervals and tests


def wilson(hits: int, n: int) -> list[float]:
    """95% interval of a share p: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) (Wilson, JASA 1927)."""
    z, p = Z, hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def share(hits: Iterable, names: Sequence[str] = ("count", "share")) -> dict:
    hits = [bool(hit) for hit in hits]
    return {"n": len(hits), names[0]: sum(hits), names[1]: sum(hits) / len(hits), "ci95": wilson(sum(hits), len(hits))}


def accuracy(rows: Iterable[Mapping]) -> dict:
    return share((row["correct"] for row in rows), ("correct", "accuracy"))


def mcnemar(only_one: int, only_two: int) -> float:
    """Exact two-sided p of McNemar's test: do the questions that only one of two policies got right fall evenly?"""
    n = only_one + only_two
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_one, only_two) + 1)) / 2**n)


def paired(difference: np.ndarray) -> dict:
    """Difference of two shares of the same questions: value, 95% interval, exact p.

    `difference` (n,) is 1 where only the first is right, -1 where only the second is, else 0. With f and k the numbers of
    either, half an answer more in each of the four cells: (f - k) / (n + 2) +- z sqrt(f + k - (f - k)^2 / (n + 2)) / (n + 2)
    (Agresti and Min, Statistics in Medicine 2005). A bootstrap of few such questions would be too sure, of none altogether.
    """
    n = len(difference)
    only_one = int((difference > 0).sum())
    only_two = int((difference < 0).sum())
    f = only_one + 0.5
    k = only_two + 0.5
    middle = (f - k) / (n + 2)
    half = Z * math.sqrt(f + k - (f - k) ** 2 / (n + 2)) / (n + 2)
    return {"value": (only_one - only_two) / n, "ci95": [max(-1.0, middle - half), min(1.0, middle + half)], "n": n,
            "p": mcnemar(only_one, only_two), "only_one": only_one, "only_two": only_two}


# Several seeds: the choice of questions and the luck of a run


@dataclass(frozen=True)
class Measured:
    """A run's value of some measure, and how far the choice of questions moves it.

    The sum of squares of `moves` is the value's variance over that choice. Runs answer the same questions, so the sum of
    products of two runs' moves is their covariance, and a difference of two values has the difference of their moves.
    """
    value: float
    moves: np.ndarray
    n: int  # questions

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(self.value + other.value, self.moves + other.moves, self.n)

    def __mul__(self, factor: float) -> "Measured":
        return Measured(self.value * factor, self.moves * factor, self.n)

    def __sub__(self, other: "Measured") -> "Measured":
        return self + other * -1


def over_questions(top: np.ndarray, bottom: np.ndarray | None = None) -> Measured:
    """Of a mean over questions; with `bottom`, of the ratio of two sums over questions, whose error is linearised. All (n,)."""
    n = len(top)
    if bottom is None:
        bottom = np.ones(n)
    value = top.sum() / bottom.sum()
    moves = (top - value * bottom) / bottom.sum()
    return Measured(float(value), moves * math.sqrt(n / max(1, n - 1)), n)


def over_resamples(replicates: np.ndarray, n: int) -> Measured:
    """Of a statistic that is no mean, from its bootstrap replicates (1 + resamples,)."""
    drawn = replicates[1:]
    known = np.isfinite(drawn)  # a resample without any well-formed answer has no form part
    moves = np.zeros(len(drawn))
    if known.any():
        moves[known] = drawn[known] - drawn[known].mean()
    return Measured(float(replicates[0]), moves / math.sqrt(max(1, known.sum() - 1)), n)


def student(t: float, df: int) -> float:
    """Two-sided p of Student's t with df degrees of freedom."""
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


@lru_cache
def student_95(df: int) -> float:
    """The t of which `student` is 0.05."""
    low, high = 0.0, 13.0  # 12.7 with one degree of freedom, less with more
    for _ in range(60):
        middle = (low + high) / 2
        if student(middle, df) > 0.05:
            low = middle
        else:
            high = middle
    return high


def variances(runs: Sequence[Measured], shares: bool) -> tuple[float, float]:
    """Of the mean of k runs: the part `shared` that the choice of questions does to all alike, and the `luck` of the runs."""
    moves = np.stack([run.moves for run in runs])
    covariances = moves @ moves.T  # (k, k)
    k = len(runs)
    if k == 1:
        shared, luck = float(covariances[0, 0]), 0.0
    else:
        shared = (covariances.sum() - np.trace(covariances)) / (k * (k - 1))
        luck = np.var([run.value for run in runs], ddof=1) / k
    if shares:  # of which nobody is surer than one answer more or less, however few questions differ
        shared = max(shared, 1 / (runs[0].n + 2) ** 2)
    return max(0.0, float(shared)), float(luck)


def over_runs(runs: Sequence[Measured], bounds: tuple[float, float] = (-1.0, 1.0)) -> dict:
    """Mean of a measure over k runs; its interval covers the choice of questions and the luck of a run.

        half^2 = z^2 C + t^2 S / k

    S, the variance of the runs' values, holds the luck of a run, and what each run alone makes of a question. C, the mean
    covariance of two runs over the choice of questions, is what that choice does to all runs alike, which S cannot see. t is
    Student's with k - 1 degrees of freedom: were all questions asked, this would be the t interval over k seeds, and for the
    differences of two conditions, seed by seed, that of the paired t test. (Two errors, each with its own quantile: Howe,
    JASA 1974.) With one run only the choice of questions is covered. Where `bounds` has ends, they are those of shares.
    """
    if not all(math.isfinite(run.value) for run in runs):
        return {"value": None, "ci95": None, "n": runs[0].n, "seeds": len(runs)}
    shared, luck = variances(runs, math.isfinite(bounds[1]))
    value = float(np.mean([run.value for run in runs]))
    half = Z * math.sqrt(shared)
    if len(runs) > 1:
        half = math.hypot(half, student_95(len(runs) - 1) * math.sqrt(luck))
    ends = [max(bounds[0], value - half), min(bounds[1], value + half)]
    return {"value": value, "ci95": ends, "n": runs[0].n, "seeds": len(runs)}


def p_over_runs(runs: Sequence[Measured]) -> float:
    """p of no difference: one less the level at which the interval of `over_runs` ends at 0.

    Were all questions asked, this would be the p of the paired t test.
    """
    shared, luck = variances(runs, True)
    value = abs(np.mean([run.value for run in runs]))
    if luck == 0:
        return math.erfc(value / math.sqrt(2 * shared))
    low, high = 0.0, value / math.sqrt(luck)  # t: with C = 0 it is the latter
    for _ in range(60):
        t = (low + high) / 2
        z = NormalDist().inv_cdf(max(student(t, len(runs) - 1), 1e-300) / 2)
        if z * z * shared + t * t * luck < value * value:
            low = t
        else:
            high = t
    return student(high, len(runs) - 1)


# Many tests; what the bootstrap says of one run


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number: the i-th smallest of m times m - i + 1, never falling (Holm 1979)."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        highest = corrected[i] = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
    return corrected


def resample(n: int, resamples: int, *seed) -> np.ndarray:
    """Bootstrap weights (1 + resamples, n); each row adds up to 1. Row 0 is the sample itself."""
    rng = np.random.default_rng(list(json.dumps(seed).encode()))
    return np.vstack([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), resamples)]) / n


def estimate(replicates: np.ndarray, n: int) -> dict:
    """Value and 95% percentile interval of a statistic from its replicates (1 + resamples,)."""
    if not np.isfinite(replicates[0]):
        return {"value": None, "ci95": None, "n": n}
    return {"value": float(replicates[0]), "ci95": np.nanpercentile(replicates[1:], [2.5, 97.5]).tolist(), "n": n}


def corrected(replicates: np.ndarray, n: int) -> dict:
    """Value and 95% interval of a statistic that chance lowers, such as the entropy of a distribution.

    The replicates are as far from the sample, on average, as the sample is from the truth: 2 x value - replicate (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 10); nothing below 0.
    """
    turned = np.maximum(2 * replicates[0] - replicates[1:], 0)
    return {"value": float(turned.mean()), "ci95": np.percentile(turned, [2.5, 97.5]).tolist(), "n": n}


def distance(weights: np.ndarray, given: Sequence, right: Sequence, half: np.ndarray) -> dict:
    """Total variation between the answers given and the right ones: half the sum over answers of |share given - share right|.

    Chance raises that sum. So one half of the questions (`half`, (n,), 0 or 1) says which answers are given too often and which too seldom,
    and the other by how much; and the other way round. The mean of both is the value: at least about so far apart, for where answers
    differ little chance picks the wrong sign. The interval reaches from the lower end of one of these to what `corrected` leaves of the sum.
    """
    both = one_hot([*given, *right])
    apart, n = (both[:len(given)] - both[len(given):]) / 2, len(given)  # (n, answers)
    signs = np.sign(np.stack([apart[half == 1].sum(0), apart[half == 0].sum(0)]))  # for each half, as the other says
    told = (apart * signs[half]).sum(1)
    with np.errstate(invalid="ignore"):
        low, high = corrected(np.nan_to_num(np.abs(weights @ apart).sum(1) / weights.sum(1)), n)["ci95"]
        bound = estimate(weights @ (told * half) / (weights @ half), n)["ci95"] or [low]
    low, high = max(0.0, min(low, bound[0])), min(1.0, high)
    return {"value": min(max(float(told.mean()), low), high), "ci95": [low, high], "n": n}


def correct_for_number(tests: Sequence[dict]) -> Sequence[dict]:
    """Note Holm's p in each of the tests that are shown together."""
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = p
    return tests


def detectable(discordant: float, n: int, tests: int) -> float | None:
    """Difference in accuracy that n paired questions show in about 80 of 100 studies: (z(1 - 0.025 / tests) + z(0.8)) sqrt(d / n).

    d is the share of questions that only one of the two got right (Connor, Biometrics 1987, without its small correction); the p of this
    comparison is multiplied by `tests`, as Holm does with the smallest of so many. None where no difference can be that large: above d.
    """
    z = NormalDist().inv_cdf
    smallest = (z(1 - 0.025 / tests) + z(0.8)) * math.sqrt(discordant / n)
    return smallest if 0 < smallest <= discordant else None


def form_part(weights: np.ndarray, strata: np.ndarray, correct: np.ndarray, formed: np.ndarray, formed_policy: np.ndarray) -> np.ndarray:
    """What the base would gain if only its answers were as well formed as the policy's: replicates (R,).

        sum over strata s of (W_policy,s - W_base,s) * (A_base,s among well formed - A_base,s among others)

    W is the share of all questions that are in s and well formed, A an accuracy: the composition part of a standardised
    difference (Kitagawa, JASA 1955). Strata (n, S) are groups and answer types: form and difficulty both differ between
    them. A stratum's A counts one answer more, of overall accuracy, so that an empty one has one. It is assumed that,
    within a stratum, answers which the base spoilt would have been right as often as those which it did not.
    """
    one = 1 / len(strata)

    def accuracies(kept):
        number, right = ((weights * x) @ strata for x in (kept, kept * correct))  # (R, S)
        with np.errstate(invalid="ignore"):
            overall = right.sum(1, keepdims=True) / number.sum(1, keepdims=True)
        return (right + one * overall) / (number + one)

    worth = accuracies(formed) - (accuracies(1 - formed) if (formed == 0).any() else 0.0)
    return ((weights * (formed_policy - formed)) @ strata * worth).sum(1)


def gain_parts(weights: np.ndarray, strata: np.ndarray, base: Mapping, run: Mapping, withouts: Sequence[str]) -> dict:
    """A run's gain over the base and its parts, as `split_gain` defines them: replicates (R,), and `difference` (n,).

    `base`, `run`: input -> (correct, formed), each (n,). The key of a part that depends on an input without a picture names it.
    """
    parts = {"difference": run["clean"][0] - base["clean"][0]}
    gain, form = {}, {}
    for name in ("clean", *withouts):
        correct, formed = base[name]
        gain[name] = weights @ (run[name][0] - correct)
        form[name] = form_part(weights, strata, correct, formed, run[name][1])
    parts["total"] = gain["clean"]
    parts["format"] = form["clean"]
    for name in withouts:
        parts["image_free", name] = gain[name] - form[name]
        parts["visual", name] = gain["clean"] - form["clean"] - parts["image_free", name]
    return parts


def split_gain(runs: Sequence[Mapping], withouts: Sequence[str]) -> dict:
    """A policy's gain over the base in accuracy, and what it is made of.

        total       accuracy(policy) - accuracy(base) on clean input
        format      `form_part` on clean input
        image_free  the same difference on the first of the inputs `withouts` a picture, less `form_part` there
        visual      total - format - image_free
        surviving   (format + image_free) / total, by input without a picture; told only where total's interval is above 0

    Whoever learns the form alone gets image_free = visual = 0; whoever learns to guess or to reason from the text alone
    gets visual = 0; whoever stops looking gets visual < 0. The visual part is gone when the picture is gone: it is better
    sight, or better use of what is seen. `runs`: the `gain_parts` of one run, or of the seeds whose mean it is (`over_runs`).
    """
    n = len(runs[0]["difference"])
    found = {}
    for key in runs[0]:
        if key != "difference":
            found[key] = mean_over_seeds([run[key] for run in runs], n)
    if len(runs) == 1:
        found["total"] = paired(runs[0]["difference"])
    without = {name: {part: found[part, name] for part in ("image_free", "visual")} for name in withouts}
    out = {"total": found["total"], "format": found["format"]}
    if withouts:
        out |= without[withouts[0]]
    reason = None
    if not withouts:
        reason = "no answers without a picture"
    elif out["visual"]["value"] is None:
        reason = "the base has no well-formed answer"
    elif out["total"]["ci95"][0] <= 0:
        reason = "no gain is shown"
    survives = {}
    for name in withouts or ("blank",):
        survives[name] = {"value": None, "ci95": None, "n": n, "reason": reason}
        if reason is None:
            survives[name] = surviving_share(runs, name, n)
    return out | {"without": without, "surviving_share": survives}


def mean_over_seeds(runs: Sequence[np.ndarray], n: int) -> dict:
    """From the replicates of one run, by percentiles, or of several, by `over_runs`."""
    if len(runs) == 1:
        return estimate(runs[0], n)
    return over_runs([over_resamples(run, n) for run in runs])


def surviving_share(runs: Sequence[Mapping], name: str, n: int) -> dict:
    """Share of the gain that is there without a picture too; of several seeds, the ratio of their means, linearised."""
    kept = [run["format"] + run["image_free", name] for run in runs]
    if len(runs) == 1:
        whole = np.where(runs[0]["total"] == 0, np.nan, runs[0]["total"])
        return estimate(kept[0] / whole, n)
    total = np.mean([run["total"][0] for run in runs])
    ratio = np.mean([replicates[0] for replicates in kept]) / total
    linear = [ratio + (part - ratio * run["total"]) / total for part, run in zip(kept, runs)]
    return over_runs([over_resamples(replicates, n) for replicates in linear], (-math.inf, math.inf))


def net_following(answers: np.ndarray, shown: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """1 where an answer follows a swapped picture, -1 where it fits the picture not shown, else 0; `paired` means it.

    Where questions and pictures trade places, whoever never looks hits both equally often and gets 0; whoever always
    looks gets 1. All (n,); an answer is a string or a number.
    """
    return 1.0 * (answers == shown) - (answers == gold)


# Answers


@dataclass
class Panel:
    """All answers to a source, on the same n questions for every policy and input."""
    source: str
    questions: list[dict]                      # records of stage 1, without pictures
    answers: dict[str, dict[str, list[dict]]]  # policy -> input -> n rows of stage 4
    weights: np.ndarray                        # (R, n)
    shown: dict[str, list[str | None]]         # input -> for each question what its swapped or edited picture says, where that is known
    left_out: int                              # questions without an answer of some policy under some input

    @cached_property
    def golds(self) -> list[str]:
        return [canonical(q["answer"]) for q in self.questions]

    @property
    def strata(self) -> np.ndarray:
        """Groups by answer types, one-hot (n, S)."""
        keys = [json.dumps([q["group"], q["answer_type"]]) for q in self.questions]
        return np.eye(len(set(keys)))[np.unique(keys, return_inverse=True)[1]]

    @cached_property
    def halves(self) -> np.ndarray:
        """(n,): 0, 1, 0, ... over the questions of each group and type."""
        place = defaultdict(itertools.count)
        return np.array([next(place[q["group"], q["answer_type"]]) % 2 for q in self.questions])

    @property
    def inputs(self) -> list[str]:
        return sorted({name for inputs in self.answers.values() for name in inputs}, key=input_order)

    @property
    def withouts(self) -> list[str]:
        """The inputs without a picture that all policies answered; the first is the one behind the parts of a gain."""
        return [name for name in NO_PICTURE if all(name in inputs for inputs in self.answers.values())]

    @property
    def without(self) -> str | None:
        return next(iter(self.withouts), None)

    @cached_property
    def majority(self) -> list[str]:
        """For each question what a blind guesser should say: the most frequent right answer of its group and type.

        Counted on the other half of the group's questions, so that no question votes for itself; on all where there is no other half.
        """
        counted, keys = defaultdict(Counter), [((q["group"], q["answer_type"]), half) for q, half in zip(self.questions, self.halves)]
        for key, gold in zip(keys, self.golds):
            counted[key][gold] += 1
        other = [counted.get((key, 1 - half)) or counted[key, half] for key, half in keys]
        return [votes.most_common(1)[0][0] for votes in other]

    def said(self, policy: str, name: str) -> list[str | None]:
        """The answers of a policy as one text for each meaning: the right one is the gold answer, however it was written."""
        return [gold if row["correct"] else canonical(row["answer"]) for gold, row in zip(self.golds, self.answers[policy][name])]

    @cached_property
    def common(self) -> set[tuple]:
        """(group, type, answer) of what is right to, or is answered by some policy to, `COMMON` questions or more; no answer always is."""
        groups = [(q["group"], q["answer_type"]) for q in self.questions]
        columns = [self.golds] + [self.said(policy, name) for policy in self.answers for name in ("clean", *self.withouts)]
        return {(*group, text) for column in columns for (group, text), count in Counter(zip(groups, column)).items()
                if count >= COMMON or text is None}

    def column(self, policy: str, name: str, key: str) -> np.ndarray:
        return np.array([row[key] for row in self.answers[policy][name]], float)

    @cached_property
    def conditions(self) -> dict[str, dict[str, str]]:
        """Condition -> seed -> run; the base is none."""
        found = defaultdict(dict)
        for policy in self.answers:
            if policy != "base":
                found[family(policy)][seed_of(policy)] = policy
        return found

    def run(self, condition: str, seed: str) -> str:
        """The run of a condition and a seed; the base goes with every seed."""
        return "base" if condition == "base" else self.conditions[condition][seed]

    def common_seeds(self, conditions: Iterable[str]) -> list[str]:
        """The seeds with which each of these conditions was trained."""
        trained = [self.conditions[name] for name in conditions if name != "base"]
        return [seed for seed in trained[0] if all(seed in runs for runs in trained)]

    def kinds(self, key: str) -> dict[str, np.ndarray]:
        """What `key` says of the questions -> which questions, as their numbers; unknown ones are left out."""
        values = sorted({q[key] for q in self.questions} - {None}, key=str)
        return {str(value): np.flatnonzero([q[key] == value for q in self.questions]) for value in values}

    def outcomes(self, run: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Input -> (correct, formed), each (n,), of a run on clean input and without a picture."""
        return {name: (self.column(run, name, "correct"), self.column(run, name, "well_formed")) for name in ("clean", *self.withouts)}

    def measured(self, run: str, name: str) -> Measured:
        """Accuracy of a run on an input."""
        return over_questions(self.column(run, name, "correct"))


def canonical(answer: str | None) -> str | None:
    """10.0 is 10, and No is no; None: no answer was found."""
    if answer is None:
        return None
    text = " ".join(answer.split()).casefold() if len(answer) > 1 else answer
    return f"{float(text):g}" if re.fullmatch(r"[-+]?\d{1,15}(?:\.\d{1,15})?", text) else text


def input_order(name: str) -> tuple:
    kind = name.partition("-")[0]
    return INPUTS.index(kind) if kind in INPUTS else len(INPUTS), severity(name), name


def severity(name: str) -> float:
    kind, _, level = name.partition("-")
    return float(level) if re.fullmatch(r"\d+(?:\.\d+)?", level) else prepare.SEVERITY.get(kind, 0.0)


def family(policy: str) -> str:
    """A run's name without its seed."""
    return re.sub(r"-s\d+$", "", policy)


def seed_of(policy: str) -> str:
    """The seed in a run's name; another policy's name has none."""
    return policy.removeprefix(family(policy))[2:]


def policy_order(policy: str) -> tuple:
    conditions = ["base", "standard", "hallucination", "mixed", "grounded"]
    condition = policy.partition("-")[0]
    place = conditions.index(condition) if condition in conditions else len(conditions)
    return place, family(policy), int(seed_of(policy) or 0), policy


def line_hash(path: Path, row: Mapping) -> bytes:
    """Of what was said and how it was graded; versions, hashes of files and log probabilities are left out."""
    policy, source, name = path.parent.parent.name, path.parent.name, path.stem
    said = [policy, source, name, row["id"], row["response"], row["answer"], row["correct"], row["well_formed"]]
    return hashlib.sha256(json.dumps(said).encode()).digest()


def fingerprint(lines: Iterable[bytes]) -> str:
    """One hash of all graded answers: sha256 of the sorted sha256 of each [policy, source, input, question id, response, answer,
    correct, well formed], as JSON. Two studies with the same one gave the same answers to the letter."""
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def same_study(found: str) -> str:
    """Whether the README's table comes from these answers, in words: the README holds the fingerprint that it comes from."""
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if found[:16] in text:
        said = "the README's table comes from these answers"
    else:
        said = "the README's table comes from other answers"
    if platform.machine() not in ("x86_64", "AMD64"):
        said += f"; on {platform.machine()} numbers may differ from the README's, which are from x86-64"
    return said


def read_answers(data: Path, path: Path, checked: dict, models: dict, lines: list[bytes]) -> list[dict]:
    """The rows of an answers file, whole, in stage 4's form, and made from what lies in the data folder now.

    `checked`: artifact -> sha256; `models`: policy -> the artifacts of its model, the same in all files; `lines`: `line_hash` of
    each row. All grow.
    """
    remedy = f"delete it and run 04_evaluate.py --data {data} again"
    rows = prepare.read_jsonl(path)
    with open(path, "rb") as file:
        if len(rows) != sum(1 for _ in file) or not rows:
            raise UserError(f"{path} row {len(rows) + 1} cannot be read: {remedy}")
    kinds = {"id": str, "response": str, "answer": (str, type(None)), "gold": str, "correct": bool, "well_formed": bool,
             "truncated": bool, "tokens": int, "gold_logprob": (int, float), "made_from": dict}
    for i, row in enumerate(rows):
        wrong = [key for key, kind in kinds.items() if not isinstance(row.get(key), kind)]
        if not wrong and not math.isfinite(row["gold_logprob"]):
            wrong = ["gold_logprob"]
        if not wrong and "nats" in row:
            wrong = read_tokens(row)
        if wrong or prepare.input_path(path.parent.name, path.stem) not in row["made_from"]:
            raise UserError(f"{path} row {i + 1} has no proper {(wrong or ['made_from'])[0]}: {remedy}")
        adapters = [Path(key).parent.name for key in row["made_from"] if key.endswith("adapter_model.safetensors")]
        if adapters != [who for who in [path.parent.parent.name] if who != "base"]:
            raise UserError(f"{path} row {i + 1} is by {(adapters or ['base'])[0]}, not by {path.parent.parent.name}: {remedy}")
        model = {key: digest for key, digest in row["made_from"].items() if not key.startswith(("questions/", "corrupted/"))}
        model["made_with"] = row.get("made_with")  # packages
        if models.setdefault(path.parent.parent.name, model) != model:
            raise UserError(f"{path} row {i + 1} is by another {path.parent.parent.name} than its answers elsewhere: {remedy}")
        new = {key: digest for key, digest in row["made_from"].items() if checked.get(key) != digest}
        prepare.check_fresh(data, path, new, f"run 04_evaluate.py --data {data} again, or delete {path.parent.parent} to do without this policy")
        checked |= new
        lines.append(line_hash(path, row))
        for key in ("made_from", "made_with", "group", "needs_image"):  # checked, or known from the question: half of what a row weighs
            row.pop(key, None)
    if len({row["id"] for row in rows}) != len(rows):
        raise UserError(f"{path} answers a question twice: {remedy}")
    return rows


def read_tokens(row: dict) -> list[str]:
    """Turn the nats of a row's tokens into an array; returns what is wrong with them."""
    try:
        nats = np.array(row["nats"], np.float32)
        proper = nats.ndim == 1 and np.isfinite(nats).all() and len(nats) == len(row["pieces"]) and all(isinstance(x, str) for x in row["pieces"])
    except (ValueError, TypeError, KeyError, OverflowError):
        proper = False
    if proper:
        row["nats"] = nats
    return [] if proper else ["nats"]


def load_panels(data: Path, study: Mapping, resamples: int, notes: list[str], checked: dict, lines: list[bytes]) -> list[Panel]:
    """The answers to every benchmark; what is not counted is noted, what they were made from and their hashes are added."""
    files, panels, models = defaultdict(lambda: defaultdict(list)), [], {}
    for path in sorted(data.glob("answers/*/*/*")):
        if path.suffix != ".jsonl" or path.parent.name not in study["sources"]["benchmarks"]:
            notes.append(f"{path.relative_to(data)} is unfinished, or of no benchmark of this study: not counted")
        else:
            files[path.parent.name][path.parent.parent.name].append(path)
    for source in study["sources"]["benchmarks"]:
        if source not in files and len(files) > 0:
            notes.append(f"no policy has answers to {source}: 04_evaluate.py makes them")
            continue
        for policy in ["base", *files[source]]:
            if "clean" not in [path.stem for path in files[source][policy]]:
                raise UserError(f"{data / 'answers' / policy / source / 'clean.jsonl'} is missing: run 04_evaluate.py --data {data}")
        answers = {policy: {path.stem: read_answers(data, path, checked, models, lines) for path in files[source][policy]}
                   for policy in sorted(files[source], key=policy_order)}
        cuts = {row.get("max_new_tokens") for inputs in answers.values() for rows in inputs.values() for row in rows}
        if len(cuts) > 1:
            after = " tokens, others after ".join(sorted(map(str, cuts)))
            raise UserError(f"{data / 'answers'}: some answers to {source} were cut after {after}: "
                            f"run 04_evaluate.py --data {data} again, for all policies at once")
        each = {(policy, name): rows for policy, inputs in answers.items() for name, rows in inputs.items()}
        panels.append(make_panel(data, source, answers, resamples, study["seed"]))
        if source in CLUSTERED:
            notes.append(f"{source} asks several questions about one problem: its intervals and tests, which count them as independent, are too sure")
        missing = {path.parent.name for path in data.glob("policies/*/config.json")} - set(answers)
        notes += [f"{run} has no answers to {source}: 04_evaluate.py makes them" for run in sorted(missing)]
        if panels[-1].left_out:
            most = max(len(rows) for rows in each.values())
            short = [" ".join(key) for key, rows in each.items() if len(rows) < most]
            notes.append(f"{panels[-1].left_out} questions of {source} lack an answer ({shorten(', '.join(short), 300)}): all numbers are on the "
                         f"other {len(panels[-1].questions)}. 04_evaluate.py without --limit answers them")
    return panels


def make_panel(data: Path, source: str, answers: dict, resamples: int, seed: int) -> Panel:
    """Cut the answers to the questions that all policies answered under all inputs."""
    def records(name):
        table = prepare.read_questions(data / prepare.input_path(source, name), "run 01_prepare.py and 02_corrupt.py again")
        return {row["id"]: row for row in table.remove_columns("images").to_list()}
    questions = {i: row | {"group": row["group"] or "all"} for i, row in records("clean").items()}
    sets = [{row["id"] for row in rows} for inputs in answers.values() for rows in inputs.values()]
    ids = [i for i in questions if all(i in each for each in sets)]
    if not ids:
        raise UserError(f"{data / 'answers'}: no question of {source} has an answer of every policy under every input: "
                        f"run 04_evaluate.py --data {data} again, with one --limit for all")
    for inputs in answers.values():
        for name, rows in inputs.items():
            by_id = {row["id"]: row for row in rows}
            inputs[name] = [by_id[i] for i in ids]  # another list: the caller still has the whole one
    pictured = set({questions[i]["group"]: i for i in reversed(ids)}.values())  # of the gallery: the first of each group
    for inputs in answers.values():
        for name, rows in inputs.items():
            for row in rows:
                if name in ("clean", *NO_PICTURE):
                    row["says"] = {what: bool(re.search(words, row["response"][:20_000], re.I)) for what, words in SAYS.items()}
                if row["id"] not in pictured:
                    del row["response"]  # most of what a row weighs
                    row.pop("pieces", None)
    swapped = {name: records(name) for name in ("mismatch", "edited", "kept") if all(name in inputs for inputs in answers.values())}
    shown = {name: [canonical(rows[i]["shown_answer"]) for i in ids] for name, rows in swapped.items()}
    return Panel(source, [questions[i] for i in ids], answers, resample(len(ids), resamples, seed, source), shown,
                 len(set().union(*sets)) - len(ids))


# What is measured


@dataclass(frozen=True)
class Observed:
    """What a policy did with each of some questions: a measure is the sum of `top` over that of `bottom`, or `top`'s mean."""
    kind: str                        # accuracy, share, difference (of two shares), effect, portion (of sums), or mean
    top: np.ndarray                  # (m,)
    bottom: np.ndarray | None = None
    unit: str | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        if self.kind == "mean":
            return -math.inf, math.inf
        return (-1.0, 1.0) if self.kind in ("difference", "effect") else (0.0, 1.0)

    @property
    def measured(self) -> Measured:
        return over_questions(self.top, self.bottom)


def observe(panel: Panel, policy: str) -> dict[tuple[str, ...], Observed]:
    """All that one policy did on one source; a key is the path under which results.json says what came of it.

    Worth of the picture: accuracy with it less accuracy without it, on the same questions. Strict accuracy: share of questions that are
    right with the picture and not right without it. Visual information: mean over questions of log p(gold | picture) - log p(gold | no
    picture), each after the policy's own reasoning, in nats. Unparsed: responses in which no answer was found. Length: tokens of a
    response. Words are looked for in the first 20,000 characters.
    """
    inputs = panel.answers[policy]
    right = {name: panel.column(policy, name, "correct") for name in sorted(inputs, key=input_order)}
    found = {("accuracy", name): Observed("accuracy", x) for name, x in right.items()}
    for key in ("needs_image", "group"):
        for value, chosen in panel.kinds(key).items():
            found |= {("breakdown", key, value, name): Observed("accuracy", x[chosen]) for name, x in right.items()}
    for name in ("clean", *panel.withouts):
        found |= observe_responses(panel, policy, name)
    for name in panel.withouts:
        found["picture_worth", name] = Observed("difference", right["clean"] - right[name])
    if panel.without:
        probabilities = [panel.column(policy, name, "gold_logprob") for name in ("clean", panel.without)]
        found["visual_information",] = Observed("mean", probabilities[0] - probabilities[1], unit="nats")
        found["strict",] = Observed("share", right["clean"] * (1 - right[panel.without]))
    return found | observe_changes(panel, policy) | observe_tokens(panel, policy)


def observe_responses(panel: Panel, policy: str, name: str) -> dict[tuple[str, ...], Observed]:
    """Words, form, length and answers of the responses to one input."""
    rows = panel.answers[policy][name]
    said = np.array(panel.said(policy, name), object)
    found = {("says", name, what): Observed("share", np.array([row["says"][what] for row in rows], float)) for what in SAYS}
    for group, chosen in panel.kinds("group").items():
        for text in frequent(panel, chosen):
            found["answers", name, group, text] = Observed("share", 1.0 * (said[chosen] == text))
    found["unparsed", name] = Observed("share", np.array([row["answer"] is None for row in rows], float))
    found["well_formed", name] = Observed("share", panel.column(policy, name, "well_formed"))
    found["truncated", name] = Observed("share", panel.column(policy, name, "truncated"))
    found["length", name] = Observed("mean", panel.column(policy, name, "tokens"), unit="tokens")
    return found


def observe_changes(panel: Panel, policy: str) -> dict[tuple[str, ...], Observed]:
    """What becomes of an answer when the picture is another one."""
    says = {name: np.array([text or "" for text in panel.said(policy, name)]) for name in panel.answers[policy]}
    golds = np.array(panel.golds)
    found = {}
    for name, texts in panel.shown.items():
        # an edit should change the right answer, `kept` should not; where it is otherwise nothing is to be seen
        told = [i for i, text in enumerate(texts) if text is not None and (text == golds[i]) == (name == "kept")]
        if not told:
            continue
        clean, there, gold = (x[told] for x in (says["clean"], says[name], golds))
        fits = np.array([texts[i] for i in told])
        if name == "mismatch":
            found["follows_picture",] = Observed("difference", net_following(there, fits, gold))
            found["follows_picture", "follows"] = Observed("share", 1.0 * (there == fits))
            found["follows_picture", "keeps"] = Observed("share", 1.0 * (there == gold))
        elif name == "kept":
            found["stays",] = Observed("share", 1.0 * (clean == there))
        else:
            found["flips",] = Observed("share", 1.0 * (clean != there))
            found["causal_effect",] = Observed("effect", causal_effect(clean, there, gold, fits))
    for name in ("blank", "removed", "mismatch"):
        if name in says:
            found["changes", name] = Observed("share", 1.0 * (says["clean"] != says[name]))
    return found


def summarise(runs: Sequence[Observed]) -> dict:
    """One measure of a run, or of the seeds of a condition: value, n, 95% interval, and for a difference p."""
    first = runs[0]
    if len(runs) == 1 and first.kind == "difference":
        return paired(first.top)
    if len(runs) == 1 and first.kind == "accuracy":
        return share(first.top, ("correct", "accuracy"))
    if len(runs) == 1 and first.kind == "share":
        return share(first.top)
    measured = [run.measured for run in runs]
    found = over_runs(measured, first.bounds)
    if first.kind == "difference":
        found["p"] = p_over_runs(measured)
    if first.unit:
        found["unit"] = first.unit
    return found


def nested(found: Mapping[tuple[str, ...], dict]) -> dict:
    """Path -> value, as dictionaries in each other."""
    out = {}
    for path, value in found.items():
        place = out
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return out


def measure(runs: Sequence[Mapping[tuple[str, ...], Observed]]) -> dict:
    """All that is said of a run, or of the seeds of a condition; what not all of them were asked is left out."""
    found = {}
    for path in runs[0]:
        if all(path in run for run in runs):
            found[path] = summarise([run[path] for run in runs])
    return nested(found)


def causal_effect(clean: np.ndarray, edited: np.ndarray, gold: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """What one edit of the picture does to the answer, per question; its mean is the average causal effect of the picture. All (n,).

        1/2 (1[edited = fits] - 1[clean = fits]) + 1/2 (1[clean = gold] - 1[edited = gold])

    `clean`, `edited`: the answers to the intact and to the edited picture; `gold`, `fits`: the answers that are right there. Everything but
    the edit is the same, and it is drawn without regard to the policy: the difference is the edit's doing. 1: the answer goes with the
    picture, always; 0: it never does.
    """
    return ((1.0 * (edited == fits) - (clean == fits)) + (1.0 * (clean == gold) - (edited == gold))) / 2


VISUAL_NATS = math.log(2)  # a token is visual if the picture makes it at least twice as likely
FIFTHS = 5  # of a response, in which its tokens are averaged


def observe_tokens(panel: Panel, policy: str) -> dict[tuple[str, ...], Observed]:
    """Where the words come from, along the answers to intact questions: log p(token | picture) - log p(token | blank), in nats.

    Visual tokens: share of tokens that the picture makes at least twice as likely. Fading: mean nats a token in each fifth of the response.
    Ratios of sums over questions; their intervals are over questions, not tokens.
    """
    rows = [row.get("nats") for row in panel.answers[policy]["clean"]]
    if any(nats is None for nats in rows):
        return {}
    tokens = np.zeros((len(rows), FIFTHS))
    total = np.zeros((len(rows), FIFTHS))  # nats
    for i, nats in enumerate(rows):
        fifth = np.arange(len(nats)) * FIFTHS // max(1, len(nats))
        tokens[i] = np.bincount(fifth, minlength=FIFTHS)
        total[i] = np.bincount(fifth, nats, minlength=FIFTHS)
    visual = np.array([(nats >= VISUAL_NATS).sum() for nats in rows], float)
    found = {}
    if tokens.sum() > 0:
        found["visual_tokens",] = Observed("portion", visual, tokens.sum(1))
    for k in range(FIFTHS):
        if tokens[:, k].sum() > 0:
            found["fading", f"fifth {k + 1}"] = Observed("mean", total[:, k], tokens[:, k], "nats a token")
    return found


def strict_subset(panel: Panel) -> list[str]:
    """Ids of the questions that no policy, the base included, answers without the picture, above chance.

    Under each input without a picture a policy answers once greedily and `samples` times at temperature 1. A question goes out if one of
    them is right; a choice question, where chance is right too, if so many of one policy's answers to one input are that chance, one in as
    many as it has choices, would do so for any of them in fewer than 1 of 20 questions (binomial, Bonferroni).
    """
    out = []
    for i, question in enumerate(panel.questions):
        rows = [inputs[name][i] for inputs in panel.answers.values() for name in panel.withouts]
        chance = 1 / len(question["choices"]) if question["choices"] else 0.0
        if all(tail(row["correct"] + row.get("drawn_right", 0), 1 + row.get("samples", 0), chance) >= 0.05 / len(rows) for row in rows):
            out.append(question["id"])
    return out


def tail(k: int, n: int, p: float) -> float:
    """Of a binomial distribution: the probability of k or more."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def one_hot(keys: Sequence) -> np.ndarray:
    """(n, K), a column for each key in order of appearance."""
    number = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return np.eye(len(number))[[number[key] for key in keys]]


def entropy(p: np.ndarray) -> np.ndarray:
    """- sum p log2 p over the last axis, in bits."""
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def distribution(panel: Panel, texts: Sequence[str | None]) -> dict:
    """How the given answers are distributed, beside the right ones.

        total_variation  `distance` over groups and answers: 0 for the right distribution
        leaning          share of answers that are the majority's (the most frequent right one of the group), less its share of the right ones
        entropy          of the answers given within a group, its mean over questions, in bits; `entropy_right` of the right ones
        letter_bias      `distance` over the letters of choice questions, whatever the group

    An answer that is right to fewer than `COMMON` questions of its group, and that no policy gives to as many, counts as one of the others;
    no answer is one of its own. Letters are compared where one was given.
    """
    golds, majority, weights, n = panel.golds, panel.majority, panel.weights, len(texts)
    groups = [(q["group"], q["answer_type"]) for q in panel.questions]
    given, right = ([group + (text,) * (text is None or group + (text,) in panel.common) for group, text in zip(groups, column)]
                    for column in (texts, golds))
    spread, within = (lambda keys: entropy(weights @ one_hot(keys))), entropy(weights @ one_hot(groups))  # each (R,)
    leaning = np.array([(text == most) * 1.0 - (gold == most) for text, most, gold in zip(texts, majority, golds)])
    out = {"total_variation": distance(weights, given, right, panel.halves), "leaning": estimate(weights @ leaning, n),
           "entropy": {**corrected(spread(given) - within, n), "unit": "bits"},
           "entropy_right": {**corrected(spread(right) - within, n), "unit": "bits"}}
    letters = [i for i, q in enumerate(panel.questions) if texts[i] in [chr(65 + k) for k in range(len(q["choices"]))]]
    if letters:
        out["letter_bias"] = distance(weights[:, letters], *([column[i] for i in letters] for column in (texts, golds)), panel.halves[letters])
    return out


def frequent(panel: Panel, chosen: Sequence[int], most: int = 6) -> dict[str, dict]:
    """The most frequent right answers to some questions, and how frequent they are."""
    counted = Counter(panel.golds[i] for i in chosen).most_common(most)
    return {text: {"n": len(chosen), "count": n, "share": n / len(chosen), "ci95": wilson(n, len(chosen))} for text, n in counted}


def compared_by(observed: Mapping, parts: Mapping | None, withouts: Sequence[str]) -> dict[str, Measured]:
    """The measures by which conditions are compared, of one run; the base has no parts."""
    found = {name: observed["accuracy", name].measured for name in ("clean", *withouts)}
    if ("causal_effect",) in observed:
        found["causal_effect"] = observed["causal_effect",].measured
    if parts and withouts:
        n = len(parts["difference"])
        found["format"] = over_resamples(parts["format"], n)
        for part in ("image_free", "visual"):
            found[part] = over_resamples(parts[part, withouts[0]], n)
    return {name: x for name, x in found.items() if math.isfinite(x.value)}


def compare(panel: Panel, observed: Mapping, parts: Mapping) -> dict:
    """Conditions against the base and against each other: condition -> reference -> measure -> difference.

    Two runs of one seed share questions, their order and all draws, so conditions are compared seed by seed (`over_runs`), and
    what all runs of a seed owe to its luck falls out. `by_seed` is the difference of each; `within_seed` what McNemar's test
    says of it, which is all there is when a study has one seed: the luck of a run is then not covered.
    """
    measures = {policy: compared_by(x, parts.get(policy), panel.withouts) for policy, x in observed.items()}
    conditions = list(panel.conditions)
    out = {}
    for i, condition in enumerate(conditions):
        for reference in ("base", *conditions[:i]):
            found = compare_two(panel, condition, reference, observed, measures)
            if found:
                out.setdefault(condition, {})[reference] = found
    return out


def compare_two(panel: Panel, condition: str, reference: str, observed: Mapping, measures: Mapping) -> dict:
    """Measure -> difference of two conditions; nothing where they have no seed in common."""
    seeds = panel.common_seeds([condition, reference])
    ones = [panel.run(condition, seed) for seed in seeds]
    twos = [panel.run(reference, seed) for seed in seeds]
    out = {}
    for name in measures[ones[0]] if seeds else ():
        if not all(name in measures[policy] for policy in ones + twos):
            continue
        pairs = [measures[one][name] - measures[two][name] for one, two in zip(ones, twos)]
        found = over_runs(pairs) | {"p": p_over_runs(pairs)}
        found["by_seed"] = {seed: pair.value for seed, pair in zip(seeds, pairs)}
        if ("accuracy", name) in observed[ones[0]]:
            found["within_seed"] = {}
            for seed, one, two in zip(seeds, ones, twos):
                right = [observed[policy]["accuracy", name].top for policy in (one, two)]
                found["within_seed"][seed] = paired(right[0] - right[1])
            if len(seeds) == 1:
                found |= found["within_seed"][seeds[0]]
        out[name] = found
    return out


def correct_differences(differences: Mapping) -> None:
    """Holm over all comparisons by one measure, on all benchmarks; and what McNemar's test could have shown, so corrected."""
    tests = defaultdict(list)
    for references in differences.values():
        for sources in references.values():
            for measures in sources.values():
                for name, found in measures.items():
                    tests[name].append(found)
    for same in tests.values():
        correct_for_number(same)
        for found in same:
            for one in found.get("within_seed", {}).values():
                discordant = (one["only_one"] + one["only_two"]) / one["n"]
                one["detectable"] = detectable(discordant, one["n"], len(same))


def collect(panels: Sequence[Panel], study: Mapping) -> dict:
    """results.json, apart from where it comes from. Runs that differ in their seed alone are also pooled (`over_runs`)."""
    out = {"gains": {}, "pooled": {}, "differences": {}, "card": {}, "strict_subset": {}}
    for panel in panels:
        observed = {policy: observe(panel, policy) for policy in panel.answers}
        base = panel.outcomes("base")
        parts = {}
        for policy, seen in observed.items():
            for key, value in about_policy(panel, policy, seen).items():
                out.setdefault(key, {}).setdefault(policy, {})[panel.source] = value
            if policy != "base":
                parts[policy] = gain_parts(panel.weights, panel.strata, base, panel.outcomes(policy), panel.withouts)
                gain = split_gain([parts[policy]], panel.withouts)
                out["gains"].setdefault(policy, {})[panel.source] = gain
        for condition, seeds in panel.conditions.items():
            runs = list(seeds.values())
            about = {"runs": runs}
            if len(runs) == 1:
                about |= about_run(out, runs[0], panel.source)
            else:
                about["gains"] = split_gain([parts[run] for run in runs], panel.withouts)
                about |= measure([observed[run] for run in runs])
            out["pooled"].setdefault(condition, {})[panel.source] = about
        for condition, references in compare(panel, observed, parts).items():
            for reference, found in references.items():
                place = out["differences"].setdefault(condition, {}).setdefault(reference, {})
                place[panel.source] = found
        out["card"][panel.source] = card(panel)
        out["strict_subset"][panel.source] = about_subset(panel)
    correct_differences(out["differences"])
    correct_the_rest(out)
    sources = {panel.source: {"n": len(panel.questions), "left_out": panel.left_out, "policies": list(panel.answers),
                              "inputs": panel.inputs, "without_picture": panel.without} for panel in panels}
    entries = check_measures() + [entry for panel in panels if panel.source == "shapes" for entry in check_shapes(panel)]
    return {**out, "sources": sources, "claims": ledger(panels, study),
            "instrument_check": {"passed": all(entry["passed"] for entry in entries), "entries": entries}}


def about_policy(panel: Panel, policy: str, observed: Mapping[tuple[str, ...], Observed]) -> dict:
    """All that is said of one policy on one source, apart from comparisons."""
    out = measure([observed])
    out["distribution"] = {name: distribution(panel, panel.said(policy, name)) for name in ("clean", *panel.withouts)}
    if policy == "base":
        out["gold"] = {group: frequent(panel, chosen) for group, chosen in panel.kinds("group").items()}
    return out


def about_subset(panel: Panel) -> dict:
    """The strict subset, how many answers without the picture it rests on, and who is right on it."""
    chosen = set(strict_subset(panel)) if panel.withouts else set()
    samples, clean = {}, {}
    for policy, inputs in panel.answers.items():
        samples[policy] = {name: inputs[name][0].get("samples", 0) for name in panel.withouts}
        if chosen:
            clean[policy] = accuracy(row for row in inputs["clean"] if row["id"] in chosen)
    return {"samples": samples, "ids": sorted(chosen), **share(q["id"] in chosen for q in panel.questions), "clean": clean}


def correct_the_rest(out: dict) -> None:
    """Holm for what is shown together: the gain of each condition, and what the picture is worth to base and conditions.

    Single runs of conditions with several seeds are corrected among themselves.
    """
    whole, single = [], []
    for condition, sources in out["pooled"].items():
        for source, about in sources.items():
            test = out["differences"][condition]["base"][source]["clean"]
            about["gains"]["total"] |= {key: test[key] for key in ("value", "ci95", "p", "p_holm")}
    for source in out["card"]:
        for about in abouts(out, source).values():
            whole += about.get("picture_worth", {}).values()
        for about in single_runs(out, source).values():
            single += about.get("picture_worth", {}).values()
    correct_for_number(whole)
    correct_for_number(single)


def card(panel: Panel) -> dict:
    """What a benchmark is like, whoever answers: what blind guessing yields, and how much the base gets right without a picture.

    `majority`: right answers of whoever always gives the most frequent right answer of a question's group and type. `one_choice`: the
    mean share of a choice question that a blind choice gets. `unseen`: questions that the base gets right on some input without a picture.
    """
    questions, base = panel.questions, panel.answers["base"]
    out = {"n": len(questions), "groups": len({q["group"] for q in questions}),
           "types": {name: share(q["answer_type"] == name for q in questions) for name in sorted({q["answer_type"] for q in questions})},
           "majority": share(most == gold for most, gold in zip(panel.majority, panel.golds)),
           "said_to_need_the_picture": share(q["needs_image"] is True for q in questions),
           "need_unknown": share(q["needs_image"] is None for q in questions)}
    options = [1 / len(q["choices"]) for q in questions if q["choices"]]
    if options:
        out["one_choice"] = {"expected": float(np.mean(options)), "n": len(options)}
    for name in panel.withouts:
        out[name] = accuracy(base[name])
    if panel.withouts:
        out["unseen"] = share(any(base[name][i]["correct"] for name in panel.withouts) for i in range(len(questions)))
    return out


# What was claimed, and how it is decided: all of it written down before any run

Term = tuple[float, str, str]  # factor, kind of policy, input: clean, or without a picture; a sum of them is a difference of accuracies


def gain_of(kind: str, over: str = "base") -> tuple[Term, ...]:
    return (1.0, kind, "clean"), (-1.0, over, "clean")


@dataclass(frozen=True)
class Claim:
    """That the sum `of` is above `low`, and (a number was published) agrees with `low` to `high`."""
    id: str
    text: str
    source: str
    of: tuple[Term, ...]
    also: tuple[tuple[Term, ...], ...] = ()  # must be above 0 too: of two losses, neither helps
    low: float = 0.0
    high: float = math.inf
    benchmark: str | None = None             # None: any
    preset: str | None = None
    sometimes: bool = False                  # one benchmark without it contradicts nothing


def published(benchmark: str, n: int, preset: str, base: float, **accuracies: float) -> list[Claim]:
    """A row of the paper's table: gains as published, give or take two standard errors, as if both accuracies were independent."""
    names = {"standard": "clean pictures", "hallucination-blank": "blank pictures", "hallucination-mismatch": "other questions' pictures"}
    out = []
    for kind, value in accuracies.items():
        kind = kind.replace("_", "-")
        gain, error = (value - base) / 100, 2 * math.sqrt(sum(p * (100 - p) for p in (base, value)) / 1e4 / n)
        out.append(Claim(f"table-{benchmark}-{preset}-{kind}", f"{preset.upper()} on {benchmark}, trained on {names[kind]}: {100 * gain:+.2f} points",
                         f"{PAPER}, main table: {base} to {value}", gain_of(kind), (), gain - error, gain + error, benchmark, preset))
    return out


PAPER, ARTICLE = "arXiv 2604.03179", "an article on that paper; the paper has not this benchmark"
TAKEN_AWAY = {"blank", "noise", "irrelevant", "mismatch", "removed"}  # damage after which nothing of a question's picture is left
CLAIMS = [
    Claim("damaged-helps", "Training without the questions' pictures improves on the base", f"{PAPER}, abstract", gain_of("hallucination")),
    Claim("damaged-beats-clean", "It sometimes improves more than training on clean pictures", f"{PAPER}, abstract",
          gain_of("hallucination", "standard"), (gain_of("hallucination"),), sometimes=True),
    Claim("damaged-at-least-half", "It gains at least half of what clean pictures gain", f"{PAPER}, main table, averages: 3B +2.53 of +5.02, 7B +2.26 of +2.63",
          ((1.0, "hallucination", "clean"), (-0.5, "standard", "clean"), (-0.5, "base", "clean")), (gain_of("hallucination"), gain_of("standard"))),
    Claim("clean-gains-blind", "Training on clean pictures also improves answers without one", f"what follows from the thesis of {PAPER}",
          ((1.0, "standard", "without"), (-1.0, "base", "without"))),
    Claim("mathvista-range", "Damaged pictures: 12 to 15 points on MathVista", "an article on that paper", gain_of("hallucination"), (), 0.12, 0.15, "mathvista"),
    Claim("mmmu-range", "Damaged pictures: 8 to 10 points on MMMU", ARTICLE, gain_of("hallucination"), (), 0.08, 0.10, "mmmu"),
    Claim("scienceqa-better", "On ScienceQA damaged pictures do better than clean ones", ARTICLE, gain_of("hallucination", "standard"),
          (gain_of("hallucination"),), benchmark="scienceqa"),
    *published("mathvision", 3040, "3b", 18.19, standard=22.73, hallucination_blank=20.95, hallucination_mismatch=20.86),
    *published("mathverse", 3940, "3b", 34.82, standard=37.72, hallucination_blank=35.10, hallucination_mismatch=35.76),
    *published("mathvista", 1000, "3b", 51.40, standard=58.40, hallucination_blank=56.40, hallucination_mismatch=58.00),
    *published("wemath", 1740, "3b", 54.48, standard=60.11, hallucination_blank=56.55, hallucination_mismatch=55.17),
    *published("mathvision", 3040, "7b", 27.70, standard=28.13, hallucination_blank=28.39, hallucination_mismatch=27.27),
    *published("mathverse", 3940, "7b", 45.20, standard=47.56, hallucination_blank=48.86, hallucination_mismatch=49.90),
    *published("mathvista", 1000, "7b", 67.00, standard=70.00, hallucination_blank=68.50, hallucination_mismatch=71.40),
    *published("wemath", 1740, "7b", 63.68, standard=68.39, hallucination_blank=66.84, hallucination_mismatch=68.33)]
PROTOCOL = ("Theirs: Qwen2.5-VL, presumably all weights, Geometry3K, 15 epochs, 5 completions at temperature 0.7, KL 0.01; seeds and grader not "
            "stated. Here: a 4-bit base with LoRA, the settings of each run under provenance, greedy answers, this kit's grader.")


def test_of(claim: Claim) -> str:
    said = lambda terms: " ".join(f"{factor:+g} {kind} ({asked})" for factor, kind, asked in terms)
    text = f"the accuracies {said(claim.of)}; reproduced if the 95% interval is above 0"
    if claim.high < math.inf:
        text = (f"the accuracies {said(claim.of)}; reproduced if the 95% interval is on the claim's side of 0 and meets {points(claim.low)} to "
                f"{points(claim.high)} points, contradicted if it meets none of these")
    text += "".join(f", and so is {said(terms)}" for terms in claim.also)
    ends = "" if claim.high < math.inf else "; never contradicted: it says sometimes" if claim.sometimes else "; contradicted if it is below 0"
    return text + ends + "; paired by question and by seed, t over seeds"


def judge(claim: Claim, panel: Panel) -> list[dict]:
    """The claim's verdict on one benchmark, for each kind of damage that was trained on and each input that it speaks of; 95% each.

    `n_decides`: about the questions at which the interval, shrunk with the root of n, would end at 0, if the estimate is the truth.
    """
    damages, inputs, out = [None], ["clean"], []
    if any(kind == "hallucination" for _, kind, _ in claim.of):
        damages = [kind for kind in panel.conditions if takes_away(kind)]
    if any(asked == "without" for *_, asked in claim.of):
        inputs = panel.withouts
    for damage, asked in itertools.product(damages, inputs):
        measured = sum_of_terms(claim.of, panel, damage, asked)
        also = [sum_of_terms(terms, panel, damage, asked) for terms in claim.also]
        if not measured or not all(also):
            continue
        found = over_runs(measured)
        judged = entry(claim, verdict_on(claim, found, [over_runs(x) for x in also]), found["n"])
        judged |= {"benchmark": panel.source, "damage": damage, "input": asked, "found": found}
        if judged["verdict"] == "undecided":
            judged |= what_decides(claim, found)
        out.append(judged)
    return out


def takes_away(condition: str) -> bool:
    """Whether nothing of the questions' pictures was left in training."""
    kind, _, damage = condition.partition("-")
    return kind == "hallucination" and set(damage.split("+")) <= TAKEN_AWAY


def sum_of_terms(terms: Sequence[Term], panel: Panel, damage: str | None, asked: str) -> list[Measured]:
    """The sum of accuracies, seed by seed; nothing where a condition was not trained, or no seed is common to all."""
    conditions = [damage if kind == "hallucination" else kind for _, kind, _ in terms]
    if not all(name == "base" or name in panel.conditions for name in conditions):
        return []
    sums = []
    for seed in panel.common_seeds(conditions):
        runs = [panel.run(name, seed) for name in conditions]
        accuracies = [panel.measured(run, asked) * factor for (factor, *_), run in zip(terms, runs)]
        sums.append(sum(accuracies[1:], start=accuracies[0]))
    return sums


def what_decides(claim: Claim, found: Mapping) -> dict:
    """What an undecided claim lacks, where more of it could decide."""
    value, (low, high) = found["value"], found["ci95"]
    could = claim.high == math.inf and value != 0 and low <= 0 <= high
    if not could or (claim.sometimes and value < 0):
        return {}
    if found["seeds"] > 1:
        return {"reason": "more seeds decide, or more questions"}
    half = max(value - low, high - value)
    return {"n_decides": math.ceil(found["n"] * (half / value) ** 2)}


def verdict_on(claim: Claim, found: Mapping, also: Sequence[Mapping]) -> str:
    """reproduced, contradicted or undecided, as `test_of` says."""
    low, high = found["ci95"]
    if claim.high < math.inf:
        side = low > 0 if claim.low + claim.high > 0 else high < 0
        meets = high >= claim.low and low <= claim.high
        return "contradicted" if not meets else "reproduced" if side else "undecided"
    if low > 0:
        return "reproduced" if all(x["ci95"][0] > 0 for x in also) else "undecided"
    return "contradicted" if high < 0 and not claim.sometimes else "undecided"


def entry(claim: Claim, verdict: str, n: int) -> dict:
    return {"id": claim.id, "text": claim.text, "source": claim.source, "test": test_of(claim), "verdict": verdict, "n": n, "protocol": PROTOCOL}


def ledger(panels: Sequence[Panel], study: Mapping) -> list[dict]:
    """Every claim on every benchmark that it speaks of; those without answers to judge them by say what is missing."""
    out = []
    for claim in CLAIMS:
        reason = None
        if claim.preset not in (None, study["preset"]):
            reason = f"about preset {claim.preset}"
        elif claim.preset and study["sources"]["train"] != "geometry3k":
            reason = "about training on geometry3k"
        asked = [] if reason else [panel for panel in panels if claim.benchmark in (None, panel.source)]
        judged = [verdict for panel in asked for verdict in judge(claim, panel)]
        out += judged or [entry(claim, "undecided", 0) | {"benchmark": claim.benchmark, "reason": reason or "not trained, not asked, or no seed in common"}]
    return out


# Does the instrument find the truth where it is known?

WORLD = [(True, (0.4, 0.3, 0.2, 0.1), 0.4), (True, (0.7, 0.3), 0.9), (True, (0.25,) * 4, 0.6), (False, (0.1,) * 10, 0.7)]
# groups of questions: whether they need the picture, how frequent each answer is, how often a base is well formed
READABLE = 1 / 3  # share of malformed responses whose answer can be read all the same
NOVICE = {"sees": 0.0, "reads": 0.3, "majority": False, "form": 1.0}  # form: exponent on a group's share of well-formed answers
LEARNERS = {  # what a base is, what training changes, and the one part in which the whole gain must land
    "answers at random, and learns nothing": ({"reads": 0.0}, {}, None),
    "learns nothing": ({"sees": 0.3}, {}, None),
    "learns the form alone": ({"sees": 0.3}, {"form": 0.1}, "format"),
    "learns to look at 6 pictures in 10": ({}, {"sees": 0.6}, "visual"),
    "learns to see all": ({}, {"sees": 1.0}, "visual"),
    "forgets to look": ({"sees": 0.6}, {"sees": 0.0}, "visual"),
    "learns which answer is frequent": ({}, {"majority": True}, "image_free"),
    "learns to reason from the text": ({"sees": 0.3}, {"reads": 0.9}, "image_free"),
}


def simulate(rng: np.random.Generator, gold: np.ndarray, donor: np.ndarray, sees, reads, majority, form) -> dict:
    """Input -> (answers, correct, formed, log p(gold)), of a policy that sees, reads and guesses with known probability; n questions."""
    n, group = len(gold), np.arange(len(gold)) % len(WORLD)
    needs, options, formed_share = (np.array(x)[group] for x in zip(*((needs, len(w), f) for needs, w, f in WORLD)))
    out = {}
    for name, shown in ("clean", gold), ("blank", None), ("removed", None), ("mismatch", donor):
        answer = np.zeros(n, int) if majority else (rng.random(n) * options).astype(int)  # 0 is each group's likeliest
        read, seen = ~needs & (rng.random(n) < reads), needs & (rng.random(n) < sees) & (shown is not None)
        answer = np.where(read, gold, np.where(seen, gold if shown is None else shown, answer))
        formed = rng.random(n) < formed_share**form
        readable = formed | (rng.random(n) < READABLE)
        out[name] = np.where(readable, answer, -1), 1.0 * ((answer == gold) & readable), 1.0 * formed, np.where(read | seen, 0.0, -np.log(options))
    return out


def expected_accuracy(sees, reads, majority, form) -> float:
    """Of such a policy on clean input, in closed form: readable, and known or guessed."""
    return float(np.mean([(f**form + (1 - f**form) * READABLE) * (k + (1 - k) * (w[0] if majority else 1 / len(w)))
                          for needs, w, f in WORLD for k in [sees if needs else reads]]))


def expected_strict(sees, reads, majority, form) -> float:
    """Right with the picture and not without: seen and readable, and the blank picture's own draws fail."""
    out = []
    for needs, w, f in WORLD:
        readable = f**form + (1 - f**form) * READABLE
        guess = lambda k: [k + (1 - k) * (i == 0 if majority else 1 / len(w)) for i in range(len(w))]
        with_, without = guess(sees if needs else reads), guess(0.0 if needs else reads)  # by which answer is right
        out.append(sum(p * readable * a * (1 - readable * b) for p, a, b in zip(w, with_, without)))
    return float(np.mean(out))


def expected_information(sees, reads, majority, form) -> float:
    """Nats by which a picture makes the right answer likelier: all that a guess leaves open, where it is seen."""
    return float(np.mean([sees * math.log(len(w)) if needs else 0.0 for needs, w, _ in WORLD]))


def expected_leaning(sees, reads, majority, form) -> float:
    """On the blank picture: share of answers that are the majority's, less its share of the right ones."""
    return float(np.mean([(f**form + (1 - f**form) * READABLE) * (k * w[0] + (1 - k) * (1.0 if majority else 1 / len(w))) - w[0]
                          for needs, w, f in WORLD for k in [0.0 if needs else reads]]))


def expected_distance(sees, reads, majority, form) -> float:
    """On the blank picture: total variation of the answers, and of those that cannot be read, from the right ones."""
    out = []
    for needs, w, f in WORLD:
        readable, k = f**form + (1 - f**form) * READABLE, 0.0 if needs else reads
        given = [readable * (k * p + (1 - k) * ((i == 0) if majority else 1 / len(w))) for i, p in enumerate(w)]
        out.append((sum(abs(a - p) for a, p in zip(given, w)) + 1 - readable) / 2)
    return float(np.mean(out))


def check_measures(n: int = 4000, resamples: int = 500, seed: int = 1) -> list[dict]:
    """Simulated policies of known truth, through the same functions as the real ones.

    A measurement passes within one width of its 95% interval, about four standard errors, of the truth, if that width is below 15 points
    (a share of a gain: 150). The majority's answer is given, for half of these groups have none.
    """
    rng, group = np.random.default_rng(seed), np.arange(n) % len(WORLD)
    gold, donor = (np.array([rng.choice(len(WORLD[g][1]), p=WORLD[g][1]) for g in group]) for _ in range(2))
    weights, entries = resample(n, resamples, "check", seed), []

    def check(what, found, truth, most=0.15):
        width = found["ci95"][1] - found["ci95"][0]
        value = next(found[key] for key in ("value", "share") if key in found)
        entries.append({"check": what, "truth": truth, **found, "value": value, "passed": bool(abs(value - truth) <= width < most)})
    letters, texts = list("ABCD"), lambda answers: [None if x < 0 else "ABCD"[x] if g == 2 else str(x) for g, x in zip(group, answers)]
    questions = [{"group": int(g), "answer_type": "choice" if g == 2 else "integer", "answer": text, "choices": letters if g == 2 else []}
                 for g, text in zip(group, texts(gold))]
    panel = Panel("simulated", questions, {}, weights, {}, 0)
    panel.majority = texts(np.zeros(n, int))  # which is so in truth, if not in every sample
    for learner, (was, change, part) in LEARNERS.items():
        before, after = NOVICE | was, NOVICE | was | change
        told, learnt = (simulate(rng, gold, donor, **settings) for settings in (before, after))
        base, policy = ({name: x[1:3] for name, x in each.items()} for each in (told, learnt))
        parts = gain_parts(weights, np.eye(len(WORLD))[group], base, policy, ["blank", "removed"])
        found = split_gain([parts], ["blank", "removed"])
        for name, value in {"total": found["total"], "format": found["format"], **found["without"]["blank"],
                            "visual (removed)": found["without"]["removed"]["visual"]}.items():
            truth = expected_accuracy(**after) - expected_accuracy(**before) if name.partition(" ")[0] in ("total", part) else 0.0
            check(f"{learner}: {name.replace('_', '-')}", value, truth)
        for name, survives in found["surviving_share"].items() if part else ():
            if survives["value"] is not None:
                check(f"{learner}: survives without the picture ({name})", survives, 1.0 * (part != "visual"), 1.5)
        spread = distribution(panel, texts(learnt["blank"][0]))
        check(f"{learner}: distance from the right answers", spread["total_variation"], expected_distance(**after))
        check(f"{learner}: distance of the letters", spread["letter_bias"], 0.75 if after["majority"] else 0.0)
        strict = policy["clean"][0] * (1 - policy["blank"][0])
        check(f"{learner}: strict accuracy", share(strict), expected_strict(**after))
        check(f"{learner}: leaning to the majority", spread["leaning"], expected_leaning(**after))
        if 0 < after["sees"] < 1:
            nats = Observed("mean", learnt["clean"][3] - learnt["blank"][3], unit="nats")
            check(f"{learner}: visual information", summarise([nats]), expected_information(**after))
    swapped = (group < 3) & (gold != donor)
    for sees in (0.0, 0.6, 0.95):
        told = simulate(rng, gold, donor, **NOVICE | {"sees": sees, "form": 0.0})
        clean, there, fits, right = (x[swapped] for x in (told["clean"][0], told["mismatch"][0], donor, gold))
        check(f"looks at {sees:.0%} of swapped pictures", paired(net_following(there, fits, right)), sees)
        effect = Observed("effect", causal_effect(clean, there, right, fits))
        check(f"causal effect of an edit on who looks at {sees:.0%} of them", summarise([effect]), sees)
    return entries


def check_shapes(panel: Panel) -> list[dict]:
    """The study's own policies on shapes: what must hold for whoever answers these questions.

    Where the text suffices, taking the picture away changes nothing (McNemar); where it does not, nobody beats the best
    guess without a picture (binomial). A test fails if its p, corrected by Holm, is below 0.01.
    """
    entries, groups = [], np.array([q["group"] for q in panel.questions])
    suffices = np.array([q["needs_image"] is False for q in panel.questions])
    for policy, name in itertools.product(panel.answers, panel.withouts):
        clean, without = (panel.column(policy, asked, "correct") for asked in ("clean", name))
        if suffices.any() and name == panel.without:  # a model may fail without a picture for want of practice alone
            entries.append({"check": f"{policy}: worth of the picture ({name}) where the text suffices", "truth": 0.0,
                            **paired(clean[suffices] - without[suffices])})
        for group in sorted(BLIND_BEST.keys() & set(groups)):
            n, k, best = int((groups == group).sum()), int(without[groups == group].sum()), BLIND_BEST[group]
            entries.append({"check": f"{policy}: right on {group} without the picture ({name}), at most", "truth": best, "p": tail(k, n, best),
                            "value": k / n, "ci95": wilson(k, n), "n": n})
    for entry, p in zip(entries, holm([entry["p"] for entry in entries])):
        entry |= {"p_holm": p, "passed": p >= 0.01}
    return entries


# In words and tables


def percent(x: float) -> str:
    return f"{100 * x:.1f}%".replace("-", "\N{MINUS SIGN}")


def points(x: float) -> str:
    return f"{100 * x:+.1f}".replace("-", "\N{MINUS SIGN}")


def interval(ci: Sequence[float], form=percent) -> str:
    return "[{}, {}]".format(*(form(end).strip("+%") for end in ci))


def value_of(x: Mapping) -> float | None:
    return next(x[key] for key in ("value", "accuracy", "share") if key in x)


def cell(x: Mapping | None, form=percent, n: bool = False) -> tuple[str, str]:
    """A number and its interval, as a table shows them."""
    if not x:
        return "\N{EN DASH}", ""
    if value_of(x) is None:
        return "cannot be told", x.get("reason", "")
    small = interval(x["ci95"], form)
    if n:
        small += f" n = {x['n']}"
        if x.get("seeds", 1) > 1:
            small += f", {x['seeds']} seeds"
    return form(value_of(x)), small


def label(condition: str, runs: Sequence[str]) -> str:
    return shorten(f"{condition} ({len(runs)} seeds)" if len(runs) > 1 else runs[0], 60)


def about_run(r: Mapping, policy: str, source: str) -> dict:
    """All that results.json says of one policy on a source, by measure."""
    found = {}
    for key, policies in r.items():
        if isinstance(policies, Mapping) and source in policies.get(policy, ()):
            found[key] = policies[policy][source]
    return found


def abouts(r: Mapping, source: str) -> dict[str, dict]:
    """Of the base and of each condition, its seeds pooled: label -> measure -> what came of it."""
    out = {"base": about_run(r, "base", source)}
    for condition, sources in r["pooled"].items():
        if source in sources:
            out[label(condition, sources[source]["runs"])] = sources[source]
    return out


def single_runs(r: Mapping, source: str) -> dict[str, dict]:
    """The same of each run of the conditions that have several: the page folds these."""
    out = {}
    for sources in r["pooled"].values():
        runs = sources[source]["runs"] if source in sources else []
        if len(runs) > 1:
            out |= {run: about_run(r, run, source) for run in runs}
    return out


def verdict(name: str, source: str, gain: Mapping) -> str:
    """One policy's gain in words; what it claims, an interval shows."""
    said = {part: f"{points(gain[part]['value'])} points {interval(gain[part]['ci95'], points)}" for part in ("total", "visual")
            if part in gain and gain[part]["value"] is not None}
    (low, high), surviving = gain["total"]["ci95"], next(iter(gain["surviving_share"].values()))
    if low <= 0 <= high or gain["total"].get("p_holm", 0) >= 0.05:
        visual = gain.get("visual", {}).get("ci95")
        return (f"{name} cannot be told from the base on {source}: {said['total']}, n = {gain['total']['n']}."
                + (f" But the visual part differs: {said['visual']}." if visual and not visual[0] <= 0 <= visual[1] else ""))
    text = f"{name} {'gains' if low > 0 else 'loses'} {said['total']} against the base on {source}, n = {gain['total']['n']}."
    if high < 0:
        return text
    if surviving["value"] is None:
        return f"{text} How much of it needs the picture cannot be told: {surviving['reason']}."
    text += " Form, or right without the picture too, is " + " or ".join(
        f"{percent(x['value'])} {interval(x['ci95'])} of that ({name})" for name, x in gain["surviving_share"].items()) + ";"
    visual = [part["visual"]["ci95"] for part in gain["without"].values()]  # each input without a picture has to agree
    if all(low > 0 for low, _ in visual):
        return f"{text} {said['visual']} need it."
    if all(high < 0 for _, high in visual):
        return f"{text} it leans less on the picture than the base does: {said['visual']}."
    return f"{text} that a part needs it is not shown: " + " or ".join(
        f"{points(x['visual']['value'])} points {interval(x['visual']['ci95'], points)} ({name})" for name, x in gain["without"].items()) + "."


def dependence(name: str, source: str, about: Mapping) -> dict:
    """Whether a policy depends on the picture, in words: what the test says of each input without a picture, corrected by Holm."""
    worths = about.get("picture_worth", {})
    text = f"Right with the picture: {' '.join(cell(about['accuracy']['clean']))}"
    shown = []
    for asked, x in worths.items():
        shown.append(math.copysign(x["p_holm"] < 0.05, x["value"]))
        text += (f"; without it ({asked}) {' '.join(cell(about['accuracy'][asked]))}, a difference of {points(x['value'])} points "
                 f"{interval(x['ci95'], points)}, p {x['p_holm']:.2g}")
    if not worths:
        claim = "was not asked without the picture"
    elif min(shown) == 1:
        claim = "depends on the picture"
    elif max(shown) == -1:
        claim = "does better without the picture"
    else:
        claim = "is not shown to depend on the picture"
    return {"name": shorten(name, 60), "source": source, "claim": claim, "text": f"{text}; n = {about['accuracy']['clean']['n']}."}


def headlines(r: Mapping) -> list[dict]:
    """Every condition (seeds pooled) on every source, in words: what the page opens with."""
    rows = []
    for source in r["sources"]:
        for condition, sources in r["pooled"].items():
            if source in sources:
                runs, gain = sources[source]["runs"], sources[source]["gains"]
                name = label(condition, runs)
                text = verdict(name, shorten(source, 60), gain)
                rows.append({"name": name, "runs": runs, "source": source, "gain": gain, "text": text})
    return rows


def measure_name(name: str) -> str:
    """Of a measure by which conditions are compared."""
    parts = {part: f"{part.replace('_', '-')} part of the gain" for part in PARTS}
    return (parts | {"causal_effect": "causal effect of an edit"}).get(name, f"right answers, {name}")


def comparisons(r: Mapping) -> list[dict]:
    """Every two conditions on every source, in words: where they are shown to differ, and where they are not."""
    rows = []
    for condition, references in r["differences"].items():
        for reference, sources in references.items():
            if reference != "base":
                rows += [compared(condition, reference, source, found) for source, found in sources.items()]
    return rows


def compared(condition: str, reference: str, source: str, found: Mapping[str, Mapping]) -> dict:
    differ, rest = [], []
    for name, x in found.items():
        said = f"{measure_name(name)} {points(x['value'])} points {interval(x['ci95'], points)}"
        if x["p_holm"] < 0.05:
            differ.append(f"{said}, p {x['p_holm']:.2g}")
        else:
            rest.append(said)
    seeds = len(found["clean"]["by_seed"])
    claim = "differs from" if differ else "is not shown to differ from"
    text = f"{'; '.join(differ)}. " if differ else ""
    if rest:
        text += f"No difference is shown in {'; '.join(rest)}. "
    text += f"n = {found['clean']['n']}, {seeds} seeds, paired." if seeds > 1 else (
        f"n = {found['clean']['n']}, one seed: the luck of a run is not covered.")
    name = f"{shorten(condition, 60)} {claim} {shorten(reference, 60)} on {shorten(source, 60)}"
    return {"condition": condition, "reference": reference, "source": source, "claim": name, "text": text}


def table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence]], fold: str | None = None, kind: str = "") -> dict:
    """`kind`: heat colours the cells by their share, prose lets them wrap."""
    return {"caption": caption, "columns": columns, "rows": rows, "fold": fold, "kind": kind}


def matrix_table(r: Mapping, source: str, rows: Mapping[str, Mapping], fold: str | None = None) -> dict:
    about = r["sources"][source]
    cells = [(name, [cell(x["accuracy"].get(asked)) for asked in about["inputs"]]) for name, x in rows.items()]
    return table(f"{source}: right answers with 95% intervals, n = {about['n']} questions in every cell",
                 ["trained", *about["inputs"]], cells, fold, "heat")


def gain_table(r: Mapping, source: str, rows: Mapping[str, Mapping], fold: str | None = None) -> dict:
    gains = {name: x["gains"] for name, x in rows.items() if "gains" in x}
    withouts = list(next(iter(gains.values()))["surviving_share"]) if gains else []
    cells = []
    for name, gain in gains.items():
        parts = [cell(gain.get(part), points) for part in ("total", *PARTS)]
        cells.append((name, parts + [cell(gain["surviving_share"].get(x)) for x in withouts]))
    return table(f"{source}: gain over the base in points with 95% intervals, n = {r['sources'][source]['n']}",
                 ["policy", "total", "format", "image-free", "visual", *(f"survives without the picture ({x})" for x in withouts)], cells, fold)


def comparisons_of(r: Mapping, source: str) -> dict[str, Mapping[str, Mapping]]:
    """Comparison -> measure -> difference, on one source."""
    out = {}
    for condition, references in r["differences"].items():
        for reference, sources in references.items():
            if source in sources:
                out[f"{condition} \N{MINUS SIGN} {reference}"] = sources[source]
    return out


def differences_table(r: Mapping, source: str) -> dict:
    found = comparisons_of(r, source)
    names = list(dict.fromkeys(name for measures in found.values() for name in measures))
    n = r["sources"][source]["n"]
    rows = []
    for comparison, measures in found.items():
        cells = []
        for name in names:
            text, small = cell(measures.get(name), points, n=measures.get(name, {}).get("n", n) != n)
            cells.append((text, f"{small} p {measures[name]['p_holm']:.2g}" if name in measures else small))
        seeds = len(measures["clean"]["by_seed"])
        rows.append((f"{comparison}, {seeds} seed{'s' * (seeds > 1)}", cells))
    return table(f"{source}: differences in points, paired by seed, 95% intervals, p corrected by Holm, n = {n}",
                 ["comparison", *map(measure_name, names)], rows)


def seeds_table(r: Mapping, source: str) -> dict:
    found = comparisons_of(r, source)
    names = list(dict.fromkeys(name for measures in found.values() for name in measures if name != "clean"))
    rows = []
    for comparison, measures in found.items():
        for seed, one in measures["clean"]["within_seed"].items():
            could = points(one["detectable"]).strip("+") if one["detectable"] else "none"
            cells = [cell(one, points), *((str(text), "") for text in (one["only_one"], one["only_two"], f"{one['p']:.2g}", could))]
            for name in names:
                value = measures.get(name, {}).get("by_seed", {}).get(seed)
                cells.append(("\N{EN DASH}" if value is None else points(value), ""))
            rows.append((f"{comparison}, seed {seed}" if seed else comparison, cells))
    return table(f"{source}: differences in points; p of McNemar's exact test on clean input, not corrected, n = {r['sources'][source]['n']}",
                 ["comparison", "right answers, clean", "only it right", "only the other", "p", "shown in 80%", *map(measure_name, names)], rows,
                 "Seed by seed")


def number(x: float) -> str:
    return f"{x:+.2f}".replace("-", "\N{MINUS SIGN}")


def looking_table(r: Mapping, source: str, rows: Mapping[str, Mapping], fold: str | None = None) -> dict:
    """Dependence on the picture, and form."""
    about = r["sources"][source]
    looks_at = {"strict accuracy": "strict", "visual information, nats": "visual_information", "visual tokens": "visual_tokens",
                "follows a swapped picture": "follows_picture", "causal effect of an edit": "causal_effect", "flips": "flips",
                "stays": "stays", "well formed": "well_formed", "no answer found": "unparsed", "cut short": "truncated", "tokens": "length"}
    if about["without_picture"]:
        looks_at = {f"worth of the picture ({about['without_picture']}), points": "picture_worth", **looks_at}
    forms = {"picture_worth": points, "visual_information": number, "length": "{:.1f}".format}
    cells = []
    for name, x in rows.items():
        row = []
        for key in looks_at.values():
            found = x.get(key, {})
            found = found.get("clean", found.get(about["without_picture"], found))
            row.append(cell(found, forms.get(key, percent), n=bool(found) and found["n"] != about["n"]))
        cells.append((name, row))
    return table(f"{source}: 95% intervals, n = {about['n']} where nothing else is said", ["policy", *looks_at], cells, fold)


def source_tables(r: Mapping, source: str) -> list[dict]:
    """Folded: each run, where in an answer the picture counts, how answers are distributed, by group, words, answers against the right ones."""
    n, rows, runs = r["sources"][source]["n"], abouts(r, source), single_runs(r, source)
    tables = [looking_table(r, source, runs, "Each run")] if runs else []
    fading = [(name, [cell(x["fading"].get(f"fifth {k + 1}"), number) for k in range(FIFTHS)]) for name, x in rows.items() if "fading" in x]
    changed = list(dict.fromkeys(asked for x in rows.values() for asked in x.get("changes", {})))
    changes = [(name, [cell(x.get("changes", {}).get(asked)) for asked in changed]) for name, x in rows.items()]
    spread = {"distance from the right answers (total variation)": "total_variation", "leaning to the majority's answer": "leaning",
              "distance of the letters": "letter_bias", "entropy, bits": "entropy", "entropy of the right answers, bits": "entropy_right"}
    spreads = []
    for policy in r["sources"][source]["policies"]:
        for asked, x in r["distribution"][policy][source].items():
            spreads.append((f"{policy}, {asked}", [cell(x.get(key), number if "entropy" in key else percent) for key in spread.values()]))
    return tables + [
        table(f"{source}: nats a token in each fifth of the answers to intact questions, 95% intervals, n = {n}",
              ["policy", *(f"fifth {k + 1}" for k in range(FIFTHS))], fading, "Where in the answer the picture counts"),
        table(f"{source}: answers that are others than with the intact picture, 95% intervals, n = {n}",
              ["policy", *changed], changes, "Answers that change with the picture"),
        table(f"{source}: each run, 95% intervals, n = {n}", ["", *spread], spreads, "How answers are distributed"),
        *detail_tables(r, source, rows)]


def detail_tables(r: Mapping, source: str, rows: Mapping[str, Mapping]) -> list[dict]:
    """A column for each input on which base and conditions were asked without the picture, or with it."""
    asked = [(x, name, key) for name, x in rows.items() for key in x["length"]]
    heads = ["", *(f"{name}, {key}" for _, name, key in asked)]
    words_of = {"True": "needs the picture", "False": "needs no picture"}
    groups = []
    for kind, values in rows["base"]["breakdown"].items():
        for value in values:
            title = words_of.get(value, value) if kind == "needs_image" else value
            groups.append((title, [cell(x["breakdown"][kind][value].get(key), n=True) for x, _, key in asked]))
    words = [(what, [cell(x["says"][key][what]) for x, _, key in asked]) for what in SAYS]
    given = []
    for group, rights in r["gold"]["base"][source].items():
        for text, right in rights.items():
            cells = [cell(x["answers"][key][group][text]) for x, _, key in asked]
            given.append((f"{group}: {text}", [cell(right, n=True), *cells]))
    return [table(f"{source}: right answers, 95% intervals", heads, groups, "By group, and by whether the picture is needed"),
            table(f"{source}: responses with such words, 95% intervals, n = {r['sources'][source]['n']}", heads, words, "What the responses say"),
            table(f"{source}: how often each answer is right, and is given, 95% intervals; the most frequent right ones of each group",
                  ["", "right", *heads[1:]], given, "Answers given, against the right ones")]


def card_table(r: Mapping) -> dict:
    """One line a benchmark: what it asks for, and what blind answers are worth."""
    shares = {"always the majority's answer": "majority", "base, blank": "blank", "base, removed": "removed", "base, one of these": "unseen", "nobody, ever": "strict",
              "said to need the picture": "said_to_need_the_picture", "not said": "need_unknown"}
    types = lambda x: ", ".join(f"{name} {percent(y['share'])}" for name, y in x["types"].items())
    choice = lambda x: (percent(x["one_choice"]["expected"]), f"n = {x['one_choice']['n']}") if "one_choice" in x else cell(None)
    cards = {source: x | {"strict": r["strict_subset"][source]} for source, x in r["card"].items()}
    rows = [(source, [(str(x["n"]), ""), (str(x["groups"]), ""), (types(x), ""), choice(x), *(cell(x.get(key)) for key in shares.values())])
            for source, x in cards.items()]
    return table("right without looking, 95% intervals; n questions", ["benchmark", "n", "groups", "answers", "a blind choice", *shares], rows)


def claims_table(r: Mapping, asked: bool) -> dict:
    """Claims with answers to judge them by; or folded the others, with what they lack."""
    rows = []
    for c in (c for c in r["claims"] if bool(c["n"]) == asked):
        decides = f"about n = {c['n_decides']:,} would decide" if c.get("n_decides") else c.get("reason", "")
        mark = {"reproduced": "\N{CHECK MARK} ", "contradicted": "\N{BALLOT X} "}.get(c["verdict"], "? ")
        named = [c.get("damage")] * bool(c.get("damage")) + [f"asked {c.get('input')}"] * (c.get("input") in NO_PICTURE)
        where = f"{c['benchmark'] or 'any'} ({', '.join(named)})" if named else c["benchmark"] or "any"
        rows.append((c["text"], [(c["source"], ""), (where, ""), cell(c.get("found"), points, n=True), (mark + c["verdict"], decides)]))
    return table("differences of accuracy in points, 95% intervals; each verdict stands alone, they are not corrected for their number",
                 ["claim", "who says so", "on", "found here", "verdict"], rows,
                 None if asked else f"{len(rows)} claims that this study cannot decide", "prose")


def check_table(r: Mapping) -> dict:
    entries = r["instrument_check"]["entries"]
    said, form = lambda e: "\N{CHECK MARK} passed" if e["passed"] else "\N{BALLOT X} failed", lambda e: number if "unit" in e else percent
    return table("in percent, information in nats; 95% intervals", ["measurement", "truth or limit", "found", "verdict"], [
        (e["check"], [(form(e)(e["truth"]), ""), cell(e, form(e), n=True), (said(e), "")]) for e in entries], f"All {len(entries)} measurements")


# Drawings


def svg(width: float, height: float, title: str, description: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>{}</svg>').format(
        width, height, visible(title), visible(title), visible(description), Markup("").join(parts))


def draw(tag: str, text: str = "", **attributes) -> Markup:
    """An SVG element; what comes from outside is escaped."""
    pairs = Markup(" ").join(Markup('{}="{}"').format(key.rstrip("_"), f"{value:.1f}" if isinstance(value, float) else value)
                             for key, value in attributes.items())
    return Markup("<{0} {1}>{2}</{0}>").format(tag, pairs, visible(text))


def gain_chart(rows: Sequence[Mapping], source: str) -> Markup:
    """For each policy its parts end to end (negative ones to the left), and below each part with its interval."""
    width, each, margin, parts = 380, 80, 10, []
    reach = [sum(sign * max(0, sign * row["gain"][part]["value"]) for part in PARTS) for row in rows for sign in (-1, 1)]
    reach += [end for row in rows for part in ("total", *PARTS) for end in row["gain"][part]["ci95"]]
    low, high = min(0.0, *reach), max(0.01, *reach)
    x = lambda value: margin + (value - low) / (high - low) * (width - 2 * margin)
    step, bottom = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if high - low <= 6 * s), each * len(rows)
    for k in range(math.ceil(low / step), math.floor(high / step) + 1):
        at, label = x(k * step), f"{100 * k * step:+.0f}".replace("-", "\N{MINUS SIGN}") if k else "0"
        parts += [draw("line", x1=at, x2=at, y1=4, y2=bottom, class_="grid" if k else "zero"),
                  draw("text", label, x=min(max(at, 14.0), width - 14.0), y=bottom + 14, class_="tick")]
    for i, row in enumerate(rows):
        top, ends = i * each, {True: 0.0, False: 0.0}
        parts += [draw("text", shorten(row["name"], 30), x=margin, y=top + 14, class_="name"),
                  draw("text", " ".join(cell(row["gain"]["total"], points)), x=width - margin, y=top + 14, class_="total")]
        for k, part in enumerate(PARTS):
            value, (left, right) = row["gain"][part]["value"], row["gain"][part]["ci95"]
            start, ends[value > 0] = ends[value > 0], ends[value > 0] + value
            a, b, y = *sorted((x(start), x(start + value))), top + 48.0 + 9 * k
            parts += [draw("rect", x=a, y=top + 22, width=b - a, height=17, class_=f"part {part}"),
                      draw("line", x1=x(left), x2=x(right), y1=y, y2=y, class_=f"whisker {part}"),
                      draw("circle", cx=x(value), cy=y, r=3.5, class_=f"part {part}")]
    return svg(width, bottom + 18, f"Gain over the base on {source} in points", " ".join(row["text"] for row in rows), parts)


def line_chart(title: str, x_label: str, series: Sequence[Mapping]) -> Markup:
    """Shares over a common axis; each of `series` has label, look (classes), x, y and maybe low and high, its interval."""
    width, height, left, right, above, below = 340, 220, 40, 16, 8, 36
    x0, x1 = (end(value for s in series for value in s["x"]) for end in (min, max))
    x = lambda value: left + (value - x0) / (x1 - x0 or 1) * (width - left - right)
    y = lambda value: height - below - min(max(value, 0), 1) * (height - above - below)
    join = lambda xs, ys: " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys))
    parts = [draw("text", x_label, x=(left + width - right) / 2, y=height - 4, class_="tick")]
    middle = float(f"{(x0 + x1) / 2:.1g}")
    parts += [draw("text", f"{t:g}", x=x(t), y=height - below + 16, class_="tick") for t in (x0, *[middle] * (x0 < middle < x1), x1)]
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [draw("line", x1=left, x2=width - right, y1=y(t), y2=y(t), class_="grid"),
                  draw("text", f"{t:.0%}", x=left - 6, y=y(t) + 4, class_="tick end")]
    for s in series:
        if "low" in s:
            around = f"{join(s['x'], s['low'])} {join(s['x'][::-1], s['high'][::-1])}"
            parts.append(draw("polygon", points=around, class_=f"band {s['look']}"))
            parts += [draw("circle", cx=x(a), cy=y(b), r=3.0, class_=f"dot {s['look']}") for a, b in zip(s["x"], s["y"])]
        parts.append(draw("polyline", points=join(s["x"], s["y"]), class_=f"line {s['look']}"))
    said = "; ".join(f"{s['label']}: from {percent(s['y'][0])} to {percent(s['y'][-1])}" for s in series)
    return svg(width, height, title, said, parts)


def looks(r: Mapping) -> dict[str, str]:
    """Condition, its label, and each of its runs -> the class that colours it."""
    out = {"base": "k0"}
    for i, (condition, sources) in enumerate(r["pooled"].items(), 1):
        for about in sources.values():
            for name in (condition, label(condition, about["runs"]), *about["runs"]):
                out[name] = f"k{min(i, 7)}"
    return out


def training_charts(data: Path, runs: Iterable[str], look: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Curves of train.jsonl: trailing means over a twentieth of the steps, drawn at 200 points or fewer."""
    keys, curves = ("step", "reward", "correct", "well_formed"), {}
    for path in [path for run in runs if (path := data / "policies" / run / "train.jsonl").exists()]:
        rows = prepare.read_jsonl(path)
        for i, row in enumerate(rows):
            if not all(isinstance(row.get(key), (int, float)) and math.isfinite(row[key]) for key in keys):
                raise UserError(f"{path} row {i + 1} is no step of a training: delete {path.parent} and run 03_train_grpo.py again")
        if rows:
            steps = np.array([[row[key] for key in keys] for row in rows], float).T  # (4, steps)
            window = max(1, len(rows) // 20)
            smooth = [np.convolve(np.pad(y, (window - 1, 0), "edge"), np.ones(window) / window, "valid") for y in steps[1:]]
            curves[path.parent.name] = np.vstack([steps[:1], smooth])[:, :: -(-len(rows) // 200)].tolist()
    series = lambda k: [{"label": run, "look": look[run], "x": curve[0], "y": curve[k]} for run, curve in curves.items()]
    return [(title, line_chart(title, "step", series(k))) for k, title in enumerate(("Reward", "Correct", "Well formed"), 1) if curves]


def stress_charts(r: Mapping, source: str, look: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Accuracy over the severity of blur and occlude, from clean on."""
    charts = []
    for kind, x_label in ("blur", "radius, share of the short side"), ("occlude", "share of the picture hidden"):
        names = ["clean"] + [name for name in r["sources"][source]["inputs"] if name.partition("-")[0] == kind]
        series = []
        for name, about in abouts(r, source).items():
            cells = {severity(asked): about["accuracy"][asked] for asked in names if asked in about["accuracy"]}
            series.append({"label": name, "look": look[name], "x": list(cells), "y": [value_of(x) for x in cells.values()],
                           "low": [x["ci95"][0] for x in cells.values()], "high": [x["ci95"][1] for x in cells.values()]})
        if len(names) > 2:
            title = f"Accuracy under {kind}, {source}, n = {r['sources'][source]['n']}"
            charts.append((title, line_chart(title, x_label, series)))
    return charts


def answer_chart(r: Mapping, source: str, group: str) -> Markup:
    """Bars of the most frequent right answers to a group: how often each is right, and how often each condition gives it."""
    width, left, each, parts = 400, 178, 22, []
    bars = [("right", r["gold"]["base"][source][group])]
    for policy, about in abouts(r, source).items():
        for name in ("clean", r["sources"][source]["without_picture"]):
            if name:
                bars.append((f"{shorten(policy, 18)}, {name}", about["answers"][name][group]))
    for row, (name, shares) in enumerate(bars):
        at, y = float(left), row * each
        parts.append(draw("text", name, x=left - 8, y=y + 15, class_="end"))
        for k, (text, x) in enumerate(shares.items()):
            wide = value_of(x) * (width - left)
            parts.append(draw("rect", x=at, y=y + 2, width=max(0.0, wide - 1), height=each - 4, class_=f"dot k{k}"))
            if wide > 7 * len(text[:8]) + 4:
                parts.append(draw("text", text[:8], x=at + 4, y=y + 15))
            at += wide
    said = "; ".join(f"{name}: " + ", ".join(f"{text} {percent(value_of(x))}" for text, x in shares.items()) for name, shares in bars)
    return svg(width, each * len(bars), f"Answers to {group} of {source}", said, parts)


def small_copy(picture: Image.Image) -> str:
    """At most 160 x 160 pixels and 128 colours, as a data URI."""
    small, buffer = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((160, 160))
    small.quantize(128).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def galleried(panel: Panel) -> list[str]:
    """The base, and of each condition its first run."""
    return ["base", *(next(iter(runs.values())) for runs in panel.conditions.values())]


def gallery(data: Path, panel: Panel, most: int, budget: int, notes: list[str]) -> list[dict]:
    """The first question of each group, under every input, with answers of base and first runs: none is picked for its looks."""
    without_tags = lambda row: row["problem"].replace("<image>", " ").strip()
    firsts, entries = {q["group"]: i for i, q in reversed(list(enumerate(panel.questions)))}, []
    read = lambda name: prepare.read_questions(data / prepare.input_path(panel.source, name), "run 02_corrupt.py again")
    tables = {name: read(name) for name in panel.inputs}
    for i in sorted(firsts.values())[:most]:
        question, shown = panel.questions[i], []
        for name, table in tables.items():
            row = table[table["id"][:].index(question["id"])]
            shown.append({"name": name, "pictures": [Markup(small_copy(picture)) for picture in row["images"][:3]],
                          "text": text if (text := without_tags(row)) != without_tags(question) else "",
                          "answers": {policy: panel.answers[policy][name][i] for policy in galleried(panel) if name in panel.answers[policy]}})
        budget -= sum(len(uri) for each in shown for uri in each["pictures"])
        if budget < 0:
            notes.append(f"the gallery of {panel.source} ends after {len(entries)} questions: more pictures would make the page too large")
            break
        entries.append({"question": question, "text": without_tags(question), "shown": shown})
    return entries


def shaded(row: Mapping, most: int = 1000) -> Markup | str:
    """A response, its tokens shaded by what the picture did for them, and underlined where it made them at least twice as likely."""
    if "pieces" not in row:
        return row["response"]
    span = Markup('<span{} style="--v:{:.0f}">{}</span>')
    told = [(visible(shorten(piece, 60)), float(nats)) for piece, nats in zip(row["pieces"][:most], row["nats"])]
    parts = [span.format(Markup(' class="visual"') * (nats >= VISUAL_NATS), 100 * min(1, nats / 3), piece) if nats >= 0.1 else Markup.escape(piece)
             for piece, nats in told]
    return Markup("").join(parts) + visible(shorten("".join(row["pieces"][most:]), 300))


# The page


def visible(text: str) -> str:
    """Control characters, those that turn the direction of writing, and lone surrogates, as their code."""
    return INVISIBLE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def shorten(text: str, most: int) -> str:
    note = f" ({len(text):,} characters in all)" if most > 60 else ""
    return text if len(text) <= most else text[:most - 1] + "\N{HORIZONTAL ELLIPSIS}" + note


CSS = """
:root{color-scheme:light dark;--page:light-dark(#f6f5f1,#101317);--card:light-dark(#fff,#181c22);--ink:light-dark(#1a1d22,#eceef2);
--soft:light-dark(#565d68,#a9b1bd);--rule:light-dark(#dedbd3,#2d333c);--heat:light-dark(#3f8fe8,#2f7de1);
--accent:light-dark(#0b5cad,#7cb7ff);
--format:light-dark(#848a94,#8d95a1);--image_free:light-dark(#d9822b,#e8984a);--visual:light-dark(#1f6fd0,#4b97f2);
--good:light-dark(#0b6e3f,#5ed39b);--bad:light-dark(#b3261e,#ff8f85);--k0:light-dark(#5b6472,#a7b0bd);--k1:light-dark(#0b62c4,#6cb2ff);
--k2:light-dark(#b8450b,#ff9a62);--k3:light-dark(#0a7550,#4fd1a0);--k4:light-dark(#8a3ea8,#d59bf0);--k5:light-dark(#7a6400,#e0c34a);
--k6:light-dark(#b3266b,#ff8fbf);--k7:light-dark(#3f4c8f,#a9b6ff)}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:1280px;margin:0 auto;padding:0 20px}header{padding-top:44px}footer{padding-bottom:60px}p,dd{max-width:75ch}
h1,h2,.tile b{font-family:Georgia,"Times New Roman",serif;font-weight:600;line-height:1.16}h1{font-size:clamp(1.8rem,4.8vw,3.1rem);
margin:.3em 0 .4em;
max-width:24em;text-wrap:balance}h1 small{display:block;font:400 1rem/1.5 system-ui,sans-serif}h2{font-size:1.55rem;margin:0 0 .3em}
small,figcaption,.soft{color:var(--soft)}section{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:26px;
margin:20px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin:22px 0}
.tile{background:var(--card);border:1px solid var(--rule);border-top:4px solid var(--edge);border-radius:12px;padding:14px 18px}
.tile b{display:block;font-size:2.1rem}.tile small{display:block}.box{border:2px solid;border-radius:12px;padding:10px 18px;margin:18px 0}
.ok{color:var(--good)}.bad{color:var(--bad)}.box.bad{border-width:4px}.box *{color:var(--ink)}.box strong{color:inherit}
a{color:var(--accent)}
.scroll{overflow-x:auto;margin:0 0 16px}.caption,figcaption{font-size:.875rem;margin:14px 0 2px}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}th,td{padding:7px 10px;
text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}td{white-space:nowrap}thead th{vertical-align:bottom}
th:first-child{text-align:left;min-width:8.5em;max-width:16em}tbody th{position:sticky;left:0;background:var(--card)}
td small{display:block;font-size:.75rem}.heat td{background:color-mix(in oklab,var(--heat) calc(var(--h)*.55%),var(--card));
border:2px solid var(--card)}table.heat{font-size:.8rem}.heat :is(th,td){padding:6px 4px}.heat td small{color:var(--ink);font-size:.69rem}
.prose :is(td,th){white-space:normal;text-align:left;min-width:8em;max-width:22em}.prose th:first-child{min-width:14em}.prose td small{white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:22px;align-items:start}figure{margin:0;
min-width:0;max-width:560px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);font:12px system-ui,sans-serif;paint-order:stroke;stroke:var(--card);
stroke-width:3px}svg .tick{fill:var(--soft);font-size:11px;
text-anchor:middle}svg .end,svg .total{text-anchor:end}svg .name,svg .total{font-weight:600}.grid{stroke:var(--rule)}
.zero{stroke:var(--soft)}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}.band{opacity:.13}.whisker{stroke-width:2.5}.wide{stroke-width:10}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 10px;padding:0;list-style:none;font-size:.875rem}
.legend svg{display:inline-block;width:26px;height:10px;margin-right:6px}details{margin:10px 0}summary{cursor:pointer;font-weight:600}
.gallery :is(td,th){text-align:left;vertical-align:top;white-space:normal;min-width:132px;max-width:190px;overflow-wrap:anywhere}
.gallery summary{font-weight:400}.gallery span[style]{background:color-mix(in oklab,var(--heat) calc(var(--v)*.5%),var(--card))}
.visual{text-decoration:underline;text-underline-offset:3px}.gallery details{margin:2px 0}.gallery img,.none{display:block;width:112px;max-height:130px;object-fit:contain;border-radius:6px;
margin-bottom:4px}
.none{border:1px dashed;padding:30px 20px;font-weight:400}.gallery th small{font-weight:400;display:block}
pre,bdi{white-space:pre-wrap;font-size:.8rem;overflow-wrap:anywhere}bdi{unicode-bidi:isolate}
@media(max-width:560px){section{padding:18px 14px}header,main,footer{padding:0 12px}header{padding-top:26px}}
@media print{:root{color-scheme:light}body{font-size:11px;background:none}section,figure,tr{break-inside:avoid}.scroll{overflow:visible}
*{print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}table{font-size:8px}th,td{padding:2px 3px}}
{% for name in parts %}.part.{{ name }}{fill:var(--{{ name }})}.whisker.{{ name }}{stroke:var(--{{ name }})}{% endfor %}
{% for k in range(8) %}.line.k{{ k }}{stroke:var(--k{{ k }})}:is(.band,.dot).k{{ k }}{fill:var(--k{{ k }})}{% endfor %}
"""

PAGE = """{% macro scroll(label) %}<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}">{{ caller() }}</div>
{% endmacro %}
{% macro table(t) %}{% if t.fold %}<details><summary>{{ t.fold }}</summary>{% endif %}<p class="soft caption">{{ t.caption }}</p>
{% call scroll(t.caption) %}<table{% if t.kind %} class="{{ t.kind }}"{% endif %}><thead><tr>{% for name in t.columns %}<th scope="col">{{ name }}
</th>{% endfor %}
</tr></thead><tbody>{% for name, cells in t.rows %}<tr><th scope="row">{{ name }}</th>{% for text, small in cells %}
<td{% if t.kind == "heat" and small %} style="--h:{{ text[:-1] }}"{% endif %}>{{ text }}{% if small %} <small>{{ small }}</small>{% endif %}</td>
{% endfor %}</tr>{% endfor %}</tbody></table>{% endcall %}{% if t.fold %}</details>{% endif %}{% endmacro %}
{% macro key(classes, label) %}<li><svg viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" class="{{ classes }}"/></svg>{{ label }}
</li>{% endmacro %}
{% macro charts(list, policies) %}<ul class="legend">{% for p in policies %}{{ key("line " ~ look[p], p) }}{% endfor %}</ul>
<div class="charts">
{% for title, chart in list %}<figure><figcaption>{{ title }}</figcaption>{{ chart }}</figure>{% endfor %}</div>{% endmacro %}
<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Seeing or guessing</title><style>{{ css }}</style></head><body>
<header><p class="soft">Seeing or guessing: {{ study.model }} model; runs of this study train on {{ study.sources.train }}</p>
{% if leads %}{% set lead = leads[0] %}{% set bare, survives = (lead.gain.surviving_share.items()|list)[0] %}
<h1>{% if survives.value is not none and survives.ci95[0] > 0 %}{{ percent(survives.value) }} of what {{ lead.name }} gained on {{ lead.source }}
survives without the picture ({{ bare }}){% elif survives.value is not none
%}What {{ lead.name }} gained on {{ lead.source }} is not shown to survive without the picture ({{ bare }})
{% else %}{{ lead.name }} on {{ lead.source }}{% endif %}<small>{{ lead.text }}</small></h1>
<div class="tiles">{% for part in ["total"] + parts|list if lead.gain[part] and lead.gain[part].value is not none %}
<div class="tile" style="--edge:var(--{{ part if part in parts else "accent" }})">
<small>{{ parts[part] or "total: gain of " ~ lead.name }}</small>
<b>{{ points(lead.gain[part].value) }}</b><small>points {{ interval(lead.gain[part].ci95, points) }}, n = {{ lead.gain[part].n }}</small>
</div>
{% endfor %}</div>{% else %}{% set lead = depends|last %}<h1>{{ lead.name }} {{ lead.claim }} on {{ lead.source }}<small>{{ lead.text }}</small></h1>
<ul>{% for x in depends if x != lead %}<li>{{ x.name }} {{ x.claim }} on {{ x.source }}. {{ x.text }}</li>{% endfor %}</ul>{% endif %}
{% set check = r.instrument_check %}{% if check.passed %}<div class="box ok"><strong>✓ The instrument check passed.</strong>
<span>{{ check.entries|selectattr("p_holm", "undefined")|list|length }} measurements of simulated policies find the truth within the width of their
interval{% if "shapes" in r.sources %}, and no limit that holds on shapes is shown to be exceeded{% else %}; no answers to shapes were there
to test{% endif %}. <a href="#check">See them</a></span></div>{% else %}
<div class="box bad" role="alert"><strong>✗ The instrument check did not pass: explain this before you believe the split.</strong><ul>
{% for e in check.entries if not e.passed %}<li>{{ e.check }}: {{ number(e.truth) if e.unit else percent(e.truth) }}; found {{ number(e.value) if e.unit else percent(e.value) }}
{{ interval(e.ci95, number if e.unit else percent) }}, n = {{ e.n }}</li>{% endfor %}</ul></div>{% endif %}
{% if compared %}<ul>{% for x in compared %}<li><strong>{{ x.claim }}</strong>. {{ x.text }}</li>{% endfor %}</ul>{% endif %}
<p class="soft">Fingerprint of the graded answers: {{ r.fingerprint[:16] }}; {{ same }}.</p>
{% if r.notes %}<details open><summary>What is missing</summary><ul>{% for note in r.notes %}<li>{{ note }}</li>{% endfor %}</ul>
</details>{% endif %}
</header><main>
{% if heads %}<section><h2>What each gain is made of</h2>
<p>Each policy against the base, on the same questions; each interval by itself, not corrected for their number. What survives
is there without the picture too: blank puts one colour in its place, removed asks the text alone. A policy can be at a loss with either for want
of practice, so that the two differ.</p><ul class="legend">
{% for part, label in parts.items() %}{{ key("whisker wide " ~ part, label) }}
{% endfor %}</ul>{% for source in r.sources %}<div class="charts"><figure><figcaption>{{ source }}: points of accuracy, 95% intervals,
n = {{ r.sources[source].n }}</figcaption>{{ by_source[source].gain_chart }}</figure><ul>{% for head in heads if head.source == source %}
<li>{{ head.text }}</li>
{% endfor %}</ul></div>{% for t in by_source[source].gain %}{{ table(t) }}{% endfor %}{% endfor %}</section>{% endif %}
<section><h2>Trained on, asked about</h2>
<p>Rows were trained differently, columns damage the question. Right is the intact question&rsquo;s answer, also
where the picture was swapped.</p>{% for source in r.sources %}{% for t in by_source[source].matrix %}{{ table(t) }}{% endfor %}{% endfor %}</section>
{% if r.differences %}<section><h2>Which conditions differ</h2><p>Runs of one seed answer the same questions and were trained on the same draws:
conditions are compared seed by seed. With several seeds interval and p cover the choice of questions and the luck of a run (a paired t
test, widened by the choice of questions); with one seed that luck is not covered, and p is McNemar&rsquo;s where answers are right or wrong. p is
corrected for the number of comparisons by the same measure (Holm). Seed by seed, shown in 80%: the smallest difference that 80 of 100
studies of one such seed would show after this correction; none: so few answers differ that no difference would.</p>{% for source in r.sources %}{% for t in by_source[source].differences %}{{ table(t) }}{% endfor %}{% endfor %}
</section>{% endif %}
<section><h2>Do the answers depend on the picture?</h2>
<p>Strict: right with the picture, and not right without it. Visual information: how much likelier
the right answer is with the picture than without. Follows: answers that fit a swapped picture, less those that fit the picture not shown;
who never looks
gets 0.</p><ul>{% for x in depends %}<li>{{ x.name }} {{ x.claim }} on {{ x.source }}. {{ x.text }}</li>{% endfor %}</ul>{% for source in r.sources %}{% set drawn = by_source[source] %}{% if drawn.runs %}<details><summary>Each run</summary><ul>
{% for x in drawn.runs %}<li>{{ x.name }} {{ x.claim }} on {{ x.source }}. {{ x.text }}</li>{% endfor %}</ul></details>{% endif %}
{{ table(drawn.looking) }}{% if drawn.stress %}{{ charts(drawn.stress, drawn.labels) }}{% endif %}
<h3>What is answered, and what is right</h3><p class="soft caption">The most frequent right
answers of the first eight groups, with the picture and without; n and intervals in the last table below.</p><div class="charts">{% for title, chart in
drawn.answers %}<figure><figcaption>{{ title }}</figcaption>{{ chart }}</figure>{% endfor %}</div>
{% for t in drawn.tables %}{{ table(t) }}{% endfor %}{% endfor %}</section>
<section><h2>Do the benchmarks need the picture?</h2>
<p>What blind answers are worth: a benchmark whose base does as well without the picture cannot show that anyone looks.</p>{{ table(card) }}
</section>
{% if heads %}<section><h2>What was claimed, and what this study says</h2><p>Each claim has a test that was fixed before any
run (below). The verdict is on this study&rsquo;s model and data. {{ protocol }}</p>{% for t in claims %}{{ table(t) }}{% endfor %}
<details><summary>The tests</summary><ul>{% for id, test in tests_of.items() %}<li>{{ id }}: {{ test }}</li>{% endfor %}</ul></details></section>
{% endif %}{% if training %}<section><h2>How training went</h2>
<p>Means over the sampled completions of a step, on the questions as each policy saw them, smoothed
over a twentieth of the steps, a line for each run: a record, not a measurement.</p>{{ charts(training, trained) }}</section>{% endif %}
<section><h2>See for yourself</h2><p>The first questions of the first {{ most }} groups under everything that was done to them, as the base and
the first run of each condition answered. Single cases illustrate; they
prove nothing.
</p>{% for source, entries in galleries.items() %}{% for entry in entries %}<details{{ " open" if loop.first }}>
<summary>{{ source }}, {{ entry.question.group }}</summary><p><bdi dir="auto">{{ entry.text }}</bdi><br>
<small>{{ entry.question.id }}, right answer: <bdi>{{ entry.question.answer|cut(60) }}</bdi></small></p>
{% call scroll("answers to " ~ entry.question.id) %}<table class="gallery"><thead><tr><th scope="col">policy</th>
{% for shown in entry.shown %}
<th scope="col">{% for uri in shown.pictures %}<img src="{{ uri }}" alt="{{ entry.question.id }}, {{ shown.name }}">{% else %}
<span class="none">no picture</span>{% endfor %}{{ shown.name }}{% if shown.text %}<details><summary>its text</summary><bdi dir="auto">{{ shown.text|cut(300) }}</bdi></details>{% endif %}
</th>{% endfor %}</tr></thead><tbody>{% for policy in galleried[source] %}<tr><th scope="row">{{ policy }}</th>
{% for shown in entry.shown %}
<td>{% set a = shown.answers[policy] %}{% if a %}
<span class="{{ "ok" if a.correct else "bad" }}">{{ "✓ right" if a.correct else "✗ wrong" }}</span>:
<bdi dir="auto">{{ (a.answer or "no answer")|cut(40) }}</bdi><details><summary>response</summary><bdi dir="auto">{{ shaded(a) }}</bdi>
</details>
{% endif %}</td>{% endfor %}</tr>{% endfor %}</tbody></table>{% endcall %}</details>{% endfor %}{% endfor %}</section>
<section id="check"><h2>Does the instrument work?</h2>
<p>Simulated policies that change in one respect, by a known amount, go through the same functions
as the real ones: the whole gain must land in one part, nothing in the others. On shapes, what must hold for every policy is tested.</p>{{
table(checks) }}
<details><summary>How each number is computed</summary>{% for name, text in how %}<h3>{{ name }}</h3><pre>{{ text }}</pre>{% endfor %}
</details>
<details><summary>Where it comes from: settings, versions, seeds, hashes</summary><pre>{{ provenance }}</pre></details></section></main>
<footer><p class="soft">Intervals are at 95%. With one seed they cover the choice of questions, not the luck of a training run;
with several, that too. All numbers: results.json. Tables to paste: tables.md.</p></footer></body></html>"""

EXPLAINED = {"Intervals of shares": wilson, "Intervals of differences": estimate, "Several seeds, and conditions seed by seed": over_runs, "p over several seeds": p_over_runs, "Paired tests": mcnemar,
             "Many tests": holm, "Parts of a gain": split_gain, "The format part": form_part,
             "Strict accuracy, visual information": observe, "How answers are distributed": distribution, "Distances between distributions": distance, "Entropies": corrected,
             "What n can show": detectable, "What a benchmark is like": card, "Claims and their verdicts": judge,
             "What is compared": compare, "The fingerprint": fingerprint, "The majority's answer": Panel.majority,
             "Follows a swapped picture": net_following, "Causal effect of an edit": causal_effect, "Words that come from the picture": observe_tokens,
             "The strict subset": strict_subset, "Instrument check, simulated": check_measures,
             "Instrument check, on shapes": check_shapes}


def markdown(tables: Iterable[Mapping]) -> str:
    """Tables to paste; what comes from outside stays text."""
    plain = lambda text: re.sub(r"([|<>&`*_\[\]\\])", r"\\\1", " ".join(visible(shorten(text, 120)).split()))
    line = lambda cells: f"| {' | '.join(cells)} |\n"
    brackets = lambda text: plain(text).replace("\\[", "[").replace("\\]", "]")  # of intervals; without a target they are no link
    both = lambda cell: plain(cell[0]) + ("; " if cell[0] == "cannot be told" else " ") * bool(cell[1]) + brackets(cell[1])
    return "\n".join(f"{plain(t['caption'])}\n\n" + line(map(plain, t["columns"])) + line(["---"] + ["---:"] * (len(t["columns"]) - 1))
                     + "".join(line([plain(name), *(both(cell) for cell in cells)]) for name, cells in t["rows"]) for t in tables)


def latex(t: Mapping) -> str:
    """The same table for a paper: rows, columns, intervals below the numbers; packages booktabs, makecell."""
    codes = {"\\": r"\textbackslash{}", "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    plain = lambda text: "".join(codes.get(c, "\\" + c if c in "&%$#_{}" else c) for c in " ".join(visible(shorten(text, 120)).split()))
    pair = lambda cell: rf"\makecell{{{plain(cell[0])} \\ {{\scriptsize {plain(cell[1])}}}}}" if cell[1] else plain(cell[0])
    line = lambda cells: "{}" + " & ".join(cells) + r" \\" + "\n"  # {}: a row may begin with a bracket
    body = "".join(line([plain(name), *map(pair, cells)]) for name, cells in t["rows"])
    return (f"% {plain(t['caption'])}\n\\begin{{tabular}}{{l{'r' * (len(t['columns']) - 1)}}}\n\\toprule\n"
            + line(map(plain, t["columns"])) + "\\midrule\n" + body + "\\bottomrule\n\\end{tabular}\n")


def render(data: Path, study: Mapping, panels: Sequence[Panel], r: dict, most: int) -> str:
    plain = lambda text: Markup.escape(visible(text))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=lambda x: (
        visible(shorten(x, 600)) if isinstance(x, str) and not isinstance(x, Markup) else x))
    environment.filters["cut"] = shorten
    look, heads, runs = looks(r), headlines(r), r["provenance"]["policies"]
    galleries = {panel.source: gallery(data, panel, most, GALLERY_CHARACTERS // len(panels), r["notes"]) for panel in panels}
    by_source = {panel.source: drawn_of(r, panel, heads, look) for panel in panels}
    return environment.from_string(PAGE).render(
        most=most, css=Markup(environment.from_string(CSS).render(parts=PARTS)), r=r, study=study, heads=heads, parts=PARTS, look=look,
        leads=[head for head in heads if set(head["runs"]) <= set(runs)], compared=comparisons(r), depends=r["dependence"],
        by_source=by_source, galleries=galleries, galleried={panel.source: galleried(panel) for panel in panels},
        trained=[condition for condition in r["pooled"] if any(family(run) == condition for run in runs)],
        training=training_charts(data, sorted(runs, key=policy_order), look), claims=[claims_table(r, True), claims_table(r, False)],
        card=card_table(r), protocol=PROTOCOL, tests_of={claim.id: test_of(claim) for claim in CLAIMS}, checks=check_table(r),
        shaded=shaded, number=number, percent=percent, points=points, interval=interval, same=same_study(r["fingerprint"]),
        how=[(name, plain(inspect.getdoc(function))) for name, function in EXPLAINED.items()],
        provenance=plain(json.dumps(r["provenance"], indent=1)))


def drawn_of(r: Mapping, panel: Panel, heads: Sequence[Mapping], look: Mapping[str, str]) -> dict:
    """Tables and charts of one source."""
    source = panel.source
    rows, runs = abouts(r, source), single_runs(r, source)
    gains = {run: {"gains": about["gains"]} for run, about in runs.items()}
    split = [head for head in heads if head["source"] == source and head["gain"].get("visual", {}).get("value") is not None]
    folded = [matrix_table(r, source, runs, "Each run"), gain_table(r, source, gains, "Each run")] if runs else []
    return {"labels": list(rows), "matrix": [matrix_table(r, source, rows), *folded[:1]],
            "gain": [gain_table(r, source, rows), *folded[1:]], "gain_chart": gain_chart(split, source) if split else "",
            "differences": [differences_table(r, source), seeds_table(r, source)] if len(rows) > 1 else [],
            "looking": looking_table(r, source, rows), "tables": source_tables(r, source), "stress": stress_charts(r, source, look),
            "runs": [dependence(name, source, about) for name, about in runs.items()],
            "answers": [(group, answer_chart(r, source, group)) for group in list(r["gold"]["base"][source])[:8]]}


def main(config: Config) -> dict:
    """Measure, draw and write; returns what results.json holds."""
    data, notes, checked, lines = Path(config.data), [], {}, []
    prepare.check_least(config, 40, "resamples")  # for there to be a share of 2.5% at either end
    prepare.check_least(config, 0, "gallery")
    study = prepare.load_study(data)
    panels = load_panels(data, study, config.resamples, notes, checked, lines)
    runs = sorted({policy for panel in panels for policy in panel.answers if (data / "policies" / policy / "config.json").exists()},
                  key=policy_order)
    results = collect(panels, study) | {"fingerprint": fingerprint(lines), "notes": notes, "provenance": {
        "study": study, "policies": {run: prepare.read_json(data / "policies" / run / "config.json", {}, "delete it and run 03_train_grpo.py again") for run in runs},
        "resamples": config.resamples, "versions": prepare.versions(), "inputs": dict(sorted(checked.items()))}}
    results["dependence"] = []
    for source in results["sources"]:
        results["dependence"] += [dependence(name, source, about) for name, about in abouts(results, source).items()]
    page = render(data, study, panels, results, config.gallery)
    subsets = {f"strict-{source}.json": json.dumps({"source": source, "made_by": inspect.getdoc(strict_subset), "policies": results["sources"][source]["policies"],
                                                    **chosen}, indent=1) for source, chosen in results["strict_subset"].items()}
    files = {"index.html": page, "tables.md": tables_to_paste(results), "results.json": json.dumps(results, indent=1), **subsets}
    with prepare.locked(data / "report"):
        for name, text in files.items():
            with prepare.replacing(data / "report" / name) as part:
                part.write_text(text, encoding="utf-8")
    print(f"{data / 'report' / 'index.html'}: {len(page) / 1e6:.1f} MB" + "".join(f"\nnote: {visible(note)}" for note in notes))
    print(f"fingerprint {results['fingerprint'][:16]}: {same_study(results['fingerprint'])}")
    return results


def tables_to_paste(r: Mapping) -> str:
    """tables.md: the main tables, in Markdown and for LaTeX."""
    main_tables, single = [], []
    for source in r["sources"]:
        rows, runs = abouts(r, source), single_runs(r, source)
        main_tables += [matrix_table(r, source, rows), gain_table(r, source, rows)]
        if r["differences"]:
            main_tables.append(differences_table(r, source))
        main_tables.append(looking_table(r, source, rows))
        if runs:
            single += [matrix_table(r, source, runs), gain_table(r, source, runs), looking_table(r, source, runs)]
        if r["differences"]:
            single.append(seeds_table(r, source))
    text = f"Fingerprint {r['fingerprint'][:16]}: {same_study(r['fingerprint'])}.\n\n"
    text += markdown([*main_tables, claims_table(r, True), card_table(r), *single])
    return text + "\nFor LaTeX (booktabs, makecell):\n\n```latex\n" + "\n".join(map(latex, main_tables)) + "```\n"


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
