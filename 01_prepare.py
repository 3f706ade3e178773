# SPDX-License-Identifier: MIT
"""Stage 1: questions and a model.

Benchmarks and training sets come in as many layouts; here they become one record: text with a tag
per picture, pictures within one pixel budget, a gold answer that the grader can read. What does
not fit is rejected with its reason, never cut and never dropped silently; training questions that
a benchmark asks too are rejected as leaks. Without a hub or a GPU there is `shapes`: a world drawn
here, whose questions are known to need the picture or not, and a real but tiny Qwen2.5-VL that has
learnt to answer some of them.

reads   datasets of the hub, or local copies of them, or your own folder (--local)
writes  data/study.json, data/questions/SOURCE.parquet, data/questions/rejected.jsonl,
        data/model/ (preset tiny)
run     python 01_prepare.py                                    # 3 to 5 minutes on 2 CPU cores
        python 01_prepare.py --preset 3b --limit 500            # from the hub
        python 01_prepare.py --preset 3b --benchmarks mathvision --local mathvision=test.parquet
        python 01_prepare.py --train mine --local mine=FOLDER   # FOLDER/questions.jsonl

In this file: the stage, the sources, the prompt, the grader, the world of shapes, the embedded
model; then the machine room. To add a benchmark, see "Sources"; to change the prompt, INSTRUCTION.
"""
import ast
import cmath
import codecs
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
import unicodedata
import warnings
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from inspect import Parameter, signature
from itertools import chain, count, islice, product
from operator import add, mul, neg, sub, truediv
from pathlib import Path
from types import SimpleNamespace

# Before torch and numpy load. Threads that wait by spinning make a shared core 100 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2500")
X86 = platform.machine() in ("x86_64", "AMD64")
if X86:
    # One instruction set and one order of sums, so that every x86-64 machine gets the same numbers.
    # What a card computes is none of their business.
    os.environ.update({
        "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_DYNAMIC": "FALSE", "OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        # products of so many shapes are kept ready; at 1,024, as usual, they take 0.5 GB
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"})

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import (
    Dataset, Features, Image as ImageFeature, List, Value, get_dataset_config_names, load_dataset)
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoTokenizer, HfArgumentParser, Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer)
from transformers.utils import logging
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil, smart_resize)


# Settings

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REAL = {
    "train": "geometry3k", "benchmarks": ["mathvista", "mmmu", "scienceqa"],
    # 512 image tokens: reads a diagram's labels, and 64 prompts fit beside the 3B on 12 GB
    "max_pixels": 512 * 28 * 28}
PRESETS = {
    "tiny": {"model": "embedded", "train": "shapes", "benchmarks": ["shapes"],
             "max_pixels": 112 * 112},  # 16 image tokens; shapes take 9
    "2b": {"model": "Qwen/Qwen3-VL-2B-Instruct", **REAL},  # for a card of 8 GB
    "3b": {"model": "Qwen/Qwen2.5-VL-3B-Instruct", **REAL},
    "7b": {"model": "Qwen/Qwen2.5-VL-7B-Instruct", **REAL},
}


def option(default, help: str):
    """A config field with its reason or unit, which `--help` shows, as its default where it has one."""
    if default not in (None, []):
        help += " (default: %(default)s)"
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    preset: str = option("tiny", "tiny, 2b, 3b or 7b: sets model, train, benchmarks, max_pixels")
    data: str = option("data", "the study's folder")
    train: str = option(None, "source to train on [preset]")
    benchmarks: list[str] = option([], "sources to evaluate on [preset]")
    local: list[str] = option([], "NAME=PATH: read source NAME from a parquet or a folder of them; "
                              "any other NAME is your own source")
    limit: int = option(None, "questions per source and split, spread over its groups; fewer where "
                        "some are rejected later [all]")
    seed: int = option(0, "of shapes, of the embedded model and of the corruptions")
    max_pixels: int = option(None, "a larger picture is scaled down to this [preset]")
    max_prompt_tokens: int = option(4096, "a longer question is rejected, never cut; seven pictures "
                                    "of 512 tokens fit")
    model: str = option(None, "hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL [preset]")


Question = dict  # one row of FEATURES, its images decoded: a list of RGB PIL pictures

FEATURES = Features({
    "id": Value("string"),            # SOURCE/...
    "problem": Value("string"),       # question and choices as shown, one <image> tag per picture
    "images": List(ImageFeature()),
    "answer": Value("string"),        # of choices the letter; an open one's may be a JSON list
    "answer_type": Value("string"),   # one of ANSWER_TYPES
    "choices": List(Value("string")),
    "unit": Value("string"),
    "precision": Value("int64"),      # decimals of a float answer
    "source": Value("string"),
    "split": Value("string"),         # train or test
    "group": Value("string"),         # the benchmark's own breakdown: subject, task
    "needs_image": Value("bool"),     # null: nobody knows
    "image_tokens": Value("int64"),   # of all pictures together
    "prompt_tokens": Value("int64"),  # of the whole prompt
    "donor": Value("string"),         # id of the question whose picture is shown (mismatch), or null
    "shown_answer": Value("string"),  # that fits the picture shown, where it is another and known
})
ANSWER_TYPES = ("choice", "integer", "float", "list", "text", "math", "open")
NO_PICTURE = ("blank", "removed")  # names of inputs without a picture
# of the plain names: at blur 0.2 no label and no shape can be made out
SEVERITY = {"blur": 0.2, "occlude": 0.5}


class UserError(Exception):
    """Bad input: printed as one sentence, exit code 2. It names the file, the row, the remedy."""


# The stage, top down


def main(config: Config) -> dict:
    """Make the questions and, for preset tiny, the model; returns study.json.

    What was made by the same settings, packages, code and inputs is kept.
    """
    data, local = Path(config.data), check_config(config)
    with locked(data / "study.json"):
        inputs = {name: fingerprint(path) for name, path in local.items()}
        model = config.model
        if model == "embedded":
            model = embedded_model(data, config.seed, config.max_pixels)
        processors = load_model_parts(model, config.max_pixels)
        settings = ("preset", "model", "seed", "max_pixels", "max_prompt_tokens", "limit")
        plan = {name: getattr(config, name) for name in settings} | {
            "sources": {"train": config.train, "benchmarks": list(dict.fromkeys(config.benchmarks))},
            "versions": versions(), "code": sha256(Path(__file__)), "inputs": inputs,
            "model_files": hash_model(data, model)}
        if (data / "study.json").exists():
            study = load_study(data)
            if is_current(data, study, plan):
                print(f"{data / 'questions'}: up to date")
                return study
        study = prepare_sources(config, plan, local, processors)
        with replacing(data / "study.json") as part:
            part.write_text(json.dumps(study, indent=1), encoding="utf-8")
        print(f"{data / 'study.json'}: the record of all this")
        return study


def check_config(config: Config) -> dict[str, Path]:
    """Fill in the preset; a sentence for what cannot work. Returns the sources to read locally."""
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown: choose from {', '.join(PRESETS)}")
    for name, value in PRESETS[config.preset].items():
        if getattr(config, name) in (None, []):
            setattr(config, name, value)
    check_least(config, 1, "limit", "max_pixels", "max_prompt_tokens")
    local = {}
    for item in config.local:
        name, _, path = item.partition("=")
        if not SOURCE_NAME.fullmatch(name) or name == "shapes" or not path:
            raise UserError(f"--local {item} is not NAME=PATH with a name of letters, digits, _ . "
                            "and -, other than shapes")
        if name not in (config.train, *config.benchmarks):
            raise UserError(f"--local {name} is neither --train nor among --benchmarks: name it "
                            "there too")
        local[name] = Path(path)
    asked = [(name, "test") for name in config.benchmarks]
    for name, split in [(config.train, "train"), *asked]:
        if name not in ("shapes", *SOURCES, *local):
            raise UserError(f"source {name} is unknown: choose from shapes, {', '.join(SOURCES)}, "
                            f"or give your own with --local {name}=PATH")
        if getattr(SOURCES.get(name, OWN), split) is None:  # a benchmark, trained on, says nothing
            raise UserError(f"source {name} has no {split} split: benchmarks are for --benchmarks "
                            "alone, training sets for --train")
    return local


def is_current(data, study, plan):
    """Whether a study was made by this plan, and its artifacts are there as they were made."""
    there = {name: sha256(data / name) for name in study["artifacts"] if (data / name).exists()}
    return plan.items() <= study.items() and there == study["artifacts"]


def prepare_sources(config: Config, plan, local, processors):
    """Write the questions of all sources; returns study.json."""
    data, asked, rejected = Path(config.data), {}, []
    study = plan | {"questions": {}, "golds_as_text": {}}
    # last the training set: its leaks are looked for in the benchmarks
    names = [name for name in plan["sources"]["benchmarks"] if name != config.train]
    names.append(config.train)
    try:
        for name in names:
            prepare_source(name, config, local.get(name), processors, study, asked, rejected)
    finally:  # also where a source has no question left: here it says why
        write_jsonl(data / REJECTED, rejected)
    print(f"{data / REJECTED}: {len(rejected)} rows that can't be used, and why")
    artifacts = [*(input_path(name, "clean") for name in names), REJECTED]
    return study | {"artifacts": {name: sha256(data / name) for name in artifacts}}


def prepare_source(name, config: Config, path, processors, study, asked, rejected):
    """Write data/questions/SOURCE.parquet, test questions first.

    `study` gets two counts, each by split: all questions, and those whose gold should be maths but
    is compared as text. `asked` and `rejected` grow: what benchmarks ask (`check_new`), and the
    rows that are not taken.
    """
    wanted = {"test": config.benchmarks, "train": [config.train]}
    counts = {split: 0 for split, names in wanted.items() if name in names}
    as_text, seen = dict(counts), {}
    study["questions"][name], study["golds_as_text"][name] = counts, as_text
    folder = path.parent if path and path.is_file() else path

    def questions():
        for split in counts:
            for place, question in chosen(name, split, path, config, rejected):
                with rejecting(rejected, place, question["id"]):
                    question = finish(question, folder, *processors, config.max_prompt_tokens)
                    check_new(question, seen, asked)
                    counts[split] += 1
                    if not reads_as_maths(question):
                        as_text[split] += 1
                    yield question
            if not counts[split]:
                why = reasons(name, rejected) or "its files are empty"
                raise UserError(f"source {name} has no {split} question left: {why}")

    file = Path(config.data) / input_path(name, "clean")
    write_questions(file, questions(), {"instruction": INSTRUCTION})  # it is part of every prompt
    told = ", ".join(f"{n} {split} questions" for split, n in counts.items())
    print(f"{file}: {told} (golds compared as text: {sum(as_text.values())}), "
          f"rejected: {reasons(name, rejected) or 'none'}")


@contextmanager
def rejecting(rejected, place, id):
    """The work on one row: where it raises Rejected, the row goes to `rejected` with the reason."""
    try:
        yield
    except Rejected as error:
        rejected.append({**place, "id": id, "reason": str(error)})


def reasons(name, rejected):
    """How often each reason in a source, without its details."""
    counts = Counter(row["reason"].partition(":")[0] for row in rejected if row["source"] == name)
    return ", ".join(f"{reason} {n}" for reason, n in counts.most_common())


def chosen(name, split, path, config: Config, rejected) -> Iterator[tuple[dict, Question]]:
    """(place of a row, question) for the rows to take: of `limit` each group has its share.

    A first pass finds them, without decoding a picture. An id that is there already gets -2, -3, ...
    """
    groups, repeats = {}, Counter()  # id -> group
    for _, question in converted(name, split, path, config, rejected):
        own = unique = question["id"]
        while unique in groups:
            repeats[own] += 1
            unique = f"{own}-{repeats[own] + 1}"
        groups[unique] = question.get("group")
    ids = list(groups)
    take = {ids[i] for i in stratified(ids, groups.values(), config.limit)}
    rows = tqdm(converted(name, split, path, config, []), f"{name} {split}", len(ids), leave=False,
                disable=None)
    for unique, (place, question) in zip(ids, rows):
        if unique in take:
            yield place, question | {"id": unique}


def converted(name, split, path, config: Config, rejected) -> Iterator[tuple[dict, Question]]:
    """(place of a row, question) for all rows of a source, pictures still encoded."""
    if name == "shapes":
        for question in shapes_world(config.seed, config.limit):
            if question["split"] == split:
                yield {"source": name}, question
        return
    for number, (place, row) in enumerate(read_rows(name, path, split)):
        with rejecting(rejected, place, None):
            if question := to_question(name, split, row, number):
                yield place, question


def to_question(name, split, row: Mapping | str, number) -> Question | None:
    """A row as a question with its pictures still encoded.

    None if the row says that it is for the other split. Raises Rejected, whatever a row holds.
    """
    try:
        texts = [row] if isinstance(row, str) else row.values()
        if any(isinstance(text, str) and len(text) > MOST_CHARACTERS for text in texts):
            raise Rejected(f"too long: over {MOST_CHARACTERS} characters")
        if isinstance(row, str):
            row = parse_line(row)
        question = SOURCES.get(name, OWN).convert(**row)
        if question.get("split") not in (None, split):
            return None
        check_question(question)
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"not a question: {type(error).__name__} {str(error)[:100]}") from error
    own_id = question.get("id")
    if own_id in (None, ""):
        own_id = f"{split}-{number}"
    return question | {"id": f"{name}/{own_id}", "source": name, "split": split}


def check_question(question):
    """Reject what a converter let through and no parquet or grader can take."""
    texts = [question["problem"], *gold_texts(question), *question["choices"]]
    texts += [str(question.get(name)) for name in ("id", "group", "unit")]
    whole = " ".join(texts)
    whole.encode()  # half a surrogate pair fits no file
    if CONTROL.search(whole):
        raise Rejected("control characters: escaped LaTeX, such as \\beta read as \\b and eta, "
                       "looks like this")
    if question.get("precision") not in (None, *range(16)):
        raise Rejected("not a question: precision is a number of decimals, at most 15")
    if not question["images"]:
        raise Rejected("no picture")
    if not plain(question["problem"].replace("<image>", "")):
        raise Rejected("not a question: it has no text")
    check_gold(question)


def finish(question, folder, tokenizer, image_processor, most_tokens):
    """Decode and scale the pictures, count tokens; a prompt that is too long is rejected."""
    if len(question["problem"]) > 100 * most_tokens:
        raise Rejected(f"too long: {len(question['problem'])} characters")
    pictures = []
    for picture in question["images"]:
        if not isinstance(picture, Image.Image):
            picture = open_picture(picture, folder)
        pictures.append(fit(picture, image_processor))
    question = count_tokens(question | {"images": pictures}, tokenizer, image_processor)
    if question["prompt_tokens"] > most_tokens:
        raise Rejected(f"too long: {question['prompt_tokens']} tokens")
    return question


