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
import importlib
import inspect
import io
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")

import jinja2
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
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # the same of Student's t, by degrees of freedom from 1 on
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


def paired(one: np.ndarray, two: np.ndarray) -> dict:
    """Difference of two shares of the same n questions, one, two (n,) in {0, 1}: value, 95% interval, exact p.

    With f and k the questions that only one of the two got right, half an answer more in each of the four cells: (f - k) / (n + 2) +-
    z sqrt(f + k - (f - k)^2 / (n + 2)) / (n + 2) (Agresti and Min, Statistics in Medicine 2005). A bootstrap of few such questions would be
    too sure, of none altogether.
    """
    only_one, only_two, n = int((one > two).sum()), int((two > one).sum()), len(one)
    f, k = only_one + 0.5, only_two + 0.5
    middle, half = (f - k) / (n + 2), Z * math.sqrt(f + k - (f - k) ** 2 / (n + 2)) / (n + 2)
    return {"value": (only_one - only_two) / n, "ci95": [max(-1.0, middle - half), min(1.0, middle + half)], "n": n,
            "p": mcnemar(only_one, only_two), "only_one": only_one, "only_two": only_two}


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


def split_gain(weights: np.ndarray, strata: np.ndarray, base: Mapping, runs: Sequence[Mapping], withouts: Sequence[str],
               drawn: np.ndarray = np.ones((1, 1))) -> dict:
    """A policy's gain over the base in accuracy, and what it is made of.

        total       accuracy(policy) - accuracy(base) on clean input
        format      `form_part` on clean input
        image_free  the same difference on the first of the inputs `withouts` a picture, less `form_part` there
        visual      total - format - image_free
        surviving   (format + image_free) / total, by input without a picture; told only where total's interval is above 0

    Whoever learns the form alone gets image_free = visual = 0; whoever learns to guess or to reason from the text alone
    gets visual = 0; whoever stops looking gets visual < 0. The visual part is gone when the picture is gone: it is better
    sight, or better use of what is seen. `base`, and each of the `runs` whose mean it is: input -> (correct, formed), each (n,);
    `drawn` (R, runs): the weight of each run in each resample.
    """
    n, gain, form = len(strata), {}, {}
    for name in ("clean", *withouts):
        correct, formed = base[name]
        mean = lambda parts: np.clip(sum(drawn[:, k] * part for k, part in enumerate(parts)), -1, 1)
        gain[name] = mean(weights @ (run[name][0] - correct) for run in runs)
        form[name] = mean(form_part(weights, strata, correct, formed, run[name][1]) for run in runs)
    total, out = gain["clean"], {"total": estimate(gain["clean"], n), "format": estimate(form["clean"], n)}
    if len(runs) == 1:
        out["total"] = paired(runs[0]["clean"][0], base["clean"][0])
    parts = {name: {"image_free": estimate(gain[name] - form[name], n),
                    "visual": estimate(total - form["clean"] - gain[name] + form[name], n)} for name in withouts}
    out |= parts[withouts[0]] if withouts else {}
    reason = None
    if not withouts:
        reason = "no answers without a picture"
    elif out["visual"]["value"] is None:
        reason = "the base has no well-formed answer"
    elif out["total"]["ci95"][0] <= 0:
        reason = "no gain is shown"
    whole = np.where(total == 0, np.nan, total)
    survives = lambda name: ({"value": None, "ci95": None, "n": n, "reason": reason} if reason else
                             estimate((form["clean"] + gain[name] - form[name]) / whole, n))
    return out | {"without": parts, "surviving_share": {name: survives(name) for name in withouts or ("blank",)}}


