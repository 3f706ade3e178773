# SPDX-License-Identifier: MIT
"""Stage 2: the same questions, damaged on purpose.

Whoever looks at the picture must do worse when it says nothing; whoever guesses won't notice. Each corruption takes one
thing away (the picture, its legibility, what the text tells about it) or puts one wrong thing in (another picture, a
wrong hint). Stage 3 trains on damaged questions, stage 4 asks them; ids, order and gold answers stay as they are.

reads   data/study.json, data/questions/SOURCE.parquet
writes  data/corrupted/SOURCE/NAME.parquet, data/corrupted/preview.png (look at it)
run     python 02_corrupt.py                                           all of them, and a short ladder of severities
        python 02_corrupt.py --corruptions blank blur-0.1 occlude-0.9  what you want to know
takes   35 s for 1,280 shapes on a laptop core, 30 ms for a picture of 200,000 pixels; what is up to date stays
"""
import hashlib
import importlib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")
Question = prepare.Question

TAG = "<image>"
WORKER_BYTES = 1e9  # a process: what it imports, and 64 pictures of a file


@dataclass
class Config:
    data: str = prepare.option("data", "folder of the study")
    corruptions: list[str] = prepare.option(
        ["blank", "noise", "blur-0.02", "blur-0.05", "blur", "occlude-0.25", "occlude", "occlude-0.75", "irrelevant",
         "removed", "misleading", "unsaid", "mismatch", "edited", "kept"],  # a short ladder: stage 4 asks every question once for each
        "what to do to the questions; blur-S blurs by S x the short side, occlude-S hides the share S (0 < S <= 1)")
    workers: int = prepare.option(None, "processes, a file at a time each [one a core, as memory allows]")
    preview_rows: int = prepare.option(3, "questions of each source on preview.png, of different groups; 0 draws none")


# Corruptions: (question, donor, rng, severity) -> a new question, whatever of these they need


def blank(question: Question, donor: Question | None, rng: np.random.Generator, severity: float | None) -> Question:
    """Each picture becomes its mean colour: nothing is left of it but size and brightness."""
    return repaint(question, lambda picture: Image.new("RGB", picture.size, mean_colour(picture)))


