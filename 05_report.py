# SPDX-License-Identifier: MIT
"""Stage 5: what it all says: how much of each gain needs the picture.

A policy that learned to look loses its gain when the picture is taken away; one that learned to
guess, or to write in the asked-for form, keeps it. So each gain over the base is split into format,
image-free and visual, on the same questions, with intervals; and before anyone believes the split,
it must find the truth where the truth is known. The page opens with what follows, in plain words.

reads   data/study.json, data/questions/, data/corrupted/, data/answers/,
        data/policies/RUN/{config.json,train.jsonl}
writes  data/report/index.html (open it), results.json (shares, not percent), tables.md,
        strict-SOURCE.json
run     python 05_report.py
takes   10 s for 16 policies on 320 questions under 5 inputs, on a laptop core
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
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P does not look there by itself
prepare = importlib.import_module("01_prepare")  # before numpy, for it pins how numpy computes

import jinja2
import mpmath
import numpy as np
from markupsafe import Markup

UserError, option = prepare.UserError, prepare.option


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    resamples: int = option(2000, "bootstrap resamples behind an interval")
    gallery: int = option(6, "questions of each source in the gallery, each of another group")


GROUPS = {  # of the matrix's columns, in this order; a name may carry its severity, as in blur-0.05
    "clean": "clean", "blank": "taken away", "removed": "taken away", "told": "taken away",
    "noise": "damaged", "blur": "damaged", "occlude": "damaged", "irrelevant": "swapped",
    "mismatch": "swapped", "edited": "swapped", "kept": "swapped", "misleading": "text",
    "unsaid": "text", "textless": "text",
}
PARTS = ("format", "image_free", "visual")  # of a gain, see `split_gain`
# damage after which nothing of a question's own picture is left
TAKEN_AWAY = {"blank", "noise", "irrelevant", "mismatch", "removed", "told"}
CLUSTERED = ("mathverse", "wemath")  # benchmarks that ask several questions about one problem


# What is done, in the order in which it is done


def main(config):
    """Read the answers, measure, say what follows, draw; returns what results.json holds."""
    prepare.check_least(config, 40, "resamples")  # fewer do not tell how far a measure moves
    prepare.check_least(config, 0, "gallery")
    data = Path(config.data)
    study = prepare.load_study(data)
    seen = Seen()
    # a panel is a source: the same questions for every policy and input
    panels = read_benchmarks(data, study, config.resamples, seen)
    # of the questions that were trained on, where some of them were asked
    trained = read_panel(data, study, study["sources"]["train"], "train/*.jsonl", config.resamples, seen)

    results = measure_all(panels, trained)
    results["claims"] = ledger(panels, study)
    results["instrument_check"] = check_instrument(panels)
    runs = runs_of(data)
    say_all(results, panels, runs)
    results["fingerprint"] = fingerprint(seen.lines)
    results["notes"] = seen.notes
    results["provenance"] = {
        "study": study, "policies": runs, "resamples": config.resamples,
        "versions": prepare.versions(), "inputs": dict(sorted(seen.checked))}
    page = render(data, panels, results, config.gallery)
    write(data / "report", page, results)

    print(f"{data / 'report' / 'index.html'}: {len(page) / 1e6:.1f} MB")
    for sentence in results["sentences"][panels[0].source]:
        print(visible(sentence["text"]))
    for note in seen.notes:
        print(f"note: {visible(note)}")
    print(same_study(results["fingerprint"]))
    return results


def runs_of(data):
    """Config of each run of stage 3; the base and other people's adapters have none here."""
    remedy = "delete it and run 03_train_grpo.py again"
    return {path.parent.name: prepare.read_json(path, {}, remedy)
            for path in sorted(data.glob("policies/*/config.json"))}


def write(folder, page, results):
    """The page, all numbers, tables to paste, and for each source its strict subset."""
    files = {"index.html": page, "tables.md": tables_to_paste(results),
             "results.json": json.dumps(results, indent=1)}
    for source, chosen in results["strict_subset"].items():
        chosen = {"source": source, "made_by": inspect.getdoc(strict_subset)} | chosen
        files[f"strict-{source}.json"] = json.dumps(chosen, indent=1)
    with prepare.locked(folder):
        for name, text in files.items():
            with prepare.replacing(folder / name) as part:
                part.write_text(text, encoding="utf-8")


def measure_all(panels, trained):
    """All numbers: measure -> policy -> source, `pooled` over seeds, `differences` of conditions."""
    out = {"gains": {}, "pooled": {}, "differences": {}}
    tests = defaultdict(list)  # what is shown together, and so corrected for its number
    for panel in panels:
        source = panel.source
        runs = {policy: observe(panel, policy) for policy in panel.answers}
        for policy, observed in runs.items():
            for name, found in measure([observed]).items():
                put(out, found, name, policy, source)
        for condition, seeds in panel.conditions.items():
            names = list(seeds.values())
            found = measure([runs[run] for run in names])
            put(out, {"runs": names} | found, "pooled", condition, source)
            tests["picture_worth"] += found.get("picture_worth", {}).values()
        differences = compare(panel, runs)
        for (one, two), found in differences.items():
            put(out, found, "differences", one, two, source)
            for name, test in found.items():
                tests[name].append(test)
        put(out, eight_settings(panel, trained, differences), "s1_to_s8", source)
        ids = strict_subset(panel)
        kept = share([question["id"] in ids for question in panel.questions])
        put(out, kept | {"ids": ids}, "strict_subset", source)
        put(out, {"n": len(panel.questions), "inputs": panel.inputs,
                  "without_picture": panel.without}, "sources", source)
    for same in tests.values():
        holm(same)
    return out


def put(place, value, *path):
    """Set place[a][b][...] = value."""
    *folders, name = path
    for folder in folders:
        place = place.setdefault(folder, {})
    place[name] = value


# What the page says first: three sentences, each of which follows from a test


def say_all(r, panels, runs):
    """In words, by source: `dependence` of each policy, three `sentences`, and what S1 to S8 say."""
    for panel in panels:
        about = {name: r["pooled"][name][panel.source] for name in panel.conditions}
        depend = [depends(name, x, panel.source) for name, x in about.items()]
        put(r, depend, "dependence", panel.source)
        trained = [name for name, x in about.items() if set(x["runs"]) <= set(runs)]
        said = sentences(r, panel, about, trained) if trained else depend[::-1][:3]
        put(r, said, "sentences", panel.source)
        for found in r["s1_to_s8"][panel.source].values():
            found["sentence"] = say_settings(found)


def sentences(r, panel, about, trained):
    """The three sentences on one source: `text` in plain words, `numbers` behind it.

    A gain or loss is stated where its p, corrected by Holm, is below 0.05, a part of a gain or an
    effect where its interval leaves out 0; else that nothing is shown. `trained`: conditions of this
    study. Where there are none, it is said of base and adapters whether they depend on the picture.
    """
    # trained without ever seeing a question's own picture
    blind = [name for name in trained if takes_away(name)]
    # whose gain is looked into: training on the real pictures, where there is such a run
    lead = next(name for name in ("standard", *blind, *trained) if name in trained)
    both = list(dict.fromkeys([*blind[:1], lead]))
    tests = {name: r["differences"][name]["base"][panel.source]["clean"] for name in both}
    return [say_gains(panel, tests), say_parts(lead, tests[lead], about[lead]["gains"]),
            say_following(about, both, panel.source)]


def say_gains(panel, tests):
    """What training gained; where both are shown to, the share that came without pictures."""
    clauses = []
    for name, test in tests.items():
        size = 100 * test["value"]
        did = f"is not shown to have gained anything ({round(size):+d} points)"
        if test["p_holm"] < 0.05:
            did = f"{'gained' if size > 0 else 'lost'} {abs(size):.0f} points"
        clauses.append(f"trained {on_what(name)}, {'it' if clauses else 'the model'} {did}")
    text = "; ".join(clauses).replace("trained", "Trained", 1) + "."
    numbers = behind(tests, points)
    if len(tests) == 2 and all(x["p_holm"] < 0.05 and x["value"] > 0 for x in tests.values()):
        ratio = share_of_gain(panel, *tests)
        if ratio:
            text += f" So {in_words(ratio)} of the gain came without ever seeing the questions\u2019 pictures."
            numbers += "; " + behind({"share": ratio})
    return {"text": text, "numbers": numbers}


def say_parts(condition, test, gain):
    """What a gain is made of, if it is shown to be one."""
    training, numbers, clauses = f"training {on_what(condition)}", {"total": test}, []
    for part, what in {"visual": "need the picture", "format": "are the asked-for form alone",
                       "image_free": "are right without the picture too"}.items():
        x = gain.get(part)
        if x and x["ci95"]:
            numbers[part.replace("_", "-")] = x
            # an interval that holds 0
            chance = " (may be chance)" if x["ci95"][0] <= 0 <= x["ci95"][1] else ""
            size = f"{100 * x['value']:.0f}".replace("-", "\N{MINUS SIGN}")
            clauses.append(f"{size}{chance} {what}")
    text = f"Of the {100 * test['value']:.0f} points gained by {training}, {', '.join(clauses)}."
    if test["p_holm"] >= 0.05 or test["value"] < 0:
        text = f"So {training} is not shown to have left a gain to divide into looking and guessing."
    elif len(clauses) < 3:
        text = f"How many of the points gained by {training} need the picture cannot be told."
    return {"text": text, "numbers": behind(numbers, points)}


def say_following(about, conditions, source):
    """How often answers go with the picture: by an edit's causal effect, else by taking it away."""
    if "causal_effect" not in about["base"]:
        return depends(conditions[-1], about[conditions[-1]], source)
    effects = {name: about[name]["causal_effect"] for name in (*reversed(conditions), "base")}
    clauses = []
    for name, x in effects.items():
        who = "before training" if name == "base" else f"trained {on_what(name)}"
        often = f"in {100 * x['value']:.0f} of 100 cases" if x["ci95"][0] > 0 else "not measurably"
        clauses.append(f"{who}, {often}")
    text = "; ".join(clauses).replace("trained", "Trained", 1)
    return {"text": "How often does the answer change with the picture, where an edit makes another "
                    f"one right? {text}.", "numbers": behind(effects)}


def depends(name, about, source):
    """Whether a policy answers worse without the picture, as each test without it says."""
    worths = about.get("picture_worth", {})
    # which way each test points: 0 where it shows nothing
    ways = {math.copysign(1, x["value"]) if x["p_holm"] < 0.05 else 0 for x in worths.values()}
    claims = {(): "cannot be said to depend on the picture or not", (1,): "depends on the picture",
              (-1,): "does better without the picture"}
    claim = claims.get(tuple(ways), "is not shown to depend on the picture")
    numbers = {f"right, {asked}": about["accuracy"][asked] for asked in ("clean", *worths)}
    numbers |= {f"worth of the picture ({asked})": x for asked, x in worths.items()}
    return {"text": f"{name} {claim} on {source}.", "numbers": behind(numbers)}