def mean_of_some(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Replicates of a mean over some of the questions; none where a resample has none of them."""
    with np.errstate(invalid="ignore"):
        return weights @ x / weights.sum(1)


def net_following(answers: np.ndarray, shown: np.ndarray, gold: np.ndarray) -> dict:
    """Share of answers that follow a swapped picture, less the share that fit the picture not shown.

    Where questions and pictures trade places, whoever never looks hits both equally often and gets 0; whoever always
    looks gets 1. All (n,); an answer is a string or a number. The interval is `paired`'s.
    """
    follows, keeps = answers == shown, answers == gold
    return {**paired(follows, keeps), "follows": share(follows), "keeps": share(keeps)}


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

    def outcomes(self, run: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Input -> (correct, formed), each (n,), of a run on clean input and without a picture."""
        return {name: (self.column(run, name, "correct"), self.column(run, name, "well_formed")) for name in ("clean", *self.withouts)}

    def drawn(self, runs: Sequence[str], seed: int) -> np.ndarray:
        """Weights (R, runs) that sum to 1: how much each run counts in each resample; runs are clusters, as a seed is.

        1/k + sqrt(k / (k - 1)) (t / z) (g - mean g) / k, g normal, t Student's with k - 1 degrees of freedom: the interval of a mean of
        k runs is then as wide as the t interval asks for, which drawing the runs themselves is not.
        """
        k = len(runs)
        if k == 1:
            return np.ones((1, 1))
        normal = np.random.default_rng(list(json.dumps([seed, *runs]).encode())).standard_normal((len(self.weights), k))
        normal[0] = 0
        t = T95[k - 2] if k - 2 < len(T95) else Z + 2.5 / (k - 1)
        return 1 / k + math.sqrt(k / (k - 1)) * t / Z * (normal - normal.mean(1, keepdims=True)) / k

    def accuracy(self, runs: Sequence[str], name: str, seed: int) -> np.ndarray:
        """Replicates (R,) of the mean accuracy of some runs on an input."""
        right = np.stack([self.column(run, name, "correct") for run in runs])
        return np.clip((self.weights @ right.T * self.drawn(runs, seed)).sum(1), 0, 1)


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


def policy_order(policy: str) -> tuple:
    conditions, seed = ["base", "standard", "hallucination", "mixed", "grounded"], policy.removeprefix(family(policy))[2:]
    condition = policy.partition("-")[0]
    return conditions.index(condition) if condition in conditions else len(conditions), family(policy), int(seed or 0), policy


def read_answers(data: Path, path: Path, checked: dict, models: dict) -> list[dict]:
    """The rows of an answers file, whole, in stage 4's form, and made from what lies in the data folder now.

    `checked`: artifact -> sha256; `models`: policy -> the artifacts of its model, the same in all files. Both grow.
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


def load_panels(data: Path, study: Mapping, resamples: int, notes: list[str], checked: dict) -> list[Panel]:
    """The answers to every benchmark; what is not counted is noted, and what they were made from goes to `checked`."""
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
        answers = {policy: {path.stem: read_answers(data, path, checked, models) for path in files[source][policy]}
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


def measure(panel: Panel, policy: str) -> dict:
    """All that is said of one policy on one source, apart from comparisons.

    Worth of the picture: accuracy with it less accuracy without it, on the same questions. Strict accuracy: share of questions that are
    right with the picture and not right without it. Visual information: mean over questions of log p(gold | picture) - log p(gold | no
    picture), each after the policy's own reasoning, in nats. Unparsed: responses in which no answer was found. Length: tokens of a
    response. Words are looked for in the first 20,000 characters.
    """
    inputs, without = panel.answers[policy], panel.without
    asked = {name: inputs[name] for name in ("clean", *panel.withouts)}
    said = {name: panel.said(policy, name) for name in asked}
    rows_of = lambda key: {value: [i for i, q in enumerate(panel.questions) if q[key] == value]
                           for value in sorted({q[key] for q in panel.questions} - {None}, key=str)}
    out = {"accuracy": {name: accuracy(inputs[name]) for name in sorted(inputs, key=input_order)},
           "breakdown": {key: {str(value): {name: accuracy(rows[i] for i in chosen) for name, rows in inputs.items()}
                               for value, chosen in rows_of(key).items()} for key in ("needs_image", "group")},
           "says": {name: {what: share(row["says"][what] for row in rows) for what in SAYS}
                    for name, rows in asked.items()},
           "answers": {name: {str(group): {text: share(texts[i] == text for i in chosen) for text in frequent(panel, chosen)}
                              for group, chosen in rows_of("group").items()} for name, texts in said.items()},
           "distribution": {name: distribution(panel, texts) for name, texts in said.items()},
           "unparsed": {name: share(row["answer"] is None for row in rows) for name, rows in asked.items()},
           "length": {name: {**estimate(panel.weights @ [row["tokens"] for row in rows], len(rows)), "unit": "tokens"}
                      for name, rows in asked.items()}}
    for key in ("well_formed", "truncated"):
        out[key] = {name: share(row[key] for row in rows) for name, rows in asked.items()}
    if policy == "base":
        out["gold"] = {str(group): frequent(panel, chosen) for group, chosen in rows_of("group").items()}
    if without:
        information = panel.column(policy, "clean", "gold_logprob") - panel.column(policy, without, "gold_logprob")
        out["picture_worth"] = {name: paired(*(panel.column(policy, asked, "correct") for asked in ("clean", name))) for name in panel.withouts}
        out["visual_information"] = {**estimate(panel.weights @ information, len(information)), "unit": "nats"}
        out["strict"] = share(a["correct"] and not b["correct"] for a, b in zip(inputs["clean"], inputs[without]))
    says = {name: np.array([text or "" for text in panel.said(policy, name)]) for name in inputs}
    for name, shown in panel.shown.items():
        told = [i for i, text in enumerate(shown) if text is not None and (text == panel.golds[i]) == (name == "kept")]
        clean, there, fits, gold = (np.array(x)[told] for x in (says["clean"], says[name], [text or "" for text in shown], panel.golds))
        if told and name == "mismatch":
            out["follows_picture"] = net_following(there, fits, gold)
        elif told and name == "kept":
            out["stays"] = share(clean == there)
        elif told:
            out["flips"] = share(clean != there)
            out["causal_effect"] = estimate(mean_of_some(panel.weights[:, told], causal_effect(clean, there, gold, fits)), len(told))
    out["changes"] = {name: share(says["clean"] != says[name]) for name in ("blank", "removed", "mismatch") if name in inputs}
    return out | token_measures(panel, policy)


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


def token_measures(panel: Panel, policy: str) -> dict:
    """Where the words come from, along the answers to intact questions: log p(token | picture) - log p(token | blank), in nats.

    Visual tokens: share of tokens that the picture makes at least twice as likely. Fading: mean nats a token in each fifth of the response.
    Ratios of sums over questions; their intervals are over questions, not tokens.
    """
    rows = [row.get("nats") for row in panel.answers[policy]["clean"]]
    if any(nats is None for nats in rows):
        return {}
    sums = np.array([[nats.sum(where=(part == fifth)) for fifth in range(FIFTHS)] + [(part == fifth).sum() for fifth in range(FIFTHS)]
                     + [(nats >= VISUAL_NATS).sum()] for nats in rows for part in [np.arange(len(nats)) * FIFTHS // max(1, len(nats))]])
    nats, tokens, visual = np.split(panel.weights @ sums, [FIFTHS, 2 * FIFTHS], 1)  # each (R, ...)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_of = (visual[:, 0] / tokens.sum(1))
        return {"visual_tokens": estimate(share_of, len(rows)),
                "fading": [{**estimate(nats[:, k] / tokens[:, k], len(rows)), "unit": "nats a token"} for k in range(FIFTHS)]}


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


def compare(panels: Sequence[Panel]) -> list[dict]:
    """Each policy against the base, and against the standard run of its seed, on clean input; Holm over all of these."""
    tests = []
    for panel in panels:
        for policy in panel.answers:
            for reference in ("base", f"standard-{policy.rpartition('-')[2]}"):
                if policy not in ("base", reference) and reference in panel.answers:
                    tests.append({"source": panel.source, "input": "clean", "policy": policy, "reference": reference,
                                  **paired(*(panel.column(name, "clean", "correct") for name in (policy, reference)))})
    for test in correct_for_number(tests):
        test["detectable"] = detectable((test["only_one"] + test["only_two"]) / test["n"], test["n"], len(tests))
    return tests


def collect(panels: Sequence[Panel], study: Mapping) -> dict:
    """results.json, apart from where it comes from. Runs that differ in their seed alone are also pooled.

    Pooled intervals are over runs as well as questions (`Panel.drawn`): with two or three runs they are wide, as they should be.
    """
    out = defaultdict(lambda: defaultdict(dict), gains={}, pooled={}, card={})
    for panel in panels:
        base = panel.outcomes("base")
        split = lambda runs: split_gain(panel.weights, panel.strata, base, [panel.outcomes(run) for run in runs], panel.withouts,
                                        panel.drawn(runs, study["seed"]))
        out["card"][panel.source] = card(panel)
        for policy in panel.answers:
            for key, value in measure(panel, policy).items():
                out[key][policy][panel.source] = value
        chosen = set(strict_subset(panel)) if panel.withouts else set()
        drawn = {policy: {name: inputs[name][0].get("samples", 0) for name in panel.withouts} for policy, inputs in panel.answers.items()}
        out["strict_subset"][panel.source] = {"samples": drawn, "ids": sorted(chosen), **share(q["id"] in chosen for q in panel.questions), "clean": {
            policy: accuracy(row for row in inputs["clean"] if row["id"] in chosen) for policy, inputs in panel.answers.items() if chosen}}
        for policy in list(panel.answers)[1:]:
            out["gains"].setdefault(policy, {})[panel.source] = gain = split([policy])
            runs = [run for run in panel.answers if family(run) == family(policy)]
            if policy == runs[-1]:
                asked = [name for name in panel.inputs if all(name in panel.answers[run] for run in runs)]
                gain = split(runs) if len(runs) > 1 else gain
                out["pooled"].setdefault(family(policy), {})[panel.source] = {"runs": runs, "gains": gain, "accuracy": {
                    name: estimate(panel.accuracy(runs, name, study["seed"]), len(panel.questions)) for name in asked}}
    tests = compare(panels)
    for test in tests:
        if test["reference"] == "base":
            out["gains"][test["policy"]][test["source"]]["total"]["p_holm"] = test["p_holm"]
    correct_for_number([x for sources in out["picture_worth"].values() for worths in sources.values() for x in worths.values()])
    sources = {panel.source: {"n": len(panel.questions), "left_out": panel.left_out, "policies": list(panel.answers),
                              "inputs": panel.inputs, "without_picture": panel.without} for panel in panels}
    entries = check_measures() + [entry for panel in panels if panel.source == "shapes" for entry in check_shapes(panel)]
    return {**out, "sources": sources, "tests": tests, "claims": ledger(panels, study),
            "instrument_check": {"passed": all(entry["passed"] for entry in entries), "entries": entries}}


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
    return text + ends + "; paired bootstrap over questions, t over runs"


def judge(claim: Claim, panel: Panel, study: Mapping) -> list[dict]:
    """The claim's verdict on one benchmark, for each kind of damage that was trained on and each input that it speaks of; 95% each.

    `n_decides`: about the questions at which the interval, shrunk with the root of n, would end at 0, if the estimate is the truth.
    """
    kinds = list(dict.fromkeys(map(family, panel.answers)))
    taken = [kind for kind in kinds if kind.startswith("hallucination-") and set(kind.partition("-")[2].split("+")) <= TAKEN_AWAY]
    found_of = lambda terms: estimate(sum(factor * panel.accuracy([run for run in panel.answers if family(run) == kind], asked, study["seed"])
                                          for factor, kind, asked in terms), len(panel.questions))
    damages = taken if any(kind == "hallucination" for _, kind, _ in claim.of) else [None]
    inputs, out = panel.withouts if any(asked == "without" for *_, asked in claim.of) else ["clean"], []
    for damage, asked in ((damage, name) for damage in damages for name in inputs):
        fill = lambda terms: [(factor, damage if kind == "hallucination" else kind, asked) for factor, kind, _ in terms]
        if not all(kind in kinds for _, kind, _ in fill(claim.of)):
            continue
        found, also = found_of(fill(claim.of)), [found_of(fill(terms)) for terms in claim.also]
        out.append(entry(claim, verdict_on(claim, found, also), found["n"]) | {
            "benchmark": panel.source, "damage": damage, "input": asked, "found": found})
        half = max(found["value"] - found["ci95"][0], found["ci95"][1] - found["value"])
        single = all(sum(family(run) == kind for run in panel.answers) == 1 for _, kind, _ in fill(claim.of))
        could = claim.high == math.inf and found["value"] and not (claim.sometimes and found["value"] < 0)
        if out[-1]["verdict"] == "undecided" and found["ci95"][0] <= 0 <= found["ci95"][1] and could and not single:
            out[-1]["reason"] = "more seeds decide, not more questions"
        elif out[-1]["verdict"] == "undecided" and found["ci95"][0] <= 0 <= found["ci95"][1] and could:
            out[-1]["n_decides"] = math.ceil(found["n"] * (half / found["value"]) ** 2)
    return out


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
        judged = [verdict for panel in asked for verdict in judge(claim, panel, study)]
        out += judged or [entry(claim, "undecided", 0) | {"benchmark": claim.benchmark, "reason": reason or "not trained, or not asked"}]
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
        found = split_gain(weights, np.eye(len(WORLD))[group], base, [policy], ["blank", "removed"])
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
            nats = estimate(weights @ (learnt["clean"][3] - learnt["blank"][3]), n)
            check(f"{learner}: visual information", {"unit": "nats"} | nats, expected_information(**after))
    swapped = (group < 3) & (gold != donor)
    for sees in (0.0, 0.6, 0.95):
        told = simulate(rng, gold, donor, **NOVICE | {"sees": sees, "form": 0.0})
        clean, there, fits, right = (x[swapped] for x in (told["clean"][0], told["mismatch"][0], donor, gold))
        check(f"looks at {sees:.0%} of swapped pictures", net_following(there, fits, right), sees)
        effect = mean_of_some(weights[:, swapped], causal_effect(clean, there, right, fits))
        check(f"causal effect of an edit on who looks at {sees:.0%} of them", estimate(effect, len(right)), sees)
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
                            **paired(clean[suffices], without[suffices])})
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


def cell(x: Mapping | None, form=percent, n: bool = False) -> tuple[str, str]:
    """A number and its interval, as a table shows them."""
    if not x:
        return "\N{EN DASH}", ""
    value = next(x[key] for key in ("value", "accuracy", "share") if key in x)
    return ("cannot be told", x.get("reason", "")) if value is None else (form(value), interval(x["ci95"], form) + f" n = {x['n']}" * n)


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


def dependence(r: Mapping, policy: str, source: str) -> dict:
    """Whether a policy depends on the picture, in words: what McNemar's test says, corrected by Holm, of each input without a picture."""
    said = lambda name: f"{percent((x := r['accuracy'][policy][source][name])['accuracy'])} {interval(x['ci95'])}"
    worths = r.get("picture_worth", {}).get(policy, {}).get(source, {})
    parts = [f"without it ({name}) {said(name)}, a difference of {points(x['value'])} points "
             f"{interval(x['ci95'], points)}, p {x['p_holm']:.2g}" for name, x in worths.items()]
    shown = [math.copysign(x["p_holm"] < 0.05, x["value"]) for x in worths.values()]
    claim = ("was not asked without the picture" if not worths else "depends on the picture" if min(shown) == 1 else
             "does better without the picture" if max(shown) == -1 else "is not shown to depend on the picture")
    text = f"Right with the picture: {said('clean')}; {'; '.join(parts)}" if parts else f"Right: {said('clean')}"
    return {"name": shorten(policy, 60), "source": source, "claim": claim, "text": f"{text}; n = {r['sources'][source]['n']}."}


def headlines(r: Mapping) -> list[dict]:
    """Every policy (seeds pooled) on every source, in words: what the page opens with."""
    rows = []
    for source in r["sources"]:
        for name, pooled in ((name, x[source]) for name, x in r["pooled"].items() if source in x):
            label = shorten(f"{name} ({len(pooled['runs'])} seeds)" if len(pooled["runs"]) > 1 else pooled["runs"][0], 60)
            text = verdict(label, shorten(source, 60), pooled["gains"])
            rows.append({"name": label, "runs": pooled["runs"], "source": source, "gain": pooled["gains"], "text": text})
    return rows


def table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence]], fold: str | None = None, kind: str = "") -> dict:
    """`kind`: heat colours the cells by their share, prose lets them wrap."""
    return {"caption": caption, "columns": columns, "rows": rows, "fold": fold, "kind": kind}