def count_tokens(question, tokenizer, image_processor):
    """The question with the numbers of its tokens, once its pictures are decoded."""
    image_tokens = []
    for picture in question["images"]:
        patches = image_processor.get_number_of_image_patches(picture.height, picture.width)
        image_tokens.append(patches // image_processor.merge_size**2)
    tokens = len(tokenize_prompt(question["problem"], image_tokens, tokenizer))
    return question | {"image_tokens": sum(image_tokens), "prompt_tokens": tokens}


def check_new(question, seen, asked):
    """Reject a training question that is there already, or that a benchmark asks too: the same
    text and like pictures. A benchmark is scored over all it has.

    `seen`: (problem, pictures) -> id. `asked`: bare text -> [(hashes of pictures, id)] of test
    questions. Both grow.
    """
    if question["source"] == "shapes":  # no question comes twice there, by construction
        return
    others = asked.setdefault(plain(question["text"]), [])
    hashes = [difference_hash(picture) for picture in question["images"]]
    if question["split"] == "test":
        others.append((hashes, question["id"]))
        return
    pixels = b"".join(picture.tobytes() for picture in question["images"])
    key = question["problem"], hashlib.sha256(pixels).digest()
    first = seen.setdefault(key, question["id"])
    if first != question["id"]:
        raise Rejected(f"duplicate: of {first}")
    for other_hashes, other in others:
        if alike(hashes, other_hashes):
            raise Rejected(f"leak: also {other}")


# Sources: to add one, write a function from its columns to a record(), and a row in SOURCES
#
# The arguments of such a function are the dataset's columns, by name: those without a default must
# be there, and others are not even read. Pictures may stay as the dataset has them.


def from_easyr1(problem, images, answer, id=None, category=None):
    """Choices that stand in the text, if any; geometry3k's are not shown: its task is free-form."""
    choices, answer = listed_gold(problem, gold_text(answer))
    return record(problem, images, answer, choices, shown=problem, id=id, group=category)


def from_mmk12(id, question, image, answer, subject):
    """Test questions list their choices in the text."""
    return from_easyr1(question, [image], answer, id, subject)


def from_mathvista(pid, question, decoded_image, choices, unit, precision, answer, answer_type,
                   metadata, query):
    """`query` is its own prompt: hint, question, unit, choices. A gold choice is given by text."""
    if answer_type == "text":
        answer_type = "choice"
        if choices and answer in choices:
            answer = LETTERS[choices.index(answer)]  # of equal ones the first: any is right
    return record(question, [decoded_image], answer, choices, answer_type, query, id=pid, unit=unit,
                  precision=None if precision is None else int(precision), group=metadata["task"])


def from_mmmu(id, question, options, answer, question_type,
              image_1, image_2, image_3, image_4, image_5, image_6, image_7):
    """Pictures are named in question and choices. An open gold may be a list of alternatives."""
    choices, kind = [], "open"
    if question_type == "multiple-choice":
        choices, kind = literal_list(options), "choice"
    pictures = [image_1, image_2, image_3, image_4, image_5, image_6, image_7]
    subject = re.sub(r"^(dev|validation|test)_|_\d+$", "", id)
    return record(question, pictures, answer, choices, kind, id=id, group=subject)


def from_scienceqa(image, question, choices, answer, hint, subject):
    """Its lecture and solution tell the answer: they are not read."""
    context = f"Context: {hint}\n" if hint else ""
    shown = with_choices(context + question, choices)
    return record(question, [image], LETTERS[answer], choices, "choice", shown, group=subject)


def from_mathvision(id, question, options, decoded_image, answer, subject):
    """One file shows all pictures that the text names."""
    return record(question, [decoded_image], answer, options, merged=True, id=id, group=subject)


def from_mathverse(sample_index, problem_version, question, image, answer, question_type, query_wo):
    """Choices stand in the text or, where the version is "Vision Only", in the picture."""
    choices = []
    if question_type == "multi-choice":
        choices = listed_choices(query_wo, CHOICE_MARKS[:1]) or list("ABCD")
    text = re.split(r"\n *choices", question or "", flags=re.I)[0]
    return record(text, [image], answer, choices, shown=query_wo, id=sample_index,
                  group=problem_version)


def from_wemath(ID, question, option, answer, image_path, key):
    """Choices are one text: "A. 3;B. 4;C. No correct answer"."""
    choices = listed_choices(re.sub(r"; *(?=[A-J]\.)", "\n", option), CHOICE_MARKS[:1])
    return record(question, [image_path], answer, choices, "choice", id=f"{ID}-{key}", group=key)


def from_own(problem, images, answer, answer_type=None, choices=None, id=None, group=None,
             unit=None, precision=None, split=None, needs_image=None):
    """The user's own: a line of questions.jsonl, or a row of a parquet with the kit's columns."""
    if not isinstance(images, list) or not isinstance(choices or [], list):
        raise Rejected("not a question: images and choices are lists")
    for value, allowed in ((answer_type, ANSWER_TYPES), (split, ("train", "test")),
                           (needs_image, (True, False))):
        if value not in (None, *allowed):
            raise Rejected(f"not a question: {value!r:.40} is none of {allowed}")
    if "\N{REPLACEMENT CHARACTER}" in f"{problem} {answer} {choices}":
        raise Rejected("not UTF-8: a letter was lost when the text was saved")
    shown = problem
    if choices:
        choices, answer, shown = own_choices(problem, choices, gold_text(answer).strip())
    elif isinstance(answer, list):
        if answer_type not in (None, "list", "open"):
            raise Rejected("gold: several answers are for type open, a list for type list")
        answer = as_texts(answer, "gold: one of the answers")
        if answer_type == "list":
            answer = f"[{', '.join(answer)}]"
    else:
        answer = gold_text(answer)
        if answer_type in (None, "choice"):
            choices, answer = listed_gold(problem, answer)
    return record(problem, images, answer, choices, answer_type or kind_of(answer), shown,
                  id=id, group=None if group is None else str(group), unit=unit,
                  precision=precision, split=split, needs_image=needs_image)


@dataclass(frozen=True)
class Source:
    """Where a dataset lies, and how its rows become records."""
    hub: str            # dataset id
    train: str | None   # the split to train on; None: not for training
    test: str | None    # the split to evaluate on
    convert: Callable   # columns -> record, or Rejected
    config: str | None = None  # of the dataset; * is all of them


SOURCES = {
    "geometry3k": Source("hiyouga/geometry3k", "train", "test", from_easyr1),
    "mmr1": Source("MMR1/MMR1-Math-RL-Data-v0", "train", None, from_easyr1),
    "clevr_count": Source("BUAADreamer/clevr_count_70k", "train", "test", from_easyr1),
    "virl39k": Source("PAPOGalaxy/PAPO_ViRL39K_train", "train", None, from_easyr1),
    "mmk12": Source("FanqingM/MMK12", "train", "test", from_mmk12),
    "mathvista": Source("AI4Math/MathVista", None, "testmini", from_mathvista),
    "mmmu": Source("MMMU/MMMU", None, "validation", from_mmmu, "*"),
    "scienceqa": Source("derek-thomas/ScienceQA", None, "test", from_scienceqa),
    "mathvision": Source("MathLLMs/MathVision", None, "test", from_mathvision),
    "mathverse": Source("AI4Math/MathVerse", None, "testmini", from_mathverse, "testmini"),
    "wemath": Source("We-Math/We-Math", None, "testmini", from_wemath),
}
OWN = Source("", "train", "test", from_own)  # any other name


def record(text, pictures, answer, choices=None, kind="math", shown=None, merged=False, **more):
    """A question whose pictures are still files.

    text: the bare question, which is compared to find leaks. shown: what the model reads, if that
    is more. kind: the answer's type, if there are no choices. merged: one file shows all pictures
    that the text names.
    """
    choices = as_texts(choices or [], "choices: one")
    if len(choices) > len(LETTERS):
        raise Rejected("not a question: more choices than letters")
    if "".join(choice.strip("(). ") for choice in choices) == LETTERS[:len(choices)]:
        shown = shown or text  # the picture says what A, B, ... are
    problem, images, numbers = place_pictures(
        shown or with_choices(text, choices), pictures, merged)
    # Choices follow the text, so the last tags are theirs. Each becomes the number of its picture:
    # as bare tags all choices would be the same text, and every letter would be right.
    all_choices = "\n".join(choices)
    in_choices = len(IMAGE_TAG.findall(all_choices))
    if "<image>" in all_choices and len(numbers) < len(images):
        raise Rejected("picture: one has no tag, and those of the choices no number")
    own_numbers = iter(numbers[len(numbers) - in_choices:])
    choices = [IMAGE_TAG.sub(lambda _: f"image {next(own_numbers)}", choice) for choice in choices]
    if len({" ".join(choice.split()) for choice in choices}) == 1:
        raise Rejected("choices: all are the same, so that every letter would be right")
    if isinstance(answer, list):
        answer = json.dumps(answer)
    answer = unboxed("" if answer is None else str(answer)).strip()
    if choices:
        kind = "choice"
    elif kind == "choice":
        raise Rejected("choices: none could be read")
    elif kind == "math" and NAMES.fullmatch(plain(answer)) and not FORMULA.search(plain(answer)):
        kind = "text"
    return {"text": IMAGE_TAG.sub("", text), "problem": problem, "images": images,
            "answer": answer, "answer_type": kind, "choices": choices, **more}


IMAGE_TAG = re.compile(r"<image ?(\d{0,2})>")  # <image>, <image1>, <image 1>
NAMES = re.compile("[A-Za-z][A-Za-z' -]+")  # Yes, or of a person
FORMULA = re.compile(r"[\d\\^=+*]|\b[a-z]\s*[-/]\s*[a-z]\b")  # 2x, x - y; not yes/no or well-known


def place_pictures(text, pictures, merged):
    """One `<image>` tag per picture, the pictures in the order of their tags, the tags' numbers.

    `<image 3>` names the third picture, a bare `<image>` the first that no tag has named; a second
    mention becomes words. So does any beyond the first where one file shows all pictures
    (`merged`). Pictures without a tag stand first.
    """
    missing = (None, {"bytes": None, "path": None})  # null, and as some write it
    given = {number: picture for number, picture in enumerate(pictures, 1) if picture not in missing}
    numbers, placed = [], []
    unnamed = (number for number in count(1) if number not in numbers)

    def tag(match):
        number = int(match[1] or next(unnamed))
        again = number in numbers
        numbers.append(number)
        if again or (merged and number not in given):
            return f"image {number}"
        if number not in given:
            raise Rejected(f"picture missing: {match[0]}")
        placed.append(given.pop(number))
        return "<image>"

    text = IMAGE_TAG.sub(tag, text)
    return "<image>" * len(given) + text, [*given.values(), *placed], numbers


# Choices: where they stand in the text, and which of them a gold names

CHOICE_MARKS = (
    re.compile(r"^[ \t]*\(?([A-Ja-j])[.:)、．]", re.M),  # A. or (a), a line each
    re.compile(r"(?<!\w)\(([A-Ja-j])\)"),  # (A) red (B) blue
    re.compile(r"(?:^|(?<=\s))([A-J])[.):、．](?=\s)"))  # A. red B. blue C. green


def as_texts(values, what):
    """Texts, and finite numbers as texts."""
    for value in values:
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number and not isinstance(value, str):
            raise Rejected(f"{what} is no text or finite number")
    return [str(value) for value in values]


def gold_text(answer):
    (text,) = as_texts([answer], "gold: the answer")
    return text


def listed_choices(text, forms=CHOICE_MARKS):
    """The choices that a question's text lists, or none: a line each, or on one line.

    They run from the last A on, without a gap. Bare marks mean that the picture shows the choices.
    """
    for form in forms:
        parts = form.split(text)  # text, letter, choice, letter, choice, ...
        letters = "".join(parts[1::2]).upper()
        start = max(letters.rfind("A"), 0)
        letters = letters[start:]
        choices = [choice.strip(" \t\r\n;,") for choice in parts[2 + 2 * start::2]]
        least = 3 if form is CHOICE_MARKS[2] else 2  # "the line from A. to B. is" lists nothing
        if len(choices) < least or letters != LETTERS[:len(choices)]:
            continue
        choices[-1] = choices[-1].partition("\n")[0].strip()  # then text that is no choice
        if not any(choices):
            return list(letters)
        prose = form is not CHOICE_MARKS[0] and "?" in "".join(choices)
        if all(choices) and not prose:
            return choices
    return []


def listed_gold(text, gold):
    """The choices that a text lists and the gold's letter, where the gold names one; else none and
    the gold. A letter beyond the last choice stays one, for `check_gold` to reject."""
    choices = listed_choices(text)
    named = gold_letter(unboxed(gold).strip(), choices)
    if choices and re.fullmatch("[A-Z]", named):
        return choices, named
    return [], gold.strip()


def gold_letter(gold, choices):
    """The letter of a gold that may be a letter, with marks or without, or a choice's text.

    A capital letter is one even where a choice has that text. What names none stays as it is.
    """
    if re.fullmatch("[A-Z]", gold):
        return gold
    if gold in choices:
        return LETTERS[choices.index(gold)]
    named = bare_choice(gold, tuple(choices))
    if named:
        return named
    marked = re.fullmatch(r"\(?([A-Za-z])[).:]{0,2}", plain(gold))
    return marked[1].upper() if marked else gold


def own_choices(problem, given, gold):
    """The texts of choices, the gold's letter, and the text that shows both where `problem` does.

    A text that lists other choices than are given, or the same in another order, shows the model
    two lists of letters: which one an answer means, nobody could say.
    """
    choices = [choice.strip() for choice in as_texts(given, "choices: one")]
    if "" in choices:
        raise Rejected("choices: one is empty")
    marked = gold not in choices and all(map(CHOICE_MARKS[0].match, choices))
    gold = gold_letter(gold, choices)
    unmarked = listed_choices("\n".join(choices), CHOICE_MARKS[:1])
    if len(unmarked) == len(choices):  # "A. red", "B. blue"
        choices = unmarked
    elif marked:
        raise Rejected("choices: their letters are not A, B, C, ...")
    listed = listed_choices(problem)
    if [choice.upper() for choice in choices] == list(LETTERS[:len(listed)]):
        choices = listed  # the texts of these letters
    gold = gold_letter(gold, choices)
    told = [comparable(choice) for choice in listed]
    wanted = [comparable(choice) for choice in choices]
    by_this_kit = comparable(with_choices("", choices))
    if told == wanted or comparable(problem).endswith(by_this_kit):
        return choices, gold, problem
    # lists in marks that are not read as such: [A] red, A - red
    texts = "|".join(map(re.escape, wanted))
    item = rf"(?<!\w)([A-J])(?=\W{{0,4}}[^\w\s=])[^\w=]{{1,5}}({texts})(?!\w)"
    items = re.findall(item, comparable(problem))  # (letter, choice)
    whole = {letter for letter, _ in items} == set(LETTERS[:len(wanted)])
    reordered = whole and items != list(zip(LETTERS, wanted))
    if listed_choices(problem, CHOICE_MARKS[:1]) or set(told) & set(wanted) or reordered:
        raise Rejected("choices: the text lists others, or in another order: give them once")
    return choices, gold, None


def comparable(text):
    """Without what a picture's place in the row decides: `<image>` is `image 2` elsewhere."""
    return plain(re.sub(r"<?\bimage ?\d*\b>?", "image", text))


def kind_of(answer):
    """The type of a gold whose row names none."""
    if isinstance(answer, list):
        return "open"
    if re.fullmatch(r"[+-]?\d{1,15}", answer):
        return "integer"
    if re.fullmatch(r"[+-]?\d{1,15}\.\d{1,15}", answer):
        return "float"
    return "math" if FORMULA.search(answer) else "text"


# The prompt: a question in the chat template of the model's family, and one line that asks for the
# form of the answer

INSTRUCTION = "Think inside <think> </think>, then answer in \\boxed{}."
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # as the templates of all FAMILIES write one


def with_choices(text, choices) -> str:
    """A question with its choices, one `(A) text` a line."""
    for letter, choice in zip(LETTERS, choices):
        text += f"\n({letter}) {choice}"
    return text


@dataclass
class Prompt:
    """A question as the model reads it."""
    input_ids: list[int]                  # L tokens, the picture's placeholders included
    pixel_values: torch.Tensor | None     # (patches, channels * temporal patch * patch * patch)
    image_grid_thw: torch.Tensor | None   # (pictures, 3), in patches
    pictures: int


def encode(question: Question, tokenizer, image_processor) -> Prompt:
    """Tokens and pixels of a question. A picture of t x h x w patches takes t * h * w / merge**2
    tokens.

    Raises ValueError where tags and pictures do not match, or a picture's sides differ by more than
    a factor of 200.
    """
    if not question["images"]:
        return Prompt(tokenize_prompt(question["problem"], [], tokenizer), None, None, 0)
    seen = image_processor(question["images"], return_tensors="pt")
    grid = seen["image_grid_thw"]
    image_tokens = (grid.prod(-1) // image_processor.merge_size**2).tolist()
    ids = tokenize_prompt(question["problem"], image_tokens, tokenizer)
    return Prompt(ids, seen["pixel_values"], grid, len(image_tokens))


def tokenize_prompt(problem: str, image_tokens: Sequence[int], tokenizer) -> list[int]:
    """Token ids of a question; picture i takes `image_tokens[i]` tokens.

    The template sees a placeholder, never the question: what a question's text says, `<|im_end|>`
    for instance, stays text and cannot become a special token. Raises ValueError where tags and
    pictures do not match.
    """
    before, after = render(tokenizer).split("\ue000")
    first, *texts = f"{problem.strip()}\n{INSTRUCTION}".split("<image>")
    parts = [before, first]
    for text, tokens in zip(texts, image_tokens, strict=True):
        parts += [PICTURE.replace("<|image_pad|>", tokens * "<|image_pad|>"), text]
    ids = []
    for number, part in enumerate([*parts, after]):
        is_text = number % 2 == 1  # else of the template, or a picture
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=is_text)["input_ids"]
    return ids


def render(tokenizer):
    """The chat template up to where the answer begins, with \\ue000 in the question's place."""
    message = {"role": "user", "content": [{"type": "text", "text": "\ue000"}]}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@lru_cache(8)
def opens_think(tokenizer) -> bool:
    """Whether the template ends a prompt in <think>, so that responses begin in the reasoning."""
    return render(tokenizer).rstrip().endswith("<think>")


def load_processors(model: str, max_pixels: int):
    """Tokenizer and image processor of a model; pictures are scaled to at most `max_pixels`.

    Not AutoProcessor: its video part needs torchvision. Pillow also gives the same pixels on every
    machine.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    # any closer, and rounding throws strips from bound to bound
    smallest = min(image_processor.size["shortest_edge"], max_pixels // 4)
    image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}
    return tokenizer, image_processor


# The grader: what a response answers, and whether that is right
#
# grade() reads the answer out of the response (the box; in evaluation else the benchmark's own
# rule), then is_right() compares it with the gold as what both are: choices, numbers, maths or
# text. Two principles hold throughout: a wrong answer that is paid is worse than a right one that
# is not, for training finds it; and nothing here raises or takes more than linear time, whatever a
# response or a question holds. Nothing in a response is ever executed.

Choices = tuple[str, ...]  # their texts, A first

FINAL_CHARACTERS = 10_000  # what is searched for the answer: the end of what follows the reasoning
ANSWER_CHARACTERS = 400    # a longer text is no answer by itself
NESTED = r"(?:[^{}\\]|\\.)*"
for _ in range(8):         # braces within braces, at most so deep
    NESTED = rf"(?:[^{{}}\\]|\\.|\{{{NESTED}\}})*"
BOX = re.compile(rf"\\boxed\s?\{{({NESTED})\}}", re.DOTALL)


@dataclass
class Grade:
    """The verdict on a response."""
    correct: bool
    well_formed: bool   # reasoning in one think block, then one boxed answer, then nothing
    answer: str | None  # as read from the response: a letter where there are choices


def grade(
    response: str, question: Mapping, reward: bool = False, think_opened: bool = False
) -> Grade:
    """Whether a response answers a question rightly, and in the form that the prompt asks for.

    reward: as training pays. The answer is what stands in the one \\boxed{} after the
    reasoning, and nothing else.
    Without it, as a benchmark scores: several boxes are one answer together, and where there
    is no box the rule of the question's source in BENCHMARKS applies, if it has one.
    think_opened: the prompt already ended in <think>, so that the response begins inside the
    reasoning.
    """
    response = f"<think>{response}" if think_opened else str(response)
    for spaced in ("< think", "< /", "</ think", "think >"):
        response = response.replace(spaced, spaced.replace(" ", ""))
    final = response.rpartition("</think>")[2]
    # reasoning that never ends answers nothing
    final = final.partition("<think>")[0][-FINAL_CHARACTERS:]
    answer = read_answer(final, question, reward)
    correct = answer is not None and is_right(answer, question)
    return Grade(correct, is_well_formed(response, final), answer and answer[:ANSWER_CHARACTERS])


def is_well_formed(response: str, final: str) -> bool:
    """White space, <think>, reasoning, </think>, text with one box that is not empty, closing
    punctuation."""
    parts = BOX.split(final)
    if not response.count("<think>") == response.count("</think>") == 1 or len(parts) != 3:
        return False
    _, box, after = parts
    closed = after.strip(" \n\t\r$.)]\\*") == ""
    return response.lstrip().startswith("<think>") and box.strip() != "" and closed


def read_answer(final: str, question: Mapping, reward: bool) -> str | None:
    """What the text after the reasoning answers; of a choice question, the letter."""
    kind, choices = as_text(question.get("answer_type")), choices_of(question)
    rules = {} if reward else BENCHMARKS.get(as_text(question.get("source")), {})
    boxes = BOX.findall(final)
    if rules and not boxes:
        boxes = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", final, re.DOTALL)
    if kind == "choice" and not choices or reward and len(boxes) > 1:
        return None
    answer = ", ".join(dict.fromkeys(boxes)).strip() if boxes else None
    if boxes and kind == "choice":
        answer = read_choice(answer, choices)
    # Several boxes that name no one choice are working. A box that never closes holds nothing.
    unclosed = not boxes and "\\boxed" in final
    if answer is not None or len(boxes) == 1 or unclosed or kind not in rules:
        return answer
    return rules[kind](final, choices)


# free text: where a benchmark looks for an answer that stands in no box. BENCHMARKS, below, is the
# table of its rules.

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen").split()
TENS = "(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
NUMBER = re.compile(
    r"(?:(?<![\w)}\]])-)?(?<![A-Za-z\d.^_/])(?:(?:\d{1,3}(?:,\d{3}){1,6}(?![\d,])|\d{1,300})(?:\.\d{1,300})?|\.\d{1,300})(?:[eE][-+]?\d{1,2}(?!\d))?")
CLAIM = (
    r"(?i:\b(?:answer|(?:correct|right|best) (?:option|choice)(?: letter)?)(?:\s?(?:is|would be|should be))?[\s:=*$({\[\\\"'>]{0,9}"
    r"(?:text\{)?(?:option\s|choice\s)?[\s({]{0,3})")
NOT_ALONE = (  # no answers
    r"\\sqrt\s?(?:\{[^{}]{0,60}\}|\d)|√\s?\d+|\\frac\s?\{[^{}]{0,60}\}\s?\{[^{}]{0,60}\}"
    # 5!, 2^5, the 5th, five-sixths, 5 million, 5 or more
    r"|(?<![\d.,])[\d.,]{1,30}\s?(?:\\?pi\b|π|!|\^\s?[-\d.,]*|(?:st|nd|rd|th)\b|-(?:half|halves|quarters?|[a-z]+(?:th|rd)s?)\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen)\b|or (?:more|less|fewer)\b)"
    r"|(?<![\d.,])\d{1,30}\s?(?:[-–~]|to)\s?\d{1,30}(?![\d.])"  # from 3 to 5
    r"|(?i:\b(?:not|n't|never|minus|negative|over|under|up to|twice|half of|log|ln|sin|cos|tan|depends on|figure|fig\.|type|step|page|chapter))\s[\d.,]+"
    rf"|\b{TENS}[\s-]\d+" r"|[<>≤≥≠]\s?[\d.,]+(?![\d.,>])"  # twenty-five, > 5
    r"|(?<![\d.,])[\d.,]{1,30}(?:√|[a-zA-Z]\b(?<![mgshLVWANJ°])|\+)"  # 5√2, 5x
    r"|[\[(][^\[\]()]{0,60},[^\[\]()]{0,60}[\])]|\b[a-zA-Z]\([^()]{0,30}\)|(?<!\d)\d{1,30}(?:\s?[/:]\s?\d{1,30})+"  # (1, 2), f(0), 2/3
    # the bound of "more than 5", the 2 of "one of 2"
    r"|(?<= than )[-\d.,]+|(?<= least )[-\d.,]+|(?<= most )[-\d.,]+|(?<= of )(?<!total of )[-\d.,]+")
STATES = r"\bis\b|=|:"
REFUSAL = re.compile(
    r"(?i)\bcan(?:no|')?t\b|\b(?:unable|impossible|insufficient|unknown|unclear|undetermined|inconclusive|unsure|uncertain|sorry|apologi[sz]e|as an ai|please provide"
    r"|unanswerable|undeterminable|indeterminate|ambiguous|refuse|it depends|N/A|failed to load|(?:hard|difficult) to (?:tell|say|see))\b"
    r"|\bnot (?:possible|load|determinable|enough|provided?|given|available|listed|clear|able|specif|sufficient|sure|certain|visible)"
    r"|n[o']t (?:possible|load|have|provide|see|know|tell|process|enough|determine|contain|match|give|specify|include|show|visible)"
    r"|\bno (?:information|image|answer|option|picture|figure|data|way|one|idea|clue|extracted)|\bany (?:one )?of (?:them|these|the (?:options|choices|above))\b"
    r"|\b(?:image|picture|figure|information|data) (?:is|are|was) (?:missing|lacking|blank)\b|\black(?:s|ing)? (?:the|necessary|enough|sufficient)\b"
    r"|\bmore (?:information|context|details)|\bwithout (?:any|more|further|the|this|additional|knowing|seeing)\b"
    r"|\b(?:upload|share|send) (?:the|an?|your) (?:image|picture|figure)|无法|不能|没有|看不|不知道|不足")
NEGATION = re.compile(
    r"(?i)\b(?:not|no|never|neither|nor|none|cannot|except|without|unlike|instead|rather|wrong|incorrect|false|untrue|unlikely|least likely|impossible|hardly|barely"
    r"|apart from|far from|different from|opposite|doubt|avoid|mistak(?:en?|es?)|invalid|inaccurate|fails?|neq?|neg|lnot|overline|\w+n['’]t)\b|[≠¬✗]|不|非|错|排除|除了"
    r"|\b(?:other than|(?:any|every|no)(?:thing|one)? but|all but|is out)\b|\b(?:exclud|eliminat|rul(?:e|es|ed|ing) out|reject)")


# what denies the name behind it; its first letter is looked for first, which is faster
DENIAL = (r"(?=[AENIRUWaenriuw])(?i:(?:\bnot|n['’]t|\bnever|\bneither|\bnor|\b(?:all|anything|everything|nothing) but|\bexcept|\brul(?:e|ed|ing) out"
          r"|\bexclud(?:e|ed|ing)|\beliminat(?:e|ed|ing)|\binstead of|\bunlike|\bwithout))")


def last_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", text.strip())[-1]


def search_text(text: str, choices: Choices = ()) -> str | None:
    """MMMU's rule for open questions, the last line alone: what follows its last "answer", "is",
    "so", "=" ..."""
    last = text.strip().rpartition("\n")[2]
    cues = r"(?i)\b(?:could be|so|is|are|thus|therefore|final|answer|result)\b|=|:"
    return None if REFUSAL.search(last) else re.split(cues, last)[-1].strip(" .*")


def search_number(text: str, choices: Choices = ()) -> str | None:
    """The last number that stands alone: "2 bars are larger than 4" answers 2, and so does "two
    bars"."""
    either = re.search(r"\d\s+(?:or|and)\s+[-\d.,]+\W*$", text[-40:])  # 5 or 7
    if either or REFUSAL.search(last_sentence(text)):
        return None
    words = rf"(?i)\b(?:{'|'.join(NUMBERS[2:])})\b"  # not the one of "this one"
    text = re.sub(words, lambda word: str(NUMBERS.index(word[0].lower())), text)
    found = NUMBER.findall(re.sub(NOT_ALONE, " ", text))
    return found[-1] if found else None


def search_maths(text: str, choices: Choices = ()) -> str | None:
    """The whole text if it is maths, else what is claimed as the answer or stated last, the last
    formula or number."""
    last = last_sentence(text)
    if NEGATION.search(last) or REFUSAL.search(last):
        return None
    *claims, claim = re.split(CLAIM, text)
    stated = re.split(r"\n|\. ", claim[:100])[0] if claims else last
    formulas = re.findall(r"(?:\$|\\[(\[])(.{1,100}?)(?:\$|\\[)\]])", text, re.DOTALL)
    ends = [re.split(r"\b(?:is|are|be)\b|:", said)[-1] for said in (stated, last)]
    for candidate in (text, stated, *ends, *formulas[-1:]):
        if read_measure(candidate, UNIT)[0]:
            return candidate.strip()
    return search_number(text)


def search_choice(text: str, choices: Choices) -> str | None:
    """The choice that free text claims as the answer, else the one that it ends on.

    Benchmarks take the last of several; here two that are claimed, or joined by "or", are none.
    """
    lone, refused = lone_letter(choices), REFUSAL.search(last_sentence(text))
    if refused:  # can't tell whether it's B
        text = re.sub(r"\bwhether\b[^.!?\n]*.?$", "", text)
    # it is not (B), B is wrong
    text = re.sub(rf"{DENIAL} (?:be )?(?i:option |choice )?[({{*]{{0,3}}{lone}", "", text)
    text = re.sub(rf"{lone}\W{{0,3}} (?:is|was)(?:n['’]t| not| wrong| incorrect| false)", "", text).strip()
    first, _, more = text.partition("\n")
    known = bare_choice(first[:ANSWER_CHARACTERS], choices)
    if known and not re.search(r"\([A-Z]\)", more):
        return known
    claims = re.findall(CLAIM + lone, text)
    if not claims:  # B is correct
        alone = rf"(?<!, )(?<!and )(?<!or ){lone}"
        claims = re.findall(rf"{alone}\W{{0,3}} is (?:the )?(?:correct|right|best)\b", text)
    either = rf"{lone}\W{{0,4}}(?:or|and|,|&)\W{{0,4}}(?!\1){lone}"
    if len({*claims}) > 1 or re.search(CLAIM + either, text):
        return None
    if re.search(rf"{either}(?:\W*$| are (?:both )?(?:right|correct|possible))", text[-60:]):
        return None
    if claims or refused:
        return claims[-1] if claims else None
    stated = read_choice(re.split(STATES, last_sentence(text))[-1], choices)
    found = re.findall(lone, text) or named_choices(text, choices)
    if stated or not found or len(found) == len({*found}) == len(choices) > 2:  # all of them
        return stated
    return found[-1]


def named_choices(text: str, choices: Choices) -> list[str]:
    """The choices whose texts occur, in order, without those that are denied; where one opens the
    text, that one; none where the text ends on several to choose from."""
    letters, words = choice_letters(choices), choice_words(choices)
    # each as a line break, which plain text has none of, and its letter
    said = words.sub(lambda found: f"\n{letters[found[0]]}", plain(text))
    said = re.sub(rf"(?:{DENIAL}|\bthan|\bleast|\bmost) (?:the |an? )?\n[A-Z]", " ", said)
    if re.search(r"\n[A-Z]\W{0,3}(?:\s(?:and|or|nor|to)|,)\s(?:the |an? )?\n[A-Z]\W*$", said):
        return []
    return re.findall(r"^\n([A-Z])", said) or re.findall(r"\n([A-Z])", said)  # "No, because ..."


# no statement about the answer, and what a blank picture brings
BLANK = re.compile(r"(?i)\b(?:blank|empty|nothing|guess\w*)\b|\bplain \w+ (?:image|picture|square)|\bcompletely (?:white|black)\b")


def search_nearest(text: str, choices: Choices) -> str | None:
    """MathVista's rule: where no choice is found, the one at the smallest edit distance, which here
    counts where the last sentence makes a statement."""
    known, last = search_choice(text, choices), last_sentence(text)
    refused = REFUSAL.search(last) or BLANK.search(last)
    # what is named, and found to be no answer, is not the nearest either
    by_letter = re.search(f"{lone_letter(choices)}|{CLAIM}[A-Z]\\b", text)
    by_text = choice_words(choices).search(plain(last))
    if known or not last or refused or by_letter or by_text:
        return known
    if NEGATION.search(last):  # it is not the largest
        letters = choice_letters(choices)
        return letters["no"] if letters.keys() <= {"yes", "no", "Yes", "No"} else None
    stated = (last.partition(" is ")[2] or last)[:200]
    nearest = min(choices, key=lambda choice: edit_distance(stated, choice[:200]))
    return LETTERS[choices.index(nearest)]


def edit_distance(text: str, choice: str) -> int:
    """Levenshtein's."""
    row = range(len(choice) + 1)
    for i, here in enumerate(text, 1):
        above, row = row, [i]
        for j, there in enumerate(choice):
            row.append(min(row[-1] + 1, above[j + 1] + 1, above[j] + (here != there)))
    return row[-1]


# How each benchmark reads free text: a function (text, choices) for each of its answer types. Where nothing is
# found, MMMU and ScienceQA officially toss a coin. Here nothing is answered.
BENCHMARKS = {
    # evaluation/extract_answer.py and calculate_score.py: an LLM extracts, then the choice at the
    # smallest edit distance counts. Departures: rules extract, and the nearest choice counts only
    # where a statement is made. Officially it also credits refusals, which a blank picture brings,
    # and is right by luck in 4 of 10 of them: that luck would be counted as accuracy without the
    # picture.
    "mathvista": {"choice": search_nearest, "integer": search_number, "float": search_number,
                  "list": search_maths, "text": search_text},
    # mmmu/utils/eval_utils.py: the last letter in brackets, else the last lone letter, else the
    # last choice whose text occurs; of an open question the tail behind "answer", "is", "so" ...
    # Departures: a claim ("the answer is B") and a letter before its own choice's text go first,
    # and an article is no letter.
    "mmmu": {"choice": search_choice, "open": search_text},
    # tools/evaluate_acc.py, and LLaVA's: a bare letter, or "The answer is X.". Departure: other
    # claims count too.
    "scienceqa": {"choice": search_choice},
    # What follows "the answer is", else the last formula or number. Officially MathVerse and
    # We-Math ask an LLM.
    "mathvision": {"choice": search_choice, "math": search_maths, "integer": search_number,
                   "float": search_number},
    "mathverse": {"choice": search_choice, "math": search_maths, "text": search_text,
                  "open": search_text},
    "wemath": {"choice": search_choice},
}


# the gold


def is_right(answer: str, question: Mapping) -> bool:
    """Whether an answer equals the gold.

    Numbers by MathVista's rules (but 5.7 is not 5, as int() has it there), open questions by
    MMMU's, maths much as Math-Verify has it. A gold that cannot be read as the maths that it
    should be is compared as text.
    """
    kind, golds = question.get("answer_type"), gold_texts(question)
    if kind == "choice":  # another option with the same text is right too
        texts = dict(zip(LETTERS, map(str.split, choices_of(question))))
        return texts[answer] == texts.get(golds[0])
    if kind in ("text", "open"):
        return any(same_text(answer, gold, phrase=kind == "open") for gold in golds)
    gold = unboxed(golds[0])
    if kind == "list" and "[" not in answer and not UNORDERED.search(answer):
        answer = f"[{answer}]"
    precision = question.get("precision")
    known = isinstance(precision, int | float) and precision in range(16)
    if kind == "float" and known and same_number(answer, gold, int(precision)):
        return True
    return same_maths(answer, gold)


def as_text(value) -> str:
    """The text of whatever a field holds; none of what has none."""
    try:
        return "" if value is None else str(value)
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, lists nested 1,000 deep
        return ""


def choices_of(question: Mapping) -> Choices:
    choices = question.get("choices")
    if not isinstance(choices, (list, tuple)):
        return ()
    return tuple(as_text(choice)[:FINAL_CHARACTERS] for choice in choices[:len(LETTERS)])


def unboxed(text: str) -> str:
    """A gold without its boxes; where it has several, they are its answer together."""
    return ", ".join(map(str.strip, BOX.findall(text))) or text


def literal_list(text: str) -> list[str]:
    """The strings or numbers of a list kept as text, Python's or JSON's: read as a literal, never
    evaluated."""
    values = ast.literal_eval(text) if len(text) <= 20_000 else None
    if not isinstance(values, list) or not {*map(type, values)} <= {str, int, float, bool}:
        raise ValueError("no readable list")
    return [str(value) for value in values]


def gold_texts(question: Mapping) -> list[str]:
    """The texts that count as right: an open question's gold may be a list of alternatives."""
    golds = question.get("answer")
    if question.get("answer_type") == "open" and isinstance(golds, str) and golds.startswith("["):
        # else it is a text that begins with a bracket
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            golds = literal_list(golds)
    golds = golds if isinstance(golds, (list, tuple)) else [golds]
    return [as_text(gold)[:FINAL_CHARACTERS] for gold in golds[:100]] or [""]


class Rejected(ValueError):
    """A row that is not taken. The message is the reason, which is counted, and after a colon its
    details."""


def check_gold(question: Mapping):
    """Reject a question for which no answer could be graded right."""
    golds, letters = gold_texts(question), LETTERS[:len(choices_of(question))]
    if not all(map(plain, golds)):
        raise Rejected("gold: the answer is empty")
    if question["answer_type"] == "choice" and golds[0] not in [*letters]:
        raise Rejected(
            f"gold: the answer {golds[0][:40]!r} is not a letter of its {len(letters)} choices")


def reads_as_maths(question: Mapping) -> bool:
    """Whether a gold that should be a number, a list or maths can be read as such; else it is
    compared as text."""
    is_text = question["answer_type"] not in ("integer", "float", "list", "math")
    return is_text or bool(read_measure(unboxed(gold_texts(question)[0]), GOLD_UNIT)[0])


# text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUPERSCRIPT = re.compile("⁻?[⁰¹²³⁴-⁹]+")
MARKS = str.maketrans({"′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
                       **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")})  # without a width
UNORDERED = re.compile(r"\bor\b|;|∪|\\cup|\\\{")
WRAPPED = re.compile(r"\\(?:text(?:bf|it|normal|rm)?|mathrm|mathbf|mbox)\s?\{([^{}\\]*)\}")
WRAPPING = re.compile(r"\\(?:text(?:bf|it|normal|rm)?|mathrm|mathbf|mbox)\s?\{|\\[()\[\],;! ]|[$*\\{}\"°]")
# beside an open answer; a mark or word that lists (, & or) is none
FILLER = (r"(?:[^\w,;/|&+]|\b(?:an?|the|its?|is|are|was|this|that|they|one|answer|final|correct|called|of|in|to|by|be|would|must|type|colou?r)\b){0,99}")
# words, but not mW, CO, pH; nor the Mg of 5 Mg, which is not mg
WORD = re.compile(
    r"(?<![^\W\d_])(?![a-z]+\b)(?!(?:[^\W\d_]|(?!NO\b)[A-Z]{2}|[^\W\d_]{2}(?=\+)|[^\W\d_]*[a-z][A-Z][^\W\d_]*|(?<=\d)[^\W\d_]{2})(?![^\W\d_]))"
    r"[^\W\d_]+")


def unwrapped(text: str) -> str:
    """Text without LaTeX's commands and marks around it: \\text{Na}+ is Na+."""
    return WRAPPING.sub(" ", WRAPPED.sub(r"\1", text))


def has_markup(text: str) -> bool:
    """Whether a text has marks of maths, which its words alone do not tell."""
    return re.search(r"[\\{}^_]", WRAPPED.sub(r"\1", text)) is not None


def raised(text: str) -> str:
    """10⁴ as 10^4; without it, it would become 104."""
    return SUPERSCRIPT.sub(
        lambda found: "^" + unicodedata.normalize("NFKC", found[0]).replace("−", "-"), text)


def plain(text: str) -> str:
    """Text for comparison: words in one case, single spaces, no LaTeX wrapping, no closing
    punctuation.

    Case, points, signs and powers stay where they carry meaning: 5 MW is not 5 mW, .5 not 5,
    10^2 not 102, f' not f.
    """
    text = unwrapped(raised(text.translate(MARKS)))
    text = " ".join(unicodedata.normalize("NFKC", text).split()).strip(" ,;:?").rstrip(".,;:? ")
    text = re.sub("^'(.*)'$", r"\1", text)
    # 5 MW is 5MW, 3 : 1 is 3:1
    text = re.sub(r"(?<=[^\W\d_]{2})!+$|(?<=\d) (?=(?!(?:and|are|is|of|or|to)\b)[A-Za-z]{1,3}\b|:)|(?<=:) (?=\d)", "", text)
    return WORD.sub(lambda word: word[0].casefold(), text)


def same_text(answer: str, gold: str, phrase: bool) -> bool:
    """Equal words or numbers; of an open question, as MMMU has it, numbers to two decimals or a
    phrase that holds the gold.

    Unlike MMMU's, the phrase may not list several things or deny one: naming everything is
    no answer.
    """
    number = re.search(r"\d", gold) and math.isfinite(one_number(read_maths(gold)))
    in_words = re.fullmatch("[A-Za-z]+ [A-Za-z ]+", plain(gold))  # also \triangle ABC
    if number or has_markup(gold) and not in_words:
        return same_maths(answer, gold) or phrase and same_number(answer, gold, 2)
    answer, gold = plain(answer[:FINAL_CHARACTERS]), plain(gold)
    if answer == gold or not gold or not phrase:
        return answer == gold != ""
    words = rf"(?<![\w.+^'-]){re.escape(gold)}(?![\w+^'-]|\.\d)(?:(?<!\bno)|(?! \w))"
    return re.fullmatch(f"{FILLER}{words}{FILLER}", answer) is not None


# choices


@lru_cache(64)
def choice_letters(choices: Choices) -> dict[str, str]:
    """The letter of each text, exact or plain, of equals the first."""
    backwards = [*zip(choices, LETTERS)][::-1]
    letters = {plain(choice): letter for choice, letter in backwards}
    letters.pop("", None)  # of a choice that is marks alone
    return letters | {choice.strip(): letter for choice, letter in backwards}


@lru_cache(64)
def choice_words(choices: Choices) -> re.Pattern:
    """The plain texts as words, the longest first: 5 is not in -5, 3/5 or 4:5, and no answer is not
    the answer no."""
    texts = sorted({plain(choice[:ANSWER_CHARACTERS]) for choice in choices} - {""}, key=len)
    words = "|".join(map(re.escape, texts[::-1])) or "(?!)"
    return re.compile(
        rf"(?<![\w.+/^√-])(?<!\d[:,])(?:{words})(?![\w/^!%']|[.,:]\d|-\w)(?:(?<!\bno)|(?! \w))")


# no unit (43°C), no name (∠A, point A)
LETTER_BEGINS = (r"(?=[A-Z])(?<![A-Za-z0-9'/∠△⊙°])(?<![\d°]\s)(?<!(?i:angle|point)\s)(?<!(?i:angle))"
                 r"(?<!(?i:line|side)\s)(?<!(?i:vertex)\s)")
LETTER_ENDS = r"(?![A-Za-z0-9'’/_])(?!\s?=\s?\d|\s\d)"


def lone_letter(choices: Choices) -> str:
    """Pattern of a choice's letter that stands alone and is no article (A rhombus)."""
    verbs = "is|was|and|or|to|through|vs|versus|then|until|because|since|as|but|for"
    return (
        rf"{LETTER_BEGINS}([A-{LETTERS[len(choices) - 1]}]){LETTER_ENDS}"
        rf"(?:(?<!A)|(?! (?!(?i:{verbs})\b|[A-Z]\b)[A-Za-z0-9]))(?:(?<!I)|(?!\s[A-Za-z]))")


LETTER_FIRST = r"(?:\\\w{4,6}\{|[\s(*]){0,4}(?i:option |choice )?[(*]{0,2}([A-Z])[).:=,}*\s]{1,5}(?:- )?(?=\S)"  # B. or \textbf{(B)}


def bare_choice(text: str, choices: Choices) -> str | None:
    """The choice that a text is, and nothing else: a letter, a choice's text, or both as in "C. A
    to B"."""
    texts, values = choice_letters(choices), dict(zip(LETTERS, choices))
    said = plain(text)
    letter = said.strip("().: ").upper()
    known = texts.get(text.strip()) or texts.get(said)
    both = re.match(LETTER_FIRST, text)
    if letter in values or known:
        return letter if letter in values else known
    if both and both[1] in values:
        rest = text[both.end():]
        if any(same_maths(shown, values[both[1]]) for shown in (rest, rest.removesuffix("}"))):
            return both[1]
    return None


# beside a number it is another: more than 12, 12 thousand, minus 12
CHANGES = re.compile(
    r"\b(?:than|least|most|over|under|above|below|up to|more|less|fewer|minus|plus|negative|times|twice|double|half|root|squared?|cubed?"
    r"|hundreds?|thousands?|millions?|billions?|dozens?|between|before|after|until|figure|page|step"
    rf"|(?:third|quarter|fifth|sixth)s?|{TENS})\b|\d ?(?:to|through|until)\b|(?<![\w/])[<>](?![\w/])|[≤≥~+]")


def read_choice(text: str, choices: Choices) -> str | None:
    """The one choice that an answer names by letter, text or value; None where it names none or
    several, or denies one."""
    if len(text) > ANSWER_CHARACTERS:
        return None
    known = bare_choice(text, choices)
    if known:
        return known
    lettered = {*re.findall(lone_letter(choices), text)}
    if not lettered and read_maths(text):  # 1.8 for \frac{9}{5}; as words, 5 would stand in -5
        named = {letter for letter, choice in zip(LETTERS, choices) if same_maths(text, choice)}
        return named.pop() if len(named) == 1 else None
    words, said = choice_words(choices), plain(text)
    named = lettered | {choice_letters(choices)[name] for name in words.findall(said)}
    rest = words.sub(" ", said)
    if NEGATION.search(rest) or len(named) != 1:  # isn't stable, A is wrong
        return None
    if not lettered and CHANGES.search(rest):  # more than a dozen
        return None
    letter = named.pop()
    if lettered and {*re.findall(f"{LETTER_BEGINS}[B-HJ-Z]{LETTER_ENDS}", rest)} - {letter}:
        return None  # B or E, which is no choice
    return letter


# maths: small, bounded arithmetic instead of a computer algebra system
#
# A text is rewritten to one notation, cut into tokens and read by recursive descent into claims. An
# expression is worth its values at some random places of its letters: expressions are equal where
# these are, whatever their form.

PLACES = 8  # positive, then of either sign, for x is not |x|; the last complex, for ab is not |ab|
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf}
FUNCTIONS = {name: getattr(cmath, name) for name in "exp sin cos tan sinh cosh tanh".split()} | {
    "ln": cmath.log, "log": cmath.log10, "lg": cmath.log10, "abs": abs,
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan}
GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau "
         "upsilon phi chi psi omega").split()
SYMBOLS = str.maketrans("×·⋅∙÷⁄−–（），′’$€£~△", "****//--(),''     ") | str.maketrans({
    "√": r"\sqrt ", "∅": r"\emptyset ", "⩽": "≤", "⩾": "≥", "∞": r"\infty ", "∈": r"\in ", "∠": r"\angle "}
    | {chr(0x3b1 + i): rf"\{name} " for i, name in enumerate(GREEK)})  # 0x3b1: α

# A noun may stand behind a number, or before an equals sign, without changing the value.
DENIED = ("no|not|than|more|less|fewer|half|most|least|above|below|under|over|negative|minus|never|none|wrong|incorrect|false|untrue|impossible|cannot|but|except|"
          "without|twice|thrice|doubled?|tripled?|if|maybe|perhaps|possibly|probably")
NO_NOUN = (f"{DENIED}|{'|'.join(NUMBERS)}|{TENS}|else|otherwise|versus|alternatively|nor|and|or|times|plus|squared|cubed|"
           "halved|tens|dozens?|hundreds?|thousands?|millions?|billions?|trillions?|lakhs?|crores?|kilo|mega|gross|[a-z]+fold|quarters?|halves|thirds?|twelfths|"
           "(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|repeating|(?:higher|lower|greater|larger|smaller|additional|extra|other)(?! [a-z])|upwards|onwards|beyond|minimum|maximum|"
           "max|tops|excluded|excluding|rejected|invalid|fails|nope|wrongly|incorrectly|unlikely|improbable|[abcxyz]{3}|factorial|sqrt|exp|sin|cos|tan|sec|arc[a-z]+")
NOUN = rf"(?!(?i:{NO_NOUN})\b)(?=[A-Za-z]*[aeiou])[A-Za-z][a-z]{{2,}}\b"
POWER = r"(?:\s?\^\s?\{?\s?-?[1-4]\s?\}?)?"
SYMBOL_UNIT = (r"(?:[kMGcdmnµ]?(?:m|g|s|[lL]|W|V|A|J|N|F|C|K|T|Pa|Hz|eV|mol|bar|Ω)|lbs?|oz|ft|in|yd|mi|hrs?|h|min|sec|mph|kph|rad)"
               rf"(?![A-Za-z]){POWER}")
ANY_UNIT = (rf"(?:(?:sq(?:uare)?\.?|cu(?:bic)?\.?)\s)?(?:{SYMBOL_UNIT}(?:\s?[/*\s]\s?{SYMBOL_UNIT}){{0,2}}|{NOUN}(?:\s{NOUN}){{0,3}})")
# A gold's unit must be clear by itself, or marked as text: 2mg may be a product. In an answer 2 h
# is two hours, 2h is not.
CLEAR_UNIT = (rf"(?<=[\d.)}}\]\s])(?:(?:[cdkm]m|kg|m[lL]|[mk]ph|k?m/[sh]|[kM]Hz|[kM]W|kJ|kPa)(?![A-Za-z]){POWER}|{NOUN}(?:\s{NOUN}){{0,3}}|°\s?(?:[CF]\b|\\text\{{\s*[CF]\s*\}})|[^\W\da-zA-Z_]+|"
              rf"(?:\\text\{{\s*{ANY_UNIT}\s*\}}{POWER}\s?/?\s?){{1,2}})")
UNIT_END = rf"{POWER}(?=[\s.]*(?:$|[,)\]∪]))"
GOLD_UNIT = re.compile(CLEAR_UNIT + UNIT_END)
UNIT = re.compile(rf"(?:{CLEAR_UNIT}|(?<=[\d)}}]\s){ANY_UNIT}){UNIT_END}")

# what is one name although it is no single letter: AB = 5, f(x) = 2x, (x, y) = (1, 2), e = 1/2
NAME = r"(?:[A-Z]{2,6}|[A-Za-z]'*\(\w(?:,\s?\w)*\)|\(\s?[a-z](?:,\s?[a-z])+\s?\)|[ei])"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\begin\{(?:[pb]?matrix|array\}\s?\{[clr| ]*)\}", "⟦["), (r"(?:\\\\\s*)?\\end\{(?:[pb]?matrix|array)\}", "]⟧"), (r"\\\\", "],["), ("&", ","),
    (r"\\(angle|triangle)\s?\{([A-Z]{1,5})\}", r"\\\1 \2"), (r"\\!\s?|\\displaystyle|\\(?:left|right)(?![a-z])\.?|\\[bB]igg?[lr]?(?![a-z])|(?:\bm\s?)?\\(?:angle|triangle)(?![a-z])", ""),
    (r"\\(?:q?quad|[;: ()\[\]])|\\,(?!\d{3})", " "),
    (r"\\(?:text(?:bf|it|normal|rm|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol|emph|underline|fbox)\s?\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
    (r"\\text\{(and|or|pi|e|(?:arc)?(?:sin|cos|tan|cot)|ln|log|lg|exp)\}", r" \1 "),
    (r"\\(?:overline|hat|bar)\s?\{([A-Za-z]+)\}", r"\1"), (r"\\(?:overrightarrow|vec)\s?(?:\{([A-Za-z]+)\}|([A-Za-z])\b)", r"⟨\1\2⟩"),
    (r"\\pm(?![a-z])", "±"), (r"\\mp(?![a-z])", "∓"), (r"\*\*", "^"),
    (r"\\(?:[dtcs]|nice)?(frac|binom)(?![a-z])", r"\\\1"), (r"\\(?:cdot|times|ast)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"),
    (r"\\(?:approx|simeq|doteq|in)(?![a-z])|≈", "="), (r"(sin|cos|tan)\s?\^\s?\{?\s?-1\s?\}?", r"arc\1"),
    (r"(?:sec|csc|cot|sinh|cosh|tanh)\s?\^\s?\{?\s?-1\s?\}?", "inverse"),
    (r"\\?log\s?_\s?(?:\{([^{}]*)\}|(\w))", r"\\logarithm{\1\2}\\ln "), (r"\\sqrt\s?\[([^\[\]]*)\]", r"\\root{\1}"), (r"\\?sqrt(?![a-z])", r"\\root(2)"),
    (r"\\sec(?![a-z])", r"\\frac{1}\\cos"), (r"\\csc(?![a-z])", r"\\frac{1}\\sin"), (r"\\cot(?![a-z])", r"\\frac{1}\\tan"), (r"\\neq?(?![a-z])|\\not\s?=|!=", "≠"),
    (r"\\leq?(?:slant|q)?(?![a-z])|<=", "≤"), (r"\\geq?(?:slant|q)?(?![a-z])|>=", "≥"), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"\^\s?\{?\s?\\circ\s?\}?|\\circ(?![a-z])|\\degree|\s?\bdegrees?\b", "°"), (r"\\?%|\s?\b(?:percent|pct)\b", " "),
    (r"\\[lr]?[vV]ert(?![a-z])|\\\|", "|"),
    # thousands: a comma between round or square brackets separates
    (r"(?<![\d.,])\d{1,3}(?:(?:,\d{3}){1,6}(?![\d,])(?![^()\[\]]*?(?:[)\]]|\\\}))|(?:(?:\{,\}|\\,|\s)\d{3}){1,6}(?!\d))",
     lambda found: re.sub(r"\D", "", found[0])),
    (r"(?<=\d)\{,\}(?=\d)", "."), (r"(?<!\d)\.(?=\d)", "0."), (r"_\s?\{(\w)\}", r"_\1"),
    (r"(\d+\.)(\d*)\\overline\s?\{?(\d+)\}?",  # 0.1666...
     lambda found: f"({found[1]}{found[2]}0+{found[3]}/{'9' * len(found[3])}{'0' * len(found[2])})"),
    (r"\\(frac|binom)\s?(\d)\s?(\d)", r"\\\1{\2}{\3}"), (r"!(?=\d)", "!*"),
    (r"(?<![\d.^])(\d+)\s?\\frac\s?\{\s?(\d+)\s?\}\s?\{\s?(\d+)\s?\}", r"(\1+\2/\3)"),  # mixed numbers
    (r"(?<![\d.^])(\d+)\s(\d+)\s?/\s?(\d+)(?!\d)", r"(\1+\2/\3)"),
    (r"\\[{}]|^\s*\{([^{}]*)\}\s*$", r" \1 "),  # a set is its members
    (r"([<>≤≥][^,]*\b)and(\b[^,]*[<>≤≥])", r"\1both\2"),  # an intersection, which is not read
    (r",?\s*\b(?:and|or)\b|;|∪|\\cup(?![a-z])", ","),
    (r"(?i)^\s*(?:(?:about|approximately|around|roughly|exactly|(?:so|thus|therefore|hence),?|(?:the )?(?:final )?answer(?: is|:)|there (?:are|is)|it is)\s)+", ""),
    (rf"(?:^|(?<=,))\s*(?:\\text\{{(?![^{{}}]*\b(?:{DENIED})\b)[^{{}}]*\}}|(?:{NOUN}|(?i:max|min)imum)(?:\s(?!(?:{DENIED})\b)[a-z]+){{0,3}})?\s*=", ""),  # Area = 12
    (rf"(?:^|(?<=,))\s*({NAME})\s?(?=[=<>≤≥])", lambda found: f"⟨{found[1].replace(' ', '')}⟩"))]
