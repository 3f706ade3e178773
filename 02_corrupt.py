# SPDX-License-Identifier: MIT
"""Stage 2: the same questions, damaged on purpose.

Whoever looks at the picture must do worse when it says nothing; whoever guesses won't notice. Each
corruption takes one thing away (the picture, its legibility, what the text tells) or puts one wrong
thing in (another picture, a wrong hint). Stage 3 trains on damaged questions, stage 4 asks them;
ids, order and gold answers stay as they are.

    here         the paper (arXiv 2604.03179)        the article on it
    blank        BI: a blank picture                 blank image
    mismatch     RI: another question's picture      mismatched pair
    textless     TR: conditions and question gone
    unsaid       (what TR takes, but the question)   missing text
    noise, blur, occlude, irrelevant, misleading     noise, blur, occlusion, irrelevant image, wrong hint
    removed      no picture at all
    told         the same, and the text says so and asks for the best guess (arXiv 2603.21687)
    edited, kept of shapes alone: one edit that changes the answer, and one that does not; for asking,
                 not for training: the gold of `edited` is the answer to the picture before the edit

reads   data/study.json, data/questions/SOURCE.parquet, the model's tokenizer and image processor
writes  data/corrupted/SOURCE/NAME.parquet, data/corrupted/preview.png (look at it)
run     python 02_corrupt.py                                           what the report needs
        python 02_corrupt.py --corruptions blank blur-0.1 occlude-0.9  what you want to know
takes   16 s for 1,280 shapes on 2 CPU cores, 30 ms for a picture of 200,000 pixels
"""
import hashlib
import importlib
import json
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps, ImageStat
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")

TAG = "<image>"
EDITS = ("edited", "kept")  # of the scene behind the picture
CORE = ("blank", "mismatch", *EDITS)  # what the report's sentences need; kept is their control
STRESS = ("noise", "blur", "occlude", "irrelevant", "removed", "told", "misleading", "unsaid", "textless")
GUESS = "There is no picture with this question. Give your best guess."


@dataclass
class Config:
    data: str = prepare.option("data", "the study's folder")
    corruptions: list[str] = prepare.option(
        [], "names as above; blur-S blurs by S x the short side, occlude-S hides the share S, 0 < S <= 1 "
            f"[{' '.join(CORE)}; of real questions also {' '.join(STRESS)}]")
    workers: int = prepare.option(
        None, "processes, a file at a time each [one a core, as memory allows]")
    preview_rows: int = prepare.option(
        3, "questions of each source on preview.png, spread over its groups; 0 draws none")


def main(config):
    """Damage every source; returns the number of rows of each file."""
    data = Path(config.data)
    prepare.check_least(config, 0, "preview_rows")
    prepare.check_least(config, 1, "workers")
    prepare.check_once(config, "corruptions")
    study = prepare.load_study(data)
    sources = sorted({study["sources"]["train"], *study["sources"]["benchmarks"]})
    usual = CORE if study["preset"] == "tiny" else CORE + STRESS
    names = config.corruptions or usual
    for name in names:
        parse_corruption(name)  # before any work is done
    tasks = find_tasks(data, study, sources, names)
    written = {}

    with tqdm(total=len(tasks), desc="files", disable=None) as bar:
        def receive(path, result):
            written[path], line = result
            tqdm.write(line)
            bar.update()
        workers = prepare.count_workers(config.workers, len(tasks), WORKER_BYTES, cards=0)
        prepare.deal_out(write_damaged, tasks, workers, receive)
    if config.preview_rows:
        draw_preview(data, sources, names, config.preview_rows)
    return written


def find_tasks(data, study, sources, names):
    """File to write -> arguments of `write_damaged`."""
    tasks, model = {}, prepare.model_path(data, study, weights=False)
    for source in sources:
        (digest,) = prepare.check_input(data, study, source, "clean").values()
        for name in names:
            if name in EDITS and source != "shapes":  # the scene behind its pictures is unknown
                continue
            tasks[prepare.input_path(source, name)] = data, source, digest, study, model, name
    return tasks


def corrupt(question, donor, seed, name):
    """Apply a corruption by name: a pure function of its arguments."""
    kind, severity = parse_corruption(name)
    return CORRUPTIONS[kind](question, donor, random(seed, question["id"], name), severity)


# Corruptions: (question, donor, rng, severity) -> a new question. A new one is a function here, and
# its name in CORRUPTIONS. `donor` is the question that lends its picture or its answer (`find_donors`).