def labelled(r: Mapping, source: str, key: str) -> list[tuple[str, dict]]:
    """What `key` says of each run on a source, and of runs pooled."""
    pooled = {name: x[source] for name, x in r["pooled"].items() if source in x and len(x[source]["runs"]) > 1}
    return [(policy, r[key][policy][source]) for policy in r["sources"][source]["policies"] if policy in r[key]] + [
        (f"{name}, {len(x['runs'])} seeds", x[key]) for name, x in pooled.items()]


def matrix_table(r: Mapping, source: str) -> dict:
    about = r["sources"][source]
    return table(f"{source}: right answers with 95% intervals (Wilson; pooled seeds: bootstrap, t over runs), n = {about['n']} questions in every cell",
                 ["trained", *about["inputs"]], kind="heat",
                 rows=[(name, [cell(cells.get(asked)) for asked in about["inputs"]]) for name, cells in labelled(r, source, "accuracy")])


def gain_table(r: Mapping, source: str) -> dict:
    rows = labelled(r, source, "gains")
    names = list(dict.fromkeys(name for _, gain in rows for name in gain["surviving_share"]))
    return table(f"{source}: gain over the base in points with 95% intervals (paired bootstrap), n = {r['sources'][source]['n']}",
                 ["policy", "total", "format", "image-free", "visual", *(f"survives without the picture ({name})" for name in names)], [
        (name, [cell(gain.get(part), points) for part in ("total", *PARTS)] + [cell(gain["surviving_share"].get(x)) for x in names])
        for name, gain in rows])