BINARY = {  # of two arguments
    "frac": truediv, "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k),
    "root": lambda degree, value: power(value, 1 / degree),
    "logarithm": lambda base, natural: natural / cmath.log(base)}
KNOWN = "|".join(["pi", "infty", *sorted([*BINARY, *FUNCTIONS], key=len, reverse=True)])
TOKEN = re.compile(
    rf"\\?((?:{KNOWN})(?![a-z])|\d{{1,60}}(?:\.(?:\d{{1,60}}|(?!\()))?(?:[eE][-+]?\d{{1,2}}(?![\d.]))?)"
    r"|((?![abcxyz]{3}(?![A-Za-z]))(?=[A-Za-z]*[aeiou])[A-Za-z]{3,})"  # prose, no product of letters
    rf"|\\?((?:(?<=\\)(?:var)?(?i:{'|'.join(GREEK)})(?![a-z])|[A-Z]{{3,}}|[A-Za-z])(?:_(?:\{{\w{{1,9}}\}}|\w))?'*)|⟨([^⟩]*)⟩|(\S)")
BRACKETS = {"(": ")]", "[": "])", "{": "}", "⟦": "⟧", "⌈": "⌉"}  # and what may close them; ⌈ and ⌉ are the bars of |x|
BARS = re.compile(r"\|([^|]*[\w)\]}!°'⌉])\s?\|")
END = "end"  # behind the last token
RELATIONS = {*"=<>≤≥≠"}
ENDS = {END, *",)]}⟧⌉", *RELATIONS}
PLUS, MINUS = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
UPWARDS = str.maketrans(">≥", "<≤")
INTERVALS = {"<<": "(,)", "<≤": "(,]", "≤<": "[,)", "≤≤": "[,]"}