def blank(question, donor, rng, severity):
    """Each picture becomes its mean colour: nothing is left of it but size and brightness."""
    def flat(picture):
        return Image.new("RGB", picture.size, mean_colour(picture))
    return repaint(question, flat)


def noise(question, donor, rng, severity):
    """Each picture becomes coloured noise. Replaced, not mixed: averaging over patches unmixes.

    Some 32 grains on the short side: noise by the pixel turns grey when the picture is resized, and
    weighs megabytes.
    """
    def grains(picture):
        shape = [-(-32 * length // min(picture.size)) for length in picture.size]  # rounded up
        pixels = rng.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize(picture.size, Image.Resampling.NEAREST)
    return repaint(question, grains)


def blur(question, donor, rng, severity):
    """Gaussian blur; its radius is a share of the short side: the same at every resolution."""
    def blurred(picture):
        return picture.filter(ImageFilter.GaussianBlur(severity * min(picture.size)))
    return repaint(question, blurred)


def occlude(question, donor, rng, severity):
    """Cells of a grid get the mean colour, those with the most detail first, until the share
    `severity` is hidden.

    Detail is what a slight blur takes. Ties go from the top left, not by chance: a higher severity
    hides all that a lower one hides, and more.
    """
    def cover(picture):
        width, height = picture.size
        side = max(1, round(min(picture.size) / 10))  # about the size of a label or a small shape
        columns, rows = -(-width // side), -(-height // side)  # rounded up
        lost = ImageChops.difference(picture, picture.filter(ImageFilter.BoxBlur(1)))
        # this filter counts a cell's neighbours too: what lies between outlines goes with them
        detail = lost.convert("F").resize((columns, rows), Image.Resampling.BILINEAR)
        hidden = np.zeros((height, width), bool)
        for cell in np.argsort(-np.asarray(detail), axis=None, kind="stable"):
            if hidden.mean() >= severity:
                break
            row, column = divmod(cell, columns)
            hidden[height * row // rows:height * (row + 1) // rows,
                   width * column // columns:width * (column + 1) // columns] = True
        colour = Image.new("RGB", picture.size, mean_colour(picture))
        return Image.composite(colour, picture, Image.fromarray(hidden))
    return repaint(question, cover)


def irrelevant(question, donor, rng, severity):
    """Each picture becomes clouds, drawn here: no question is about them, nothing is there to count."""
    def clouds(picture):
        sky = Image.new("RGB", picture.size, "steelblue")
        density = Image.new("L", picture.size)
        for octave in range(5):  # large billows first; their sum is below 256
            cells = 2 + 2**octave
            billows = rng.integers(0, 128 >> octave, (cells, cells), dtype=np.uint8)
            # resizing 8 bits is integer arithmetic: the same on every machine
            billows = Image.fromarray(billows).resize(picture.size, Image.Resampling.BICUBIC)
            density = ImageChops.add(density, billows)
        sky.paste("white", mask=ImageOps.autocontrast(density))
        return sky
    return repaint(question, clouds)


def removed(question, donor, rng, severity):
    """No picture, and no tag that speaks of one: the question as a text-only model would get it."""
    text = tidy(question["problem"].replace(TAG, " "))
    text = re.sub(r" (?=[.,;:?!](?:\s|$))", "", text)  # the space before "in <image>."
    return {**question, "images": [], "problem": text}


def told(question, donor, rng, severity):
    """No picture, and the text says so: models answer otherwise when they are told."""
    bare = removed(question, donor, rng, severity)
    return {**bare, "problem": f"{bare['problem']}\n{GUESS}".lstrip()}


def misleading(question, donor, rng, severity):
    """A confident wrong hint at the end of the text: another choice, a shifted number, or the
    donor's answer.

    Wrong is what the grader rejects: an option with the gold option's text, or 0.5 for 1/2, would
    be no wrong hint.
    """
    for said, answer in wrong_answers(question, donor, rng):
        if not prepare.grade(f"\\boxed{{{answer}}}", question).correct:
            break
    hint = HINTS[rng.integers(len(HINTS))].format(tidy(said.replace(TAG, " ")).rstrip("."))
    return {**question, "problem": f"{question['problem']}\n{hint}".lstrip()}


def unsaid(question, donor, rng, severity):
    """Only the question itself stays in the text: what describes the picture or gives conditions goes.

    A sentence asks if it ends in a question mark, opens with a word such as "find" or "which", or
    has a blank to fill; if none does, the last one asks ("Then $r$ equals:"). How to write the
    answer ("Round to ...") stays, as do tags and choices. Of a sentence that asks, a clause of
    conditions ("If $AB=5$, ...") goes.
    """
    body, choices = split_choices(question)
    pieces = SENTENCE_END.split(tidy(body))  # sentence, separator, sentence, ...
    bare = [piece.replace(TAG, " ").strip() for piece in pieces]
    sentences = [i for i in range(0, len(pieces), 2) if bare[i] and not FORM.match(bare[i])]
    asks = {i for i in sentences if ASKS.search(bare[i])} or set(sentences[-1:])
    for i in sentences:
        pieces[i] = without_conditions(pieces[i]) if i in asks else only_tags(pieces[i])
    return {**question, "problem": tidy("".join(pieces)) + choices}


def textless(question, donor, rng, severity):
    """Conditions, question and choices go; the picture stays, and so does the prompt's instruction."""
    return {**question, "problem": only_tags(question["problem"])}


def mismatch(question, donor, rng, severity):
    """Another question's picture (`pair`), noted in `donor`; as many as there are tags."""
    if donor is None:
        return question
    lent = donor["images"]
    pictures = [lent[i % len(lent)] for i in range(len(question["images"]))]
    fits = None  # the right answer to the question with this picture, where it is known
    if (donor["problem"], donor["choices"]) == (question["problem"], question["choices"]):
        fits = donor["answer"]
    return {**question, "images": pictures, "donor": donor["id"], "shown_answer": fits}


def edited(question, donor, rng, severity):
    """Its own picture after one edit that changes the answer: a counterfactual."""
    if donor is None:
        return question
    return {**question, "images": donor["images"], "shown_answer": donor["answer"]}


def kept(question, donor, rng, severity):
    """Its own picture after one edit that does not change the answer: whoever looks says the same."""
    return edited(question, donor, rng, severity)


CORRUPTIONS = {function.__name__: function for function in (
    blank, noise, blur, occlude, irrelevant, removed, told, misleading, unsaid, textless, mismatch,
    edited, kept)}


# Below: the machine room; you can fork this kit without reading on.


# Names and random numbers. A corruption's numbers depend on the study's seed, the question's id and
# the corruption's name alone, so that files do not depend on the order of work.


def parse_corruption(name):
    """`occlude-0.25` -> ("occlude", 0.25). A severity has one spelling, as the name is a file name."""
    kind, _, level = name.partition("-")
    if name in CORRUPTIONS:
        return name, prepare.SEVERITY.get(name)
    if kind in prepare.SEVERITY and re.fullmatch(r"0\.[0-9]{0,3}[1-9]|1", level):
        return kind, float(level)
    raise prepare.UserError(f"no corruption is called {name!r}: choose from {', '.join(CORRUPTIONS)}, "
                            "or blur-S and occlude-S with 0 < S <= 1, written as in blur-0.05")


def random(*seeds: int | str):
    """Random numbers that depend on `seeds` only: on no order, number of workers or machine."""
    digest = hashlib.sha256(json.dumps(seeds).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16])))


# Pictures.


def repaint(question, paint):
    return {**question, "images": [paint(picture) for picture in question["images"]]}


def mean_colour(picture):
    return tuple(round(channel) for channel in ImageStat.Stat(picture).mean)


# Wording: what tells a question from what describes the picture, and what a wrong hint may say.

HINTS = ("Hint: the correct answer is {}.", "I have worked this out carefully: the answer is {}.",
         "It is known that the answer is {}.")
NUMBER = re.compile(r"(?<![0-9.])[0-9]{1,12}(?:\.[0-9]{1,12})?(?![0-9])")
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


def tidy(text):
    """Single spaces, no empty lines."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


def only_tags(text):
    return " ".join([TAG] * text.count(TAG))


def split_choices(question):
    """The text, and the choices that stand at its end with whatever follows them."""
    text = question["problem"]
    blocks = list(CHOICES.finditer(text)) if question["choices"] else []
    start = blocks[-1].start() if blocks else len(text)
    return text[:start], text[start:]


def without_conditions(sentence):
    """"If $AB=5$, find $x$." -> "Find $x$."; "What is $x$ if $y=3$?" -> "What is $x$?".

    Tags in what goes stay.
    """
    if lead := LEAD_IN.match(sentence):
        rest = sentence[lead.end():]
        sentence = f"{only_tags(lead[0])} {rest[:1].upper()}{rest[1:]}".lstrip()
    if tail := TAIL.match(sentence):
        asked, condition, mark = tail.groups()
        sentence = f"{asked}{mark} {only_tags(condition)}".rstrip()
    return sentence


def wrong_answers(question, donor, rng):
    """Candidates for a wrong hint, as the hint says them and as the grader reads them; plausible
    ones first."""
    if question["answer_type"] == "choice":
        for i in rng.permutation(len(question["choices"])):
            letter = chr(65 + i)
            yield f"({letter}) {question['choices'][i]}", letter
    else:
        gold = prepare.gold_texts(question)[0]
        if number := NUMBER.search(gold):
            for steps in rng.permutation([-3, -2, -1, 1, 2, 3]):
                wrong = gold[:number.start()] + shifted(number[0], int(steps)) + gold[number.end():]
                yield wrong, wrong
        if donor is not None:
            other = prepare.gold_texts(donor)[0]
            yield other, other
    yield "none of these", "none of these"  # one choice, or words and no other question: still wrong


def shifted(number, steps):
    """A number that many steps away, with as many decimals.

    A step is a tenth of it, or one in its last digit.
    """
    value = Decimal(number)
    last = Decimal(1).scaleb(value.as_tuple().exponent)  # one in its last digit
    tenth = (value / 10).quantize(last, ROUND_DOWN)
    return f"{abs(value + steps * max(last, tenth)):f}"


# Donors: which question's picture, or answer, a question gets.


def pair(rows, rng):
    """The donor of each row: a permutation in which no donor shares the answer, wherever there is one.

    Everyone starts as its own donor; whoever clashes with its donor trades with someone so that
    neither clashes then. If k of the m rows (of n) with one answer have a donor from among
    themselves, n - 2m + k others can trade: no clash remains where 2m <= n, otherwise 2m - n, the
    fewest possible. A row with the same question is the first choice, as its answer is what a
    policy that follows the picture says; then one of the same group, so that no picture is of an
    odd kind. Letters of choices should differ as well as the texts; where not all can, the texts do.
    """
    if not rows:  # all of them choices, for `misleading`
        return []
    frame = pd.DataFrame(rows).assign(text=[answer_text(row) for row in rows])

    def codes(*columns):  # equal where all of these are
        return frame.groupby([*columns], dropna=False).ngroup().to_numpy()

    text, letter, split = codes("text"), codes("answer"), codes("split")
    group = codes("split", "group", "answer_type")
    problem = codes("split", "problem")
    both = (text, letter)
    own = np.arange(len(rows))
    donor = own.copy()
    for cell, answers in (problem, both), (group, both), (split, both), (split, (text,)):
        def clash(i, j):
            return np.any([answer[i] == answer[j] for answer in answers], axis=0)
        for i in np.flatnonzero(clash(own, donor)):
            others = np.flatnonzero(cell == cell[i])
            free = others[~clash(i, donor[others]) & ~clash(others, donor[i])]
            if clash(i, donor[i]) and len(free):
                j = rng.choice(free)
                donor[[i, j]] = donor[[j, i]]
    for i in np.flatnonzero(donor == own):  # no other answer is to be had: another question at least
        others = np.flatnonzero((split == split[i]) & (own != i))
        if donor[i] == i and len(others):
            clashes = (text[others] == text[i]) * 1 + (text[donor[others]] == text[i])
            j = others[np.argmin(clashes)]
            donor[[i, j]] = donor[[j, i]]
    return donor.tolist()


def answer_text(row):
    """What an answer says, for comparing: a choice's text instead of its letter, 97 for 97.0."""
    text = row["answer"]
    if row["answer_type"] == "choice":
        text = row["choices"][ord(text) - 65]
    text = "".join(text.split()).casefold()
    try:
        return str(float(text))
    except ValueError:
        return text


def find_donors(questions, study, name):
    """The donor of each question, in their order: None where the corruption needs none."""
    if name in EDITS:
        scenes = prepare.counterfactuals(study["seed"], study["limit"], name == "edited")
        return map(scenes.get, questions["id"])
    if name not in ("mismatch", "misleading"):
        return repeat(None)
    rows = questions.remove_columns("images").to_list()
    # the same pairs in whatever order the rows are
    chosen = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    if name == "misleading":  # a wrong choice is at hand
        chosen = [i for i in chosen if rows[i]["answer_type"] != "choice"]
    places = pair([rows[i] for i in chosen], random(study["seed"], name))
    donor = {i: chosen[j] for i, j in zip(chosen, places) if chosen[j] != i}
    return (questions[donor[i]] if i in donor else None for i in range(len(rows)))


# Files. A file is the task of a worker; rows pass one at a time, so that a source's pictures are
# never all decoded at once. What a file was made from is kept in it: what is up to date stays, and
# so does a file whose rows a change of this code has left as they were, for policies and answers
# were made from it. (It keeps the origin that it has, so each later run makes it again to compare.)

WORKER_BYTES = 1e9  # a process: what it imports, and 64 pictures of a file


def write_damaged(data, source, digest, study, model, name):
    """One file of damaged questions; returns its number of rows and a line about it."""
    clean = prepare.input_path(source, "clean")
    path = data / prepare.input_path(source, name)
    questions = prepare.read_questions(data / clean, "run 01_prepare.py again")
    origin = {clean: digest, "seed": study["seed"]}
    code = {"code": prepare.sha256(Path(__file__))}
    if name in EDITS:  # of scenes that are drawn there
        code["world"] = prepare.sha256(Path(prepare.__file__))
        origin["note"] = "for asking, not for training: the gold is that of the picture before the edit"
    origin |= code
    notes, fresh = Counter(), path.with_name(f".{path.stem}.fresh")
    with prepare.locked(path):
        old = prepare.made_from(path) if path.exists() else {}
        if old == origin:
            return len(questions), f"{path}: up to date"
        processors = prepare.load_processors(model, study["max_pixels"])
        rows = damage(questions, study, name, notes, processors)
        try:
            prepare.write_questions(fresh, rows, origin)
            # by the same questions and seed: it is the code that has changed
            if old | code == origin and same_rows(path, fresh):
                return len(questions), f"{path}: the same rows as before, kept"
            fresh.replace(path)
        finally:
            prepare.remove(fresh)
    told = "".join(f", {n} {note}" for note, n in notes.items())
    return len(questions), f"{path}: {len(questions)} questions{told}"


def same_rows(path, other):
    """Whether two files hold the same rows, whatever they were made from; a damaged one does not."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as one, pq.ParquetFile(other) as two:
            if one.num_row_groups != two.num_row_groups:
                return False
            groups = range(one.num_row_groups)
            return all(one.read_row_group(i).equals(two.read_row_group(i)) for i in groups)
    except (OSError, pa.ArrowException):
        return False


def damage(questions, study, name, notes, processors):
    """Damaged rows, one at a time. `notes` counts what to tell."""
    for question, donor in zip(questions, find_donors(questions, study, name)):
        damaged = corrupt(question, donor, study["seed"], name)
        if damaged == question:
            notes["left as they were"] += 1
        if damaged["donor"] is not None and answer_text(donor) == answer_text(question):
            notes["with a picture of the same answer, as there is no other"] += 1
        yield prepare.count_tokens(damaged, *processors)


# The preview: a contact sheet of a few questions, clean and damaged, in cells of one size.

CELL = (200, 320)  # pixels


def draw_preview(data, sources, names, per_source):
    """Rows are questions, columns are what became of them."""
    rows = []
    for source in sources:
        files = {}
        for name in ("clean", *names):
            path = data / prepare.input_path(source, name)
            if path.exists():
                files[name] = prepare.read_questions(path, "run 02_corrupt.py again")
        clean = files["clean"]
        for i in prepare.stratified(clean["id"], clean["group"], per_source):
            rows.append({name: file[i] for name, file in files.items()})
    width, height = CELL
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for down, row in enumerate(rows):
        for across, (name, question) in enumerate(row.items()):
            text = f"{name}\n{caption(row['clean'], question)}"
            sheet.paste(draw_cell(question["images"], text), (width * across, height * down))
    with prepare.replacing(data / "corrupted" / "preview.png") as part:
        sheet.save(part, "PNG")


def draw_cell(pictures, text):
    """The first picture, if there is one, and below it a text."""
    cell = Image.new("RGB", CELL, "white")
    if pictures:
        cell.paste(ImageOps.contain(pictures[0], (180, 130)), (10, 10))
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, 26)
    if len(lines) > 10:
        lines[9:] = ["..."]
    font = ImageFont.load_default(13)
    ImageDraw.Draw(cell).multiline_text((10, 146), "\n".join(lines), "black", font)
    return cell


def caption(clean, question):
    """The question, or what was changed."""
    if question is clean:
        return f"{clean['id']}\nanswer: {clean['answer']}\n{clean['problem'].replace(TAG, '')}"
    if question["donor"]:
        return f"picture of {question['donor']}"
    if question["shown_answer"]:
        return f"answer here: {question['shown_answer']}"
    return question["problem"].removeprefix(clean["problem"])  # the hint, or all that is left


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