def share_of_gain(panel, blind, seeing):
    """Gain of `blind` over gain of `seeing` on clean input, a ratio of means; nothing unless both
    have the same seeds."""
    if panel.conditions[blind].keys() != panel.conditions[seeing].keys():
        return None
    gains = [(panel.gain(one), panel.gain(two)) for one, two in panel.by_seed(blind, seeing).values()]
    whole = sum(two.mean() for _, two in gains)
    ratio = sum(one.mean() for one, _ in gains) / whole
    # linearised: how far a seed's gains move the ratio of the means
    linear = [over_questions((one - ratio * two) * (len(gains) / whole)) for one, two in gains]
    found = over_runs(linear, UNBOUNDED)
    return found | {"value": ratio, "ci95": [ratio + end for end in found["ci95"]]}


def say_settings(found):
    """What S1 to S8 say together: what was memorised, what carries over, what needs the picture."""
    clauses = []
    for name, (shown, not_shown) in SAID_OF_SETTINGS.items():
        if name in found:
            sure = found[name]["ci95"][0] > 0 and found[name].get("p_holm", 0) < 0.05
            said = shown if sure else not_shown
            clauses.append(said.format(points=f"{100 * found[name]['value']:.0f} points"))
    return f"Together: {'; '.join(clauses)}."


SAID_OF_SETTINGS = {  # where the interval is above 0, and where it is not
    "memorised": ("{points} of what training on the real pictures gains on its own questions do not "
                  "carry over to new ones", "that anything was memorised is not shown"),
    "carried": ("training on damaged questions is worth {points} on new, intact questions",
                "training on damaged questions is not shown to help on new, intact questions"),
    "picture": ("{points} of what training on the real pictures gets right on new questions need the "
                "picture", "training on the real pictures is not shown to need them on new questions"),
}


FRACTIONS = {"none": 0, "a tenth": 1 / 10, "a quarter": 1 / 4, "a third": 1 / 3, "half": 1 / 2,
             "two thirds": 2 / 3, "three quarters": 3 / 4, "five sixths": 5 / 6,
             "nine tenths": 9 / 10, "all": 1, "more than all": 1.2}


def in_words(ratio):
    """A share as a fraction; as a range where its interval is wider than a quarter."""
    def nearest(x):
        return min(FRACTIONS, key=lambda name: abs(FRACTIONS[name] - x))

    low, high = ratio["ci95"]
    # one fraction would say more than is known
    if high - low > 0.25 and nearest(low) != nearest(high):
        return f"between about {nearest(low)} and {nearest(high)}"
    return f"about {nearest(ratio['value'])}"


def on_what(condition):
    """What a condition was trained on, in words."""
    kind, _, damage = condition.partition("-")
    damaged = {"blank": "blank pictures", "mismatch": "other questions\u2019 pictures",
               "removed": "questions without their pictures"}
    damaged = damaged.get(damage, f"questions damaged by {damage}")
    return {"standard": "on the real pictures", "hallucination": f"on {damaged} only",
            "mixed": f"on real pictures mixed with {damaged}",
            "grounded": "on the real pictures with a bonus for looking"}.get(kind, f"as {kind}")


def behind(found, form=None):
    """The numbers behind a sentence: what, value, interval, p, n and seeds."""
    text = "; ".join(f"{name} {' '.join(cell(x, form or percent))}, {counted(x)}"
                     for name, x in found.items())
    # most have the same n and seeds
    last = counted(list(found.values())[-1])
    return text.replace(f", {last};", ";")  # said once, at the end


# What was claimed, and how it is decided: all of it written down before any run

Term = tuple[float, str, str]  # factor, kind of policy, input (clean, or "without" the picture)


@dataclass(frozen=True)
class Claim:
    """That the sum `of` accuracies is above `low`, or (a number was published) in `low` to `high`."""
    id: str
    text: str
    source: str
    of: tuple[Term, ...]
    also: tuple = ()  # further sums that must be above 0: of two losses, neither helps
    low: float = 0.0
    high: float = math.inf
    benchmark: str | None = None  # None: any
    preset: str | None = None
    sometimes: bool = False  # then one benchmark without it contradicts nothing


def gain_of(kind, over="base"):
    return (1.0, kind, "clean"), (-1.0, over, "clean")


PAPER = "arXiv 2604.03179"
ARTICLE = "an article on that paper"
DAMAGED = gain_of("hallucination")
CLAIMS = [
    Claim("damaged-helps", "Training without the questions' pictures improves on the base",
          f"{PAPER}, abstract", DAMAGED),
    Claim("damaged-beats-clean", "It sometimes improves more than training on clean pictures",
          f"{PAPER}, abstract", gain_of("hallucination", "standard"), (DAMAGED,), sometimes=True),
    Claim("damaged-at-least-half", "It gains at least half of what clean pictures gain",
          f"{PAPER}, main table, averages: 3B +2.53 of +5.02, 7B +2.26 of +2.63",
          ((1.0, "hallucination", "clean"), (-0.5, "standard", "clean"), (-0.5, "base", "clean")),
          (DAMAGED, gain_of("standard"))),
    Claim("clean-gains-blind", "Training on clean pictures also improves answers without one",
          f"what follows from the thesis of {PAPER}",
          ((1.0, "standard", "without"), (-1.0, "base", "without"))),
    Claim("mathvista-range", "Damaged pictures: 12 to 15 points on MathVista", ARTICLE,
          DAMAGED, (), 0.12, 0.15, "mathvista"),
    Claim("mmmu-range", "Damaged pictures: 8 to 10 points on MMMU",
          f"{ARTICLE}; the paper has not this benchmark", DAMAGED, (), 0.08, 0.10, "mmmu"),
    Claim("scienceqa-better", "On ScienceQA damaged pictures do better than clean ones",
          f"{ARTICLE}; the paper has not this benchmark", gain_of("hallucination", "standard"),
          (DAMAGED,), benchmark="scienceqa")]
# the paper's main table, trained on Geometry3K, accuracies in percent
TRAINED = {"standard": "clean pictures", "hallucination-blank": "blank pictures",
           "hallucination-mismatch": "other questions' pictures"}
PUBLISHED = [  # preset, benchmark, n, base, and as in TRAINED
    ("3b", "mathvision", 3040, 18.19, 22.73, 20.95, 20.86),
    ("3b", "mathverse", 3940, 34.82, 37.72, 35.10, 35.76),
    ("3b", "mathvista", 1000, 51.40, 58.40, 56.40, 58.00),
    ("3b", "wemath", 1740, 54.48, 60.11, 56.55, 55.17),
    ("7b", "mathvision", 3040, 27.70, 28.13, 28.39, 27.27),
    ("7b", "mathverse", 3940, 45.20, 47.56, 48.86, 49.90),
    ("7b", "mathvista", 1000, 67.00, 70.00, 68.50, 71.40),
    ("7b", "wemath", 1740, 63.68, 68.39, 66.84, 68.33)]


def published():
    """Gains as published, give or take two standard errors, as if accuracies were independent."""
    for preset, benchmark, n, base, *accuracies in PUBLISHED:
        for kind, value in zip(TRAINED, accuracies):
            gain = value - base  # points
            error = 2 * math.sqrt((base * (100 - base) + value * (100 - value)) / n)
            text = f"{preset.upper()} on {benchmark}, trained on {TRAINED[kind]}: {gain:+.2f} points"
            yield Claim(f"table-{benchmark}-{preset}-{kind}", text,
                        f"{PAPER}, main table: {base} to {value}", gain_of(kind), (),
                        (gain - error) / 100, (gain + error) / 100, benchmark, preset)


CLAIMS += published()
PROTOCOL = (
    "Theirs: Qwen2.5-VL, presumably all weights, Geometry3K, 15 epochs, 5 completions at temperature "
    "0.7, KL 0.01; seeds and grader not stated. Here: a 4-bit base with LoRA, the settings of each run "
    "under provenance, greedy answers, this kit's grader.")


def ledger(panels, study):
    """Every claim on every benchmark that it speaks of; else that it could not be judged."""
    out = []
    for claim in CLAIMS:
        judged = [found for panel in panels for found in judge(claim, panel)]
        # what was published is about one model and one training set
        if claim.preset and (claim.preset, "geometry3k") != (study["preset"], study["sources"]["train"]):
            judged = []
        missing = {"verdict": "undecided", "n": 0, "benchmark": claim.benchmark,
                   "reason": "not trained, not asked, no common seed, or about another model or training set"}
        about = {"id": claim.id, "text": claim.text, "source": claim.source, "test": test_of(claim)}
        out += [about | found for found in judged or [missing]]
    return out


def test_of(claim):
    """The test of a claim in words."""
    sums = [" ".join(f"{factor:+g} {kind} ({asked})" for factor, kind, asked in terms)
            for terms in (claim.of, *claim.also)]
    test = " above 0, and so is ".join(sums) + " above 0"
    if claim.high < math.inf:
        test = (f"{sums[0]} on its side of 0, and its value within {points(claim.low)} to "
                f"{points(claim.high)} points")
    return f"accuracies, by question and by seed: 95% interval of {test}"


def judge(claim, panel):
    """The verdict on one benchmark, for each damage trained on and each input that is spoken of."""
    if claim.benchmark not in (None, panel.source):
        return []
    damages, inputs, out = [None], ["clean"], []
    for _, kind, asked in claim.of:
        if kind == "hallucination":
            damages = [condition for condition in panel.conditions if takes_away(condition)]
        if asked == "without":
            inputs = panel.withouts
    # a claim about damage is judged once for each kind, one about blind answers for each input
    for damage, asked in itertools.product(damages, inputs):
        found, *also = (sum_of_terms(terms, panel, damage, asked) for terms in (claim.of, *claim.also))
        if found and all(also):
            out.append({"verdict": verdict_on(claim, found, also), "n": found["n"], "found": found,
                        "benchmark": panel.source, "damage": damage, "input": asked})
    return out


def takes_away(condition):
    """Whether nothing of the questions' pictures was left in training."""
    kind, _, damage = condition.partition("-")
    return kind == "hallucination" and set(damage.split("+")) <= TAKEN_AWAY


def sum_of_terms(terms, panel, damage, asked):
    """The sum of accuracies, over seeds; nothing where a condition or a common seed lacks."""
    names = [damage if kind == "hallucination" else kind for _, kind, _ in terms]
    sums = []
    for runs in panel.by_seed(*names).values():
        accuracies = [factor * panel.right(run, asked) for run, (factor, *_) in zip(runs, terms)]
        sums.append(over_questions(sum(accuracies)))
    return over_runs(sums) if sums else None


def verdict_on(claim, found, also):
    """reproduced, contradicted or undecided, as `test_of` says."""
    low, high = found["ci95"]
    if claim.high < math.inf:
        if high < claim.low or low > claim.high:
            return "contradicted"
        # whoever learns nothing reproduces nothing, even where little was published
        same_side = low > 0 if claim.low + claim.high > 0 else high < 0
        within = claim.low <= found["value"] <= claim.high
        return "reproduced" if same_side and within else "undecided"
    if low > 0 and all(x["ci95"][0] > 0 for x in also):
        return "reproduced"
    return "contradicted" if high < 0 and not claim.sometimes else "undecided"


# What is measured