class Letter(tuple):
    """The value of a letter or another name, at each of the PLACES."""
    written: str  # ⟨x⟩


@dataclass
class Group:
    """Several values between brackets: a pair, an interval, or the rows of a matrix."""
    shape: str  # as in (,] or [,,]
    parts: list


@dataclass
class Claim:
    """One thing that an answer says: a value, perhaps named (x = 3, x < 3), or a relation between
    two sides.

    A value is a tuple of numbers, one at each of the PLACES, or a Group.
    """
    values: list            # of 1/3 ≈ 0.33 both; none of x^2 = 4
    sign: str = ""          # =, ≠, < or ≤, also where values follow from what was compared
    difference: tuple = ()  # of the first two sides
    name: tuple = ()        # a Letter


def same_maths(answer: str, gold: str) -> bool:
    """Whether two texts say the same. Where the gold is no maths, the same words or the same notation
    do. A unit may be left out, but not be another."""
    claims, golds = read_measure(answer, UNIT)[0], read_measure(gold, GOLD_UNIT)[0]
    if not golds and not has_markup(gold):
        if plain(answer[:FINAL_CHARACTERS]) == plain(gold) != "":
            return True
    if of_other_unit(answer, gold):
        return False
    if as_written(answer) == as_written(gold) != "":
        return True
    if not all(map(is_constant, golds)):  # a letter that is a factor is no unit: 2 is not 2mg
        claims = read_maths(answer)
    if gold.startswith("(") and len(claims) > len(golds) == 1 and not UNORDERED.search(answer):
        claims = read_maths(f"({answer})")  # 1, 2
    return same_claims(claims, golds)