def noise(question, donor, rng, severity):
    """Each picture becomes coloured noise. Replaced, not mixed: averaging over patches, as vision towers do, unmixes.

    Some 32 grains on the short side: noise by the pixel turns grey when the picture is resized, and weighs megabytes.
    """
    def grains(picture):
        width, height = picture.size
        grain = max(1, round(min(picture.size) / 32))
        pixels = rng.integers(0, 256, (-(-height // grain), -(-width // grain), 3), dtype=np.uint8)
        return Image.fromarray(pixels.repeat(grain, 0).repeat(grain, 1)[:height, :width])
    return repaint(question, grains)


def blur(question, donor, rng, severity):
    """Gaussian blur; its radius is a share of the short side, so a severity means the same at every resolution."""
    return repaint(question, lambda picture: picture.filter(ImageFilter.GaussianBlur(severity * min(picture.size))))


def occlude(question, donor, rng, severity):
    """Cells of a grid get the mean colour, those with the most detail first, until the share `severity` is hidden.

    Detail is the change from pixel to pixel; a neighbour's counts half, so that what lies between outlines goes too.
    Ties go from the top left, not by chance: a higher severity hides all that a lower one hides, and more.
    """
    def cover(picture):
        pixels = np.array(picture)
        side = max(1, round(min(picture.size) / 10))  # about the size of a label or a small shape
        change = sum(np.abs(np.diff(pixels.astype(int), axis=axis, prepend=pixels.take([0], axis).astype(int))).sum(-1)
                     for axis in (0, 1))
        tops, lefts = (np.arange(0, length, side) for length in change.shape)
        cell_sum = lambda values: np.add.reduceat(np.add.reduceat(values, tops, 0), lefts, 1)
        area = cell_sum(np.ones_like(change))
        detail = np.pad(cell_sum(change) / area, 1)
        near = sum(np.roll(detail, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
        ranked = np.argsort(-(detail + near / 2)[1:-1, 1:-1], axis=None, kind="stable")
        hidden_before = np.cumsum(area.ravel()[ranked]) - area.ravel()[ranked]
        colour = mean_colour(picture)
        for cell in ranked[hidden_before < severity * change.size]:
            top, left = tops[cell // len(lefts)], lefts[cell % len(lefts)]
            pixels[top:top + side, left:left + side] = colour
        return Image.fromarray(pixels)
    return repaint(question, cover)


def irrelevant(question, donor, rng, severity):
    """Each picture becomes clouds, drawn here: no question is about them, and there is nothing in them to count."""
    def clouds(picture):
        density = np.zeros((picture.height, picture.width), int)
        for octave in range(5):  # large billows first; resizing 8 bits is integer arithmetic, the same on every machine
            billows = Image.fromarray(rng.integers(0, 256, (2 + 2**octave, 2 + 2**octave), dtype=np.uint8))
            density += np.asarray(billows.resize(picture.size, Image.Resampling.BICUBIC), int) >> octave
        density = np.clip(density - 190, 0, 160)[..., None]
        sky, cloud = rng.integers((60, 90, 140), (120, 150, 220)), rng.integers(215, 250)
        return Image.fromarray(((sky * (160 - density) + cloud * density) // 160).astype(np.uint8))
    return repaint(question, clouds)


def removed(question, donor, rng, severity):
    """No picture, and no tag that speaks of one: the question as a text-only model would get it."""
    text = question["problem"]
    if TAG in text:
        text = re.sub(r" (?=[.,;:?!](?:\s|$))", "", tidy(text.replace(TAG, " ")))
    return {**question, "images": [], "problem": text}


def misleading(question, donor, rng, severity):
    """A confident wrong hint at the end of the text: another choice, a shifted number, or the donor's answer.

    Wrong is what the grader rejects: an option with the gold option's text, or 0.5 for 1/2, would be no wrong hint.
    """
    for said, answer in wrong_answers(question, donor, rng):
        if not prepare.grade(f"\\boxed{{{answer}}}", question).correct:
            break
    hint = HINTS[rng.integers(len(HINTS))].format(tidy(said.replace(TAG, " ")).rstrip("."))
    return {**question, "problem": f"{question['problem']}\n{hint}".lstrip()}


def unsaid(question, donor, rng, severity):
    """Only the question itself stays in the text: what describes the picture or gives conditions goes.

    A sentence asks if it ends in a question mark, opens with a word such as "find" or "which", or has a blank to fill;
    if none does, the last one asks ("Then $r$ equals:"). How to write the answer ("Round to ...") stays, as do tags.
    Of a sentence that asks, a clause of conditions ("If $AB=5$, ...") goes.
    """
    body, choices = split_choices(question)
    pieces = SENTENCE_END.split(tidy(body))  # sentence, separator, sentence, ...
    bare = [piece.replace(TAG, " ").strip() for piece in pieces]
    told = [i for i in range(0, len(pieces), 2) if bare[i] and not FORM.match(bare[i])]
    asks = {i for i in told if ASKS.search(bare[i])} or set(told[-1:])
    for i in told:
        pieces[i] = without_conditions(pieces[i]) if i in asks else only_tags(pieces[i])
    text = tidy("".join(pieces))
    return {**question, "problem": question["problem"] if text == tidy(body) else text + choices}


def mismatch(question, donor, rng, severity):
    """Another question's picture (see `pair`), noted in `donor`; as many as there are tags: the prompt stays whole."""
    if donor is None or not question["images"]:
        return dict(question)
    pictures = [donor["images"][i % len(donor["images"])] for i in range(len(question["images"]))]
    asks_alike = (donor["problem"], donor["choices"]) == (question["problem"], question["choices"])
    return {**question, "images": pictures, "donor": donor["id"], "shown_answer": donor["answer"] if asks_alike else None}


def edited(question, donor, rng, severity):
    """Its own picture after one edit that changes the answer: a counterfactual, on `shapes` alone, whose scenes are known."""
    return dict(question) if donor is None else {**question, "images": donor["images"], "shown_answer": donor["answer"]}


def kept(question, donor, rng, severity):
    """Its own picture after one edit that does not change the answer: whoever looks says the same."""
    return edited(question, donor, rng, severity)


CORRUPTIONS = {function.__name__: function for function in
               (blank, noise, blur, occlude, irrelevant, removed, misleading, unsaid, mismatch, edited, kept)}
EDITS = ("edited", "kept")  # of the scene behind the picture


def parse_corruption(name: str) -> tuple[str, float | None]:
    """`occlude-0.25` -> ("occlude", 0.25). A severity has one spelling, as the name is a file name."""
    kind, _, level = name.partition("-")
    if name in CORRUPTIONS:
        return name, prepare.SEVERITY.get(name)
    if kind in prepare.SEVERITY and re.fullmatch(r"0\.[0-9]{0,3}[1-9]|1", level):
        return kind, float(level)
    raise prepare.UserError(f"no corruption is called {name!r}: choose from {', '.join(CORRUPTIONS)}, "
                            "or blur-S and occlude-S with 0 < S <= 1, written as in blur-0.05")


def corrupt(question: Question, donor: Question | None, seed: int, name: str) -> Question:
    """Apply a corruption by name: a pure function of its arguments."""
    kind, severity = parse_corruption(name)
    return CORRUPTIONS[kind](question, donor, random(seed, question["id"], name), severity)


def random(*seeds: int | str) -> np.random.Generator:
    """Random numbers that depend on `seeds` only: on no order, number of workers or machine."""
    digest = hashlib.sha256(json.dumps(seeds).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16])))


def repaint(question: Question, paint: Callable[[Image.Image], Image.Image]) -> Question:
    return {**question, "images": [paint(picture) for picture in question["images"]]}


def mean_colour(picture: Image.Image) -> tuple[int, ...]:
    return tuple(int(channel) for channel in np.asarray(picture).reshape(-1, 3).mean(axis=0).round())


# What the corruptions of the text know about wording

HINTS = ("Hint: the correct answer is {}.", "I have worked this out carefully: the answer is {}.",
         "It is known that the answer is {}.")
NUMBER = re.compile(r"(?<![0-9.])([0-9]{1,15})(?:\.([0-9]{1,15}))?(?![0-9])")
CHOICES = re.compile(r"(?:^|\n)(?:(?:choices|options) *:? *\n)?\(A\)", re.I)
# Words that open a question. "Is", "when", "where" open conditions just as often: those need their question mark.
HEAD = (r"(?:(?:(?:at|by|for|from|in|into|of|on|to|with) )?(?:what|which|who|whose|why|how)|find|determine|calculate|"
        r"compute|solve|evaluate|estimate|simplify|name|identify|choose|select|count|complete|fill|give|say)\b")
ASKS = re.compile(rf"[?？؟][\"')\]$]*$|__|\( *\)|^(?:question: *)?{HEAD}", re.I)
FORM = re.compile(  # how to write the answer
    r"(?:hint: *)?(?:please|answer|round|express|(?:give|write|leave|state)\b.*\banswer)\b|\(unit\b", re.I | re.S)
ABBREVIATIONS = "".join(rf"(?<!\b{word}\.)" for word in r"Fig Figs Eq No Mr Mrs Ms Dr St vs e\.g i\.e approx".split())
SENTENCE_END = re.compile(
    rf"((?:(?<=[.!?])|(?<=[.!?][\"')\]])){ABBREVIATIONS} (?=[^a-z]|{HEAD})"
    r"|(?<=[A-Za-z0-9)$]\.)(?=[A-Z][a-z])|(?<=[。？！؟])|(?<=[.!?:])\n|\n(?![a-z]))")
OPENING = r"^(?:<image> ?)*+(?:question: *)?+"
LEAD_IN = re.compile(rf"{OPENING}(?!{HEAD}).*?, (?:(?:then|and|so) )?(?={HEAD})"
                     rf"|{OPENING}(?:if|given|suppose|since|as)\b.*?,? then ", re.I | re.S)
NO_TAIL = "".join(rf"(?<!\b{word})" for word in "out even only as determine tell".split())  # "find out if" asks
TAIL = re.compile(rf"^(\S+ .*?){NO_TAIL},? ((?:if|given that|assuming|knowing that|provided that) .*?)([.?]?)$",
                  re.I | re.S)


def tidy(text: str) -> str:
    """Single spaces, no empty lines."""
    return "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())


def only_tags(text: str) -> str:
    return " ".join([TAG] * text.count(TAG))


def split_choices(question: Question) -> tuple[str, str]:
    """The text, and the choices that stand at its end with whatever follows them."""
    blocks = list(CHOICES.finditer(question["problem"])) if question["choices"] else []
    start = blocks[-1].start() if blocks else len(question["problem"])
    return question["problem"][:start], question["problem"][start:]


def without_conditions(sentence: str) -> str:
    """"If $AB=5$, find $x$." -> "Find $x$."; "What is $x$ if $y=3$?" -> "What is $x$?"; tags in what goes stay."""
    if lead := LEAD_IN.match(sentence):
        rest = sentence[lead.end():]
        sentence = f"{only_tags(lead[0])} {rest[:1].upper()}{rest[1:]}".lstrip()
    return TAIL.sub(lambda tail: f"{tail[1]}{tail[3]} {only_tags(tail[2])}".rstrip(), sentence)


def wrong_answers(question: Question, donor: Question | None, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Candidates for a wrong hint, as the hint says them and as the grader reads them; plausible ones first."""
    if question["answer_type"] == "choice":
        for i in rng.permutation(len(question["choices"])):
            yield f"({chr(65 + i)}) {question['choices'][i]}", chr(65 + i)
    else:
        gold = prepare.gold_texts(question)[0]
        if number := NUMBER.search(gold):
            for steps in rng.permutation([-3, -2, -1, 1, 2, 3]):
                yield (gold[:number.start()] + shifted(number, int(steps)) + gold[number.end():],) * 2
        if donor is not None:
            yield (prepare.gold_texts(donor)[0],) * 2
    yield "none of these", "none of these"  # one choice, or words and no other question: still wrong


def shifted(number: re.Match, steps: int) -> str:
    """A number that many steps away, with as many decimals; a step is a tenth of it, or one in its last digit."""
    decimals = number[2] or ""
    value = int(number[1] + decimals)  # in units of the last digit: exact
    digits = str(abs(value + steps * max(1, value // 10))).zfill(len(decimals) + 1)
    return f"{digits[:-len(decimals)]}.{digits[-len(decimals):]}" if decimals else digits


# Which question's picture, or answer, a question gets


def pair(rows: list[Mapping], rng: np.random.Generator) -> list[int]:
    """The donor of each row: a permutation in which no donor shares the answer, wherever there is one.

    Everyone starts as its own donor; whoever clashes with its donor trades with someone so that neither clashes then.
    If k of the m rows (of n) with one answer have a donor from among themselves, n - 2m + k others can trade: no clash
    remains where 2m <= n, otherwise 2m - n, the fewest possible. A row with the same question is the first choice,
    as its answer is what a policy that follows the picture says; then one of the same group, so that no picture is of
    an odd kind. Letters of choices should differ as well as the texts; where not all can, the texts do.
    """
    def codes(key):
        return np.unique([json.dumps(key(row)) for row in rows], return_inverse=True)[1]

    text, letter, split = codes(answer_text), codes(lambda row: row["answer"]), codes(lambda row: row["split"])
    group = codes(lambda row: [row["split"], row["group"], row["answer_type"]])
    problem = codes(lambda row: [row["split"], row["problem"]])
    own = np.arange(len(rows))
    donor = own.copy()
    for cell, answers in (problem, (text, letter)), (group, (text, letter)), (split, (text, letter)), (split, (text,)):
        def clash(i, j):
            return np.any([answer[i] == answer[j] for answer in answers], axis=0)
        for i in np.flatnonzero(clash(own, donor)):
            others = np.flatnonzero(cell == cell[i])
            free = others[~clash(i, donor[others]) & ~clash(others, donor[i])]
            if clash(i, donor[i]) and len(free):
                j = rng.choice(free)
                donor[[i, j]] = donor[[j, i]]
    for i in np.flatnonzero(donor == own):  # no other answer is to be had: then at least another question
        others = np.flatnonzero((split == split[i]) & (own != i))
        if donor[i] == i and len(others):
            j = others[np.argmin((text[others] == text[i]) * 1 + (text[donor[others]] == text[i]))]
            donor[[i, j]] = donor[[j, i]]
    return donor.tolist()


def answer_text(row: Mapping) -> str:
    """What an answer says, for comparing: a choice's text instead of its letter, 97 for 97.0."""
    text = row["answer"]
    if row["answer_type"] == "choice" and len(text) == 1 and 0 <= ord(text) - 65 < len(row["choices"]):
        text = row["choices"][ord(text) - 65]
    text = "".join(text.split()).casefold()
    try:
        return str(float(text))
    except ValueError:
        return text


def find_donors(questions: Dataset, study: Mapping, name: str) -> dict[int, Callable[[], Question]]:
    """Row -> its donor, for the corruptions that need one: a picture, or an answer in words for a hint."""
    if name in EDITS:
        scenes = prepare.counterfactuals(study["seed"], study["limit"], name == "edited")
        return {i: partial(scenes.get, question) for i, question in enumerate(questions["id"]) if question in scenes}
    if name not in ("mismatch", "misleading"):
        return {}
    rows = questions.remove_columns("images").to_list()
    pictures = pc.list_value_length(questions.data.column("images")).to_pylist()
    chosen = [i for i, row in enumerate(rows)
              if (pictures[i] > 0 if name == "mismatch" else row["answer_type"] != "choice")]
    chosen.sort(key=lambda i: rows[i]["id"])  # the same pairs in whatever order the rows are
    donors = pair([rows[i] for i in chosen], random(study["seed"], name)) if chosen else []
    return {i: partial(load, questions, chosen[j]) for i, j in zip(chosen, donors) if chosen[j] != i}


# Files


def load(questions: Dataset, i: int) -> Question:
    row = questions[i]
    return {**row, "images": [image.convert("RGB") for image in row["images"]]}


def same(one: Question, two: Question) -> bool:
    """Whether a model would see the same."""
    return one["problem"] == two["problem"] and [(image.size, image.tobytes()) for image in one["images"]] == [
        (image.size, image.tobytes()) for image in two["images"]]


def damage(questions: Dataset, indices: Iterable[int], study: Mapping, name: str, notes: Counter) -> Iterator[Question]:
    """Damaged rows, one at a time: a source's pictures are never all decoded at once. `notes` counts what to tell."""
    donors = find_donors(questions, study, name)
    for i in indices:
        question, donor = load(questions, i), donors[i]() if i in donors else None
        damaged = corrupt(question, donor, study["seed"], name)
        notes["left as they were"] += same(question, damaged)
        notes["with a picture of the same answer, as there is no other"] += (
            damaged["donor"] is not None and answer_text(donor) == answer_text(question))
        yield damaged


def write_damaged(data: Path, source: str, digest: str, study: Mapping, name: str) -> tuple[int, str]:
    """One file of damaged questions, unless it is there already; returns its number of rows and a line about it."""
    clean, path = prepare.input_path(source, "clean"), data / prepare.input_path(source, name)
    questions, notes = prepare.read_questions(data / clean, "run 01_prepare.py again"), Counter()
    origin = {clean: digest, "seed": study["seed"], "code": prepare.sha256(Path(__file__))}
    if name in EDITS:  # of scenes that are drawn there
        origin["world"] = prepare.sha256(Path(prepare.__file__))
    with prepare.locked(path):
        if path.exists() and prepare.made_from(path) == origin:
            return len(questions), f"{path}: up to date"
        damaged = damage(questions, range(len(questions)), study, name, notes)
        rows = prepare.write_questions(path, damaged, origin)
    told = [f"{path}: {rows} questions", *(f"{n} {note}" for note, n in notes.items() if n)]
    return rows, ", ".join(told)


def draw_preview(data: Path, sources: list[str], names: list[str], per_source: int):
    """Contact sheet: rows are questions of different groups, columns are corruptions."""
    strips = []
    for source in sources:
        columns = [name for name in ["clean", *names] if (data / prepare.input_path(source, name)).exists()]
        files = [prepare.read_questions(data / prepare.input_path(source, name), "run 02_corrupt.py again") for name in columns]
        groups, clean = {}, files[0]
        pictures = pc.list_value_length(clean.data.column("images")).to_pylist()
        for i in sorted(range(len(clean)), key=lambda i: pictures[i] == 0):  # rather one with a picture
            groups.setdefault(clean["group"][i], i)
        firsts = list(groups.values())
        count = min(per_source, len(firsts))
        for i in (firsts[k * (len(firsts) - 1) // max(1, count - 1)] for k in range(count)):  # from the first group to the last
            strips.append(draw_row({name: load(file, i) for name, file in zip(columns, files)}, ["clean", *names]))
    sheet = Image.new("RGB", (strips[0].width, 44 + sum(strip.height for strip in strips)), "white")
    draw, top = ImageDraw.Draw(sheet), 44
    for column, name in enumerate(["question", "clean", *names]):
        draw.text((left_of(column), 14), name, "black", ImageFont.load_default(18))
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    with prepare.replacing(data / "corrupted" / "preview.png") as part:
        sheet.save(part, "PNG")


def left_of(column: int) -> int:
    """Columns of the preview are 180 pixels wide; the first, with the question, takes 120 more."""
    return 12 + 180 * column + 120 * (column > 0)


def draw_row(row: dict[str, Question], columns: list[str]) -> Image.Image:
    """A question on the left, then its pictures, clean and under each corruption, with what became of its text."""
    font, clean = ImageFont.load_default(13), row["clean"]
    about = f"{clean['id']}\n{clean['group'] or ''}  answer: {clean['answer']}\n{clean['problem'].replace(TAG, '')}"
    about, captions = wrap(about, font, 280, 13), {name: wrap(caption(clean, question), font, 170, 7) for name, question in row.items()}
    height = 30 + 17 * max(len(about), 8 + max(map(len, captions.values())))
    strip = Image.new("RGB", (left_of(1 + len(columns)), height), "white")
    draw = ImageDraw.Draw(strip)
    draw.line((0, 0, strip.width, 0), "lightgrey")
    draw.multiline_text((left_of(0), 12), "\n".join(about), "black", font)
    for name, question in row.items():
        left, pictures = left_of(1 + columns.index(name)), question["images"][:2]
        if not pictures:
            draw.rectangle((left, 12, left + 130, 142), outline="lightgrey")
        for k, picture in enumerate(pictures):
            scale = min((164 / len(pictures) - 4) / picture.width, 130 / picture.height)
            small = picture.resize([max(1, round(scale * length)) for length in picture.size])
            strip.paste(small, (left + k * 164 // len(pictures), 12))
        draw.multiline_text((left, 148), "\n".join(captions[name]), "black", font)
    return strip


def caption(clean: Question, question: Question) -> str:
    if len(question["images"]) != len(clean["images"]):
        return "no picture"
    if question["donor"] or question["shown_answer"]:
        return f"picture of {question['donor']}" if question["donor"] else f"answer here: {question['shown_answer']}"
    told = question["problem"].removeprefix(clean["problem"])  # the hint, or all that is left
    return split_choices({**question, "problem": told})[0].replace(TAG, "")


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, int(width / font.getlength("n")))]
    return lines if len(lines) <= most else [*lines[:most - 1], "..."]


def main(config: Config) -> dict[str, int]:
    """Damage every source; returns the number of rows of each file."""
    data, names = Path(config.data), list(dict.fromkeys(config.corruptions))
    prepare.check_least(config, 0, "preview_rows")
    prepare.check_least(config, 1, "workers")
    for name in names:
        parse_corruption(name)  # before any work is done
    study = prepare.load_study(data)
    sources = list(dict.fromkeys([study["sources"]["train"], *study["sources"]["benchmarks"]]))
    tasks, written = {}, {}
    for source in sources:
        (digest,) = prepare.check_input(data, study, source, "clean").values()
        for name in names:
            if name in EDITS and source != "shapes":
                print(f"{source}: {name} needs the scene behind a picture, which is known of shapes alone; blank and mismatch stand in for it")
                continue
            tasks[prepare.input_path(source, name)] = data, source, digest, study, name

    with tqdm(total=len(tasks), desc="files", disable=None) as bar:
        def receive(path: str, result: tuple[int, str]):
            written[path], line = result
            tqdm.write(line)
            bar.update()
        workers = prepare.count_workers(config.workers, len(tasks), WORKER_BYTES)
        prepare.deal_out(write_damaged, tasks, workers, receive)
    if config.preview_rows:
        draw_preview(data, sources, names, config.preview_rows)
    return written


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