UNBOUNDED = (-math.inf, math.inf)
BOUNDS = {"accuracy": (0.0, 1.0), "share": (0.0, 1.0), "ratio": UNBOUNDED, "mean": UNBOUNDED}


@dataclass(frozen=True)
class Observed:
    """What a policy did with each of some questions, x (m,): the measure is its mean.

    Or, of a statistic that is no mean, its bootstrap replicates, x (1 + resamples,), of n
    questions.
    """
    kind: str  # accuracy, share, difference (of two such), effect, mean; of replicates: part or ratio
    x: np.ndarray
    n: int | None = None

    @property
    def measured(self):
        return over_questions(self.x) if self.n is None else over_resamples(self.x, self.n)

    def __sub__(self, other):
        kind = "difference" if self.kind == "accuracy" else "other difference"
        return Observed(kind, self.x - other.x, self.n)


def observe(panel, policy):
    """All that one policy did on one source; a key is the path under which results.json says it.

    Worth of the picture: accuracy with it less accuracy without it, on the same questions. Mirage
    score (arXiv 2603.21687): accuracy without the picture over accuracy with it, by a paired
    bootstrap; 1: the picture is worth nothing. That paper asks as input `removed` does. Well
    formed: share of the responses to intact questions.
    """
    right = {name: panel.right(policy, name) for name in panel.answers[policy]}
    found = {("accuracy", name): Observed("accuracy", x) for name, x in right.items()}
    for name, x in panel.sampled.get(policy, {}).items():
        found["accuracy", name] = Observed("accuracy", x)
    with_picture = panel.weights @ right["clean"]
    with_picture[with_picture == 0] = np.nan  # then there is no ratio
    for name in panel.withouts:
        found["picture_worth", name] = Observed("difference", right["clean"] - right[name])
        ratio = panel.weights @ right[name] / with_picture
        found["mirage", name] = Observed("ratio", ratio, len(panel.questions))
    found["well_formed",] = Observed("share", panel.column(policy, "clean", "well_formed"))
    if policy != "base":  # it gains nothing over itself
        found |= split_gain(panel.weights, panel.strata, panel.outcomes("base"),
                            panel.outcomes(policy), panel.without)
    if panel.fits is not None:
        gold = np.array([canonical(question["answer"]) for question in panel.questions])
        # an edit may leave the right answer as it was, or nobody knows it
        changed = (panel.fits != "") & (panel.fits != gold)
        if changed.any():
            clean, edited = panel.said(policy, "clean"), panel.said(policy, "edited")
            effect = causal_effect(clean, edited, gold, panel.fits)
            found["causal_effect",] = Observed("effect", effect[changed])
    return found


def causal_effect(clean, edited, gold, fits):
    """What one edit of the picture does to the answer, per question; averaged, its causal effect.

        1/2 (1[edited = fits] - 1[clean = fits]) + 1/2 (1[clean = gold] - 1[edited = gold])

    All (n,). `clean`, `edited`: the answers to the intact and to the edited picture; `gold`,
    `fits`: the answers that are right there. Everything but the edit is the same, and it is drawn
    without regard to the policy: the difference is the edit's doing. 1: the answer always goes
    with the picture; 0: it never does.
    """
    towards = 1.0 * (edited == fits) - (clean == fits)
    away = 1.0 * (clean == gold) - (edited == gold)
    return (towards + away) / 2


def split_gain(weights, strata, base, run, without):
    """A policy's gain over the base in accuracy, and what it is made of.

        total       accuracy(policy) - accuracy(base) on clean input
        format      `form_part` on clean input
        image_free  the same difference on an input without the picture, less `form_part` there
        visual      total - format - image_free

    Whoever learns the form alone gets image_free = visual = 0; whoever learns to guess or to
    reason from the text alone gets visual = 0; whoever stops looking gets visual < 0. The visual
    part is gone when the picture is gone: it is better sight, or better use of what is seen.
    weights (R, n), strata (n, S); `base`, `run`: input -> (correct, formed), each (n,).
    """
    n = weights.shape[1]
    total = run["clean"][0] - base["clean"][0]
    form = form_part(weights, strata, *base["clean"], run["clean"][1])  # (R,)
    found = {("gains", "total"): Observed("difference", total),
             ("gains", "format"): Observed("part", form, n)}
    if without:
        kept = weights @ (run[without][0] - base[without][0])  # (R,): gained without the picture
        kept -= form_part(weights, strata, *base[without], run[without][1])
        found["gains", "image_free"] = Observed("part", kept, n)
        found["gains", "visual"] = Observed("part", weights @ total - form - kept, n)
    return found


def form_part(weights, strata, correct, formed, formed_policy):
    """What the base would gain if its answers were as well formed as the policy's: replicates (R,).

        sum over strata s of
            (W_policy,s - W_base,s) * (A_base,s among well formed - A_base,s among others)

    W is the share of all questions that are in s and well formed, A an accuracy: the composition
    part of a standardised difference (Kitagawa, JASA 1955). Strata (n, S) are groups by answer
    types: form and difficulty both differ between them. A stratum's A counts one answer more, of
    overall accuracy, so that an empty one has one. It is assumed that, within a stratum, answers
    which the base spoilt would have been right as often as those which it did not.
    """
    one = 1 / len(strata)  # question, as a share

    def accuracies(kept):
        number = (weights * kept) @ strata  # (R, S)
        right = (weights * kept * correct) @ strata
        with np.errstate(invalid="ignore"):  # a base without any well-formed answer has no such part
            overall = right.sum(1, keepdims=True) / number.sum(1, keepdims=True)
        return (right + one * overall) / (number + one)

    worth = accuracies(formed)
    if (formed == 0).any():
        worth -= accuracies(1 - formed)
    return ((weights * (formed_policy - formed)) @ strata * worth).sum(1)


def measure(runs):
    """What came of each measure, of a run or of the seeds of a condition, nested by path."""
    out = {}
    for path in runs[0]:
        if all(path in run for run in runs):
            put(out, summarise([run[path] for run in runs]), *path)
    return out


def summarise(runs):
    """One measure of a run, or of a condition's seeds: value, n, 95% interval; of a difference p.

    Of one run by formula, or by percentiles of the bootstrap; of several by `over_runs`.
    """
    kind, x, n = runs[0].kind, runs[0].x, runs[0].n
    by_formula = {"accuracy": accuracy, "share": share, "difference": paired}
    if len(runs) == 1 and kind in by_formula:
        return by_formula[kind](x)
    if len(runs) == 1 and kind in ("part", "ratio"):
        return estimate(x, n)
    measured = [run.measured for run in runs]
    found = over_runs(measured, BOUNDS.get(kind, (-1.0, 1.0)))
    if kind in ("difference", "other difference") and found["value"] is not None:
        found["p"] = p_over_runs(measured)
    return found


def compare(panel, runs):
    """Conditions against the base and each other: measure -> difference. `runs`: as observed.

    Two runs of one seed share questions, their order and all draws, so conditions are compared
    seed by seed (`over_runs`), and what all runs of a seed owe to its luck falls out. `by_seed` is
    the difference of each; `within_seed` what McNemar's test says of right and wrong answers, which
    is all there is where a study has one seed: the luck of a run is then not covered.
    """
    paths = [("accuracy", name) for name in ("clean", *panel.withouts)]
    paths += [("causal_effect",), *(("gains", part) for part in PARTS)]
    out = defaultdict(dict)
    for (one, two), path in itertools.product(itertools.combinations(panel.conditions, 2), paths):
        seeds = panel.by_seed(two, one)
        pairs = [[runs[run].get(path) for run in both] for both in seeds.values()]
        # the base has no parts of a gain, and not everybody was asked everything
        if not pairs or any(None in pair for pair in pairs):
            continue
        apart_by_seed = [first - second for first, second in pairs]
        found = summarise(apart_by_seed)
        if found["value"] is not None:
            values = [difference.measured.value for difference in apart_by_seed]
            found["by_seed"] = dict(zip(seeds, values))
            if apart_by_seed[0].kind == "difference":
                tests = [paired(difference.x) for difference in apart_by_seed]
                found["within_seed"] = dict(zip(seeds, tests))
            out[two, one][path[-1]] = found
    return out


# The paper's eight settings; which questions need their picture

# trained on, asked about, split. The order of the pairs is the paper's, as notes on it tell; that
# within a pair the questions trained on come first is this kit's choice
SETTINGS = {
    "S1": ("clean", "clean", "train"), "S2": ("clean", "clean", "test"),
    "S3": ("clean", "damaged", "train"), "S4": ("clean", "damaged", "test"),
    "S5": ("damaged", "clean", "train"), "S6": ("damaged", "clean", "test"),
    "S7": ("damaged", "damaged", "train"), "S8": ("damaged", "damaged", "test"),
}


def eight_settings(panel, trained, differences):
    """S1 to S8 of the paper, for each damage that was trained on: setting -> accuracy.

    `panel` holds the answers to test questions, `trained` those to questions of the training set,
    where they were asked. `base`: the same as S1 to S4 before training. Where several kinds of
    damage were trained on together, questions are asked under the first of them. And what the
    settings say together:

        memorised  gain of training on clean pictures on the questions trained on, S1 - base, less the
                   same on new ones of the same source, S2 - base: what does not carry over
        carried    S6 - base: what training on damaged questions is worth on new, clean questions
        picture    S2 - S4, where the damage takes the picture away: what training on clean pictures
                   gets right on new questions by their picture
    """
    out = {}
    standard = panel.conditions.get("standard", {}).values()
    for condition in panel.conditions:
        kind, _, damage = condition.partition("-")
        asked = damage.partition("+")[0]
        if kind != "hallucination" or asked not in panel.inputs:
            continue
        found = out[condition] = {"asked": asked, "base": {}}
        for setting, (of, name, split) in SETTINGS.items():
            where = panel if split == "test" else trained
            name = name.replace("damaged", asked)
            found[setting] = accuracy_of(where, "standard" if of == "clean" else condition, name)
            if of == "clean":
                found["base"][setting] = accuracy_of(where, "base", name)
        asked_both = [run for run in standard if trained and run in trained.answers]
        if asked_both and found["S1"] and found["base"]["S1"] and trained.source == panel.source:
            moved = [apart(trained.gain(run), panel.gain(run)) for run in asked_both]
            found["memorised"] = over_runs(moved)
        found["carried"] = differences[condition, "base"]["clean"]
        if found["S4"] and takes_away(condition):
            worth = [panel.right(run, "clean") - panel.right(run, asked) for run in standard]
            found["picture"] = over_runs([over_questions(x) for x in worth])
    return out


def accuracy_of(panel, condition, name):
    """Accuracy of a condition on an input, over its seeds; nothing where one was not asked."""
    runs = panel.conditions.get(condition, {}).values() if panel else ()
    if not runs or any(name not in panel.answers[run] for run in runs):
        return None
    return summarise([Observed("accuracy", panel.right(run, name)) for run in runs])