def as_written(text: str) -> str:
    """In the one notation, without white space beside marks: what is no number or relation, or none
    that can be worked out, is the same where it is written the same."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", rewrite(text))
    text = re.sub(r"\s?\{(\w)\}", r" \1", text)
    return re.sub(r"\s*(\W)\s*", r"\1", text)


@lru_cache(1024)
def read_measure(text: str, units: re.Pattern) -> tuple[list[Claim], set[str]]:
    """What a text claims without the units of its values, and these, as symbols."""
    value = rewrite(text)
    found = [unit[0] for unit in units.finditer(value)] or UNIT_MARK.findall(text)
    return parse(units.sub("", value)), {unit_symbol(unit) for unit in found}


def unit_symbol(unit: str) -> str:
    """degrees is °, and metres is m."""
    unit = re.sub(r"\\text|[{}\s.]", "", unit)
    for name, symbol in UNIT_NAMES:
        unit = re.sub(name, symbol, unit)
    return unit


UNIT_MARK = re.compile(r"°|\\circ|degrees?\b|%|\bpercent\b|\\\$|^\s*\$(?=[^$]*$)|\bdollars?\b|[€£]")  # rewrite() drops them
UNIT_NAMES = (
    (r"\\circ|degrees?", "°"), ("percent", "%"), (r"\\\$|dollars?", "$"),
    ("^(?:square(?!s)|sq(?!u))(.+)", r"\1^2"), ("^cubic(.+)", r"\1^3"), ("milli(?=[mgls])", "m"),
    (r"(?<=m)([sh])\^-1", r"/\1"), (r"per(?=second|s$|hour|h$|minute|day|week|month|year)", "/"), ("mph", "mi/h"), ("kph", "km/h"),
    ("centi(?=m)", "c"), ("kilo(?=[mgw])", "k"), ("met(?:er|re)s?", "m"), ("gram(?:me)?s?", "g"),
    ("lit(?:er|re)s?", "L"), ("seconds?|secs?", "s"), ("minutes?|mins?", "min"),
    ("hours?|hrs?", "h"), ("inch(?:es)?", "in"), ("f(?:ee|oo)t", "ft"), ("miles?", "mi"),
    ("watts?", "W"), ("volts?", "V"), ("newtons?", "N"), ("joules?", "J"), ("(?<=[a-z]{3})s$", ""))


def same_number(answer: str, gold: str, decimals: int) -> bool:
    """Equal when rounded to the gold's decimals, as MathVista has it."""
    value = one_number(read_measure(answer, UNIT)[0])
    number = one_number(read_measure(gold, GOLD_UNIT)[0])
    equal_values = round(value, decimals) == round(number, decimals)
    return equal_values and not of_other_unit(answer, gold)


def of_other_unit(answer: str, gold: str) -> bool:
    """Whether both have units, and others: mW is not MW, 30% is not 30°."""
    units, gold_units = read_measure(answer, UNIT)[1], read_measure(gold, GOLD_UNIT)[1]
    return bool(units and gold_units) and units != gold_units


def one_number(claims) -> float:
    """The one real number that claims are; else nan, which equals nothing."""
    return real_number(claims[0].values[-1]) if len(claims) == 1 and claims[0].values else math.nan


def real_number(value) -> float:
    """What a value is everywhere, where that is one real number; else nan."""
    if isinstance(value, Group) or not is_constant(value) or isinstance(value[0], complex):
        return math.nan
    return float(value[0])


def is_constant(value) -> bool:
    if isinstance(value, Claim):
        return all(map(is_constant, value.values or [value.difference]))
    if isinstance(value, Group):
        return all(map(is_constant, value.parts))
    return len({*value}) == 1


def same_claims(claims, golds) -> bool:
    """Whether each claim is another of the golds, in whatever order; names may be left out where
    there is but one."""
    names = {claim.name for claim in (*claims, *golds) if claim.values}
    if not claims or len(claims) != len(golds) or () in names and len(names) > 2:
        return False
    left = list(golds)
    for claim in claims:
        fits = [gold for gold in left if same_claim(claim, gold)]
        if not fits:
            return False
        left.remove(fits[0])
    return True


def same_claim(claim, gold) -> bool:
    """A name on the left of a plain value may be left out, a function's or a sequence's also of an
    expression (f(x) = 2x is 2x, the line y = 2x is not); another name is another claim."""
    if not claim.values or not gold.values or claim.name and gold.name and claim.name != gold.name:
        return same_relation(claim, gold)
    left_out = gold.name and not claim.name and not is_constant(gold)
    if left_out and not re.search(r"[(_]", gold.name.written):
        return False
    return any(same_value(*pair) for pair in product(claim.values, gold.values))


def same_relation(relation, gold) -> bool:
    """Relations hold in the same places where their differences are a constant factor apart, in an
    inequality a positive one."""
    factors = each(truediv, relation.difference, gold.difference)
    if relation.sign != gold.sign or not factors or factors[0] == 0:  # 1 = 1 holds everywhere
        return False
    if gold.sign in "<≤" and not factors[0].real > 0:
        return False
    return all(equal(factor, factors[0]) for factor in factors)


def same_value(value, gold) -> bool:
    """Expressions equal wherever the gold is real, for a root is asked only where it is defined,
    and at the last place; groups part by part."""
    if isinstance(value, Group) and isinstance(gold, Group):
        return value.shape == gold.shape and all(map(same_value, value.parts, gold.parts))
    if isinstance(value, Group) or isinstance(gold, Group):
        return False
    real = [pair for pair in zip(value, gold) if not isinstance(pair[1], complex)]
    # where the gold is nan, it is too large for a float
    asked = [pair for pair in (*real, (value[-1], gold[-1])) if not cmath.isnan(pair[1])]
    return bool(asked) and all(equal(*pair) for pair in asked)


def equal(value, gold) -> bool:
    """Numbers may differ by half a unit of the sixth decimal, where Math-Verify rounds, so that
    whole ones must be the same."""
    exact = isinstance(value, Fraction) and isinstance(gold, Fraction)
    noise = 0 if exact else 1e-12 * (abs(gold) or 1)  # of floating point: sin(pi) is 1e-16
    return value == gold or abs(value - gold) < 5e-7 * min(1, abs(gold)) + noise


@lru_cache(1024)
def rewrite(text: str) -> str:
    """LaTeX and Unicode in one notation; a text too long to be an answer as none."""
    text = " ".join(raised(text).translate(SYMBOLS).split()) if len(text) <= ANSWER_CHARACTERS else ""
    text = text.removeprefix("**").removesuffix("**")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(" .")


@lru_cache(1024)
def read_maths(text: str) -> list[Claim]:
    """What a text claims, with commas, "and" or "or" between; none where it is no maths."""
    return parse(rewrite(text))


def parse(text: str) -> list[Claim]:
    """The claims of a text in the one notation."""
    # a letter or a number; what else is marked as text is a word, no product of letters
    text = re.sub(r"\\text\{([^{}A-Za-z]*[A-Za-z]?[^{}A-Za-z]*)\}", r" \1 ", text)
    while BARS.search(text):  # the inner ones first
        text = BARS.sub(r"⌈\1⌉", text)
    # of 0, ±2 the 0 stands once; a pair is taken twice as a whole
    items = [text] if re.search(r"[(\[⟦]", text) else text.split(",")
    for place, item in enumerate(items):
        if re.search("[±∓]", item):
            items[place] = f"{item.translate(PLUS)},{item.translate(MINUS)}"
    text = ",".join(items)
    try:
        tokens = [END, *reversed(tokenize(text))]
        claims = read_claims(tokens)
    except (ValueError, LookupError, RecursionError, TypeError):
        # a mark in the place of a number, brackets too deep, arithmetic with a pair
        return []
    return claims if tokens == [END] else []  # more brackets close than open


def tokenize(text: str) -> list[str]:
    """Functions, numbers, names as in ⟨x⟩, and marks."""
    tokens = []
    for known, prose, letter, name, mark in TOKEN.findall(text):
        if prose:
            raise ValueError(f"{prose} is prose, not a product")
        constant = letter if letter in CONSTANTS else ""
        tokens.append(known or constant or mark or f"⟨{letter or name}⟩")
    return tokens


# the parser: `tokens` is a stack, the next one last


def read_claims(tokens) -> list[Claim]:
    """Claims with commas between."""
    claims = [read_claim(tokens)]
    while tokens[-1] == ",":
        tokens.pop()
        claims.append(read_claim(tokens))
    return claims


def read_claim(tokens) -> Claim:
    """A value that may be worked out (x = 1 + 2 = 3, 1/3 ≈ 0.33), a letter's interval, else two
    sides."""
    sides, signs = [read_terms(tokens)], ""
    while tokens[-1] in RELATIONS:
        signs += tokens.pop()
        sides.append(read_terms(tokens))
    if not signs:
        return Claim(sides)
    if signs[0] in ">≥":
        sides, signs = sides[::-1], signs[::-1].translate(UPWARDS)
    letters = [side for side in sides if isinstance(side, Letter)]
    values = [side for side in sides if not isinstance(side, Letter)]
    difference = () if Group in map(type, sides) else each(sub, sides[1], sides[0])
    if len(letters) < 2 and {*signs} == {"="}:
        if all(rounds_to(value, values[-1]) for value in values):
            return Claim([values[0], values[-1]], "=", difference, *letters)
    if len(letters) == 1 and {*signs} <= {*"<≤"} and all(map(is_constant, values)):
        between = interval(sides, signs, sides.index(*letters))
        return Claim([between], signs, difference, *letters)
    if len(sides) > 2 or is_constant(difference):
        raise ValueError("a relation of numbers, as in 17 ≈ 18")
    return Claim([], signs, difference)