def tests_table(r: Mapping) -> dict:
    said = lambda t: "no difference shown" if t["p_holm"] >= 0.05 else "better" if t["value"] > 0 else "worse"
    rows = [(f"{t['policy']} against {t['reference']}, {t['source']}", [cell(t, points, n=True), *((text, "") for text in (
        t["only_one"], t["only_two"], f"{t['p']:.2g}", f"{t['p_holm']:.2g}",
        points(t["detectable"]).strip("+") if t["detectable"] else "none", said(t)))]) for t in r["tests"]]
    return table(f"McNemar's exact test; p corrected for the number of comparisons shown, {len(rows)} (Holm); differences in points, 95% "
                 "intervals; shown in 80%: the smallest difference that 80 of 100 studies like this would show, so corrected; none: so few answers differ that no difference would",
                 ["comparison", "difference", "only it right", "only the other", "p", "p, Holm", "shown in 80%", "verdict"], rows)


def number(x: float) -> str:
    return f"{x:+.2f}".replace("-", "\N{MINUS SIGN}")


def source_tables(r: Mapping, source: str) -> list[dict]:
    """Dependence on the picture; and folded: how answers are distributed, by group, words, answers against the right ones."""
    about = r["sources"][source]
    worth = {f"worth of the picture ({about['without_picture']}), points": "picture_worth"} if about["without_picture"] else {}
    looks_at = {**worth, "strict accuracy": "strict", "visual information, nats": "visual_information", "visual tokens": "visual_tokens",
                "follows a swapped picture": "follows_picture", "causal effect of an edit": "causal_effect", "flips": "flips",
                "stays": "stays", "well formed": "well_formed", "no answer found": "unparsed", "cut short": "truncated", "tokens": "length"}
    form = lambda key: {"picture_worth": points, "visual_information": number, "length": lambda x: f"{x:.1f}"}.get(key, percent)
    found = lambda key, policy: (x := r.get(key, {}).get(policy, {}).get(source)) and x.get("clean", x.get(about["without_picture"], x))
    looking = [(policy, [cell(x := found(key, policy), form(key), n=bool(x) and x["n"] != about["n"]) for key in looks_at.values()])
               for policy in about["policies"]]
    fades = {policy: x for policy in about["policies"] if (x := r.get("fading", {}).get(policy, {}).get(source))}
    fading = [(policy, [cell(fifth, number) for fifth in x]) for policy, x in fades.items()]
    changed = list(dict.fromkeys(name for policy in about["policies"] for name in r["changes"][policy][source]))
    changes = [(policy, [cell(r["changes"][policy][source].get(name)) for name in changed]) for policy in about["policies"]]
    asked = [(policy, name) for policy in about["policies"] for name in r["distribution"][policy][source]]
    heads = ["", *(f"{policy}, {name}" for policy, name in asked)]
    spread = {"distance from the right answers (total variation)": "total_variation", "leaning to the majority's answer": "leaning",
              "distance of the letters": "letter_bias", "entropy, bits": "entropy", "entropy of the right answers, bits": "entropy_right"}
    spreads = [(what, [cell(r["distribution"][policy][source][name].get(key), number if "entropy" in key else percent) for policy, name in asked])
               for what, key in spread.items()]
    words_of = {"True": "needs the picture", "False": "needs no picture"}
    groups = [(words_of.get(value, value) if key == "needs_image" else value, [cell(r["breakdown"][policy][source][key][value][name], n=True)
              for policy, name in asked]) for key, values in r["breakdown"]["base"][source].items() for value in values]
    words = [(what, [cell(r["says"][policy][source][name][what]) for policy, name in asked]) for what in SAYS]
    given = [(f"{group}: {text}", [cell(right, n=True), *(cell(r["answers"][policy][source][name][group][text]) for policy, name in asked)])
             for group, rights in r["gold"]["base"][source].items() for text, right in rights.items()]
    return [table(f"{source}: 95% intervals, n = {about['n']} where nothing else is said", ["policy", *looks_at], looking),
            table(f"{source}: nats a token in each fifth of the answers to intact questions, 95% intervals, n = {about['n']}",
                  ["policy", *(f"fifth {k}" for k in range(1, FIFTHS + 1))], fading, "Where in the answer the picture counts"),
            table(f"{source}: answers that are others than with the intact picture, 95% intervals, n = {about['n']}",
                  ["policy", *changed], changes, "Answers that change with the picture"),
            table(f"{source}: 95% intervals, n = {about['n']}", heads, spreads, "How answers are distributed"),
            table(f"{source}: right answers, 95% intervals", heads, groups, "By group, and by whether the picture is needed"),
            table(f"{source}: responses with such words, 95% intervals, n = {about['n']}", heads, words, "What the responses say"),
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


def looks(policies: Sequence[str]) -> dict[str, str]:
    """Policy -> its classes: the family's colour, the run's dashes."""
    kinds = list(dict.fromkeys(map(family, policies)))
    return {policy: f"k{min(kinds.index(family(policy)), 7)} d{min([p for p in policies if family(p) == family(policy)].index(policy), 3)}"
            for policy in policies}


def training_charts(data: Path, look: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Curves of train.jsonl: trailing means over a twentieth of the steps, drawn at 200 points or fewer."""
    keys, curves = ("step", "reward", "correct", "well_formed"), {}
    for path in [path for run in look if (path := data / "policies" / run / "train.jsonl").exists()]:
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
        for policy in r["sources"][source]["policies"]:
            cells = {severity(name): x for name in names if (x := r["accuracy"][policy][source].get(name))}
            series.append({"label": policy, "look": look[policy], "x": list(cells), "y": [x["accuracy"] for x in cells.values()],
                           "low": [x["ci95"][0] for x in cells.values()], "high": [x["ci95"][1] for x in cells.values()]})
        if len(names) > 2:
            title = f"Accuracy under {kind}, {source}, n = {r['sources'][source]['n']}"
            charts.append((title, line_chart(title, x_label, series)))
    return charts


def answer_chart(r: Mapping, source: str, group: str) -> Markup:
    """Bars of the most frequent right answers to a group: how often each is right, and how often each policy gives it."""
    policies, width, left, each, parts = r["sources"][source]["policies"], 400, 178, 22, []
    names = [name for name in ("clean", r["sources"][source]["without_picture"]) if name]
    bars = [("right", r["gold"]["base"][source][group])] + [
        (f"{shorten(policy, 18)}, {name}", r["answers"][policy][source][name][group]) for policy in policies for name in names]
    for row, (label, shares) in enumerate(bars):
        at, y = float(left), row * each
        parts.append(draw("text", label, x=left - 8, y=y + 15, class_="end"))
        for k, (text, x) in enumerate(shares.items()):
            wide = x["share"] * (width - left)
            parts.append(draw("rect", x=at, y=y + 2, width=max(0.0, wide - 1), height=each - 4, class_=f"dot k{k}"))
            if wide > 7 * len(text[:8]) + 4:
                parts.append(draw("text", text[:8], x=at + 4, y=y + 15))
            at += wide
    said = "; ".join(f"{label}: " + ", ".join(f"{text} {percent(x['share'])}" for text, x in shares.items()) for label, shares in bars)
    return svg(width, each * len(bars), f"Answers to {group} of {source}", said, parts)


def small_copy(picture: Image.Image) -> str:
    """At most 160 x 160 pixels and 128 colours, as a data URI."""
    small, buffer = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((160, 160))
    small.quantize(128).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(data: Path, panel: Panel, most: int, budget: int, notes: list[str]) -> list[dict]:
    """The first question of each group, under every input, with each policy's answer: none is picked for its looks."""
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
                          "answers": {policy: rows[name][i] for policy, rows in panel.answers.items() if name in rows}})
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
.d1{stroke-dasharray:6 3}.d2{stroke-dasharray:2 3}
.d3{stroke-dasharray:9 3 2 3}.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 10px;padding:0;list-style:none;font-size:.875rem}
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
<span>{{ check.entries|selectattr("p", "undefined")|list|length }} measurements of simulated policies find the truth within the width of their
interval{% if "shapes" in r.sources %}, and no limit that holds on shapes is shown to be exceeded{% else %}; no answers to shapes were there
to test{% endif %}. <a href="#check">See them</a></span></div>{% else %}
<div class="box bad" role="alert"><strong>✗ The instrument check did not pass: explain this before you believe the split.</strong><ul>
{% for e in check.entries if not e.passed %}<li>{{ e.check }}: {{ number(e.truth) if e.unit else percent(e.truth) }}; found {{ number(e.value) if e.unit else percent(e.value) }}
{{ interval(e.ci95, number if e.unit else percent) }}, n = {{ e.n }}</li>{% endfor %}</ul></div>{% endif %}
{% if r.notes %}<details open><summary>What is missing</summary><ul>{% for note in r.notes %}<li>{{ note }}</li>{% endfor %}</ul>
</details>{% endif %}
</header><main>
{% if heads %}<section><h2>What each gain is made of</h2>
<p>Each policy against the base, on the same questions; each interval by itself, not corrected for their number. What survives
is there without the picture too: blank puts one colour in its place, removed asks the text alone. A policy can be at a loss with either for want
of practice, so that the two differ.</p><ul class="legend">
{% for part, label in parts.items() %}{{ key("whisker wide " ~ part, label) }}
{% endfor %}</ul>{% for source in r.sources %}<div class="charts"><figure><figcaption>{{ source }}: points of accuracy, 95% intervals,
n = {{ r.sources[source].n }}</figcaption>{{ gain_charts[source] }}</figure><ul>{% for head in heads if head.source == source %}
<li>{{ head.text }}</li>
{% endfor %}</ul></div>{{ table(gain_tables[source]) }}{% endfor %}</section>{% endif %}
<section><h2>Trained on, asked about</h2>
<p>Rows were trained differently, columns damage the question. Right is the intact question&rsquo;s answer, also
where the picture was swapped.</p>{% for source in r.sources %}{{ table(matrices[source]) }}{% endfor %}</section>
{% if r.tests %}<section><h2>Which differences exceed the choice of questions</h2><p>The same questions, two policies, clean input.</p>{{ table(tests) }}
</section>{% endif %}
<section><h2>Do the answers depend on the picture?</h2>
<p>Strict: right with the picture, and not right without it. Visual information: how much likelier
the right answer is with the picture than without. Follows: answers that fit a swapped picture, less those that fit the picture not shown;
who never looks
gets 0.</p><ul>{% for x in depends %}<li>{{ x.name }} {{ x.claim }} on {{ x.source }}. {{ x.text }}</li>{% endfor %}</ul>{% for source, about in r.sources.items() %}{% for t in tables[source] %}{{ table(t) }}{% if loop.first %}{% if stress[source] %}
{{ charts(stress[source], about.policies) }}{% endif %}<h3>What is answered, and what is right</h3><p class="soft caption">The most frequent right
answers of the first eight groups, with the picture and without; n and intervals in the last table below.</p><div class="charts">{% for title, chart in
answers_given[source] %}<figure><figcaption>{{ title }}</figcaption>{{ chart }}</figure>{% endfor %}</div>{% endif %}{% endfor %}{% endfor %}</section>
<section><h2>Do the benchmarks need the picture?</h2>
<p>What blind answers are worth: a benchmark whose base does as well without the picture cannot show that anyone looks.</p>{{ table(card) }}
</section>
{% if heads %}<section><h2>What was claimed, and what this study says</h2><p>Each claim has a test that was fixed before any
run (below). The verdict is on this study&rsquo;s model and data. {{ protocol }}</p>{% for t in claims %}{{ table(t) }}{% endfor %}
<details><summary>The tests</summary><ul>{% for id, test in tests_of.items() %}<li>{{ id }}: {{ test }}</li>{% endfor %}</ul></details></section>
{% endif %}{% if training %}<section><h2>How training went</h2>
<p>Means over the sampled completions of a step, on the questions as each policy saw them, smoothed
over a twentieth of the steps: a record, not a measurement.</p>{{ charts(training, r.provenance.policies) }}</section>{% endif %}
<section><h2>See for yourself</h2><p>The first questions of the first {{ most }} groups under everything that was done to them. Single cases illustrate; they
prove nothing.
</p>{% for source, entries in galleries.items() %}{% for entry in entries %}<details{{ " open" if loop.first }}>
<summary>{{ source }}, {{ entry.question.group }}</summary><p><bdi dir="auto">{{ entry.text }}</bdi><br>
<small>{{ entry.question.id }}, right answer: <bdi>{{ entry.question.answer|cut(60) }}</bdi></small></p>
{% call scroll("answers to " ~ entry.question.id) %}<table class="gallery"><thead><tr><th scope="col">policy</th>
{% for shown in entry.shown %}
<th scope="col">{% for uri in shown.pictures %}<img src="{{ uri }}" alt="{{ entry.question.id }}, {{ shown.name }}">{% else %}
<span class="none">no picture</span>{% endfor %}{{ shown.name }}{% if shown.text %}<details><summary>its text</summary><bdi dir="auto">{{ shown.text|cut(300) }}</bdi></details>{% endif %}
</th>{% endfor %}</tr></thead><tbody>{% for policy in r.sources[source].policies %}<tr><th scope="row">{{ policy }}</th>
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
<footer><p class="soft">Intervals are at 95%. With one seed a policy they cover the choice of questions, not the luck of a training run;
pooled over
seeds, that too. All numbers: results.json. Tables to paste: tables.md.</p></footer></body></html>"""

EXPLAINED = {"Intervals of shares": wilson, "Intervals of differences": estimate, "Several seeds": collect, "Paired tests": mcnemar,
             "Many tests": holm, "Parts of a gain": split_gain, "The format part": form_part,
             "Strict accuracy, visual information": measure, "How answers are distributed": distribution, "Distances between distributions": distance, "Entropies": corrected,
             "What n can show": detectable, "What a benchmark is like": card, "Claims and their verdicts": judge,
             "Runs as clusters": Panel.drawn, "The majority's answer": Panel.majority,
             "Follows a swapped picture": net_following, "Causal effect of an edit": causal_effect, "Words that come from the picture": token_measures,
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
    look, heads = looks(sorted({policy for panel in panels for policy in panel.answers}, key=policy_order)), headlines(r)
    drawn = {source: [head for head in heads if head["source"] == source and head["gain"].get("visual", {}).get("value") is not None]
             for source in r["sources"]}
    each = lambda function, *arguments: {source: function(r, source, *arguments) for source in r["sources"]}
    plain = lambda text: Markup.escape(visible(text))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=lambda x: (
        visible(shorten(x, 600)) if isinstance(x, str) and not isinstance(x, Markup) else x))
    environment.filters["cut"] = shorten
    galleries = {panel.source: gallery(data, panel, most, GALLERY_CHARACTERS // len(panels), r["notes"]) for panel in panels}
    return environment.from_string(PAGE).render(
        most=most, css=Markup(environment.from_string(CSS).render(parts=PARTS)), r=r, study=study, heads=heads, parts=PARTS, look=look,
        leads=[head for head in heads if set(head["runs"]) <= set(r["provenance"]["policies"])],
        depends=r["dependence"],
        galleries=galleries,
        gain_charts={source: gain_chart(rows, source) if rows else "" for source, rows in drawn.items()}, gain_tables=each(gain_table),
        matrices=each(matrix_table), tests=tests_table(r), tables=each(source_tables), stress=each(stress_charts, look),
        answers_given={source: [(group, answer_chart(r, source, group)) for group in list(r["gold"]["base"][source])[:8]] for source in r["sources"]},
        training=training_charts(data, look), claims=[claims_table(r, True), claims_table(r, False)], card=card_table(r), protocol=PROTOCOL,
        tests_of={claim.id: test_of(claim) for claim in CLAIMS}, checks=check_table(r), shaded=shaded, number=number, percent=percent, points=points,
        interval=interval, how=[(name, plain(inspect.getdoc(function))) for name, function in EXPLAINED.items()],
        provenance=plain(json.dumps(r["provenance"], indent=1)))


def main(config: Config) -> dict:
    """Measure, draw and write; returns what results.json holds."""
    data, notes, checked = Path(config.data), [], {}
    prepare.check_least(config, 40, "resamples")  # for there to be a share of 2.5% at either end
    prepare.check_least(config, 0, "gallery")
    study = prepare.load_study(data)
    panels = load_panels(data, study, config.resamples, notes, checked)
    runs = sorted({policy for panel in panels for policy in panel.answers if (data / "policies" / policy / "config.json").exists()},
                  key=policy_order)
    results = collect(panels, study) | {"notes": notes, "provenance": {
        "study": study, "policies": {run: prepare.read_json(data / "policies" / run / "config.json", {}, "delete it and run 03_train_grpo.py again") for run in runs},
        "resamples": config.resamples, "versions": prepare.versions(), "inputs": dict(sorted(checked.items()))}}
    results["dependence"] = [dependence(results, policy, source) for source, x in results["sources"].items() for policy in x["policies"]]
    page = render(data, study, panels, results, config.gallery)
    main_tables = [f(results, source) for source in results["sources"] for f in (matrix_table, gain_table, lambda *of: source_tables(*of)[0])]
    tables = markdown([*main_tables, claims_table(results, True), card_table(results)])
    tables += "\nFor LaTeX (booktabs, makecell):\n\n```latex\n" + "\n".join(map(latex, main_tables)) + "```\n"
    subsets = {f"strict-{source}.json": json.dumps({"source": source, "made_by": inspect.getdoc(strict_subset), "policies": results["sources"][source]["policies"],
                                                    **chosen}, indent=1) for source, chosen in results["strict_subset"].items()}
    for name, text in {"index.html": page, "tables.md": tables, "results.json": json.dumps(results, indent=1), **subsets}.items():
        with prepare.replacing(data / "report" / name) as part:
            part.write_text(text, encoding="utf-8")
    print(f"{data / 'report' / 'index.html'}: {len(page) / 1e6:.1f} MB" + "".join(f"\nnote: {visible(note)}" for note in notes))
    return results


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