def strict_subset(panel):
    """Ids of the questions whose answers without the picture are right no more often than by chance.

    Under each input without a picture every policy, the base included, answers once greedily and
    `samples` times at temperature 1. A question goes out if one of all these answers is right; a
    choice question, where chance is right too, one in as many as it has choices, if so many are
    that chance would do so for fewer than 1 of 20 questions (binomial). Policies of one base guess
    alike: what all of them guess right by luck goes out as well. B-Clean (arXiv 2603.21687) takes
    out each question that a model under comparison once answers right without the picture: there
    every lucky choice goes out, more with each model, and what a second try would guess stays.
    """
    out = []
    for i, question in enumerate(panel.questions):
        rows = [inputs[name][i] for inputs in panel.answers.values() for name in panel.withouts]
        right = sum(row["correct"] + row.get("drawn_right", 0) for row in rows)
        given = sum(1 + row.get("samples", 0) for row in rows)
        chance = 1 / len(question["choices"]) if question["choices"] else 0.0
        if rows and tail(right, given, chance) >= 0.05:
            out.append(question["id"])
    return out


# ------------------------------------------------------------------------------------------------
# Below: the machine room. You can fork this kit without reading on.
# ------------------------------------------------------------------------------------------------


# Statistics of shares and paired differences. One run's intervals cover the choice of questions: by
# formula where a measure is a share or a paired difference, else as far as a bootstrap moves it.

Z = 1.959963984540054  # of a normal distribution, 95% lie within so many standard deviations


def wilson(hits, n):
    """95% interval of a share p = hits / n (Wilson, JASA 1927).

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    p = hits / n
    centre = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    whole = 1 + Z * Z / n
    return [max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)]


def share(hits, names=("count", "share")):
    n, k = len(hits), int(sum(hits))
    return {"n": n, names[0]: k, names[1]: k / n, "ci95": wilson(k, n)}


def accuracy(right):
    return share(right, ("correct", "accuracy"))


def mcnemar(only_one, only_two):
    """Exact two-sided p of McNemar's test: do questions that only one got right fall evenly?"""
    return min(1.0, 2 * tail(max(only_one, only_two), only_one + only_two, 0.5))


@lru_cache(maxsize=None)
def tail(k, n, p):
    """Of a binomial distribution: the probability of k or more of n."""
    p = mpmath.mpf(p)  # whose powers do not vanish, however large n is
    return float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)))


def paired(difference):
    """Difference of two shares of the same questions: value, 95% interval, exact p.

    `difference` (n,) is 1 where only the first is right, -1 where only the second is, else 0. With
    f and k the numbers of either, half an answer more in each of the four cells (Agresti and Min,
    Statistics in Medicine 2005): (f - k) / (n + 2) +- z sqrt(f + k - (f - k)^2 / (n + 2)) / (n +
    2). A bootstrap of few such questions would be too sure, of none altogether.
    """
    n = len(difference)
    only_one = int((difference > 0).sum())
    only_two = int((difference < 0).sum())
    f, k = only_one + 0.5, only_two + 0.5
    middle = (f - k) / (n + 2)  # drawn a little towards 0
    half = Z * math.sqrt(f + k - (f - k) ** 2 / (n + 2)) / (n + 2)
    return {"value": (only_one - only_two) / n,
            "ci95": [max(-1.0, middle - half), min(1.0, middle + half)], "n": n,
            "p": mcnemar(only_one, only_two), "only_one": only_one, "only_two": only_two}


def holm(tests):
    """Give each test its `p_holm`: its p corrected for their number, as Holm (1979) does.

    The i-th smallest of m times m - i + 1, never falling, at most 1.
    """
    so_far = 0.0
    for i, test in enumerate(sorted(tests, key=lambda test: test["p"])):
        so_far = max(so_far, test["p"] * (len(tests) - i))
        test["p_holm"] = min(1.0, so_far)


def resample(n, resamples, *seed):
    """Bootstrap weights (1 + resamples, n); each row adds up to 1. Row 0 is the sample itself."""
    rng = np.random.default_rng(list(json.dumps(seed).encode()))
    drawn = rng.multinomial(n, np.full(n, 1 / n), resamples)
    return np.vstack([np.ones((1, n)), drawn]) / n


def estimate(replicates, n):
    """Value and 95% percentile interval of a statistic from its replicates (1 + resamples,)."""
    if not np.isfinite(replicates[0]):
        return {"value": None, "ci95": None, "n": n}
    ends = np.nanpercentile(replicates[1:], [2.5, 97.5]).tolist()
    return {"value": float(replicates[0]), "ci95": ends, "n": n}


# Several seeds. An interval then covers two things: the choice of questions, which all runs share,
# and the luck of a run. Differences of conditions are taken seed by seed first.


@dataclass(frozen=True)
class Measured:
    """A run's value of some measure, and how far the choice of questions moves it.

    The sum of squares of `moves` is the value's variance over that choice. Runs answer the same
    questions, so the sum of products of two runs' moves is their covariance.
    """
    value: float
    moves: np.ndarray
    n: int  # questions


def over_questions(x):
    """Of a mean over questions, x (n,)."""
    n = len(x)
    mean = float(np.mean(x))
    return Measured(mean, (x - mean) / math.sqrt(n * max(1, n - 1)), n)


def over_resamples(replicates, n):
    """Of a statistic that is no mean, from its bootstrap replicates (1 + resamples,)."""
    # a resample without any well-formed answer has no form part: it moves nothing
    drawn = np.where(np.isfinite(replicates), replicates, replicates[0])[1:]
    return Measured(float(replicates[0]), (drawn - drawn.mean()) / math.sqrt(len(drawn)), n)


def apart(one, two):
    """Difference of two means over different questions: what the choice of either does adds up."""
    one, two = over_questions(one), over_questions(two)
    return Measured(one.value - two.value, np.concatenate([one.moves, two.moves]), min(one.n, two.n))


def student(t, df):
    """Two-sided p of Student's t with df degrees of freedom."""
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


def largest(holds, low, high):
    """The largest x between two ends for which `holds`, by bisection; above it nothing does."""
    for _ in range(60):
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return high


@lru_cache
def student_95(df):
    """The t of which `student` is 0.05: 12.7 with one degree of freedom, less with more."""
    return largest(lambda t: student(t, df) > 0.05, 0.0, 13.0)


def variances(runs, shares):
    """Of the mean of k runs: what the choice of questions does to all alike, and luck's part."""
    moves = np.stack([run.moves for run in runs])
    covariances = moves @ moves.T  # (k, k)
    k = len(runs)
    if k == 1:
        shared, luck = covariances[0, 0], 0.0
    else:
        shared = (covariances.sum() - np.trace(covariances)) / (k * (k - 1))
        luck = np.var([run.value for run in runs], ddof=1) / k
    if shares:  # of which nobody is surer than one answer more or less, however few questions differ
        shared = max(shared, 1 / (runs[0].n + 2) ** 2)
    return max(0.0, float(shared)), float(luck)