def interval(sides, signs, at) -> Group:
    """What a letter, one of the sides, lies between: of x < 2, (-infty, 2)."""
    if at > 1 or len(sides) - at > 2:
        raise ValueError("a relation of numbers, as in x < 2 < 1")
    low, high, opening, closing = everywhere(-math.inf), everywhere(math.inf), "<", "<"
    if at == 1:
        low, opening = sides[0], signs[0]
    if at < len(sides) - 1:
        high, closing = sides[at + 1], signs[at]
    if low[0].real > high[0].real:
        raise ValueError("nothing is between")
    return Group(INTERVALS[opening + closing], [low, high])


def rounds_to(value, rounded) -> bool:
    """Whether a value is another, or is that when rounded to its decimals."""
    short = real_number(rounded)
    decimals = len(str(short).partition(".")[2])
    if same_value(value, rounded):
        return True
    # what is near a whole number is not rounded to it: the root of 168 is not 13
    return not short.is_integer() and round(real_number(value), decimals) == short


def read_terms(tokens, rank=1):
    """What operators of at least `rank` join (precedence climbing). Side by side is a product, but
    not before a number."""
    value = read_atom(tokens)
    while tokens[-1] not in ENDS:
        token = tokens[-1]
        if token[0].isdigit():
            raise ValueError("two numbers side by side")
        own_rank, next_rank, apply = OPERATORS.get(token, OPERATORS["*"])
        if own_rank < rank:
            break
        if token in OPERATORS:
            tokens.pop()
        value = each(apply, value, read_terms(tokens, next_rank))
    return value


def read_atom(tokens):
    """A number, a letter, a bracket or a function, with what stands behind it: degrees do not
    count."""
    token = tokens.pop()
    if token in "+-":
        value = read_terms(tokens, 3)  # -2^2 is -4
        return each(neg, value) if token == "-" else value
    if token[0].isdigit():
        value = everywhere(Fraction(token))
    elif token[0] == "⟨":
        value = variable(token)
    elif token in BRACKETS:
        value = read_brackets(tokens, token)
    elif token in BINARY:
        value = each(BINARY[token], read_atom(tokens), read_atom(tokens))
    elif token in FUNCTIONS:
        value = read_function(tokens, token)
    else:
        value = everywhere(CONSTANTS[token])
    while tokens[-1] in "°!":
        if tokens.pop() == "!":
            value = each(factorial, value)
    return value


def read_brackets(tokens, opening):
    """The value between brackets or bars; several values as a group."""
    claims, closing = read_claims(tokens), tokens.pop()
    if closing not in BRACKETS[opening] or any(claim.name for claim in claims):
        raise ValueError("unbalanced brackets, or a relation between them")
    parts = [claim.values[0] for claim in claims]
    value = parts[0] if len(parts) == 1 else Group(opening + "," * (len(parts) - 1) + closing, parts)
    return each(abs, value) if opening == "⌈" else value


def read_function(tokens, name):
    """sin x or sin^2 x; an angle in degrees is taken as such."""
    exponent = everywhere(Fraction(1))
    if tokens[-1] == "^":
        tokens.pop()
        exponent = read_atom(tokens)
    degrees = tokens.count("°")
    value = read_argument(tokens)
    if tokens.count("°") < degrees:
        value = each(mul, value, everywhere(math.pi / 180))
    return each(power, each(FUNCTIONS[name], value), exponent)


def read_argument(tokens):
    """What brackets hold, else factors side by side: the 2x of sin 2x cos x."""
    if tokens[-1] in BRACKETS:
        return read_atom(tokens)
    value = read_terms(tokens, 3)
    while tokens[-1][0] == "⟨" or tokens[-1] in ("pi", "frac"):
        value = each(mul, value, read_terms(tokens, 3))
    return value


# arithmetic at the places


@lru_cache(256)
def variable(name: str) -> Letter:
    """A letter's values at the PLACES, independent of every other letter's."""
    draw = random.Random(name)
    first, *others = [draw.uniform(-2.7, 2.7) for _ in range(PLACES - 1)]
    turned = complex(draw.uniform(0.8, 1.2), draw.uniform(0.01, 0.05))
    letter = Letter([abs(first), *others, turned])
    letter.written = name
    return letter


def everywhere(number) -> tuple:
    return (number,) * PLACES


def each(apply, *values) -> tuple:
    """An operation at each of the places."""
    return tuple(at_place(apply, *numbers) for numbers in zip(*values))


def at_place(apply, *numbers):
    """The result at one place, real where it is; nan where there is none, or one that comparing
    could overflow: others remain."""
    try:
        result = apply(*numbers)
        size = abs(result)
    except (ArithmeticError, ValueError):
        return math.nan
    if 1e-90 < size < 1e90 or size in (0, math.inf):
        # no -0j, which would take the other branch of a root
        return result if result.imag else result.real
    return math.nan


def power(base, exponent):
    """Exact where numbers stay small, else in floating point, where what is huge overflows at once.
    The cube root of -8 is -2."""
    odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1
    if odd_root and not isinstance(base, complex) and base < 0:
        return (-1) ** exponent.numerator * power(-base, exponent)
    if isinstance(base, Fraction):
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if abs(exponent) * bits > 1024:
            base = complex(base)
    return base ** exponent


def factorial(value) -> Fraction:
    if value not in range(51):
        raise ValueError("no small whole number")
    return Fraction(math.factorial(int(value)))


# each with its rank, and that of what stands behind it
OPERATORS = {"+": (1, 2, add), "-": (1, 2, sub), "*": (2, 3, mul), "/": (2, 3, truediv),
             "^": (3, 3, power)}


# The embedded world: pictures of shapes, and questions whose need for the picture is known
#
# A scene is what its nine cells hold. A question is a family and the words that were drawn for it;
# truth() answers it on any scene, so a picture can be edited and the right answer is known again.

PICTURE_SIDE = 84  # pixels: a 3 x 3 grid of cells of 28 x 28, one image token each
COLOURS = {"red": (214, 48, 49), "green": (0, 160, 90), "blue": (36, 90, 220),
           "yellow": (240, 190, 20)}
KINDS = ("circle", "square", "triangle")
EMPTY = ("", "")  # else a cell holds (kind, colour)
CONTENTS = [EMPTY, *product(KINDS, COLOURS)]
COUNTS = (0, 1, 2, 3, 4)  # of a kind; skewed, so that always saying 2 is right 4 times in 10
COUNT_WEIGHTS = (0.1, 0.2, 0.4, 0.2, 0.1)
WORLD_SIZE = {"train": 960, "test": 320}


def draw_scene(rng):
    """What the nine cells hold, row by row, at most eight shapes; and how they look: the ground's
    colour, then for each cell its shape's centre and half its size, in pixels."""
    counts = [0]
    while not 0 < sum(counts) < 9:  # an empty picture would be its own blank
        counts = rng.choices(COUNTS, COUNT_WEIGHTS, k=len(KINDS))
    cells = []
    for kind, n in zip(KINDS, counts):
        for _ in range(n):
            cells.append((kind, rng.choice(list(COLOURS))))
    cells += [EMPTY] * (9 - len(cells))
    rng.shuffle(cells)
    ground = tuple(rng.randint(100, 140) for _ in range(3))
    places = [(x + rng.randint(-2, 2), y + rng.randint(-2, 2), rng.randint(7, 10))
              for y, x in product((14, 42, 70), repeat=2)]
    return cells, (ground, places)


def paint(cells, look):
    """The picture of these cells; of edited ones too, in the same places."""
    ground, places = look
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), ground)
    draw = ImageDraw.Draw(picture)
    for (kind, colour), (x, y, r) in zip(cells, places):
        box = x - r, y - r, x + r, y + r
        if kind == "circle":
            draw.ellipse(box, COLOURS[colour])
        elif kind == "square":
            draw.rectangle(box, COLOURS[colour])
        elif kind == "triangle":
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], COLOURS[colour])
    return picture


def number_of(kind, cells):
    return sum(held == kind for held, _ in cells)


# What a question is about: words drawn for a scene, with what there is to see of them


def one_kind(cells, rng):
    kind = rng.choice(KINDS)
    return {"kind": kind, "n": number_of(kind, cells), "extra": 0}


def single_shape(cells, rng):
    single = [cell for cell in cells if cell != EMPTY and number_of(cell[0], cells) == 1]
    kind, colour = rng.choice(single) if single else ("circle", "red")
    return {"kind": kind, "colour": colour}


def two_kinds(cells, rng):
    one, two = rng.sample(KINDS, 2)
    a, b = number_of(one, cells), number_of(two, cells)
    if a != b and (a > b) != (rng.random() < 0.7):  # skewed: yes is right 7 times in 10
        one, two, a, b = two, one, b, a
    return {"one": one, "two": two, "a": a, "b": b}


def two_numbers(cells, rng):
    return {"name": rng.choice(("Ann", "Ben", "Eva", "Tom")),
            "thing": rng.choice(("cards", "books", "keys", "pens", "cups", "hats")),
            "a": rng.randint(1, 9), "b": rng.randint(1, 9)}


def kind_and_number(cells, rng):
    return one_kind(cells, rng) | {"extra": rng.randint(1, 5)}


@dataclass(frozen=True)
class Family:
    """A kind of question, and what is said about it; {answer} is the right one, {word} in words.

    The warm start tends to answer an order in prose, without digits, tags or box, so that the
    embedded base, as real ones do, loses some answers to their form alone.
    """
    draw: Callable     # (cells, rng) -> the words of a question
    answer_type: str
    needs_image: bool
    guess: Callable    # rng -> an answer by someone who never looks
    question: str
    order: str         # the same question, as an order
    reasoning: str
    prose: str


WORLD = {
    "count": Family(
        one_kind, "integer", True, lambda rng: rng.choices(COUNTS, COUNT_WEIGHTS)[0],
        "How many {kind}s are there?", "Count the {kind}s.",
        "I see: {kind}s {n}.", "There are {word}."),
    "colour": Family(
        single_shape, "choice", True, lambda rng: rng.choice("ABCD"),
        "What colour is the {kind}?", "Name the colour of the {kind}.",
        "I see: {kind} {colour}, so {answer}.", "It is the colour of the {kind}."),
    "more": Family(
        two_kinds, "text", True, lambda rng: rng.choices(("yes", "no"), (7, 3))[0],
        "Are there more {one}s than {two}s?", "Say yes or no: more {one}s than {two}s.",
        "I see: {one}s {a}, {two}s {b}.", "I see {one}s and {two}s."),
    "sum": Family(
        two_numbers, "integer", False, lambda rng: rng.randint(2, 18),
        "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
        "{name} has {a} {thing} and gets {b} more. Give the number of {thing}.",
        "{a} and {b} is {answer}.", "{name} has {word} {thing}."),
    "both": Family(
        kind_and_number, "integer", True, lambda rng: rng.randint(1, 9),
        "Another card has {extra} {kind}s. How many {kind}s are on both?",
        "Another card has {extra} {kind}s. Count the {kind}s on both.",
        "I see: {kind}s {n}. {n} and {extra} is {answer}.", "There are {word}."),
}


def truth(family, words, cells):
    """The right answer on a scene, None where the question cannot be asked about it."""
    if family == "sum":
        return words["a"] + words["b"]
    if family == "more":
        a, b = number_of(words["one"], cells), number_of(words["two"], cells)
        if a == b:
            return None
        return "yes" if a > b else "no"
    n = number_of(words["kind"], cells)
    if family == "colour":
        colour = dict(cells).get(words["kind"])
        return LETTERS[list(COLOURS).index(colour)] if n == 1 else None
    return n + words["extra"]


def ask(family, cells, rng):
    """A question of a family about a scene: its record without picture, ways to answer it in the
    warm start with the name of one as its style, and its words. None where there is no answer."""
    asked = WORLD[family]
    words = asked.draw(cells, rng)
    gold = truth(family, words, cells)
    if gold is None:
        return None
    as_order = rng.random() < 0.33
    choices = list(COLOURS) if family == "colour" else []
    said = words | {"answer": gold, "word": NUMBERS[gold] if isinstance(gold, int) else gold}
    text = (asked.order if as_order else asked.question).format(**said)
    answers = {"reasoned": f"<think>{asked.reasoning.format(**said)}</think>\\boxed{{{gold}}}",
               "guessed": f"<think>I guess.</think>\\boxed{{{asked.guess(rng)}}}",
               "prose": asked.prose.format(**said)}
    weights = (0.25, 0.1, 0.65) if as_order else (0.35, 0.5, 0.15)
    answers["style"] = rng.choices(("reasoned", "guessed", "prose"), weights)[0]
    question = {"problem": "<image>" + with_choices(text, choices), "answer": str(gold),
                "answer_type": asked.answer_type, "choices": choices, "group": family,
                "needs_image": asked.needs_image, "source": "shapes"}
    return question, answers, words


def shapes_world(seed: int, limit: int | None) -> Iterator[Question]:
    """Questions of the families in turn, each with its `scene`: words, cells and look.

    Train and test share none. Two are the same if text and picture are, and where the text
    suffices, if the text is.
    """
    rng, seen = random.Random(f"shapes|{seed}"), set()
    for split, size in WORLD_SIZE.items():
        made = 0
        while made < min(size, limit or size):
            cells, look = draw_scene(rng)
            asked = ask(list(WORLD)[made % len(WORLD)], cells, rng)
            if asked is None:
                continue
            question, _, words = asked
            picture = paint(cells, look)
            key = question["problem"], picture.tobytes() if question["needs_image"] else None
            if key in seen:
                continue
            seen.add(key)
            yield question | {"id": f"shapes/{split}-{made:04d}", "split": split,
                              "images": [picture], "scene": (words, cells, look)}
            made += 1


def counterfactuals(seed: int, limit: int | None, changes: bool) -> dict[str, Question]:
    """id -> the question of `shapes_world` about its own picture after one edit, which changes the
    answer or does not, with the answer that is right then; where there is such an edit."""
    found = {}
    for question in shapes_world(seed, limit):
        family, (words, cells, look) = question["group"], question["scene"]
        rng = random.Random(f"{seed}|{question['id']}|{changes}")
        edited = edit_scene(family, words, cells, rng, changes)
        if edited:
            answer = str(truth(family, words, edited))
            found[question["id"]] = question | {"images": [paint(edited, look)], "answer": answer}
    return found


def edit_scene(family, words, cells, rng, changes):
    """The scene after one edit: a shape added, taken away, recoloured or replaced.

    None: there is no such edit that leaves a scene as others are, and the question an answer.
    """
    before = truth(family, words, cells)
    edits = [edit for edit in product(range(9), CONTENTS) if edit[1] != cells[edit[0]]]
    for cell, new in rng.sample(edits, len(edits)):
        edited = cells[:cell] + [new] + cells[cell + 1:]
        after = truth(family, words, edited)
        usual = all(number_of(kind, edited) in COUNTS for kind in KINDS)
        if usual and edited != [EMPTY] * 9 and after is not None and (after != before) == changes:
            return edited
    return None


# The embedded model: a real Qwen2.5-VL of 1.7 million parameters, warm-started on shapes
#
# First the vision tower learns what the cells hold; then, on its frozen features, the language
# model learns to answer. It ends with a mixture of styles that leaves room for reinforcement.

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (  # of Qwen's kind; a message's content is text, or a list of parts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WARM_START = {"scenes": 2400, "blanks": 200, "vision_steps": 40, "first_steps": 300,
              "reasoned_steps": 450, "styled_steps": 150, "batch": 32, "learning_rate": 2e-3}


def make_embedded_model(folder: Path, seed: int, max_pixels: int):
    """data/model/: the model as save_pretrained writes it, loaded by every later stage like any."""
    fix_arithmetic(2)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": max_pixels})
    loss = warm_start(model, tokenizer, image_processor, seed)
    print(f"embedded model: last loss {loss:.3f} nats per token")
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)