def over_runs(runs, bounds=(-1.0, 1.0)):
    """Mean of a measure over k runs; the interval covers the choice of questions and a run's luck.

        half^2 = z^2 C + t^2 S / k

    S, the variance of the runs' values, holds the luck of a run, and what each run alone makes of
    a question. C, the mean covariance of two runs over the choice of questions, is what that
    choice does to all runs alike, which S cannot see. t is Student's with k - 1 degrees of
    freedom: were all questions asked, this would be the t interval over k seeds, and for the
    differences of two conditions, seed by seed, that of the paired t test. (Two errors, each with
    its own quantile: Howe, JASA 1974.) With one run only the choice of questions is covered.
    `bounds`: of shares, if finite.
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


def p_over_runs(runs):
    """p of no difference: one less the level at which the interval of `over_runs` ends at 0.

    Were all questions asked, this would be the p of the paired t test.
    """
    shared, luck = variances(runs, True)
    value = abs(np.mean([run.value for run in runs]))
    if luck == 0:  # one run, or runs that all agree: a normal distribution's p
        return math.erfc(value / math.sqrt(2 * shared))

    def leaves_out_0(t):
        z = NormalDist().inv_cdf(max(student(t, len(runs) - 1), 1e-300) / 2)
        return z * z * shared + t * t * luck < value * value

    # with C = 0 it is the upper end
    return student(largest(leaves_out_0, 0.0, value / math.sqrt(luck)), len(runs) - 1)


# Does the instrument find the truth where it is known? Simulated policies that change in one
# respect, by a known amount, go through the same functions as the real ones; and on shapes what
# must hold for whoever answers is tested. A page whose check fails says so before anything else.

# of four groups of questions: need of the picture, share well formed, chance of a guess to be right
# if all answers are as likely, and if it is the most frequent answer
NEEDS = np.array([True, True, True, False])
FORMED = np.array([0.4, 0.9, 0.6, 0.7])
ANY_ANSWER, FREQUENT = np.array([0.25, 0.5, 0.25, 0.1]), np.array([0.4, 0.7, 0.25, 0.1])
READABLE = 1 / 3  # share of malformed responses whose answer can be read all the same
# shares that are seen and read from the text, form: exponent on a group's share of well-formed answers
NOVICE = {"sees": 0.0, "reads": 0.3, "guesses": ANY_ANSWER, "form": 1.0}
LEARNERS = {  # what a base is, what training changes, the one part in which the whole gain must land
    "answers at random, and learns nothing": ({"reads": 0.0}, {}, None),
    "learns nothing": ({"sees": 0.3}, {}, None),
    "learns the form alone": ({"sees": 0.3}, {"form": 0.1}, "format"),
    "learns to look at 6 pictures in 10": ({}, {"sees": 0.6}, "visual"),
    "learns to see all": ({}, {"sees": 1.0}, "visual"),
    "forgets to look": ({"sees": 0.6}, {"sees": 0.0}, "visual"),
    "learns which answer is frequent": ({}, {"guesses": FREQUENT}, "image_free"),
    "learns to reason from the text": ({"sees": 0.3}, {"reads": 0.9}, "image_free"),
}
BLIND_BEST = {"count": 0.42, "colour": 0.26, "more": 0.70, "both": 0.42}  # shapes: best blind guess


def check_instrument(panels):
    """Both checks; shapes are the only questions of which it is known what a blind guess can get."""
    shapes = [panel for panel in panels if panel.source == "shapes"]
    entries = sum(map(check_shapes, shapes), check_measures())
    return {"passed": all(entry["passed"] for entry in entries), "entries": entries}


def check_measures(n=4000, resamples=500, seed=1):
    """Simulated policies of known truth, through the same functions as the real ones.

    A measurement passes within one width of its 95% interval, about four standard errors, of the
    truth, if that width is below 15 points (`verify`).
    """
    rng = np.random.default_rng(seed)
    group = np.arange(n) % len(NEEDS)
    weights, strata = resample(n, resamples, "check", seed), np.eye(len(NEEDS))[group]
    checks = []  # what is checked, what was observed, the truth
    for learner, (was, change, part) in LEARNERS.items():
        base, policy = NOVICE | was, NOVICE | was | change
        gain = expected_accuracy(**policy) - expected_accuracy(**base)
        parts = split_gain(weights, strata, simulate(rng, group, **base),
                           simulate(rng, group, **policy), "blank")
        for (_, name), observed in parts.items():
            truth = gain if name in ("total", part) else 0.0
            checks.append((f"{learner}: {name.replace('_', '-')}", observed, truth))
    for sees in (0.0, 0.6, 0.95):
        gold, fits, *guesses = rng.integers(0, 4, (4, n))
        clean = np.where(rng.random(n) < sees, gold, guesses[0])
        edited = np.where(rng.random(n) < sees, fits, guesses[1])
        effect = causal_effect(clean, edited, gold, fits)[gold != fits]
        what = f"causal effect of an edit on who looks at {sees:.0%} of the pictures"
        checks.append((what, Observed("effect", effect), sees))
    return [verify(*check) for check in checks]


def verify(what, observed, truth):
    """What was observed beside the truth, and whether they agree."""
    entry = {"check": what, "truth": truth} | summarise([observed])
    width = entry["ci95"][1] - entry["ci95"][0]
    return entry | {"passed": bool(abs(entry["value"] - truth) <= width < 0.15)}


def simulate(rng, group, form, **skill):
    """Input -> (correct, formed), each (n,), of a policy that sees, reads and guesses so often."""
    out = {}
    for name in ("clean", "blank"):
        formed = rng.random(len(group)) < (FORMED**form)[group]
        readable = formed | (rng.random(len(group)) < READABLE)
        right = rng.random(len(group)) < chance(name, **skill)[group]
        out[name] = 1.0 * (right & readable), 1.0 * formed
    return out


def chance(name, sees, reads, guesses):
    """Of such a policy to know or guess what is right, by group."""
    known = np.where(NEEDS, sees * (name == "clean"), reads)
    return known + (1 - known) * guesses


def expected_accuracy(form, **skill):
    """Of such a policy on clean input, in closed form."""
    formed = FORMED**form
    return float(np.mean((formed + (1 - formed) * READABLE) * chance("clean", **skill)))


def check_shapes(panel):
    """The study's own policies on shapes: what must hold for whoever answers these questions.

    Where the text suffices, taking the picture away changes nothing (McNemar); where it does not,
    nobody beats the best guess without a picture (binomial). A test fails if its p, corrected by
    Holm, is below 0.01.
    """
    entries = []
    groups = np.array([q["group"] for q in panel.questions])
    suffices = np.array([q["needs_image"] is False for q in panel.questions])
    for policy, name in itertools.product(panel.answers, panel.withouts):
        without = panel.right(policy, name)
        # on the first alone: a model may fail under another for want of practice
        if suffices.any() and name == panel.without:
            worth = panel.right(policy, "clean") - without
            what = f"{policy}: worth of the picture ({name}) where the text suffices"
            entries.append({"check": what, "truth": 0.0, **paired(worth[suffices])})
        for group in sorted(BLIND_BEST.keys() & set(groups)):
            best, found = BLIND_BEST[group], share(without[groups == group])
            what = f"{policy}: right on {group} without the picture ({name}), at most"
            entries.append({"check": what, "truth": best, **found,
                            "p": tail(found["count"], found["n"], best)})
    holm(entries)
    for entry in entries:
        entry["passed"] = entry["p_holm"] >= 0.01
    return entries


# Reading answers. A file of stage 4 counts if it is whole, in its form, and made from what lies in
# the data folder now; all policies are compared on the questions that all of them answered under
# all inputs.


ROW = {"id": str, "response": str, "answer": (str, type(None)), "correct": bool, "well_formed": bool}
TOKENS = {"token_texts": [str], "token_nats": [(int, float)]}
DRAWN = {"samples": int, "drawn_right": int}


@dataclass
class Panel:
    """All answers to a source, on the same n questions for every policy and input."""
    source: str
    questions: list[dict]         # records of stage 1, without pictures
    answers: dict[str, dict]      # policy -> input -> n rows of stage 4
    weights: np.ndarray           # (R, n)
    # (n,): the answer to the edited picture, "" where nobody knows; where edits were asked about
    fits: np.ndarray | None = None
    # policy -> input that was asked of fewer questions -> whether each answer is right
    sampled: dict[str, dict] = field(default_factory=dict)

    @property
    def strata(self):
        """Groups by answer types, one-hot (n, S)."""
        keys = [json.dumps([q["group"], q["answer_type"]]) for q in self.questions]
        return np.eye(len(set(keys)))[np.unique(keys, return_inverse=True)[1]]

    @property
    def inputs(self):
        asked = [*self.answers.values(), *self.sampled.values()]
        return sorted(set().union(*asked), key=input_order)

    @property
    def withouts(self):
        """Inputs without a picture that all policies answered."""
        return [name for name in prepare.NO_PICTURE if all(name in x for x in self.answers.values())]

    @property
    def without(self):
        """The first of them, behind the parts of a gain."""
        return next(iter(self.withouts), None)

    @cached_property
    def conditions(self):
        """Condition -> seed -> run, the base first."""
        found = defaultdict(dict)
        for policy in self.answers:
            found[family(policy)][seed_of(policy)] = policy
        return dict(found)

    def by_seed(self, *conditions):
        """Seed -> the runs of these conditions with it; the one base goes with every seed."""
        trained = [self.conditions.get(name, {}) for name in conditions if name != "base"]
        common = [seed for seed in trained[0] if all(seed in runs for runs in trained)]
        return {seed: [self.conditions[name].get(seed, "base") for name in conditions]
                for seed in common}

    def column(self, policy, name, key):
        return np.array([row[key] for row in self.answers[policy][name]], float)

    def right(self, policy, name):
        return self.column(policy, name, "correct")

    def gain(self, run):
        """Over the base, on clean input, of each question (n,)."""
        return self.right(run, "clean") - self.right("base", "clean")

    def outcomes(self, run):
        """Input -> (correct, formed), each (n,), on clean input and without a picture."""
        return {name: (self.right(run, name), self.column(run, name, "well_formed"))
                for name in ("clean", *self.withouts)}

    def said(self, policy, name):
        """Answers (n,), one text for each meaning: a right one is the gold, however written."""
        return np.array([canonical(question["answer"] if row["correct"] else row["answer"])
                         for question, row in zip(self.questions, self.answers[policy][name])])


class Seen:
    """What reading found: `notes` for the page, (artifact, sha256), a hash of each answer."""

    def __init__(self):
        self.notes, self.checked, self.lines = [], set(), []
        self.models = {}  # policy -> artifacts and packages of its answers, the same in all files


def read_benchmarks(data, study, resamples, seen):
    """A panel for each benchmark of the study that has answers."""
    sources, panels = study["sources"]["benchmarks"], []
    for path in sorted((data / "answers").glob("*/*/[!.]*")):  # a lock's name begins with a dot
        # train/ holds answers to questions that were trained on
        if path.name != "train" and (path.suffix != ".jsonl" or path.parent.name not in sources):
            seen.notes.append(f"{path.relative_to(data)} is unfinished, or of no benchmark of this study: "
                              "not counted")
    for source in sources:
        policies = {path.parts[-3] for path in (data / "answers").glob(f"*/{source}/*.jsonl")}
        for run in [*runs_of(data), "base"]:
            if run not in policies:
                seen.notes.append(f"{run} has no answers to {source}: 04_evaluate.py makes them")
        if not policies:
            continue
        for policy in sorted({"base"} | policies):
            clean = data / "answers" / policy / source / "clean.jsonl"
            if not clean.exists():
                raise UserError(f"{clean} is missing: run 04_evaluate.py --data {data}")
        panel = read_panel(data, study, source, "*.jsonl", resamples, seen)
        panels.append(panel)
        for name in (*prepare.NO_PICTURE, "edited"):
            lacking = [policy for policy, inputs in panel.answers.items() if name not in inputs]
            if 0 < len(lacking) < len(panel.answers):  # nobody's: not asked, or of a sample
                seen.notes.append(f"{', '.join(lacking)}: no answers to {source} under {name}, so but for "
                                  "accuracies no number of any policy rests on that input")
        if source in CLUSTERED:
            seen.notes.append(f"{source} asks several questions about one problem: its intervals and "
                              "tests, which count them as independent, are too sure")
    if not panels:
        raise UserError(f"{data / 'answers'} holds no answers to {', '.join(sources)}: "
                        f"run 04_evaluate.py --data {data}")
    return panels


def read_panel(data, study, source, files, resamples, seen):
    """Read these files of each policy, and cut them to the questions that all of them answer."""
    again = f"run 04_evaluate.py --data {data} again, for all policies at once"
    given, cuts = {}, set()  # (policy, input) -> id -> row
    for path in sorted((data / "answers").glob(f"*/{source}/{files}")):
        rows = read_rows(data, path, source, seen)
        given[path.relative_to(data).parts[1], path.stem] = rows
        cuts |= {str(row.get("max_new_tokens")) for row in rows.values()}
    # a longer limit gives more right answers: such files are not compared
    if len(cuts) > 1:
        raise UserError(f"{data / 'answers'}: some answers to {source} were cut after "
                        f"{' tokens, others after '.join(sorted(cuts))}: {again}")
    if not given:
        return None
    sampled = take_sampled(given)
    records = records_of(data, source, "clean")
    ids = [i for i in records if all(i in rows for rows in given.values())]
    if not ids:
        raise UserError(f"{data / 'answers'}: no question of {source} has an answer of every policy under "
                        f"every input: {again} and with one --limit")
    left_out = len(set().union(*given.values())) - len(ids)
    if left_out:
        seen.notes.append(f"{left_out} questions of {source} lack an answer of some policy: all numbers "
                          f"are on the other {len(ids)}. 04_evaluate.py without --limit answers them")
    questions = [records[i] | {"group": records[i]["group"] or "all"} for i in ids]
    pictured = {ids[place] for place in first_of_groups(questions)}  # in the gallery
    answers = {}
    for policy, name in sorted(given, key=lambda key: policy_order(key[0])):
        rows = given[policy, name]
        put(answers, [rows[i] for i in ids], policy, name)
        for i in rows.keys() - pictured:
            for key in ("response", *TOKENS):  # most of what a row weighs
                rows[i].pop(key, None)
    fits = None
    if all("edited" in inputs for inputs in answers.values()):
        edited = records_of(data, source, "edited")
        fits = np.array([canonical(edited[i]["shown_answer"]) for i in ids])
    weights = resample(len(ids), resamples, study["seed"], source)
    return Panel(source, questions, answers, weights, fits, sampled)


def take_sampled(given):
    """Take out of `given` the inputs that every policy was asked about fewer questions than about
    clean pictures, as stage 4 does where no sentence rests on an input: policy -> input -> whether
    each answer is right, on the questions that all policies have there."""
    sampled = defaultdict(dict)
    for name in sorted({name for _, name in given}):
        asked = {policy: rows for (policy, other), rows in given.items() if other == name}
        # of training questions clean pictures may not have been asked about
        if all(rows.keys() < given.get((who, "clean"), {}).keys() for who, rows in asked.items()):
            common = sorted(set.intersection(*map(set, asked.values())))
            for policy, rows in asked.items():
                del given[policy, name]
                sampled[policy][name] = np.array([rows[i]["correct"] for i in common], float)
    return sampled


def first_of_groups(questions):
    """Places of the first question of each group: none is picked for its looks."""
    firsts = {}
    for place, question in enumerate(questions):
        firsts.setdefault(question["group"], place)
    return list(firsts.values())


def records_of(data, source, name):
    """Id -> question record of an input, without its pictures."""
    path = data / prepare.input_path(source, name)
    table = prepare.read_questions(path, "run 01_prepare.py and 02_corrupt.py again")
    return {row["id"]: row for row in table.remove_columns("images").to_list()}


def read_rows(data, path, source, seen):
    """Id -> row of an answers file: whole, in its form, made from what lies in the folder now."""
    _, policy, *where, _ = path.relative_to(data).parts
    again = f"run 04_evaluate.py --data {data} again"
    rows, origin = prepare.read_jsonl(path), set()
    wrong = what_is_wrong(path, rows, prepare.input_path(source, path.stem))
    if not wrong:
        for row in rows:
            origin |= row.pop("made_from").items()
        packages = {row.pop("made_with", None) for row in rows}
        wrong = who_is_wrong(policy, origin, packages, seen)
    if wrong:
        raise UserError(f"{path} {wrong}: delete it and {again}")
    # a file is hashed once, however many answers were made from it
    for name, digest in sorted(origin - seen.checked):
        prepare.check_fresh(data, path, {name: digest},
                            f"{again}, or delete {data / 'answers' / policy} to do without this policy")
    seen.checked |= origin
    for row in rows:
        said = [row[key] for key in ("id", "response", "answer", "correct", "well_formed")]
        # versions, file hashes and log probabilities are left out
        line = json.dumps([policy, "/".join(where), path.stem, *said])
        seen.lines.append(hashlib.sha256(line.encode()).digest())
    return {row["id"]: row for row in rows}


def what_is_wrong(path, rows, questions):
    """With the rows of a file of answers to these questions."""
    if not rows or len(rows) < len(path.read_bytes().splitlines()):
        return f"row {len(rows) + 1} cannot be read"
    form = ROW | {"made_from": {questions: str}}
    for i, row in enumerate(rows, 1):
        shapes = dict(form)
        for more in (TOKENS, DRAWN):
            if more.keys() & row.keys():
                shapes |= more
        wrong = [key for key in shapes if not prepare.has_shape(row, {key: shapes[key]})]
        if wrong:
            return f"row {i} has no proper {wrong[0]}"
        compared = [*row["made_from"].values(), row.get("made_with", "")]
        if not prepare.has_shape(compared, [str]):
            return f"row {i} has no proper made_from or made_with"
    if len({row["id"] for row in rows}) < len(rows):
        return "answers a question twice"
    return None


def who_is_wrong(policy, origin, packages, seen):
    """With answers that should be by one policy: that they, or its others, are by another."""
    # what answered, as opposed to what was asked
    model = {(name, digest) for name, digest in origin
             if not name.startswith(("questions/", "corrupted/"))}
    adapters = {Path(name).parent.name for name, _ in model if name.endswith("adapter_model.safetensors")}
    who = ", ".join(sorted(adapters)) or "base"
    if who != policy:
        return f"is by {who}, not by {policy}"
    if len(packages) > 1 or seen.models.setdefault(policy, (model, packages)) != (model, packages):
        return f"is by another {policy} than its answers elsewhere"
    return None


def fingerprint(lines):
    """One hash of all graded answers: two studies with the same gave the same answers to the letter.

    sha256 of the sorted sha256 of each [policy, source, input, question id, response, answer,
    correct, well formed], as JSON; the source of questions that were trained on is SOURCE/train.
    """
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def same_study(found):
    """The fingerprint, and whether the README, which holds its own, is about these answers."""
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if found[:16] in text:
        return f"Fingerprint {found[:16]}: the README speaks of these answers"
    other = f"Fingerprint {found[:16]}: the README speaks of other answers"
    if platform.machine() not in ("x86_64", "AMD64"):
        other += f", by an x86-64 processor, and {platform.machine()} rounds sums otherwise"
    return other


def canonical(answer):
    """10.0 is 10, and No is no; empty where no answer was found."""
    text = " ".join((answer or "").split())
    if re.fullmatch(r"[-+]?\d{1,15}(?:\.\d{1,15})?", text):
        return f"{float(text):g}"
    return text.casefold() if len(text) > 1 else text  # a letter is a choice


def family(policy):
    """A run's name without its seed."""
    return re.sub(r"-s\d+\Z", "", policy)


def seed_of(policy):
    """The seed in a run's name; another policy's name has none."""
    return policy.removeprefix(family(policy))[2:]


def policy_order(policy):
    order = ["base", "standard", "hallucination", "mixed", "grounded", policy.partition("-")[0]]
    return order.index(order[-1]), family(policy), int(seed_of(policy) or 0), policy


def group_of(name):
    """The group of columns of an input; `other` of one that this kit does not know."""
    return GROUPS.get(name.partition("-")[0], "other")


def input_order(name):
    kinds = [*GROUPS, name.partition("-")[0]]
    return kinds.index(kinds[-1]), name


# In words and tables. A cell is a number and what stands small below it; a table serves the page
# and tables.md alike. What comes from outside is escaped where it is written.

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069"
                       "\ufeff\ud800-\udfff\ufffe\uffff]")


def visible(text):
    """Control characters, those that turn the direction of writing, lone surrogates: as codes."""
    return INVISIBLE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def shorten(text, most):
    return text if len(text) <= most else text[:most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def percent(x):
    return f"{100 * x:.1f}%".replace("-", "\N{MINUS SIGN}")


def points(x):
    return f"{100 * x:+.1f}".replace("-", "\N{MINUS SIGN}")


def counted(x):
    """Questions and seeds behind a number."""
    return f"n = {x['n']}" + (f", {x['seeds']} seeds" if x.get("seeds", 1) > 1 else "")


def cell(x, form=percent, n=None):
    """A number, and its interval, p and n; n questions are usual where n is given, and not told."""
    if not x:
        return "\N{EN DASH}", ""
    value = next(x[key] for key in ("value", "accuracy", "share") if key in x)
    if value is None:
        return "cannot be told", ""
    low, high = (form(end).strip("+%") for end in x["ci95"])
    small = f"[{low}, {high}]"
    if "p_holm" in x:
        small += f" p {x['p_holm']:.2g}" if x["p_holm"] > 0.001 else " p < 0.001"
    if n is not None and n != x["n"]:
        small += f" {counted(x)}"
    return form(value), small


def grid(caption, rows, columns, n=None, form=percent, **more):
    """A table; `rows`: label -> measures, `columns`: title -> path of a measure in them.

    `n` questions, as the caption says: a cell of another number tells its own. None: none does.
    `form` writes a number. `more`:
    kind="heat" colours cells by their share, `groups` of columns are (title, how many).
    """
    cells = []
    for name, measures in rows.items():
        found = []
        for path in columns.values():
            x = measures  # of this row, followed down the path
            for key in path:
                x = (x or {}).get(key)
            found.append(cell(x, form, n))
        cells.append((name, found))
    return {"caption": caption, "columns": ["", *columns], "rows": cells} | more


def rows_of(r, source):
    """Of the base and of each condition, its seeds pooled: label -> measure -> what came of it."""
    out = {}
    for condition, sources in r["pooled"].items():
        if source in sources:
            runs = sources[source]["runs"]
            name = f"{condition} ({len(runs)} seeds)" if len(runs) > 1 else runs[0]
            out[name] = sources[source]
    return out


def tables_of(r, source):
    """The tables of one source, by the part of the page in which they stand."""
    rows, about = rows_of(r, source), r["sources"][source]
    n = about["n"]
    asked = {name: ("accuracy", name) for name in about["inputs"]}
    heat = {"kind": "heat", "groups": [("", 1), *Counter(map(group_of, asked)).items()]}
    gained = {name: x for name, x in rows.items() if "gains" in x}
    gains = {part.replace("_", "-"): ("gains", part) for part in ("total", *PARTS)}
    looking, without = {}, about["without_picture"]
    if without:
        looking |= {f"mirage score ({without})": ("mirage", without),
                    f"worth of the picture ({without})": ("picture_worth", without)}
    looking |= {"causal effect of an edit": ("causal_effect",), "well formed": ("well_formed",)}
    found = {
        "matrix": [grid("right answers", rows, asked, n, **heat)],
        "settings": [settings_table(*x) for x in r["s1_to_s8"][source].items()],
        "gains": [grid("gain over the base in points", gained, gains, n, points)],
        "looking": [grid("use of the picture", rows, looking, n)],
        "differences": [differences_table(r, source, n)]}
    # what holds for all of them
    for t in itertools.chain(*found.values()):
        t["caption"] = f"{source}, 95% intervals, n = {n}: {t['caption']}"
    return found


def settings_table(condition, found):
    """S1 to S8: rows are trained on nothing, clean or damaged, columns asked clean or damaged."""
    columns = [f"{asked}, {which}" for asked in ("clean", found["asked"]) for which in ("old", "new")]
    settings = [found[name] for name in SETTINGS]
    rows = {"trained on nothing": found["base"].values(), "clean (S1 to S4)": settings[:4],
            f"{condition} (S5 to S8)": settings[4:]}
    numbers = sorted({found[name]["n"] for name in ("S1", "S3", "S5", "S7") if found[name]})
    told = f", n = {' or '.join(map(str, numbers))}" if numbers else ""
    return grid(f"the paper\u2019s S1 to S8, right answers to old questions (trained on{told}) and new ones",
                {name: dict(zip(columns, row)) for name, row in rows.items()},
                {name: (name,) for name in columns})


def differences_table(r, source, n):
    """Each condition against the base and the others."""
    rows, columns = {}, {}
    for condition, references in r["differences"].items():
        for reference, sources in references.items():
            if source in sources:
                found = sources[source]
                seeds = len(found["clean"]["by_seed"])
                rows[f"{condition} \N{MINUS SIGN} {reference} (seeds: {seeds})"] = found
                columns |= {name.replace("_", "-"): (name,) for name in found}
    return grid("differences in points, paired by seed, p corrected by Holm: of right answers (clean, "
                "blank, removed), of an edit\u2019s effect, of parts of the gain", rows, columns, n, points)


def tables_to_paste(r):
    """tables.md: the sentences and the tables of the page in Markdown."""
    text = same_study(r["fingerprint"]) + "\n"
    for source, said in r["sentences"].items():
        texts = [f"{x['text']} ({x['numbers']})" for x in said]
        texts += [x["sentence"] for x in r["s1_to_s8"][source].values()]
        tables = [t for part in tables_of(r, source).values() for t in part if t["rows"]]
        text += "\n" + "\n\n".join(map(plain, texts)) + "\n\n" + "\n".join(map(markdown, tables))
    return text


def plain(text):
    """What comes from outside stays text in Markdown; brackets of intervals stay brackets."""
    text = re.sub(r"([|<>&`*_~\\])", r"\\\1", " ".join(visible(shorten(text, 2000)).split()))
    return re.sub(r"\[(?![\d\N{MINUS SIGN}])|(?<!\d)\]|\](?=[(:\[])", r"\\\g<0>", text)


def markdown(t):
    lines = [t["columns"], ["---"] + ["---:"] * (len(t["columns"]) - 1)]
    lines += [[name, *map(" ".join, cells)] for name, cells in t["rows"]]
    body = "".join(f"| {' | '.join(map(plain, line))} |\n" for line in lines)
    return f"{plain(t['caption'])}\n\n{body}"


# The page: one file, without scripts. The template says in which order; it draws bars and curves
# itself.


def training_curves(data, runs):
    """Run -> rows of its train.jsonl, a step each."""
    curves = {}
    for run in runs:
        path = data / "policies" / run / "train.jsonl"
        rows = prepare.read_jsonl(path) if path.exists() else []
        number = (int, float)
        if not prepare.has_shape(rows, [{"reward": number, "correct": number, "well_formed": number}]):
            raise UserError(f"{path} has a row that is no step of a training: delete {path.parent} "
                            "and run 03_train_grpo.py again")
        if rows:
            curves[run] = rows
    return curves


def gallery(data, panel, most):
    """The first question of each group, under every input."""
    tables = {name: prepare.read_questions(data / prepare.input_path(panel.source, name),
                                           "run 02_corrupt.py again") for name in panel.inputs}
    entries = []
    for i in first_of_groups(panel.questions)[:most]:
        question, shown = panel.questions[i], []
        for name, table in tables.items():
            row = table[table["id"][:].index(question["id"])]
            answers = {policy: inputs[name][i] for policy, inputs in panel.answers.items() if name in inputs}
            pictures = [Markup(small_copy(picture)) for picture in row["images"][:2]]
            shown.append({"name": name, "text": row["problem"], "pictures": pictures, "answers": answers})
        entries.append({"question": question, "shown": shown})
    return entries


def small_copy(picture):
    """At most 112 x 112 pixels and 64 colours, as a data URI: the page stays below 5 MB."""
    small, buffer = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((112, 112))
    small.quantize(64).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tokens_of(row):
    """A response as (text, nats) of its tokens: what the picture did for each."""
    texts, nats = row.get("token_texts", [row["response"]]), row.get("token_nats", [0.0])
    return list(zip(texts, nats))[:1000]


EXPLAINED = (  # functions whose docstrings the page shows
    sentences, wilson, paired, mcnemar, holm, estimate, over_runs, p_over_runs, split_gain, form_part,
    compare, observe, causal_effect, eight_settings, strict_subset,
    judge, check_measures, check_shapes, fingerprint)


def render(data, panels, r, most):
    def finalize(value):
        if isinstance(value, str) and not isinstance(value, Markup):
            return visible(shorten(value, 600))
        return value

    def whole(text):
        return Markup.escape(visible(text))

    # every string that the template writes is escaped, and cut unless it is marked as whole
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=finalize)
    environment.filters |= {"cut": shorten, "tokens": tokens_of, "whole": whole, "family": family,
                            "json": json.dumps}
    return environment.from_string(PAGE).render(
        r=r, css=Markup(CSS), parts=("total", *PARTS), protocol=PROTOCOL, cell=cell, points=points, percent=percent,
        tables={panel.source: tables_of(r, panel.source) for panel in panels},
        galleries={panel.source: gallery(data, panel, most) for panel in panels},
        curves=training_curves(data, r["provenance"]["policies"]), same=same_study(r["fingerprint"]),
        how={f.__name__: inspect.getdoc(f) for f in EXPLAINED})