def make_tokenizer(seed: int):
    """A byte-level BPE of Qwen's kind, learnt from the world's own texts."""
    rng, texts = random.Random(f"tokenizer|{seed}"), ["user\nassistant\n"]
    for _ in range(3000):
        asked = ask(rng.choice(list(WORLD)), draw_scene(rng)[0], rng)
        if asked:
            question, answers, _ = asked
            texts.append(question["problem"].removeprefix("<image>") + "\n" + INSTRUCTION)
            texts += [answers["reasoned"], answers[answers["style"]]]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, 512, show_progress=False, new_special_tokens=SPECIAL_TOKENS)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    """The same class as the 3B, four layers deep. Widths are multiples of 64, as NF4 on CPU asks."""
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text = dict(
        vocab_size=576, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.06, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"],
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]})
    vision = dict(
        depth=2, hidden_size=128, num_heads=4, intermediate_size=256, out_hidden_size=128,
        initializer_range=0.06, fullatt_block_indexes=[0, 1])
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"]))


def warm_start(model, tokenizer, image_processor, seed):
    """Plain supervised learning on the world; returns the last loss, nats per response token."""
    cells, pictures = warm_pictures(seed)
    rng, patches = random.Random(f"order|{seed}"), []
    for start in range(0, len(pictures), 200):  # few at a time, in half precision: 200 MB, not 1 GB
        seen = image_processor(pictures[start:start + 200], return_tensors="pt")
        grid = seen["image_grid_thw"][:1]
        patches.append(seen["pixel_values"].half().unflatten(0, (-1, int(grid.prod()))))
    features = teach_tower(model, torch.cat(patches), grid, cells, rng)

    def loss(step):
        return response_loss(model, tokenizer, features, grid, warm_rows(cells, step, rng))

    steps = [WARM_START[f"{phase}_steps"] for phase in ("first", "reasoned", "styled")]
    language = list(model.model.language_model.parameters())
    return optimise(language, sum(steps), loss, "language model")


def warm_pictures(seed):
    """What the cells of each picture hold, and the pictures: scenes first, then blank ones, where
    nothing is in the cells, and noise."""
    rng = random.Random(f"warm start|{seed}")
    scenes = [draw_scene(rng) for _ in range(WARM_START["scenes"])]
    cells, pictures = [cells for cells, _ in scenes], [paint(*scene) for scene in scenes]
    size = (PICTURE_SIDE, PICTURE_SIDE)
    for _ in range(WARM_START["blanks"]):
        picture = Image.new("RGB", size, tuple(rng.randint(80, 170) for _ in range(3)))
        if rng.random() >= 0.7:
            picture = Image.frombytes("RGB", size, rng.randbytes(PICTURE_SIDE * PICTURE_SIDE * 3))
        cells.append([EMPTY] * 9)
        pictures.append(picture)
    return cells, pictures


def teach_tower(model, patches, grid, cells, rng):
    """The vision tower learns what each cell holds, read by a linear layer that is thrown away.

    patches: (pictures, patches of each, pixels of a patch). grid: (1, 3) in patches. Returns the
    features of all pictures, (pictures, 9, hidden): from here on the tower is frozen, as in stage
    3, and the language model learns from features that are computed once.
    """
    held = torch.tensor([CONTENTS.index(cell) for cell in chain.from_iterable(cells)]).view(-1, 9)
    reader = torch.nn.Linear(model.config.text_config.hidden_size, len(CONTENTS))

    def features(some):
        seen = model.model.visual(patches[some].flatten(0, 1).float(), grid.expand(len(some), -1))
        return seen.pooler_output.unflatten(0, (-1, 9))

    def loss(step):
        some = rng.choices(range(len(cells)), k=2 * WARM_START["batch"])
        read = reader(features(some))  # (pictures, 9, contents)
        return torch.nn.functional.cross_entropy(read.flatten(0, 1), held[some].flatten())

    optimise([*model.model.visual.parameters(), *reader.parameters()], WARM_START["vision_steps"],
             loss, "vision tower")
    with torch.no_grad():
        return torch.cat([features(some) for some in torch.arange(len(cells)).split(64)])


def warm_rows(cells, step, rng):
    """(number of a picture, question, response) for a step: sight, then reasoning, then styles.

    Any pretrained model has met pictures that say nothing: half the questions that the text answers
    stand on one, and 15% of the others, then with the answer that a scene now hidden had. Without
    these, training on blank pictures could only break the model.
    """
    first = step < WARM_START["first_steps"]
    styled = step >= WARM_START["first_steps"] + WARM_START["reasoned_steps"]
    families = ("count", "count", "colour") if first else list(WORLD)
    scenes, rows = len(cells) - WARM_START["blanks"], []
    while len(rows) < WARM_START["batch"]:
        picture = rng.randrange(scenes)
        asked = ask(rng.choice(families), cells[picture], rng)
        if asked is None:
            continue
        question, answers, _ = asked
        if not first and rng.random() < (0.15 if question["needs_image"] else 0.5):
            picture = rng.randrange(scenes, len(cells))
        rows.append((picture, question, answers[answers["style"] if styled else "reasoned"]))
    return rows


def response_loss(model, tokenizer, features, grid, rows):
    """Cross-entropy over the tokens of the responses; rows as `warm_rows` makes them.

    features: (pictures, 9, hidden). grid: (1, 3), the same for all pictures.
    """
    shown, ids, targets = [], [], []
    for picture, question, response in rows:
        prompt = tokenize_prompt(question["problem"], [9], tokenizer)
        answer = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        shown.append(features[picture])
        ids.append(torch.tensor(prompt + answer))
        targets.append(torch.tensor([-100] * len(prompt) + answer))
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, L)
    targets = pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:]  # (B, L - 1)
    is_image = ids == model.config.image_token_id
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid.expand(len(rows), -1))
    seen = SimpleNamespace(pooler_output=shown, deepstack_features=[])
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False,
                         mm_encoder_outputs={"image": seen}).last_hidden_state
    keep = targets != -100  # logits only where a target is
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][keep]), targets[keep])


def optimise(parameters, steps, loss_of_step, name):
    """AdamW with a short warm-up and a linear decay to a fifth; returns the last loss."""
    optimizer = torch.optim.AdamW(
        parameters, lr=WARM_START["learning_rate"], weight_decay=0.01, betas=(0.9, 0.99),
        fused=True)  # the other forms take a square root that differs between processors
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 40) * (1 - 0.8 * step / steps))
    for step in tqdm(range(steps), desc=name, disable=None):
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


# Below: the machine room. You can fork this kit without reading on.


# Rows of a dataset, from anywhere. What is read otherwise than it is meant (an encoding, a single
# backslash) would train or score the wrong question without a sign, so such a row is rejected.

MOST_CHARACTERS = 1_000_000  # of a text in a row, far beyond any prompt: it is not even looked at
CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f]|\f(?=[a-z])")  # \f: read from "\frac"
UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is no text in the file's encoding
# In JSON "\frac" is a form feed and "rac", "\theta" a tab and "heta", "\neq" a line break and "eq":
# only a doubled backslash is one. \f, \r and \b before a letter are never meant; \n and \t may be,
# so there the names of LaTeX decide; the rest are no JSON.
ONE_BACKSLASH = re.compile(
    r"(?<!\\)(?:\\\\)*\\([bfr][A-Za-z]+"
    r"|n(?:abla|atural|cong|earrow|eq|exists|geq|leq|mid|ot|otin|prec|sim|subseteq|u"
    r"|warrow|ewline)(?![A-Za-z])|n(?:e|eg|i)(?![A-Za-z.):])"
    r"|n(?:parallel|shortparallel|gtr|subset[a-z]*|supset[a-z]+|triangle[a-z]+|[vV][dD]ash"
    r"|(?:left|right)arrow)(?![A-Za-z])"
    r"|t[a-z]+\s?\{|t(?:extdegree|riangle[a-z]+|hick[a-z]+|wohead[a-z]+)(?![A-Za-z])"
    r"|t(?:an|anh|au|ext|ext(?:bf|it|rm|sf|tt|style)|frac|heta|herefore|hinspace|ilde|imes|o|op"
    r"|riangle|riangleq)(?![A-Za-z])"
    r"|u(?![0-9A-Fa-f]{4})[A-Za-z]*|[AC-Zac-eg-mo-qsv-z][A-Za-z]*|[(){}[\],;:!%$&#_ ^|])")


def read_rows(name, path, split) -> Iterator[tuple[dict, Mapping | str]]:
    """(source, file and number, row) of a split, from the hub or from `path`; a row is a mapping
    with the converter's columns, or a line of JSON. One is in memory at a time."""
    source = SOURCES.get(name, OWN)
    split = getattr(source, split)
    tables = local_files(name, split, path) if path else hub_tables(name, source, split)
    for file, table in tables.items():
        with reading(file, "get it again"):
            if isinstance(table, Dataset):
                wanted = wanted_columns(file, table.column_names, source)
                rows = rows_of(table.select_columns(wanted).with_format("arrow").iter(1))
            elif table.suffix == ".jsonl":
                rows = read_lines(table)
            else:
                table = pq.ParquetFile(table)
                wanted = wanted_columns(file, table.schema_arrow.names, source)
                rows = rows_of(table.iter_batches(1, columns=wanted))
            for number, row in enumerate(rows, 1):
                if row:  # no empty line
                    yield {"source": name, "file": file, "row": number}, row


def rows_of(batches):
    for batch in batches:
        yield from batch.to_pylist()


def hub_tables(name, source, split):
    """Name -> table, for each configuration of a hub dataset that is wanted."""
    reach_hub()
    try:
        every = source.config == "*"
        configs = get_dataset_config_names(source.hub) if every else [source.config]
        return {f"{source.hub}/{config or 'default'}": load_dataset(source.hub, config, split=split)
                for config in configs}
    except Exception as error:  # no network, a changed layout: the hub's errors share no class
        raise UserError(f"source {name} could not be loaded from the hub ({source.hub}, "
                        f"{type(error).__name__}): give a local copy with --local {name}=PATH"
                        ) from error


SPLIT_NAME = re.compile("(testmini_text_only|testmini|test|train|validation|val|dev)[-_.]")


def local_files(name, split, path):
    """Name -> file: `path` itself, its questions.jsonl, or its parquets but for those that are
    named after another split."""
    files = [file for file in (path, path / "questions.jsonl") if file.is_file()][:1]
    if not files:
        for file in sorted(path.rglob("*.parquet")):
            named = SPLIT_NAME.match(file.name)
            if file.is_file() and (named is None or named[1] == split):
                files.append(file)
    if not files:
        raise UserError(f"--local {name}={path}: that folder has no parquet of split {split} and "
                        "no questions.jsonl")
    return {str(file): file for file in files}


def wanted_columns(file, columns, source):
    """Those that the source's converter reads; a sentence where it needs one that is not there."""
    arguments = signature(source.convert).parameters
    missing = [name for name, argument in arguments.items()
               if argument.default is Parameter.empty and name not in columns]
    if missing:
        raise UserError(f"{file} lacks the columns {', '.join(missing)}: give a file that has them")
    return [name for name in arguments if name in columns]


def read_lines(file):
    """Lines of a text file: UTF-16 where its first bytes say so, UTF-8 where it is that throughout.

    Else it is of another encoding, in which a line may look like UTF-8 by chance, as a lone \\u56fe
    in GBK does: then ASCII, and a byte that is none stays marked, for `parse_line` to reject.
    """
    raw = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if utf16 else "utf-8")
    except UnicodeDecodeError:
        text = raw.decode("ascii", "surrogateescape")
    del raw  # a file may be as large as the memory for it
    for line in re.split("\r\n|\r|\n", text):
        yield line.strip()


def parse_line(line):
    """A line of JSON as a row, or Rejected where it would be read as something else than meant."""
    if UNDECODED.search(line):
        raise Rejected("not UTF-8: save the file as UTF-8")
    if latex := ONE_BACKSLASH.search(line):
        name = latex[1][:20]
        raise Rejected(f"backslash: JSON reads \\{name} as no LaTeX, double it: \\\\{name}; behind "
                       "a line break or tab that is meant put a space")
    return json.loads(line)


@lru_cache
def reach_hub():
    """Without a connection only the cache counts: the hub's own library would try again for half a
    minute at each file."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the network, a proxy or a setting says
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


# Pictures. A picture file is foreign input: its size is known before it is decoded, its path stays
# in the source's folder, and no format is read whose decoder starts a program.

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, which does
MOST_PIXELS = 64_000_000  # of a picture file; MathVista's largest has 18.3 million


def open_picture(raw: Mapping | str, folder: Path | None) -> Image.Image:
    """Decode a picture of unknown origin, in the row ({"bytes", "path"}) or in a file of the
    source's own folder; raises Rejected with the reason."""
    try:
        with Image.open(picture_file(raw, folder), formats=PICTURE_FORMATS) as picture:
            short, long = sorted(picture.size)
            if short * long > MOST_PIXELS or long > 200 * short:  # the processor's highest ratio
                raise Rejected(f"picture refused: {picture.width} x {picture.height} pixels")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode[0] in "IF":
                picture = eight_bits(picture)
            if picture.has_transparency_data:  # as on paper: what is transparent shows white
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except Rejected:
        raise
    except Exception as error:  # damaged files make the decoders raise anything
        raise Rejected(f"picture unreadable: {type(error).__name__}") from error


def picture_file(raw, folder):
    """What holds a picture: the row's own bytes, or a file that lies within the source's folder."""
    if isinstance(raw, dict):
        if raw["bytes"] is not None:
            return io.BytesIO(raw["bytes"])
        raw = raw["path"]
    file = (folder / raw).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise Rejected("picture refused: its path leaves the source's folder")
    if not file.is_file():
        raise Rejected("picture missing: no such file")
    return file


def eight_bits(picture):
    """Grey of more than 8 bits, or in floats, as bright as its own scale says: Pillow would clip."""
    values = np.asarray(picture, np.float32)
    highest = values.max()
    if not math.isfinite(highest):
        raise Rejected("picture unreadable: its brightness is no number")
    white = next(scale for scale in (1, 255, 65535, highest) if scale >= highest)
    return Image.fromarray((values.clip(0) * (255 / white)).astype(np.uint8))


def fit(picture: Image.Image, image_processor) -> Image.Image:
    """Scale a picture above the pixel budget to the size that the image processor chooses, its
    filter included.

    Then the processor finds nothing left to resize. Smaller pictures stay.
    """
    side = image_processor.patch_size * image_processor.merge_size
    smallest, budget = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    width, height = picture.size
    down, across = smart_resize(height, width, side, smallest, budget)
    if max(width * height, across * down) <= budget:
        return picture
    # once; again only for strips, left above the budget as no side goes below a patch
    return fit(picture.resize((across, down), Image.Resampling.BICUBIC), image_processor)


def difference_hash(picture) -> np.ndarray:
    """256 bits, (16, 16): whether brightness falls, by more than noise, from each cell of a 17 x 16
    grid to the next one in its row."""
    cells = picture.convert("L").resize((17, 16), Image.Resampling.BOX)
    cells = np.asarray(cells).astype(int)  # (16, 17)
    return cells[:, :-1] > cells[:, 1:] + 2


def alike(hashes, others) -> bool:
    """Whether pictures look alike, pair by pair: they differ in a quarter, at most, of the bits
    that are set in the one with fewer.

    Relative, for a sparse drawing sets few. Saved again as JPEG, or at half its size, a picture is
    like itself; so are drawings that differ in a label alone.
    """
    if len(hashes) != len(others):
        return False
    return all(4 * (one != two).sum() <= min(one.sum(), two.sum())
               for one, two in zip(hashes, others))


def stratified(ids: Sequence[str], groups: Iterable[str | None], limit: int | None) -> list[int]:
    """Numbers of `limit` questions in which each group has its share; in a group the hashes of ids
    decide, on every machine alike."""
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in ids]
    table = pd.DataFrame({"group": list(groups), "hash": hashes}).sort_values("hash")
    members = table.groupby("group", dropna=False)["hash"]
    table["share"] = (members.cumcount() + 0.5) / members.transform("size")
    return sorted(table.sort_values(["share", "hash"]).index[:limit])


# The model's files: which they are, that they are whole, and that nobody changed them


def load_model_parts(model, max_pixels):
    """Tokenizer and image processor, if the model is one of the families that the kit trains."""
    with loading(model):
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        tokenizer, image_processor = load_processors(model, max_pixels)
        side = int(image_processor.patch_size) * image_processor.merge_size
        image_processor(Image.new("RGB", (side, side)))  # it works
    if kind not in FAMILIES:
        raise UserError(f"{model} is a {kind} model: this kit trains {', '.join(FAMILIES)}")
    try:
        prompt = tokenizer.decode(tokenize_prompt("<image>", [1], tokenizer))
    except Exception:  # no template, or a broken one
        prompt = ""
    if PICTURE not in prompt or INSTRUCTION not in prompt:
        raise UserError(f"{model} has no chat template for pictures or no whole tokenizer: copy "
                        "chat_template.jinja, tokenizer.json and tokenizer_config.json of the "
                        "published model there")
    if max_pixels < side**2:
        raise UserError(f"--max_pixels {max_pixels} is less than one image token: choose at least "
                        f"{side**2}")
    return tokenizer, image_processor