CSS = """
:root{color-scheme:light dark;--page:light-dark(#f6f5f1,#101317);--card:light-dark(#fff,#181c22);
--ink:light-dark(#1a1d22,#eceef2);--soft:light-dark(#565d68,#a9b1bd);
--rule:light-dark(#dedbd3,#2d333c);--heat:light-dark(#3f8fe8,#2f7de1);
--accent:light-dark(#0b5cad,#7cb7ff);--good:light-dark(#0b6e3f,#5ed39b);
--bad:light-dark(#b3261e,#ff8f85);--total:light-dark(#3c424c,#c8cdd6);
--format:light-dark(#848a94,#8d95a1);--image_free:light-dark(#d9822b,#e8984a);
--visual:light-dark(#1f6fd0,#4b97f2)}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif;
overflow-wrap:anywhere}
header,main,footer{max-width:1320px;margin:0 auto;padding:0 20px}
header{padding-top:20px}footer{padding-bottom:60px}p{max-width:75ch}
h1{font-size:1rem;font-weight:600;margin:0 0 10px;color:var(--soft)}
h2{font:600 1.4rem/1.2 Georgia,"Times New Roman",serif;margin:0 0 .3em}
h3{font-size:1rem;margin:1em 0 .2em}
.lead{margin:0;padding:0;list-style:none}
.lead li{margin:0 0 10px;max-width:66em}
.lead span{font:600 clamp(1.1rem,1.9vw,1.42rem)/1.28 Georgia,"Times New Roman",serif;display:block}
small,figcaption,.soft{color:var(--soft)}small{font-size:.78rem}
section,main>details{background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:18px 22px;margin:14px 0}
main>details>summary{font:600 1.15rem/1.3 Georgia,"Times New Roman",serif}
.bar{margin:2px 0;max-width:none}.ok{color:var(--good)}.bad{color:var(--bad)}
.box{border:4px solid;border-radius:12px;padding:10px 18px;margin:14px 0}
.box *{color:var(--ink)}.box strong{color:inherit}
a{color:var(--accent)}
.side{display:flex;flex-wrap:wrap;gap:0 34px;align-items:flex-start}.side>*{max-width:100%}
.scroll{overflow-x:auto;margin:0 0 12px}
.caption,figcaption{font-size:.82rem;margin:10px 0 2px;max-width:none}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
td{white-space:nowrap}thead th{vertical-align:bottom}
thead .group th{text-align:center;border-left:2px solid var(--rule);font-weight:400;
color:var(--soft)}
th:first-child{text-align:left;min-width:7.5em;max-width:16em;border-left:0}
tbody th{position:sticky;left:0;background:var(--card)}
td small{display:block;font-size:.72rem}
.heat td{background:color-mix(in oklab,var(--heat) calc(var(--h)*.5%),var(--card));
border:2px solid var(--card)}
.heat :is(th,td){padding:4px 6px}.heat td small{color:var(--ink)}
.many.heat{font-size:.78rem}.many.heat :is(th,td){padding:4px 3px}.many.heat td small{font-size:.64rem}
.prose :is(td,th){white-space:normal;text-align:left;min-width:8em;max-width:22em}
.prose th:first-child{min-width:14em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:22px;
align-items:start}
figure{margin:0;min-width:0;max-width:420px;width:100%}
svg{width:100%;height:auto;display:block;overflow:visible}svg path{stroke:var(--rule);fill:none}
polyline{fill:none;stroke-width:1;stroke-linejoin:round;stroke:var(--c)}
.k0{--c:light-dark(#0b62c4,#6cb2ff)}.k1{--c:light-dark(#b8450b,#ff9a62)}
.k2{--c:light-dark(#0a7550,#4fd1a0)}.k3{--c:light-dark(#8a3ea8,#d59bf0)}
.k4{--c:light-dark(#7a6400,#e0c34a)}.k5{--c:light-dark(#b3266b,#ff8fbf)}
.k6{--c:light-dark(#3f4c8f,#a9b6ff)}
.policy{margin:10px 0;max-width:860px}.policy b{font-size:.9rem}
.part{display:grid;grid-template-columns:84px minmax(0,1fr) 150px;gap:10px;align-items:center;
font-size:.82rem;margin:2px 0}
.part>:first-child{text-align:right;color:var(--soft)}
.track{position:relative;height:15px;background:color-mix(in oklab,var(--rule) 45%,var(--card))}
.track i{position:absolute;top:0;height:100%;background:var(--of)}
.track .whisker{top:6.5px;height:2px;background:var(--ink);box-shadow:0 0 0 1px var(--card)}
.track .zero{width:1px;background:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 10px;padding:0;list-style:none;
font-size:.875rem}
.legend i{display:inline-block;width:22px;height:4px;margin:0 6px 4px 0;background:var(--c)}
details{margin:8px 0}summary{cursor:pointer;font-weight:600}
.gallery :is(td,th){text-align:left;vertical-align:top;white-space:normal;min-width:132px;
max-width:190px;overflow-wrap:anywhere}
.gallery summary{font-weight:400}.gallery details{margin:2px 0}
.gallery span[style]{background:color-mix(in oklab,var(--heat) calc(var(--v)*.5%),var(--card))}
.visual{text-decoration:underline;text-underline-offset:3px}
.gallery img,.none{display:block;width:112px;max-height:130px;object-fit:contain;
border-radius:6px;margin-bottom:4px}
.none{border:1px dashed;padding:30px 20px;font-weight:400}
pre,bdi{white-space:pre-wrap;font-size:.8rem;overflow-wrap:anywhere}bdi{unicode-bidi:isolate}
@media(max-width:560px){.part{grid-template-columns:72px minmax(0,1fr);}
.part small{grid-column:2}
section,main>details{padding:14px 12px}
header,main,footer{padding:0 12px}header{padding-top:16px}}
@media print{:root{color-scheme:light}body{font-size:11px;background:none}
section,figure,tr{break-inside:avoid}.scroll{overflow:visible}
details::details-content{content-visibility:visible;block-size:auto}
table{font-size:8px}th,td{padding:2px 3px}}
"""

PAGE = """
{% macro scroll(label) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}">{{ caller() }}</div>
{% endmacro %}
{% macro table(t) %}{% if t.rows %}<div><p class="soft caption">{{ t.caption }}</p>
{% call scroll(t.caption) %}
<table class="{{ t.kind }}{{ " many" if t.columns|length > 10 }}"><thead>
{% if t.groups %}<tr class="group">{% for title, span in t.groups %}
<th scope="col" colspan="{{ span }}">{{ title }}</th>{% endfor %}</tr>{% endif %}
<tr>{% for name in t.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for name, cells in t.rows %}<tr><th scope="row">{{ name }}</th>{% for text, small in cells %}
<td{% if t.kind == "heat" and small %} style="--h:{{ text[:-1] }}"{% endif %}>{{ text }}
{% if small %}<small>{{ small }}</small>{% endif %}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>{% endcall %}</div>{% endif %}{% endmacro %}
{% macro tables_for(part) %}{% for t in tables.values() %}{% for x in t[part] %}{{ table(x) }}
{% endfor %}{% endfor %}{% endmacro %}
{% macro lead(list) %}<ol class="lead">{% for x in list %}
<li><span>{{ x.text }}</span><small>{{ x.numbers }}</small></li>{% endfor %}</ol>{% endmacro %}
{% set span = namespace(low=0, high=0.01) %}
{% for some in r.pooled.values() %}{% for about in some.values() if about.gains %}
{% for x in about.gains.values() if x.ci95 %}{% set span.low = [span.low, x.ci95[0]]|min %}
{% set span.high = [span.high, x.ci95[1]]|max %}{% endfor %}{% endfor %}{% endfor %}
{% macro at(x) %}{{ (100 * (x - span.low) / (span.high - span.low))|round(2) }}%{% endmacro %}
{% macro wide(a, b) %}left:{{ at(a) }};width:{{ (100 * (b - a) / (span.high - span.low))|round(2) }}%
{%- endmacro %}
{% set study = r.provenance.study %}{% set check = r.instrument_check %}
<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Seeing or guessing</title><style>{{ css }}</style></head><body>
<header><h1>Seeing or guessing: {{ study.model }} model; runs of this study train on
{{ study.sources.train }}</h1>
{% for source, list in r.sentences.items() %}{% if loop.first %}{{ lead(list) }}
{% else %}<details><summary>The same on {{ source }}</summary>{{ lead(list) }}</details>
{% endif %}{% endfor %}
{% if check.passed %}<p class="bar"><small><strong class="ok">✓ The instrument check passed.</strong>
{{ check.entries|selectattr("p_holm", "undefined")|list|length }} measurements of simulated
policies find the truth within the width of their interval
{%- if check.entries|selectattr("p_holm", "defined")|list %}, and no
limit that holds on shapes is shown to be exceeded{% endif %}. <a href="#check">See them</a>.
{{ same }}.</small></p>
{% else %}<div class="box bad" role="alert"><strong>✗ The instrument check did not pass: explain this
before you believe a number.</strong><ul>{% for e in check.entries if not e.passed %}
<li>{{ e.check }}, {{ cell(e, n=0)|join(" ") }} instead of {{ percent(e.truth) }}</li>
{% endfor %}</ul></div><p class="soft">{{ same }}.</p>{% endif %}
{% if r.notes %}<details><summary>What is missing: {{ r.notes|length }}</summary><ul>
{% for note in r.notes %}<li>{{ note }}</li>{% endfor %}</ul></details>{% endif %}
</header><main>
<section><h2>Trained on, asked about</h2>
{% for source, t in tables.items() %}<div class="side">{{ table(t.matrix[0]) }}
{% for settings in t.settings %}<div>{{ table(settings) }}<p class="soft caption">
{{ (r.s1_to_s8[source].values()|list)[loop.index0].sentence }}</p></div>{% endfor %}</div>
{% endfor %}<p class="soft caption">Rows were trained differently, columns damage the question.
Right is the intact question&rsquo;s answer, also where the picture was swapped. Told: the text says
that there is no picture, and asks for a guess. S1 to S8: trained
clean (S1 to S4) or damaged (S5 to S8), asked clean or damaged, about the questions trained on or
new ones; the numbers go through a row from left to right. Where no training question was asked,
the four settings with new ones are left.</p></section>
{% if r.gains %}<section><h2>What each gain is made of</h2>
<p class="soft caption">Each policy against the base, on the same questions, in points of accuracy
with 95% intervals. Format: as if only the asked-for form had been learnt. Image-free: what is
gained without the picture too. Visual: the rest, which is gone when the picture is.</p>
{% for name, some in r.pooled.items() %}{% for source, about in some.items() if about.gains %}
<div class="policy"><b>{{ name }}</b> <span class="soft">on {{ source }}{% if about.runs|length > 1 %},
{{ about.runs|length }} seeds{% endif %}</span>
{% for part in parts if about.gains[part] %}{% set x = about.gains[part] %}<div class="part">
<span>{{ part|replace("_", "-") }}</span><div class="track" style="--of:var(--{{ part }})">
{% if x.ci95 %}<i style="{{ wide([0, x.value]|min, [0, x.value]|max) }}"></i>
<i class="whisker" style="{{ wide(x.ci95[0], x.ci95[1]) }}"></i>{% endif %}
<i class="zero" style="left:{{ at(0) }}"></i></div>
<small>{{ cell(x, points)|join(" ") }}</small></div>{% endfor %}</div>{% endfor %}{% endfor %}
</section>{% endif %}
<details{{ " open" if not r.gains }}><summary>Do the answers depend on the picture?</summary>
<p>Mirage score (arXiv 2603.21687): accuracy without the picture over accuracy with it. Worth:
accuracy with the picture less accuracy without it, p corrected for the number of policies (Holm).
Causal effect: how much more often an answer is the one that fits an edited picture, because of that
edit.</p><ul>
{% for list in r.dependence.values() %}{% for x in list %}<li>{{ x.text }} <small>{{ x.numbers }}</small>
</li>{% endfor %}{% endfor %}</ul>{{ tables_for("looking") }}</details>
{% if r.differences %}<details><summary>Which conditions differ</summary><p>Runs of one seed answer
the same questions and were trained on the same draws: conditions are compared seed by seed. With
several seeds interval and p cover the choice of questions and the luck of a run (a paired t test,
widened by the choice of questions); with one seed that luck is not covered, and p is
McNemar&rsquo;s where answers are right or wrong. p is corrected for the number of comparisons by
the same measure (Holm).</p>{{ tables_for("differences") }}</details>
<details><summary>What was claimed, and what this study says</summary>
<p>Each claim has a test that was fixed before any run (below). The verdict is on this study&rsquo;s
model and data. {{ protocol }}</p>
{% for judged in (true, false) %}{% if not judged %}<details><summary>Claims that this study cannot
decide</summary>{% endif %}{% call scroll("claims and verdicts") %}<table class="prose"><thead><tr>
<th scope="col">claim</th><th scope="col">verdict</th><th scope="col">found here, points</th>
<th scope="col">on</th><th scope="col">who says so</th><th scope="col">test</th></tr></thead><tbody>
{% for c in r.claims if (c.n > 0) == judged %}<tr><th scope="row">{{ c.text }}</th>
<td>{{ {"reproduced": "✓", "contradicted": "✗"}.get(c.verdict, "?") }} {{ c.verdict }}
<small>{{ c.reason }}</small></td><td>{{ cell(c.found, points, 0)|join(" ") }}</td>
<td>{{ c.benchmark or "any" }} {{ c.damage or "" }} {{ c.input or "" }}</td><td>{{ c.source }}</td>
<td>{{ c.test }}</td></tr>{% endfor %}</tbody></table>{% endcall %}
{% if not judged %}</details>{% endif %}{% endfor %}</details>{% endif %}
<details><summary>Which questions need the picture?</summary><p>The strict subset is of questions
whose answers without the picture, of all policies together, are right no more often than by chance
(strict-SOURCE.json).</p>
<ul>{% for source, kept in r.strict_subset.items() %}<li>{{ source }}:
{{ cell(kept, n=0)|join(" ") }}</li>{% endfor %}</ul></details>
{% if curves %}<details><summary>How training went</summary><p>Means over the sampled completions
of a step, on the questions as each policy saw them, smoothed over a twentieth of the steps, from
0 to 1, a line for each run: a record, not a measurement.</p><ul class="legend">
{% set names = curves.keys()|map("family")|unique|list %}{% for name in names %}
<li><i class="k{{ loop.index0 % 7 }}"></i>{{ name }}</li>{% endfor %}</ul><div class="charts">
{% for key in ("reward", "correct", "well_formed") %}<figure><figcaption>{{ key|replace("_", " ") }}
</figcaption><svg viewBox="-2 -2 204 104" role="img" aria-label="{{ key }} over the steps of training">
<path d="M0 0H200M0 50H200M0 100H200"/>{% for run, steps in curves.items() %}
{% set window = [1, steps|length // 20]|max %}<polyline class="k{{ names.index(run|family) % 7 }}"
points="{% for _ in steps %}{% set some = steps[[0, loop.index - window]|max:loop.index] %}
{{ (200 * loop.index / steps|length)|round(1) }},
{{- (100 - 100 * some|sum(attribute=key) / some|length)|round(1) }} {% endfor %}"/>{% endfor %}</svg>
</figure>
{% endfor %}</div></details>{% endif %}
<details><summary>See for yourself</summary><p>The first questions of the first groups under
everything that was done to them, as the base and the first run of each condition answered. Words
are shaded by what the picture did for them, log p(word | picture) - log p(word | blank), and
underlined where it made them at least twice as likely. Single cases illustrate; they prove
nothing.</p>
{% for source, entries in galleries.items() %}{% for entry in entries %}
<details{{ " open" if loop.first }}><summary>{{ source }}, {{ entry.question.group }}</summary>
<p><bdi dir="auto">{{ entry.question.problem }}</bdi><br><small>{{ entry.question.id }}, right
answer: <bdi>{{ entry.question.answer|cut(60) }}</bdi></small></p>
{% call scroll("answers to " ~ entry.question.id) %}<table class="gallery"><thead><tr>
<th scope="col">policy</th>{% for shown in entry.shown %}<th scope="col">
{% for uri in shown.pictures %}<img src="{{ uri }}" alt="{{ entry.question.id }}, {{ shown.name }}">
{% else %}<span class="none">no picture</span>{% endfor %}{{ shown.name }}
{% if shown.text != entry.question.problem %}<details><summary>its text</summary>
<bdi dir="auto">{{ shown.text|cut(300) }}</bdi></details>{% endif %}</th>{% endfor %}</tr></thead>
<tbody>{% for runs in r.pooled.values() if source in runs %}
{% set policy = runs[source].runs[0] %}<tr><th scope="row">{{ policy }}</th>
{% for shown in entry.shown %}<td>{% set a = shown.answers[policy] %}{% if a %}
<span class="{{ "ok" if a.correct else "bad" }}">{{ "✓ right" if a.correct else "✗ wrong" }}</span>:
<bdi dir="auto">{{ (a.answer or "no answer")|cut(40) }}</bdi><details><summary>response</summary>
<bdi dir="auto">{% for text, nats in a|tokens %}{% if nats > 0.1 %}
<span style="--v:{{ (33 * [nats, 3]|min)|round }}"{{ ' class="visual"'|safe if nats > 0.693 }}>
{{- text }}</span>{% else %}{{ text }}{% endif %}{% endfor %}</bdi></details>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% endcall %}</details>{% endfor %}{% endfor %}</details>
<details id="check"><summary>Does the instrument work?</summary><p>Simulated policies that change in
one respect, by a known amount, go through the same functions as the real ones: the whole gain must
land in one part, nothing in the others. On shapes, what must hold for every policy is tested.</p>
{% call scroll("measurements") %}<table><thead><tr><th scope="col">measurement</th>
<th scope="col">truth or limit</th><th scope="col">found</th><th scope="col">verdict</th></tr>
</thead><tbody>{% for e in check.entries %}<tr><th scope="row">{{ e.check }}</th>
<td>{{ percent(e.truth) }}</td><td>{{ cell(e, n=0)|join(" ") }}</td>
<td>{{ "✓ passed" if e.passed else "✗ failed" }}</td></tr>{% endfor %}</tbody></table>{% endcall %}
</details>
<details><summary>How each number is computed</summary>{% for name, text in how.items() %}
<h3>{{ name }}</h3><pre>{{ text|whole }}</pre>{% endfor %}</details>
<details><summary>Where it comes from: settings, versions, seeds, hashes</summary>
<pre>{{ r.provenance|json(indent=1)|whole }}</pre></details></main>
<footer><p class="soft">Intervals are at 95%. With one seed they cover the choice of questions, not
the luck of a training run; with several, that too. All numbers: results.json. Tables to paste:
tables.md.</p></footer></body></html>"""


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