@contextmanager
def loading(model):
    """The work on a model's files, of a folder or the hub: what they raise becomes a sentence."""
    if not Path(model).is_dir():
        reach_hub()
    try:
        yield
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"model {model} could not be loaded from the hub or a folder "
                        f"({type(error).__name__}): give a whole copy with --model FOLDER") from error


def hash_model(data, model):
    """What identifies a model and its processors: file, relative to `data` where it lies there, ->
    sha256; of a hub model, name -> commit."""
    folder = Path(model).resolve()
    if not folder.is_dir():
        with loading(model):
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return {f"hub:{model}": config._commit_hash or "unknown"}
    kinds = (".safetensors", ".json", ".jinja", ".txt")
    files = [file for file in sorted(folder.iterdir())
             if file.suffix in kinds and file.name != RECIPE]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{folder} has no weights as .safetensors, and others can hold code: save "
                        "them so with save_pretrained")
    for file in weights:
        with loading(str(folder)), safe_open(file, "np"):
            pass  # its header fits its length
    within = data.resolve().as_posix() + "/"
    return {file.as_posix().removeprefix(within): sha256(file) for file in files}


def model_path(data: Path, study: Mapping, weights: bool = True) -> str:
    """Where the study's model is: in the data folder, in a folder or in the hub's cache; stops if
    it is not the one recorded. Without `weights`: its config and processors alone."""
    model, files = study["model"], study["model_files"]
    wanted = ["*.json", "*.jinja", "*.txt"]
    if weights:
        wanted.append("*.safetensors")
    else:
        files = {name: digest for name, digest in files.items() if not name.endswith(".safetensors")}
    if commit := files.get(f"hub:{model}"):
        with loading(model):  # as it was, whatever the hub has now
            return huggingface_hub.snapshot_download(model, revision=commit, allow_patterns=wanted)
    check_fresh(data, data / "study.json", files, "run 01_prepare.py again")
    return str(data / "model") if model == "embedded" else model


RECIPE = "made_from.json"  # beside the embedded model


def embedded_model(data, seed, max_pixels):
    """The folder of the embedded model, made unless it was by this very recipe: seed, pixels,
    packages and code."""
    folder = data / "model"
    recipe = {"seed": seed, "max_pixels": max_pixels, "versions": versions(),
              "code": sha256(Path(__file__))}
    if (folder / RECIPE).exists() and read_jsonl(folder / RECIPE) == [recipe]:
        print(f"{folder}: up to date")
        return str(folder)
    print(f"{folder}: learning for three minutes, and again after a change of this file, --seed, "
          "--max_pixels or packages", flush=True)
    with replacing(folder) as part:
        make_embedded_model(part, seed, max_pixels)
        (part / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def versions() -> dict[str, str]:
    """Of the packages that decide what a stage computes."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "pillow")
    return {name: version(name) for name in names}


# Files: an artifact exists whole or not at all, says what it was made from, and is checked before
# it is read. So a stage that was killed at any moment goes on by the same command, and no stage
# works on a mixture of old and new.

REJECTED = "questions/rejected.jsonl"
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # files are called so
STUDY = {
    "preset": re.compile("|".join(PRESETS)), "model": str, "seed": int, "max_pixels": int,
    "versions": dict, "artifacts": dict, "model_files": dict,
    "sources": {"train": SOURCE_NAME, "benchmarks": [SOURCE_NAME]}}


def input_path(source: str, name: str) -> str:
    """Where the questions of a source lie, relative to the data folder; `name` is clean or a
    corruption."""
    if name == "clean":
        return f"questions/{source}.parquet"
    return f"corrupted/{source}/{name}.parquet"


def load_study(data: Path) -> dict:
    """study.json, the record of stage 1."""
    path = data / "study.json"
    remedy = "delete it and run" if path.exists() else "run"
    return read_json(path, STUDY, f"{remedy} 01_prepare.py")


def check_input(data: Path, study: Mapping, source: str, name: str) -> dict[str, str]:
    """Stop unless the questions of a source, clean or damaged, are those of the study as it now is.

    Returns artifact -> sha256.
    """
    clean, path = input_path(source, "clean"), data / input_path(source, name)
    for package, was in study["versions"].items():
        now = versions().get(package)
        if was != now:
            raise UserError(f"{data / 'study.json'} was made with {package} {was}, not {now}: "
                            "install that, or run 01_prepare.py again")
    digest = study["artifacts"].get(clean)
    check_fresh(data, data / "study.json", {clean: digest}, "run 01_prepare.py again")
    if name != "clean":
        if not path.exists():
            there = ", ".join(sorted(file.stem for file in path.parent.glob("*.parquet")))
            raise UserError(f"{path} is missing: choose from {there or 'none yet'}, or run "
                            f"02_corrupt.py --corruptions {name}")
        if not {clean: digest, "seed": study["seed"]}.items() <= made_from(path).items():
            raise UserError(f"{path} was made from another {data / clean} than the one there now, "
                            "or by another seed: run 02_corrupt.py again")
    return {input_path(source, name): sha256(path)}


def check_fresh(data: Path, artifact: Path, sources: Mapping[str, str], remedy: str):
    """Stop if `artifact` was made from something else than what now lies in the data folder.

    `sources`: path relative to `data` -> the sha256 that it had when `artifact` was made.
    """
    for name, digest in sources.items():
        if not (data / name).exists():
            raise UserError(f"{data / name} is missing: {remedy}")
        if sha256(data / name) != digest:
            raise UserError(f"{artifact} was made from another {data / name} than the one there "
                            f"now: {remedy}")


def write_questions(path: Path, questions: Iterable[Question], made_from: Mapping) -> int:
    """Write question records as parquet, 64 rows in memory at a time; returns their number.

    `made_from` (artifact, relative to the data folder -> sha256; seed) goes into the file's
    metadata, where the function of that name finds it.
    """
    schema = FEATURES.arrow_schema
    origin = json.dumps(made_from, sort_keys=True).encode()
    schema = schema.with_metadata({**schema.metadata, b"made_from": origin})
    written, questions = 0, iter(questions)
    with replacing(path) as part, pq.ParquetWriter(part, schema, write_page_checksum=True) as file:
        while batch := list(islice(questions, 64)):
            rows = []
            for question in batch:
                row = {name: question.get(name) for name in FEATURES}
                row["images"] = [png(image) for image in question["images"]]
                rows.append(FEATURES.encode_example(row))
            file.write_table(pa.Table.from_pylist(rows, schema=schema))
            written += len(rows)
    return written


def png(image: Image.Image) -> dict:
    """A picture as the parquet stores it: lossless, and the same bytes on every machine."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # half the default's time, about as many bytes
    return {"bytes": buffer.getvalue(), "path": None}


def read_questions(path: Path, remedy: str) -> Dataset:
    """The question records of one parquet; rows decode their pictures when they are read."""
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}")
    with reading(path, f"delete it, then {remedy}"):
        table = Dataset(pq.read_table(path, page_checksum_verification=True))
        if table.features != FEATURES:
            raise ValueError("its columns are not those of a question")
    return table


def made_from(path: Path) -> dict[str, str | int]:
    """What a parquet of `write_questions` was made from."""
    with reading(path, "delete it and run 02_corrupt.py again"):
        return json.loads((pq.read_schema(path).metadata or {}).get(b"made_from", b"{}"))


def read_json(path: Path, shape: Mapping, remedy: str) -> dict:
    """A record that a stage wrote, with at least the keys of `shape`."""
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}")
    with reading(path, remedy):
        record = json.loads(path.read_bytes())
    for key in shape:
        if not has_shape(record, {key: shape[key]}):
            raise UserError(f"{path} is damaged (it has no proper {key}): {remedy}")
    return record


def has_shape(value, shape) -> bool:
    """Whether a value from JSON is of this type (or one of these), text of this pattern, a list of
    this, or a mapping with such values."""
    if isinstance(shape, type | tuple):
        return isinstance(value, shape)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if not isinstance(value, type(shape)):
        return False
    if isinstance(shape, list):
        return all(has_shape(each, shape[0]) for each in value)
    return all(has_shape(value.get(key), each) for key, each in shape.items())


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON lines file up to the first broken line: the last one, where a kill cut it."""
    rows = []
    with suppress(ValueError, TypeError, RecursionError):
        for line in path.read_bytes().splitlines():
            rows.append(dict(json.loads(line)))
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping]):
    with replacing(path) as part:
        append_jsonl(part, rows)


def append_jsonl(path: Path, rows: Iterable[Mapping]):
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path):
    """Of a file, or of the names and contents of all files in a folder."""
    if not path.exists():
        raise UserError(f"{path} is missing: check --local")
    files = [file for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    digests = [(file.relative_to(path).as_posix(), sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def remove(path: Path):
    """A file or a folder with all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved into place at the end: the artifact exists whole or not
    at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)  # of a process that was killed
        yield part
        if part.is_file():
            with open(part, "rb+") as file:  # Windows syncs only what may be written
                os.fsync(file)  # what the name promises survives a power cut
        os.replace(part, path)
    finally:
        remove(part)


@contextmanager
def reading(path: Path | str, remedy: str):
    """What is wrong with a file becomes a sentence."""
    try:
        yield
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        why = str(error).partition("\n")[0][:200]
        raise UserError(f"{path} cannot be read ({why}): {remedy}") from error


@contextmanager
def writing(path: Path):
    """A fault of the file system becomes a sentence; libraries written in Rust tell its number in
    their text alone."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number is None:
            raise
        raise UserError(f"{getattr(error, 'filename', None) or path} cannot be written or read "
                        f"({os.strerror(number)}): make room, give permission, or choose another "
                        "folder with --data") from error


@contextmanager
def locked(path: Path):
    """Keep other processes off an artifact while it is made; the kernel lets go when its holder
    ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # workers of a command that was killed need a moment to notice
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=2):
            yield
    except Timeout:
        raise UserError(f"{path} is in use by another run: wait for its end, or choose another "
                        "folder with --data") from None


# Workers: runs, files and batches of questions are independent of each other, so they are dealt out
# to processes. Without cards a worker computes with one thread, for sums depend on their number; it
# shares nothing with the others. So one worker and eight give the same bytes, on any number of
# cores.


def count_workers(asked: int | None, tasks: int, worker_bytes: float, cards: int | None = None) -> int:
    """How many processes share that many tasks: one a card, or without cards one a core, as memory
    allows. 0 cards: of work that needs none."""
    tasks = max(tasks, 1)
    cards = torch.cuda.device_count() if cards is None else cards
    if asked is not None:
        most = min(tasks, cards or tasks)
        if asked > most:
            raise UserError(f"--workers {asked} is more than there is to do, or more than there are "
                            f"cards: choose at most {most}")
        return asked
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    fitting = int(psutil.virtual_memory().available // worker_bytes)
    most = cards or min(cores, fitting)
    return max(1, min(most, tasks))


def worker_bytes(model: str) -> float:
    """Memory of a process that holds the model in this folder and works with it, at the least."""
    weights = Path(model).glob("*.safetensors")
    return 1e9 + 2 * sum(path.stat().st_size for path in weights)


def deal_out(work: Callable, tasks: Mapping[str, tuple], workers: int,
             receive: Callable, watch: Callable = lambda: None):
    """Call `work(*task)` for each named task; `receive(name, result)` as they end, `watch()` now
    and then.

    One worker is this process itself, so that a profiler or an emulator sees all. More are
    processes of their own, each the only one of its pool: where one is killed, its task is lost and
    is known by name, and the others are not touched. After a failure nothing new begins, and what
    is under way may save what it has: a worker is told so by SIGTERM.
    """
    if workers <= 1:
        begin_worker(0)
        for name, task in tasks.items():
            receive(name, work(*task))
            watch()
        return
    waiting, busy = list(tasks.items()), {}
    with ExitStack() as pools:
        idle = [pools.enter_context(start_worker(number)) for number in range(workers)]
        try:
            while waiting or busy:
                while waiting and idle:
                    pool, (name, task) = idle.pop(), waiting.pop(0)
                    with outliving(name):
                        busy[pool.submit(work, *task)] = name, pool
                done, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
                watch()
                for future in done:
                    name, pool = busy.pop(future)
                    with outliving(name):
                        result = future.result()
                    receive(name, result)
                    idle.append(pool)
        except BaseException:
            stop_workers(busy)
            watch()
            raise


def start_worker(number: int) -> ProcessPoolExecutor:
    """A process that works on one task at a time."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    # Ctrl-C in a terminal goes to all its processes, but here the first decides: the others are
    # born deaf to it
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool.submit(begin_worker, number)
    signal.signal(signal.SIGINT, usual)
    return pool


def begin_worker(number):
    """Once in each process that works: its card or its thread, what it prints, and its end."""
    if number < torch.cuda.device_count():
        torch.cuda.set_device(number)
    else:
        fix_arithmetic(1)
    if multiprocessing.parent_process() is not None:
        keep_quiet()
        threading.Thread(target=end_with_parent, daemon=True).start()


def fix_arithmetic(threads):
    """The same sums on every machine: they depend on the number of threads, and on who adds."""
    torch.set_num_threads(threads)
    if X86:
        multiply_by_onednn()


@lru_cache
def multiply_by_onednn():
    """Products of fp32 matrices on a processor go to oneDNN, for the whole process.

    MKL gives the same bytes on every processor only by its slowest code; oneDNN, held to AVX2, does
    at 2.5 times the speed. Small products, where a call costs more than the product, stay with MKL.
    """
    oneDNN = torch.ops.mkldnn._linear_pointwise.default

    def stays(a, b):
        expanded = 0 in (*a.stride(), *b.stride())  # which oneDNN reads wrongly
        return a.dtype != torch.float32 or len(a) * b.numel() < 2**18 or expanded

    def mm(keys, a, b):
        if stays(a, b):
            return plain["mm"].call_boxed(keys, a, b)
        return oneDNN(a, b.t(), None, "none", [], "")

    def addmm(keys, bias, a, b, **scales):
        if stays(a, b) or bias.dim() != 1 or scales:
            return plain["addmm"].call_boxed(keys, bias, a, b, **scales)
        return oneDNN(a, b.t(), bias.contiguous(), "none", [], "")

    plain = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm")}
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant
        for function in (mm, addmm):
            library.impl(function.__name__, function, "CPU", with_keyset=True, allow_override=True)
    return library  # the cache keeps it: with it the kernels would go


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def outliving(name):
    """The work on a task by another process: where that is gone, a sentence says so."""
    try:
        yield
    except BrokenProcessPool:
        fault = "was killed, by a person or for lack of memory"
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not short and "can't allocate memory" not in str(error):
            raise
        fault = "ran out of memory"
    else:
        return
    raise UserError(f"the worker process of {name} {fault}: the same command continues; if memory "
                    "is short, with fewer --workers")


def stop_workers(busy):
    """Let every worker end the step under way and save it; a second Ctrl-C ends them at once."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    try:
        wait(busy)
    except KeyboardInterrupt:
        for child in children:
            child.kill()


# The command line, the same in all stages


def run(main: Callable, config_class: type, description: str):
    """Parse the command line and run a stage.

    Bad input ends with one sentence and exit code 2, Ctrl-C and SIGTERM with 130.
    """
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False,
                              formatter_class=RawDescriptionHelpFormatter)
    config, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False)
    keep_quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers stop a job
    try:
        if unknown:
            raise UserError(f"{unknown[0]} is no option: see --help")
        with writing(Path(config.data)):
            return main(config)
    except UserError as error:
        told, code = f"error: {error}", 2
        if config.data != "data" and ".py" in told and "--data" not in told:
            told += f" (with --data {config.data})"
    except KeyboardInterrupt:
        told, code = "stopped: the same command continues", 130
    for number in (signal.SIGINT, signal.SIGTERM):  # it is ending already
        signal.signal(number, signal.SIG_IGN)
    print(told, file=sys.stderr)
    sys.exit(code)


def keep_quiet():
    """What a process prints: no warnings about calls that other libraries make or about doubtful
    pictures, bars on a terminal alone, on any console."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", module="PIL")  # it is taken or rejected
    tqdm.set_lock(threading.RLock())  # its own is shared by processes: a killed one leaves a trace
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # one that is not UTF-8 lacks characters


def check_least(config, least: float, *names: str):
    """Stop if one of these options, where it is given, is smaller or not finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:  # so that nan is caught too
            raise UserError(f"--{name} {value} is too small: choose at least {least}")
        if value == math.inf:
            raise UserError(f"--{name} {value} is not finite: choose a number")


def check_once(config, *names: str):
    """Stop if one of these options holds something twice."""
    for name in names:
        for value, times in Counter(getattr(config, name)).items():
            if times > 1:
                raise UserError(f"--{name} has {value} twice: give it once")


if __name__ == "__main__":
    run(main, Config, __doc__)
