# SPDX-License-Identifier: MIT
"""Stage 1: questions and a model.

Six benchmarks and four training sets come in as many layouts; here they become one record: text with a tag per
picture, pictures within one pixel budget, a gold answer that the grader can read. What does not fit is rejected with
its reason, never cut and never dropped silently; training questions that a benchmark asks too are rejected as leaks.
Without a hub or a GPU there is `shapes`: a world drawn here, whose questions are known to need the picture or not, and
a real but tiny Qwen2.5-VL that has learnt to answer some of them.

reads   datasets of the hub, or local copies of them, or your own folder (--local)
writes  data/study.json, data/questions/SOURCE.parquet, data/questions/rejected.jsonl, data/model/ (preset tiny)
run     python 01_prepare.py                                    # shapes and the embedded model: 3 minutes on 2 CPU cores
        python 01_prepare.py --preset 3b --limit 500            # geometry3k; mathvista, mmmu, scienceqa; from the hub
        python 01_prepare.py --preset 3b --benchmarks mathvision --local mathvision=test.parquet geometry3k=DIR
        python 01_prepare.py --train mine --local mine=FOLDER   # FOLDER/questions.jsonl: problem, answer, images, ...
"""
import ast
import cmath
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import unicodedata
import warnings
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from importlib.metadata import version
from inspect import Parameter, signature
from itertools import product
from operator import add, mul, sub, truediv
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "2500")  # before torch: threads that wait by spinning make a shared core 100 times slower

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import (
    Dataset, Features, Image as ImageFeature, List, Value, config as datasets_config, disable_progress_bars, get_dataset_config_names,
    load_dataset)
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

Question = dict  # one row of FEATURES, its images decoded: a list of RGB PIL pictures

FEATURES = Features({
    "id": Value("string"),            # SOURCE/...
    "problem": Value("string"),       # question and choices as shown, one <image> tag per picture
    "images": List(ImageFeature()),
    "answer": Value("string"),        # a choice question's is the letter; an open one's may be a JSON list of alternatives
    "answer_type": Value("string"),   # choice, integer, float, list, text, math, open
    "choices": List(Value("string")),
    "unit": Value("string"),
    "precision": Value("int64"),      # decimals of a float answer
    "source": Value("string"),
    "split": Value("string"),         # train or test
    "group": Value("string"),         # the benchmark's own breakdown: subject, task
    "needs_image": Value("bool"),     # null: nobody knows
    "image_tokens": Value("int64"),   # of all pictures together
    "prompt_tokens": Value("int64"),  # of the whole prompt, these included; a damaged row keeps the clean one's
    "donor": Value("string"),         # id of the question whose picture this one was given (mismatch), else null
    "shown_answer": Value("string"),  # the answer that fits the picture shown, where that is another one and its answer is known
})


class UserError(Exception):
    """Bad input: printed as one sentence, exit code 2. The message names the file, the row and the remedy."""


def option(default, help: str):
    """A config field with its reason or unit, which `--help` shows."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REAL = {"train": "geometry3k", "benchmarks": ["mathvista", "mmmu", "scienceqa"],
        "max_pixels": 512 * 28 * 28}  # 512 image tokens: reads a diagram's labels, and 64 prompts fit beside the 3B on 12 GB
PRESETS = {
    "tiny": {"model": "embedded", "train": "shapes", "benchmarks": ["shapes"], "max_pixels": 112 * 112},  # 16 image tokens; shapes take 9
    "3b": {"model": "Qwen/Qwen2.5-VL-3B-Instruct", **REAL},
    "7b": {"model": "Qwen/Qwen2.5-VL-7B-Instruct", **REAL},
}


@dataclass
class Config:
    preset: str = option("tiny", "tiny, 3b or 7b: sets model, train, benchmarks and max_pixels")
    data: str = option("data", "the study's folder")
    train: str = option(None, "source to train on [preset]")
    benchmarks: list[str] = option([], "sources to evaluate on [preset]")
    local: list[str] = option([], "NAME=PATH: read source NAME from a parquet or a folder of them; any other NAME is your own source")
    limit: int = option(None, "questions per source and split, spread over its groups; fewer where some are rejected later [all]")
    seed: int = option(0, "of shapes, of the embedded model and of the corruptions")
    max_pixels: int = option(None, "a larger picture is scaled down to this [preset]")
    max_prompt_tokens: int = option(4096, "a longer question is rejected, never cut; seven pictures of 512 tokens fit")
    model: str = option(None, "hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL [preset]")


class Help(RawDescriptionHelpFormatter):
    """Docstrings as they are written, and defaults where there are any."""

    def _get_help_string(self, action):
        return f"{action.help} (default: %(default)s)" if action.default not in (None, [], SUPPRESS) else action.help


def run(main: Callable, config_class: type, description: str, several: bool = False):
    """Parse the command line and run a stage; bad input ends with one sentence and exit code 2, Ctrl-C and SIGTERM with 130."""
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False, formatter_class=Help)
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about calls that other libraries make
    if not sys.stderr.isatty():  # bars are for a terminal
        disable_progress_bars()
        logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers stop a job: like Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console that is not UTF-8 lacks some characters of questions
    try:
        if unknown:
            raise UserError(f"{unknown[0]} is no option: see --help")
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if size > 1 and not several:
            raise UserError(f"{Path(sys.argv[0]).name} is the work of one process: run it with python, not with torchrun")
        with writing(Path(config.data)), locked(Path(config.data), config_class is Config) if size == 1 or rank == 0 else nullcontext():
            return main(config)
    except UserError as error:
        elsewhere = f" (with --data {config.data})" if config.data != "data" and ".py" in str(error) and "--data" not in str(error) else ""
        says, code = f"error: {error}{elsewhere}", 2
    except KeyboardInterrupt:
        says, code = "stopped: the same command continues", 130
    for number in (signal.SIGINT, signal.SIGTERM):  # it is ending already
        signal.signal(number, signal.SIG_IGN)
    print(says, file=sys.stderr)
    sys.exit(code)


def check_least(config, least: float, *names: str):
    """Stop if one of these options, where it is given, is smaller."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) >= least:  # so that nan is caught too
            raise UserError(f"--{name} {getattr(config, name)} is too small: choose at least {least}")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# by name, for not every system has all of them
OF_A_DISK = {getattr(errno, name, None) for name in (
    "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOTDIR", "EISDIR", "EEXIST", "ENOENT", "ELOOP",
    "ENAMETOOLONG")} - {None}


@contextmanager
def writing(path: Path):
    """A fault of the file system becomes a sentence; libraries written in Rust tell its number in their text alone."""
    try:
        yield
    except Exception as error:
        told = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or told and int(told[1])
        if number not in OF_A_DISK or isinstance(error, UserError):
            raise
        raise UserError(f"{getattr(error, 'filename', None) or path} cannot be written or read ({os.strerror(number)}): make room, give "
                        "permission, or choose another folder with --data") from error


@contextmanager
def locked(data: Path, begin: bool):
    """Keep other runs off the data folder, and clear away what killed ones left half written.

    The kernel lets go of the lock when its holder ends, however it ends. Of torchrun's processes the first takes it.
    """
    if not begin and not data.is_dir():
        raise UserError(f"{data} is missing: run 01_prepare.py --data {data} first")
    data.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{data} is in use by another run: wait for its end, or choose another folder with --data") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(f"note: {data} lies on a file system without locks: keep other runs off it yourself")
    try:
        if lock.is_locked:
            clear_parts(data)
        yield
    finally:
        lock.release()


def clear_parts(data: Path):
    """Take away what killed runs left half written."""
    for folder in (data, *filter(Path.is_dir, map(data.joinpath, FOLDERS))):
        os.listdir(folder)  # glob passes over a folder that may not be read, without a word
        for part in folder.glob(".*.part" if folder == data else "**/.*.part"):
            remove(part)


FOLDERS = ("questions", "corrupted", "policies", "answers", "report")  # of the data folder, beside model


def remove(path: Path):
    """A file or a folder with all in it, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved into place at the end: the artifact exists whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
        raise UserError(f"{path} cannot be read ({str(error).partition(chr(10))[0][:200]}): {remedy}") from error


def has_shape(value, shape) -> bool:
    """Whether a value from JSON is of this type, text of this pattern, a list of this, or a mapping with such values."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(has_shape(value.get(key), each) for key, each in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(each, shape[0]) for each in value)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and bool(shape.fullmatch(value))
    return isinstance(value, shape)


def read_json(path: Path, shape: Mapping, remedy: str) -> dict:
    """A record that a stage wrote, with at least the keys of `shape`."""
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}")
    with reading(path, remedy):
        record = json.loads(path.read_bytes())
    if wrong := [key for key in shape if not has_shape(record, {key: shape[key]})]:
        raise UserError(f"{path} is damaged (it has no proper {wrong[0]}): {remedy}")
    return record


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON lines file up to the first broken line: the last one, where a kill cut it short."""
    rows = []
    with suppress(ValueError, TypeError, RecursionError):
        for line in path.read_bytes().splitlines():
            rows.append(dict(json.loads(line)))
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping]):
    with replacing(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def append_jsonl(path: Path, rows: Iterable[Mapping]):
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file)


def write_questions(path: Path, questions: Iterable[Question], made_from: Mapping[str, str | int]) -> int:
    """Write question records as parquet, 64 rows in memory at a time; returns their number.

    `made_from` (artifact, relative to the data folder -> sha256; seed) goes into the file's metadata: `check_input` reads it.
    """
    schema = FEATURES.arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), b"made_from": json.dumps(dict(made_from), sort_keys=True).encode()})
    count, batch = 0, []
    with replacing(path) as part, pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
        def flush():
            encoded = [FEATURES.encode_example({**row, "images": [png(image) for image in row["images"]]}) for row in batch]
            writer.write_table(pa.Table.from_pylist(encoded, schema=schema))
            batch.clear()
        for question in questions:
            batch.append({name: question.get(name) for name in FEATURES})
            count += 1
            if len(batch) == 64:
                flush()
        if batch:
            flush()
    return count


def png(image: Image.Image) -> dict:
    """A picture as the parquet stores it: lossless, and the same bytes on every machine."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # half the time of the default, for about as many bytes
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


def undecoded(table: Dataset) -> Dataset:
    """The same rows with pictures as bytes: for what needs no pixel."""
    return table.cast_column("images", List(ImageFeature(decode=False)))


def made_from(path: Path) -> dict[str, str | int]:
    """What a parquet of `write_questions` was made from."""
    with reading(path, "delete it and run 02_corrupt.py again"):
        return dict(json.loads((pq.read_schema(path).metadata or {}).get(b"made_from", b"{}")))


def check_fresh(data: Path, artifact: Path, sources: Mapping[str, str], remedy: str):
    """Stop if `artifact` was made from something else than what now lies in the data folder.

    `sources`: path relative to `data` -> the sha256 that it had when `artifact` was made.
    """
    for name, digest in sources.items():
        if not (data / name).exists():
            raise UserError(f"{data / name} is missing: {remedy}")
        if sha256(data / name) != digest:
            raise UserError(f"{artifact} was made from another {data / name} than the one there now: {remedy}")


def check_input(data: Path, study: Mapping, source: str, name: str) -> dict[str, str]:
    """Stop unless the questions of a source, clean or damaged, are those of the study as it now is; returns artifact -> sha256."""
    clean, relative = input_path(source, "clean"), input_path(source, name)
    if other := [f"{name} {was}, not {versions().get(name)}" for name, was in study["versions"].items() if was != versions().get(name)]:
        raise UserError(f"{data / 'study.json'} was made with {', '.join(other)}: install that, or run 01_prepare.py again")
    check_fresh(data, data / "study.json", {clean: study["artifacts"].get(clean, "")}, "run 01_prepare.py again")
    if name != "clean":
        if not (data / relative).exists():
            there = sorted(path.stem for path in (data / relative).parent.glob("*.parquet"))
            raise UserError(f"{data / relative} is missing: choose from {', '.join(there) or 'none yet'}, or run 02_corrupt.py --corruptions {name}")
        origin = made_from(data / relative)
        if origin.get("seed") != study["seed"]:
            raise UserError(f"{data / relative} was damaged by seed {origin.get('seed')}, the study's is {study['seed']}: "
                            "run 02_corrupt.py again")
        check_fresh(data, data / relative, {clean: origin.get(clean, "")}, "run 02_corrupt.py again")
    return {relative: sha256(data / relative)}


SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # files are called so
STUDY = {"preset": re.compile("|".join(PRESETS)), "model": str, "seed": int, "max_pixels": int, "versions": dict, "artifacts": dict,
         "sources": {"train": SOURCE_NAME, "benchmarks": [SOURCE_NAME]}, "model_files": dict}


def load_study(data: Path) -> dict:
    """study.json, the record of stage 1."""
    path = data / "study.json"
    return read_json(path, STUDY, "delete it and " * path.exists() + f"run 01_prepare.py --data {data}")


def model_path(data: Path, study: Mapping) -> str:
    """Where the study's model is, the embedded one in the data folder, else a hub id or a folder; stops if it is not the one recorded."""
    if commit := study["model_files"].get(f"hub:{study['model']}"):
        with loading(study["model"]):  # as it was, whatever the hub has now
            return huggingface_hub.snapshot_download(study["model"], revision=commit, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"])
    check_fresh(data, data / "study.json", study["model_files"], "run 01_prepare.py again")
    return str(data / "model") if study["model"] == "embedded" else study["model"]


def versions() -> dict[str, str]:
    """Of the packages that decide what a stage computes."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "pillow")}


def stratified(ids: Sequence[str], groups: Sequence[str | None], limit: int | None) -> list[int]:
    """Numbers of `limit` questions in which each group has its share; in a group the hashes of ids decide, on every machine alike."""
    members = {}
    for number, (name, group) in enumerate(zip(ids, groups)):
        members.setdefault(group, []).append((hashlib.sha256(name.encode()).hexdigest(), number))
    ranked = [((k + 0.5) / len(rows), *row) for rows in members.values() for k, row in enumerate(sorted(rows))]
    return sorted(number for _, _, number in sorted(ranked)[:limit])


NO_PICTURE = ("blank", "removed")  # names of inputs without a picture
SEVERITY = {"blur": 0.2, "occlude": 0.5}  # of the plain names: at blur 0.2 no label and no shape can be made out


def input_path(source: str, name: str) -> str:
    """Where the questions of a source lie, relative to the data folder; `name` is clean or a corruption."""
    return f"questions/{source}.parquet" if name == "clean" else f"corrupted/{source}/{name}.parquet"


INSTRUCTION = "Think inside <think> </think>, then answer in \\boxed{}."


@dataclass
class Prompt:
    """A question as the model reads it."""
    input_ids: list[int]                  # L tokens, the picture's placeholders included
    pixel_values: torch.Tensor | None     # (patches, channels * temporal patch * patch * patch)
    image_grid_thw: torch.Tensor | None   # (pictures, 3), in patches
    pictures: int


def load_processors(model: str, max_pixels: int):
    """Tokenizer and image processor of a model; pictures are scaled to at most `max_pixels`.

    Not AutoProcessor: its video part needs torchvision. Pillow also gives the same pixels on every machine.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    smallest = min(image_processor.size["shortest_edge"], max_pixels // 4)  # any closer, and rounding throws strips from bound to bound
    image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}
    return tokenizer, image_processor


def tokenize_prompt(problem: str, image_tokens: Sequence[int], tokenizer) -> list[int]:
    """Token ids of a question in the chat template of its model's family; picture i takes `image_tokens[i]` tokens.

    The template sees placeholders, never the question: what a question's text says, `<|im_end|>` for instance, stays
    text and cannot become a special token. Raises ValueError where tags and pictures do not match.
    """
    texts = problem.strip().split("<image>")
    if len(texts) - 1 != len(image_tokens):
        raise ValueError(f"{len(texts) - 1} <image> tags for {len(image_tokens)} pictures")
    texts[-1] += "\n" + INSTRUCTION
    content = []
    for i, text in enumerate(texts):  # text, picture, text, ...: the tags say where the pictures stand
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": f"\ue000{i}\ue000"}] * bool(text)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    counts, ids = iter(image_tokens), []
    for i, part in enumerate(rendered.split("\ue000")):  # odd parts are the numbers of texts
        if i % 2:
            ids += tokenizer(texts[int(part)], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            part = re.sub(r"<\|image_pad\|>", lambda match: match[0] * next(counts), part)
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def encode(question: Question, tokenizer, image_processor) -> Prompt:
    """Tokens and pixels of a question. A picture of t x h x w patches takes t * h * w / merge**2 tokens.

    Raises ValueError where tags and pictures do not match, or a picture's sides differ by more than a factor of 200.
    """
    pixels = image_processor(question["images"], return_tensors="pt") if question["images"] else {}
    grid = pixels.get("image_grid_thw")
    image_tokens = (grid.prod(-1) // image_processor.merge_size**2).tolist() if question["images"] else []
    ids = tokenize_prompt(question["problem"], image_tokens, tokenizer)
    return Prompt(ids, pixels.get("pixel_values"), grid, len(image_tokens))


def with_choices(text: str, choices: Sequence[str]) -> str:
    """A question with its choices, one `(A) text` a line."""
    return text + "".join(f"\n({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))


# The grader: what a response answers, and whether that is right; never raises, linear in the response's length

FINAL_CHARACTERS = 10_000  # what is searched for the answer: the end of what follows the reasoning
ANSWER_CHARACTERS = 400    # a longer text is no answer by itself
BRACES = re.compile(r"\\boxed\s?\{|\\[{}\\]|[{}]")
CLAIM = re.compile(r"(?i)\banswer(?:\s?(?:is|would be|should be))?[\s:=*$({\[\\\"']{0,9}(?:option\s)?")
NUMBER = re.compile(r"(?:(?<![\w)}\]])-)?(?<![A-Za-z\d.^_])(?:(?:\d{1,3}(?:,\d{3}){1,6}(?![\d,])|\d{1,300})(?:\.\d{1,300})?|\.\d{1,300})"
                    r"(?:[eE][-+]?\d{1,2}(?!\d))?")


@dataclass
class Grade:
    """The verdict on a response."""
    correct: bool
    well_formed: bool   # as asked for: reasoning in one think block, then one boxed answer, then nothing
    answer: str | None  # as read from the response: a letter where there are choices


def grade(response: str, question: Mapping) -> Grade:
    """Right is the last \\boxed{} after the reasoning, else the last <answer>, else what the benchmarks' own rules find there.

    Where there are several boxes (or tags) after the reasoning, all must be right; one that never closes holds nothing.
    Well formed is white space, <think>, reasoning, </think>, text with one box that is not empty, closing punctuation.
    """
    for loose, tight in (("< ", "<"), ("</ ", "</"), ("think >", "think>")):
        response = response.replace(loose, tight)
    _, closed, final = response.rpartition("</think>")
    final = (final if closed else response).partition("<think>")[0][-FINAL_CHARACTERS:]
    boxes = find_boxes(final)
    well_formed = (response.count("<think>") == response.count("</think>") == len(boxes) == 1 and response.lstrip().startswith("<think>")
                   and bool(closed and boxes[0][0].strip()) and not final[boxes[0][1]:].strip(" \n\t\r$.)]\\*"))
    tagged = [part.partition("</answer>")[0] for part in final.split("<answer>")[1:] if "</answer>" in part]
    answers = list(dict.fromkeys([text for text, _ in boxes] or tagged))
    if answers:  # a box or tag is read whole: a choice's letter, else the text as it is
        choice = question["answer_type"] == "choice"
        read = [read_choice(text, question["choices"] or []) if choice else text.strip() for text in answers[-4:]]
    else:
        read = [None if "\\boxed" in final else search_answer(final, question)]
    correct = len(answers) <= 4 and all(text and is_right(text, question) for text in read)
    return Grade(correct, well_formed, read[-1][:ANSWER_CHARACTERS] if read[-1] else None)


def find_boxes(text: str) -> list[tuple[str, int]]:
    """Contents of the outermost boxes whose braces balance, each with the position behind it."""
    opened, boxes = [], []
    for token in BRACES.finditer(text) if "\\boxed" in text else ():
        if token[0] == "}" and opened:
            start, is_box = opened.pop()
            while is_box and boxes and boxes[-1][0] > start:  # boxes inside this one
                boxes.pop()
            boxes += [(start, token.start())] * is_box
        elif token[0][-1] == "{" and token[0] != "\\{":
            opened.append((token.end(), len(token[0]) > 1))
    return [(text[start:end], end + 1) for start, end in boxes]


def search_answer(text: str, question: Mapping) -> str | None:
    """The answer in free text, by a rule for each type."""
    kind, extracted = question["answer_type"], question.get("source") in (None, "mathvista")  # there an LLM extracts the answer
    if kind == "choice":
        return search_choice(text, question["choices"] or [], extracted)
    if kind in ("integer", "float"):
        return search_number(text, extracted)
    if kind == "list":
        return "[" + text.rpartition("[")[2].partition("]")[0] + "]" if "[" in text else None
    return search_maths(text) if kind == "math" else search_text(text)


def is_right(answer: str, question: Mapping) -> bool:
    """Whether an answer equals the gold: MathVista's rules for numbers (but 5.7 is not 5), Math-Verify's for maths, MMMU's for text."""
    kind, golds = question["answer_type"], gold_texts(question)
    if kind == "choice":  # another option with the same text is right too
        return question["choices"][ord(answer) - 65].split() == question["choices"][ord(golds[0]) - 65].split()
    if kind in ("list", "math"):
        return same_maths(f"[{answer}]" if kind == "list" and "[" not in answer else answer, golds[0])
    if kind in ("text", "open"):
        return any(same_text(answer, gold, phrase=kind == "open") for gold in golds)
    value, gold = one_value(answer), one_value(golds[0])
    if value is None or gold is None or isinstance(value, complex):
        return False
    decimals = question.get("precision") if kind == "float" else None
    return equal(value, gold) if decimals is None else round(float(value), decimals) == round(float(gold), decimals)


def literal_list(text: str) -> list[str]:
    """The strings or numbers of a list kept as text, Python's or JSON's: read as a literal, never evaluated."""
    values = ast.literal_eval(text) if len(text) <= 20_000 else None
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise ValueError("no readable list")
    return [str(value) for value in values]


def gold_texts(question: Mapping) -> list[str]:
    """The texts that count as right, the first to be teacher-forced: an open question's gold may be a list of alternatives."""
    golds = question["answer"]
    if question["answer_type"] == "open" and isinstance(golds, str) and golds.startswith("["):
        try:
            golds = literal_list(golds)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # a text that begins with a bracket
    return [str(gold) for gold in golds] if isinstance(golds, (list, tuple)) else [str(golds)]


class Rejected(ValueError):
    """A row that is not taken. The message is the reason, which is counted, and after a colon its details."""


def check_gold(question: Mapping):
    """Reject a question for which no answer could be graded right."""
    golds, kind, letters = gold_texts(question), question["answer_type"], [chr(65 + i) for i in range(len(question["choices"] or []))]
    if not golds or not all(gold.strip() for gold in golds):
        raise Rejected("gold: the answer is empty")
    if kind == "choice" and golds[0] not in letters:
        raise Rejected(f"gold: the answer {golds[0][:40]!r} is not a letter of its {len(letters)} choices")
    if kind in ("list", "math") and not values_of(golds[0]) or kind in ("integer", "float") and not is_right(golds[0], question):
        raise Rejected(f"gold: the answer {golds[0][:40]!r} cannot be read as {kind}")


# choices

WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{|\\[()\[\]]|[$*\\{}\"°]")


def plain(text: str) -> str:
    """Text for comparison: one case, single spaces, no LaTeX wrapping, no closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", WRAPPING.sub(" ", text)).casefold().split()).strip(" .,;:!?'")


@lru_cache(64)
def choice_patterns(choices: tuple[str, ...]) -> tuple[str, dict[str, str], str]:
    """Of choices: a pattern of a letter that stands alone; plain text -> letter; a pattern of these texts as words, the longest first."""
    lone = rf"(?<![A-Za-z0-9'/∠△⊙])([A-{chr(64 + len(choices))}])(?![A-Za-z0-9'’/])" if choices else "(?!)()"
    letters = {plain(choice): chr(65 + i) for i, choice in reversed(list(enumerate(choices))) if plain(choice)}
    texts = "|".join(re.escape(text) for text in sorted(letters, key=len, reverse=True)) or "(?!)"
    return lone, letters, rf"(?<![\w.])(?:{texts})(?!\w|\.\d)"


def bare_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text is, and nothing else: a letter, perhaps with brackets or a full stop, or a choice's text."""
    if len(text) > ANSWER_CHARACTERS:
        return None
    letter = re.fullmatch(r"\(?\s?([A-Za-z])\s?[).:]{0,2}", WRAPPING.sub(" ", text).strip())
    if letter and ord(letter[1].upper()) - 65 < len(choices):
        return letter[1].upper()
    same = [chr(65 + i) for i, choice in enumerate(choices) if text.strip() == choice.strip()]
    return same[0] if same else choice_patterns(tuple(choices))[1].get(plain(text))


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The one choice that a boxed answer names by letter, text or value; None where it names none or several."""
    bare, (lone, letters, texts) = bare_choice(text, choices), choice_patterns(tuple(choices))
    if bare or len(text) > ANSWER_CHARACTERS:
        return bare
    lettered = re.match(r"[\s(]{0,3}" + lone + r"\s?[).:=]{0,2}", text)  # "C. A to B": the letters after are the choice's own
    if lettered:
        rest, choice = text[lettered.end():], choices[ord(lettered[1]) - 65]
        if plain(rest) == plain(choice) or same_maths(rest, choice):
            return lettered[1]
    named = set(re.findall(lone, text))
    if not named and values_of(text) is not None:  # 1.8 for \\frac{9}{5}; as words, 5 would stand in -5
        named = {chr(65 + i) for i, choice in enumerate(choices) if same_maths(text, choice)}
    else:
        named |= {letters[said] for said in re.findall(texts, plain(text))}
    return named.pop() if len(named) == 1 else None


def search_choice(text: str, choices: Sequence[str], nearest: bool) -> str | None:
    """The choice that free text claims as the answer, else by MMMU's rule, else by MathVista's.

    MMMU: the last letter in brackets, else (here: what the last sentence states, else) the last lone letter, else (here: the choice
    with whose text it begins, else) the last whose text occurs, else a random one (here: none). MathVista (`nearest`): the choice
    nearest to the answer that an LLM extracts (here: to the last sentence, of "Therefore, x is 5" to the 5). Both take the last of
    several; here two that are claimed, or joined by "or", are none.
    """
    bare = bare_choice(text, choices)
    if bare or not text.strip():
        return bare
    lone, letters, texts = choice_patterns(tuple(choices))
    claimed = [re.match(rf"{lone}(?:\W{{0,4}}(?:or|and|,|&)\W{{0,4}}{lone})?", text[claim.end():claim.end() + 20])
               for claim in CLAIM.finditer(text)]
    claimed = {letter for match in claimed if match for letter in match.groups() if letter}
    if claimed:  # "A or B" claims nothing, nor does A here and B there
        return claimed.pop() if len(claimed) == 1 else None
    if re.search(rf"{lone}\W{{0,4}}(?:or|and|,|&)\W{{0,4}}(?!\1){lone}\W*$", text[-40:]):
        return None
    last = re.split(r"(?<=[.!?])\s|\n", text.strip())[-1]
    stated = re.split(r"\bis\b|=|:", last)
    said = read_choice(stated[-1], choices) if len(stated) > 1 else None
    found = re.findall(rf"\({lone}\)", text) or [said] * bool(said) or re.findall(lone, text)
    concluded = len(stated) > 1 and re.match(r"(?i)(?:therefore|thus|so|hence)\b", last) and not re.search(texts, plain(last))
    if not found and not (nearest and concluded):
        opening = re.match(texts, plain(text))  # "No, because ..."
        found = [letters[named] for named in ([opening[0]] if opening else re.findall(texts, plain(text)))]
    if len(found) == len(set(found)) == len(choices) > 2:  # all of them, listed
        return None
    if found or not nearest or not choices:
        return found[-1] if found else None
    said = stated[-1].strip(" .*$") if concluded else last
    distances = [edit_distance(said[:200], choice[:200]) for choice in choices]
    return chr(65 + distances.index(min(distances)))  # the first of equals


def edit_distance(text: str, choice: str) -> int:
    """Levenshtein's."""
    row = range(len(choice) + 1)
    for i, here in enumerate(text, 1):
        above, row = row, [i]
        for j, there in enumerate(choice, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (here != there)))
    return row[-1]


# text and numbers


def search_text(text: str) -> str | None:
    """MMMU's rule for open questions, the last line alone: what follows its last "answer", "is", "so", "=" ..."""
    last = (text.strip().splitlines() or [""])[-1]
    return re.split(r"(?i)\b(?:could be|so|is|are|thus|therefore|final|answer|result)\b|=|:", last)[-1].strip(" .*") or None


def same_text(answer: str, gold: str, phrase: bool) -> bool:
    """Equal words or numbers; of an open question, as MMMU has it, numbers to two decimals or a phrase that holds the gold.

    Unlike MMMU's, the phrase may not list several things: naming everything is no answer.
    """
    value, number, answer, gold = one_value(answer), one_value(gold), plain(answer), plain(gold)
    if answer == gold or value is not None and number is not None and equal(value, number):
        return bool(answer)
    if number is not None or not phrase:
        return phrase and value is not None and round(complex(value).real, 2) == round(complex(number).real, 2)
    rest = re.sub(rf"(?<!\w){re.escape(gold)}(?!\w)", "", answer, count=1)
    return bool(gold) and rest != answer and len(rest) < 100 and not re.search(r"[,;/|]|\b(?:or|and|not?|yes)\b", rest)


def search_number(text: str, words: bool = False) -> str | None:
    """The last number that is not the bound of a comparison: "2 bars are larger than 4" answers 2, and so does "two bars" with `words`."""
    found = list(NUMBER.finditer(text))
    free = [number[0] for number in found if not text.endswith((" than ", " least ", " most ", " of "), 0, number.start())]
    if len(free) > 1 and re.search(r"\d\s+(?:or|and)\s+[-\d.,]+\W*$", text[-40:]):  # "5 or 7" answers nothing
        return None
    if words and not free:
        free = [str(NUMBERS.index(word)) for word in re.findall(rf"\b(?:{'|'.join(NUMBERS[2:])})\b", text.lower())]
    return (free or [number[0] for number in found] or [None])[-1]


def search_maths(text: str) -> str | None:
    """The whole text if it is an expression, else what is claimed as the answer, the last formula, the last number."""
    claims = [text[claim.end():claim.end() + 100].partition("\n")[0].partition(". ")[0] for claim in CLAIM.finditer(text)]
    formulas = re.findall(r"(?:\$|\\[(\[])(.{1,100}?)(?:\$|\\[)\]])", text, re.DOTALL)
    for candidates in ([text], claims, formulas):
        if candidates and values_of(candidates[-1]):
            return candidates[-1].strip()
    return search_number(text)


# maths: small, bounded arithmetic instead of a computer algebra system; nothing in a response is ever executed

BRACKETS = {"(": ")", "{": "}", "[": "]"}
CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS = {"sqrt": cmath.sqrt, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "ln": cmath.log, "log": cmath.log10}
TOKEN = re.compile(r"(\d+(?:\.\d*)?(?:[eE][-+]?\d{1,2}(?![\d.]))?|\.\d+)|\\?(frac|sqrt|sin|cos|tan|log|ln|pi)|\\?([A-Za-z]+)|(\*\*|\S)")
SYMBOLS = str.maketrans({"√": r"\sqrt ", "π": r"\pi ", "×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "≈": "=",
                         "²": "^2 ", "³": "^3 ", "°": " ", "$": " ", "（": "(", "）": ")", "，": ",", "~": " "})
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\!\s?", ""), (r"\\[dt]frac(?![a-z])", r"\\frac"), (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}|\\(?:left|right|displaystyle|q?quad|[,;: ()\[\]])", r" \1 "),
    (r"\\approx(?![a-z])", "="), (r"\^\s?\{?\s?\\circ\s?\}?|\\circ|\\degree|\bdegrees?\b|\\?%|\bpercent\b|\bpct\b", " "),
    (r"(?<![\d.,])(\d{1,3}(?:,\d{3}){1,6})(?![\d,])", lambda found: found[1].replace(",", "")),
    (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\d.^])(\d+)\s?\\frac\s?\{\s?(\d+)\s?\}\s?\{\s?(\d+)\s?\}", r"(\1+\2/\3)"),  # mixed numbers
    (r"(?<![\d.^])(\d+)\s(\d+)\s?/\s?(\d+)(?!\d)", r"(\1+\2/\3)"))]
UNIT = re.compile(r"(?<=[\d})\s])(?:km/h|m/s|[kMG]?(?:Hz|Pa|N|J|W|V)|[kcdm]?m|[km]?g|lbs?|ft|in|yd|mi|s|hr?|mL|L|[^\W\da-zA-Z_]+|"
                  r"(?!sqrt|sin|cos|tan|log|frac|[abcxyz]{3}\b)[A-Za-z]{3,})\s*(?:\^\s*\{?\s*[23]\s*\}?\s*\^?)?[\s.]*$")


def values_of(text: str) -> list[tuple] | None:
    """The values of an expression, or of several with commas between, each at two points; None where it is no maths.

    Units, degree and percent signs do not count; of an equation its right-hand side does. Order counts within brackets and in ratios.
    """
    if len(text) > ANSWER_CHARACTERS:
        return None
    text = text.translate(SYMBOLS)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    for _ in range(3):  # "square metres per hour"
        text = UNIT.sub("", text.strip().rstrip(" ."))
    bracketed = re.fullmatch(r"\s*\\?[\[({](.*[,;].*)[\])}]\s*", text)
    parts = re.split(r"[,;:]|\band\b|\bor\b", bracketed[1] if bracketed else text)
    try:
        values = [tuple(evaluate(part.rpartition("=")[2], point) for point in (0, 1)) for part in parts[:20]]
    except (ValueError, ArithmeticError, RecursionError):
        return None
    ordered = bracketed or ":" in text or len(values) == 1
    return values if ordered else sorted(values, key=lambda pair: (complex(pair[0]).real, complex(pair[0]).imag))


def evaluate(text: str, point: int):
    """The value of an expression: a Fraction while that is exact, its variables fixed numbers. Raises ValueError where it is none."""
    tokens = []
    for number, name, letters, sign in TOKEN.findall(text):
        if len(letters) > 2 and not re.fullmatch("[abcxyz]{3}", letters):
            raise ValueError(f"{letters} is prose, not a product")
        tokens += [Fraction(number)] if number else [name] if name else list(letters or sign.replace("**", "^"))
    tokens = [None, *reversed(tokens)]  # a stack, the next token last
    value = read_terms(tokens, point)
    if tokens[-1] is not None or not cmath.isfinite(complex(value)):
        raise ValueError("no expression")
    return value.real if isinstance(value, complex) and value.imag == 0 else value


def read_terms(tokens: list, point: int, rank: int = 1):
    """What operators of at least `rank` join (precedence climbing). Side by side is a product, but not before a number."""
    value = read_atom(tokens, point)
    while tokens[-1] not in (None, *BRACKETS.values()):
        if isinstance(tokens[-1], Fraction):
            raise ValueError("two numbers side by side")
        own_rank, apply = OPERATORS.get(tokens[-1], OPERATORS["*"])
        if own_rank < rank:
            break
        if tokens[-1] in OPERATORS:
            tokens.pop()
        value = apply(value, read_terms(tokens, point, own_rank + 1))
    return value


def read_atom(tokens: list, point: int):
    token = tokens.pop()
    if token in ("+", "-"):
        value = read_terms(tokens, point, 3)  # -2^2 is -4
        return -value if token == "-" else value
    if isinstance(token, Fraction):
        return token
    if token in BRACKETS:
        value = read_terms(tokens, point)
        if tokens.pop() != BRACKETS[token]:
            raise ValueError("unbalanced brackets")
        return value
    if token == "frac":
        return read_atom(tokens, point) / read_atom(tokens, point)
    if token == "sqrt" and tokens[-1] == "[":
        degree = read_atom(tokens, point)
        return power(read_atom(tokens, point), 1 / degree)
    if token in FUNCTIONS:
        return FUNCTIONS[token](complex(read_atom(tokens, point)))
    if token in CONSTANTS:
        return CONSTANTS[token]
    if token and token.isalpha():
        return 0.5 + (ord(token) * (0.618, 0.414)[point]) % 1
    raise ValueError(f"{token} is no number")


def power(base, exponent):
    """Exact for small whole exponents, else in floating point, where what is huge overflows at once."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= 64:
        if abs(exponent) * (base.numerator.bit_length() + base.denominator.bit_length()) <= 2000:
            return base ** int(exponent)
    return complex(base) ** complex(exponent)


OPERATORS = {"+": (1, add), "-": (1, sub), "*": (2, mul), "/": (2, truediv), "^": (3, power)}


def equal(value, gold) -> bool:
    """Whole numbers must be the same; others may differ by half a unit of the sixth decimal, where Math-Verify rounds."""
    if isinstance(value, Fraction) and isinstance(gold, Fraction) and value.denominator == gold.denominator == 1:
        return value == gold
    return abs(complex(value) - complex(gold)) <= 5e-7 * min(1, abs(complex(gold))) + 1e-12 * abs(complex(gold))


def one_value(text: str):
    """The one number that a text names, by itself or among words; None for an expression with variables."""
    values = values_of(text)
    if values is None and len(text) <= ANSWER_CHARACTERS:
        found = NUMBER.findall(text)
        if len(found) == 1 and not re.search(r"[\d*^/+√π=\\{}()]", text.replace(found[0], "", 1)):
            values = values_of(found[0])
    return values[0][0] if values and len(values) == 1 and values[0][0] == values[0][1] else None


def same_maths(answer: str, gold: str) -> bool:
    """Equal values, term by term; where the gold is no maths, equal text."""
    gold = find_boxes(gold)[-1][0] if find_boxes(gold) else gold
    values, golds = values_of(answer), values_of(gold)
    if golds is None:
        return bool(plain(answer)) and plain(answer).replace(" ", "") == plain(gold).replace(" ", "")
    return values is not None and len(values) == len(golds) and all(equal(*pair) for both in zip(values, golds) for pair in zip(*both))


# --- golds that are compared as text, for stage 1 to count ---


def reads_as_maths(question: Mapping) -> bool:
    """Whether a gold that should be a number or an expression can be read as one."""
    kinds = ("list", "math", "integer", "float")
    return question["answer_type"] not in kinds or bool(values_of(gold_texts(question)[0]))


# --- end of these ---


# The embedded world: pictures of shapes, and questions whose need for the picture is known

SIDE = 84  # pixels: a 3 x 3 grid of cells of 28 x 28, one image token each
COLOURS = {"red": (214, 48, 49), "green": (0, 160, 90), "blue": (36, 90, 220), "yellow": (240, 190, 20)}
KINDS = ("circle", "square", "triangle")
COUNTS, COUNT_WEIGHTS = (0, 1, 2, 3, 4), (0.1, 0.2, 0.4, 0.2, 0.1)  # skewed: always saying 2 is right 4 times in 10
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen").split()
WORLD_SIZE = {"train": 960, "test": 320}


Cells = list[tuple[str, str]]  # what the nine cells of a scene hold, row by row: (kind, colour) or ("", "")


def draw_scene(rng: random.Random) -> tuple[Cells, Callable[[Cells], Image.Image]]:
    """Up to eight shapes on a jittered 3 x 3 grid, and the painter that shows these cells, or edited ones in the same places."""
    counts = [0]
    while not 0 < sum(counts) < 9:  # an empty picture would be its own blank
        counts = rng.choices(COUNTS, COUNT_WEIGHTS, k=len(KINDS))
    cells = [(kind, rng.choice(list(COLOURS))) for kind, n in zip(KINDS, counts) for _ in range(n)]
    cells += [("", "")] * (9 - len(cells))
    rng.shuffle(cells)
    ground = tuple(rng.randint(100, 140) for _ in range(3))
    places = [(14 + 28 * (cell % 3) + rng.randint(-2, 2), 14 + 28 * (cell // 3) + rng.randint(-2, 2), rng.randint(7, 10)) for cell in range(9)]

    def paint(cells: Cells) -> Image.Image:
        picture = Image.new("RGB", (SIDE, SIDE), ground)
        draw = ImageDraw.Draw(picture)
        for (kind, colour), (x, y, r) in zip(cells, places):
            if kind == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
            elif kind == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
            elif kind == "triangle":
                draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=COLOURS[colour])
        return picture
    return cells, paint


def number_of(kind: str, cells: Cells) -> int:
    return sum(k == kind for k, _ in cells)


# Each family maps a scene to (as a question, as an order, the answer as a function of the cells, reasoning, the same without
# digits, tags or box); the answer is None where the scene does not allow the question. The warm start tends to answer an order in prose, so that the
# embedded base, as real ones do, loses some answers to their form alone.


def ask_count(shapes, rng):
    kind = rng.choice(KINDS)
    n = number_of(kind, shapes)
    return (f"How many {kind}s are there?", f"Count the {kind}s.", partial(number_of, kind), f"I see: {kind}s {n}.", f"There are {NUMBERS[n]}.")


def ask_colour(shapes, rng):
    single = [(k, c) for k, c in shapes if k and number_of(k, shapes) == 1]
    kind, colour = rng.choice(single) if single else (KINDS[0], "red")
    choices = list(COLOURS)
    truth = lambda cells: "ABCD"[choices.index(dict(cells)[kind])] if number_of(kind, cells) == 1 else None
    letter = truth(shapes)
    return (with_choices(f"What colour is the {kind}?", choices), with_choices(f"Name the colour of the {kind}.", choices),
            truth, f"I see: {kind} {colour}, so {letter}.", f"It is the colour of the {kind}.", choices)


def ask_more(shapes, rng):
    one, two = rng.sample(KINDS, 2)
    a, b = number_of(one, shapes), number_of(two, shapes)
    if a != b and (a > b) != (rng.random() < 0.7):  # skewed: yes is right 7 times in 10
        one, two, a, b = two, one, b, a

    def truth(cells):
        difference = number_of(one, cells) - number_of(two, cells)
        return ("yes" if difference > 0 else "no") if difference else None
    return (f"Are there more {one}s than {two}s?", f"Say yes or no: more {one}s than {two}s.", truth,
            f"I see: {one}s {a}, {two}s {b}.", f"I see {one}s and {two}s.")


def ask_sum(shapes, rng):
    name, thing = rng.choice(("Ann", "Ben", "Eva", "Tom")), rng.choice(("cards", "books", "keys", "pens", "cups", "hats"))
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    told = f"{name} has {a} {thing} and gets {b} more."
    return (f"{told} How many {thing} does {name} have?", f"{told} Give the number of {thing}.", lambda cells: a + b,
            f"{a} and {b} is {a + b}.", f"{name} has {NUMBERS[a + b]} {thing}.")


def ask_both(shapes, rng):
    kind, extra = rng.choice(KINDS), rng.randint(1, 5)
    n = number_of(kind, shapes)
    told = f"Another card has {extra} {kind}s."
    return (f"{told} How many {kind}s are on both?", f"{told} Count the {kind}s on both.", lambda cells: number_of(kind, cells) + extra,
            f"I see: {kind}s {n}. {n} and {extra} is {n + extra}.", f"There are {NUMBERS[n + extra]}.")


# family -> (how to ask, answer_type, needs_image, a guess that never looks)
WORLD = {
    "count": (ask_count, "integer", True, lambda rng: rng.choices(COUNTS, COUNT_WEIGHTS)[0]),
    "colour": (ask_colour, "choice", True, lambda rng: rng.choice("ABCD")),
    "more": (ask_more, "text", True, lambda rng: rng.choices(("yes", "no"), (7, 3))[0]),
    "sum": (ask_sum, "integer", False, lambda rng: rng.randint(2, 18)),
    "both": (ask_both, "integer", True, lambda rng: rng.randint(1, 9)),
}


def ask(family: str, shapes: Cells, rng: random.Random) -> tuple[Question, dict[str, str], Callable[[Cells], object]] | None:
    """A question of a family about a scene (its record without picture), three ways to answer it in the warm start, and its truth elsewhere."""
    how, answer_type, needs_image, guess = WORLD[family]
    question, order, truth, reasoning, prose, *choices = how(shapes, rng)
    gold = truth(shapes)
    if gold is None:
        return None
    as_order = rng.random() < 0.33
    record = {"problem": "<image>" + (order if as_order else question), "answer": str(gold), "answer_type": answer_type,
              "choices": choices[0] if choices else [], "group": family, "needs_image": needs_image, "source": "shapes"}
    weights = (0.25, 0.1, 0.65) if as_order else (0.35, 0.5, 0.15)
    answers = {"reasoned": f"<think>{reasoning}</think>\\boxed{{{gold}}}",
               "guessed": f"<think>I guess.</think>\\boxed{{{guess(rng)}}}", "prose": prose}
    return record, answers | {"style": rng.choices(("reasoned", "guessed", "prose"), weights)[0]}, truth


def asked_scenes(seed: int, limit: int | None) -> Iterator[tuple[Question, Cells, Callable, Callable]]:
    """The questions of the embedded world, with their scenes, painters and truths: families in turn; train and test share no question.

    Two questions are the same if text and picture are, and where the text suffices, if the text is.
    """
    rng, seen = random.Random(f"shapes|{seed}"), set()
    for split, size in WORLD_SIZE.items():
        size, made = min(size, limit or size), 0
        while made < size:
            cells, paint = draw_scene(rng)
            asked, picture = ask(list(WORLD)[made % len(WORLD)], cells, rng), paint(cells)
            if asked is None:
                continue
            record, _, truth = asked
            key = record["problem"] if not record["needs_image"] else (record["problem"], picture.tobytes())
            if key in seen:
                continue
            seen.add(key)
            yield record | {"id": f"shapes/{split}-{made:04d}", "split": split, "images": [picture]}, cells, paint, truth
            made += 1


def shapes_world(seed: int, limit: int | None) -> Iterator[Question]:
    return (question for question, *_ in asked_scenes(seed, limit))


def edit_scene(cells: Cells, truth: Callable, rng: random.Random, changes: bool) -> Cells | None:
    """The scene after one edit, a shape added, taken away, recoloured or replaced, that changes the answer, or that does not.

    None: there is no such edit that leaves a scene as others are, and the question one that has an answer.
    """
    edits = [(cell, new) for cell in range(9) for new in [("", ""), *product(KINDS, COLOURS)] if new != cells[cell]]
    for cell, new in rng.sample(edits, len(edits)):
        edited = cells[:cell] + [new] + cells[cell + 1:]
        usual = number_of("", edited) < 9 and all(number_of(kind, edited) in COUNTS for kind in KINDS)
        if usual and truth(edited) is not None and (truth(edited) != truth(cells)) == changes:
            return edited
    return None


def counterfactuals(seed: int, limit: int | None, changes: bool) -> dict[str, Question]:
    """id -> the question of `shapes_world` about its own picture after one edit, with the answer that is right then; where there is one."""
    found = {}
    for question, cells, paint, truth in asked_scenes(seed, limit):
        edited = edit_scene(cells, truth, random.Random(f"{seed}|{question['id']}|{changes}"), changes)
        if edited:
            found[question["id"]] = question | {"images": [paint(edited)], "answer": str(truth(edited))}
    return found


# The embedded model: a real Qwen2.5-VL of 1.7 million parameters, warm-started on shapes

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WARM_START = {"scenes": 2400, "blanks": 200, "vision_steps": 40, "first_steps": 300, "reasoned_steps": 450, "styled_steps": 150,
              "batch": 32, "learning_rate": 2e-3}


def make_tokenizer(seed: int):
    """A byte-level BPE of Qwen's kind, learnt from the world's own texts."""
    rng, texts = random.Random(f"tokenizer|{seed}"), ["user\nassistant\n"]
    for _ in range(3000):
        asked = ask(rng.choice(list(WORLD)), draw_scene(rng)[0], rng)
        if asked:
            texts += [asked[0]["problem"].removeprefix("<image>") + "\n" + INSTRUCTION, asked[1]["reasoned"], asked[1][asked[1]["style"]]]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 512, show_progress=False, new_special_tokens=SPECIAL_TOKENS)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<|endoftext|>", CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The same class as the 3B, four layers deep. Widths are multiples of 64, which NF4 on CPU requires."""
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text = dict(vocab_size=576, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.06, tie_word_embeddings=True, bos_token_id=None,
                eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]})
    vision = dict(depth=2, hidden_size=128, num_heads=4, intermediate_size=256, out_hidden_size=128,
                  initializer_range=0.06, fullatt_block_indexes=[0, 1])
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"]))


def warm_pictures(seed: int) -> tuple[list, list[Image.Image]]:
    """What the cells of each scene hold, and the pictures: scenes first, then blank ones (nothing in their cells) and noise."""
    rng = random.Random(f"warm start|{seed}")
    scenes = [draw_scene(rng) for _ in range(WARM_START["scenes"])]
    cells, pictures = [cells for cells, _ in scenes], [paint(cells) for cells, paint in scenes]
    for _ in range(WARM_START["blanks"]):
        blank = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(80, 170) for _ in range(3)))
        pictures.append(blank if rng.random() < 0.7 else Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(SIDE * SIDE * 3)))
    return cells + [[("", "")] * 9] * WARM_START["blanks"], pictures


def optimise(parameters: list[torch.Tensor], steps: int, loss_of_step: Callable[[int], torch.Tensor], name: str) -> float:
    """AdamW with a short warm-up and a linear decay to a fifth; returns the last loss."""
    optimizer = torch.optim.AdamW(parameters, lr=WARM_START["learning_rate"], weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 40) * (1 - 0.8 * step / steps))
    for step in tqdm(range(steps), desc=name, disable=None):
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


def teach_tower(model, patches: torch.Tensor, grid: torch.Tensor, cells: list, rng: random.Random) -> torch.Tensor:
    """The vision tower learns what each cell holds, read by a linear layer that is thrown away; returns the features of all pictures.

    `patches` (pictures, patches of each, pixels of a patch), `grid` (1, 3) in patches, features (pictures, 9, hidden).
    From here on the tower is frozen, as in stage 3: the language model learns from features that are computed once.
    """
    kinds = {held: number for number, held in enumerate([("", ""), *((kind, colour) for kind in KINDS for colour in COLOURS)])}
    held = torch.tensor([[kinds[cell] for cell in picture] for picture in cells])
    reader = torch.nn.Linear(model.config.text_config.hidden_size, len(kinds))

    def features(some):
        seen = model.model.get_image_features(patches[some].flatten(0, 1).float(), grid.expand(len(some), -1), return_dict=True)
        return torch.stack(list(seen.pooler_output))

    def loss(step):
        some = rng.choices(range(len(cells)), k=2 * WARM_START["batch"])
        return torch.nn.functional.cross_entropy(reader(features(some)).flatten(0, 1), held[some].flatten())
    optimise([*model.model.visual.parameters(), *reader.parameters()], WARM_START["vision_steps"], loss, "vision tower")
    with torch.no_grad():
        return torch.cat([features(some) for some in torch.arange(len(cells)).split(64)])


def warm_rows(cells: list, step: int, rng: random.Random) -> list[tuple[int, Question, str]]:
    """(number of a picture, question, response) for one step of the warm start: sight first, then reasoning, then styles.

    Any pretrained model has met pictures that say nothing: half the questions that the text answers stand on one, and
    15% of the others, then with the answer that a scene now hidden had. Without these, training on blank pictures could
    only break the model.
    """
    rows, first = [], step < WARM_START["first_steps"]
    scenes = len(cells) - WARM_START["blanks"]
    while len(rows) < WARM_START["batch"]:
        picture = rng.randrange(scenes)
        asked = ask(rng.choice(("count", "count", "colour") if first else list(WORLD)), cells[picture], rng)
        if asked:
            record, answers, _ = asked
            if not first and rng.random() < (0.15 if record["needs_image"] else 0.5):
                picture = rng.randrange(scenes, len(cells))
            styled = step >= WARM_START["first_steps"] + WARM_START["reasoned_steps"]
            rows.append((picture, record, answers[answers["style"] if styled else "reasoned"]))
    return rows


def warm_start(model, tokenizer, image_processor, seed: int) -> float:
    """Plain supervised learning on the world; returns the last loss, nats per response token.

    It ends with a mixture of styles that leaves room for reinforcement: reasoned and tagged, a guess in tags, and prose.
    """
    cells, pictures = warm_pictures(seed)
    rng, patches = random.Random(f"order|{seed}"), []
    for start in range(0, len(pictures), 200):  # a few at a time, and in half precision: 200 MB, not 1 GB
        seen = image_processor(pictures[start:start + 200], return_tensors="pt")
        grid = seen["image_grid_thw"][:1]
        patches.append(seen["pixel_values"].half().unflatten(0, (-1, int(grid.prod()))))
    features = teach_tower(model, torch.cat(patches), grid, cells, rng)
    pad, image = tokenizer.pad_token_id, model.config.image_token_id

    def loss(step):
        rows = warm_rows(cells, step, rng)
        prompts = [tokenize_prompt(record["problem"], [9], tokenizer) for _, record, _ in rows]
        answers = [tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] for _, _, response in rows]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers))
        ids = torch.tensor([p + a + [pad] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)])  # (B, L)
        targets = torch.tensor([[-100] * len(p) + a + [-100] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)])
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=(ids == image).int(), image_grid_thw=grid.expand(len(rows), -1))
        shown = SimpleNamespace(pooler_output=list(features[[picture for picture, _, _ in rows]]), deepstack_features=[])
        hidden = model.model(input_ids=ids, mm_encoder_outputs={"image": shown}, position_ids=positions, use_cache=False).last_hidden_state
        keep = targets[:, 1:] != -100
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][keep]), targets[:, 1:][keep])

    steps = sum(WARM_START[f"{phase}_steps"] for phase in ("first", "reasoned", "styled"))
    return optimise(list(model.model.language_model.parameters()), steps, loss, "language model")


def make_embedded_model(folder: Path, seed: int, max_pixels: int):
    """data/model/: the model as save_pretrained writes it, loaded by every later stage like any other."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": max_pixels})
    loss = warm_start(model, tokenizer, image_processor, seed)
    print(f"embedded model: {model.num_parameters() / 1e6:.2f} M parameters, last loss {loss:.3f} nats per token")
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)


# Sources: hub datasets, local copies of them, and the user's own

IMAGE_TAG = re.compile(r"<image ?(\d{0,2})>")  # <image>, <image1>, <image 1>
ANSWER_TYPES = ("choice", "integer", "float", "list", "text", "math", "open")
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none starts a program, as EPS does
MOST_PIXELS = 64_000_000  # of a picture file; MathVista's largest has 18.3 million
MOST_CHARACTERS = 1_000_000  # of a text in a row, far beyond any prompt: it is not even looked at
CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f]|\f(?=[a-z])")  # \f: read from "\frac"
# In JSON "\frac" is a form feed and "rac", "\theta" a tab and "heta", "\neq" a line break and "eq":
# only a doubled backslash is one. \f, \r and \b before a letter are never meant; \n and \t may be,
# so there the names of LaTeX decide; the rest are no JSON.
ONE_BACKSLASH = re.compile(
    r"(?<!\\)(?:\\\\)*\\([bfr][A-Za-z]+"
    r"|n(?:abla|atural|cong|earrow|eq|exists|geq|leq|mid|ot|otin|prec|sim|subseteq|u"
    r"|warrow|ewline)(?![A-Za-z])|n(?:e|eg|i)(?![A-Za-z.):])"
    r"|t(?:an|anh|au|ext|ext(?:bf|it|rm|sf|tt|style)|frac|heta|herefore|hinspace|ilde|imes|o|op"
    r"|riangle|riangleq)(?![A-Za-z])"
    r"|u(?![0-9A-Fa-f]{4})[A-Za-z]*|[AC-Zac-eg-mo-qsv-z][A-Za-z]*|[(){}[\],;:!%$&#_ ^|])")
UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is no text in the file's encoding
SPLITS = ("train", "validation", "val", "dev", "test", "testmini")  # a file's name may begin so


def place_pictures(text: str, pictures: Sequence, merged: bool) -> tuple[str, list, list[int]]:
    """One `<image>` tag per picture, the pictures in the order of their tags, and the tags' numbers.

    `<image 3>` names the third picture, a bare `<image>` the first that no tag has named; a second
    mention becomes words. So does any beyond the first where one file shows all pictures
    (`merged`). Pictures without a tag stand first.
    """
    given = {}
    for number, picture in enumerate(pictures, 1):
        if picture not in (None, {"bytes": None, "path": None}):  # null, as some write it
            given[number] = picture
    numbers, named, placed, following = [], set(), {}, 1

    def tag(match: re.Match) -> str:
        nonlocal following
        while following in named:
            following += 1
        number = int(match[1] or following)
        numbers.append(number)
        named.add(number)
        if number in placed or (merged and number not in given):
            return f"image {number}"
        if number not in given:
            raise Rejected(f"picture missing: {match[0]}")
        placed[number] = given[number]
        return "<image>"

    text = IMAGE_TAG.sub(tag, text)
    first = [picture for number, picture in given.items() if number not in placed]
    return "<image>" * len(first) + text, first + list(placed.values()), numbers


def unboxed(answer: str) -> str:
    """The content of a gold's last \\boxed{}, as virl39k has them; a gold without one stays."""
    boxes = find_boxes(answer)
    return boxes[-1][0].strip() if boxes else answer.strip()


def record(text: str, pictures: Sequence, answer, choices: Sequence[str] | None = None,
           kind: str = "math", shown: str | None = None, merged: bool = False, **more) -> Question:
    """A question whose pictures are still files.

    `text` is the bare question; `shown` what the model reads, if that is more.
    """
    choices = choices or []
    letters = list(LETTERS[:len(choices)])
    if len(choices) > len(LETTERS):
        raise Rejected("not a question: more choices than letters")
    if not all(isinstance(choice, str) for choice in choices):
        raise Rejected("choices: one is null or no text")
    if [choice.strip("(). ") for choice in choices] == letters:
        shown = shown or text  # the picture says what A, B, ... are
    problem, images, numbers = place_pictures(
        shown or with_choices(text, choices), pictures, merged)
    # Choices follow the text, so the last tags are theirs. Each becomes the number of its picture:
    # as bare tags all choices would be the same text, and every letter would be right.
    in_choices = sum(len(IMAGE_TAG.findall(choice)) for choice in choices)
    own_numbers = iter(numbers[len(numbers) - in_choices:])
    choices = [IMAGE_TAG.sub(lambda _: f"image {next(own_numbers)}", choice) for choice in choices]
    if choices and len({" ".join(choice.split()) for choice in choices}) == 1:
        raise Rejected("choices: all are the same, so that every letter would be right")
    if isinstance(answer, list):
        answer = json.dumps(answer)
    answer = unboxed("" if answer is None else str(answer))
    if choices:
        kind = "choice"
    elif kind == "math" and re.fullmatch(r"[A-Za-z][A-Za-z' -]+", plain(answer)):
        kind = "text"  # Yes, or a name
    return {"text": IMAGE_TAG.sub("", text), "problem": problem, "images": images,
            "answer": answer, "answer_type": kind, "choices": choices, **more}


# Choices

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKS = (re.compile(r"^[ \t]*\(?([A-Ja-j])[.:)、．]", re.M),  # A. or (a), a line each
         re.compile(r"(?<!\w)\(([A-Ja-j])\)"),             # (A) red (B) blue
         re.compile(r"(?:^|(?<=\s))([A-J])[.):、．](?=\s)"))   # A. red B. blue C. green


def letter(text: str, choices: Sequence[str]) -> str:
    """A choice named by its text becomes its letter; of equal choices the first, as the grader
    takes any of them."""
    return LETTERS[choices.index(text)] if text in choices else text


def gold_letter(gold: str, choices: Sequence[str]) -> str:
    """The letter of a gold that may be a letter, with marks or without, or a choice's text.

    A capital letter is one even where a choice has that text. What names none stays as it is.
    """
    if re.fullmatch("[A-Z]", gold):
        return gold
    if gold in choices:
        return letter(gold, choices)
    texts = [plain(choice) for choice in choices]
    if texts.count(plain(gold)) == 1:
        return LETTERS[texts.index(plain(gold))]
    marked = re.fullmatch(r"\(?([A-Za-z])[).:]{0,2}", plain(gold))
    return marked[1].upper() if marked else gold


def some(choices: Sequence[str]) -> Sequence[str]:
    """The choices of a question that must have some."""
    if not choices:
        raise Rejected("choices: none could be read")
    return choices


def listed_choices(text: str, forms: Sequence[re.Pattern] = MARKS) -> list[str]:
    """The choices that a question's text lists, or none: a line each, or on one line.

    They run from the last A on, without a gap. Bare marks mean that the picture shows the choices.
    """
    for form in forms:
        marks = list(form.finditer(text))
        letters = "".join(mark[1] for mark in marks).upper()
        marks = marks[letters.rfind("A"):]
        least = 3 if form is MARKS[2] else 2  # "the line from A. to B. is" lists nothing
        if len(marks) < least or not letters.endswith(LETTERS[:len(marks)]):
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        choices = [text[mark.end():end].strip(" \t\r\n;,") for mark, end in zip(marks, ends)]
        choices[-1] = choices[-1].partition("\n")[0].strip()  # then text that is no choice
        if not any(choices):
            return list(LETTERS[:len(marks)])
        prose = form is not MARKS[0] and any("?" in choice for choice in choices)
        if all(choices) and not prose:
            return choices
    return []


def listed_gold(text: str, gold: str) -> tuple[list[str], str]:
    """The choices that a text lists and the gold's letter, where the gold names one; else none and
    the gold. A letter beyond the last choice stays one, for `check_gold` to reject."""
    choices = listed_choices(text)
    named = gold_letter(unboxed(gold), choices)
    if choices and re.fullmatch("[A-Z]", named):
        return choices, named
    return [], gold


# From a dataset's columns, by name, to a record: columns without a default must be there, others
# than these are not even read


def from_easyr1(problem, images, answer, id=None, category=None):
    """Choices that stand in the text, if any; geometry3k's are not shown: its task is free-form."""
    choices, answer = listed_gold(problem, answer)
    return record(problem, images, answer, choices, shown=problem, id=id, group=category)


def from_mmk12(id, question, image, answer, subject):
    """Test questions list their choices in the text."""
    choices, answer = listed_gold(question, answer)
    return record(question, [image], answer, choices, shown=question, id=id, group=subject)


def from_mathvista(pid, question, decoded_image, choices, unit, precision, answer, answer_type,
                   metadata, query):
    """`query` is its own prompt: hint, question, unit, choices. A gold choice is given by its
    text."""
    choices = some(choices) if answer_type == "text" else choices or []
    return record(question, [decoded_image], letter(answer, choices), choices, answer_type, query,
                  id=pid, unit=unit, precision=None if precision is None else int(precision),
                  group=metadata["task"])


def from_mmmu(id, question, options, answer, question_type,
              image_1, image_2, image_3, image_4, image_5, image_6, image_7):
    """Pictures are named in the question and in choices. An open question's gold may be a list of
    alternatives."""
    choices = some(literal_list(options)) if question_type == "multiple-choice" else []
    if answer.startswith("[") and not choices:
        answer = literal_list(answer)
    pictures = [image_1, image_2, image_3, image_4, image_5, image_6, image_7]
    subject = re.sub(r"^(dev|validation|test)_|_\d+$", "", id)
    return record(question, pictures, answer, choices, "open", id=id, group=subject)


def from_scienceqa(image, question, choices, answer, hint, subject):
    """Its lecture and solution tell the answer: they are not read."""
    context = f"Context: {hint}\n" if hint else ""
    shown = with_choices(context + question, some(choices))
    return record(question, [image], LETTERS[answer], choices, shown=shown, group=subject)


def from_mathvision(id, question, options, decoded_image, answer, subject):
    """One file shows all pictures that the text names."""
    return record(question, [decoded_image], answer, options, merged=True, id=id, group=subject)


def from_mathverse(sample_index, problem_version, question, image, answer, question_type, query_wo):
    """Choices stand in the text or, where the version is "Vision Only", in the picture."""
    choices = []
    if question_type == "multi-choice":
        choices = listed_choices(query_wo, MARKS[:1]) or list("ABCD")
    text = re.split(r"\n *choices", question or "", flags=re.I)[0]
    return record(text, [image], answer, choices, shown=query_wo, id=sample_index,
                  group=problem_version)


def from_wemath(ID, question, option, answer, image_path, key):
    """Choices are one text: "A. 3;B. 4;C. No correct answer"."""
    choices = some(listed_choices(re.sub(r"; *(?=[A-J]\.)", "\n", option), MARKS[:1]))
    return record(question, [image_path], answer, choices, id=f"{ID}-{key}", group=key)


def from_own(problem, images, answer, answer_type=None, choices=None, id=None, group=None,
             unit=None, precision=None, split=None, needs_image=None):
    """The user's own: a line of questions.jsonl, or a row of a parquet with the kit's columns."""
    lists = isinstance(choices or [], list) and isinstance(images, list)
    known = answer_type in (None, *ANSWER_TYPES) and split in (None, "train", "test")
    if not (lists and known and needs_image in (None, True, False)):
        raise Rejected("not a question: choices and images are lists, answer_type is one of "
                       f"{', '.join(ANSWER_TYPES)}, split is train or test, needs_image is true or "
                       "false, or they are left out")
    if "\N{REPLACEMENT CHARACTER}" in f"{problem} {answer} {choices}":
        raise Rejected("not UTF-8: a letter was lost when the text was saved")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise Rejected("gold: the answer is no finite number")
    shown = problem
    if choices:
        choices, answer, shown = own_choices(problem, choices, str(answer).strip())
    elif answer_type in (None, "choice") and isinstance(answer, str | int | float):
        choices, answer = listed_gold(problem, str(answer).strip())
    if answer_type == "choice":
        some(choices)
    texts = {}
    for name, value in (("id", id), ("group", group), ("unit", unit)):
        if value is not None:
            texts[name] = str(value)
    return record(problem, images, answer, choices, answer_type or kind_of(answer), shown,
                  split=split, needs_image=needs_image,
                  precision=None if precision is None else int(precision), **texts)


def own_choices(problem: str, given: list, gold: str) -> tuple[list[str], str, str | None]:
    """The texts of choices, the gold's letter, and the text that shows both where `problem` does.

    A text that lists other choices than are given, or the same in another order, shows the model
    two lists of letters: which one an answer means, nobody could say.
    """
    if any(choice is None or isinstance(choice, list | dict) for choice in given):
        raise Rejected("choices: one is null or no text")
    if any(isinstance(choice, float) and not math.isfinite(choice) for choice in given):
        raise Rejected("choices: one is no finite number")
    choices = [str(choice).strip() for choice in given]
    if not all(choices):
        raise Rejected("choices: one is empty")
    gold = gold_letter(gold, choices)
    unmarked = listed_choices("\n".join(choices), MARKS[:1])
    if len(unmarked) == len(choices):  # "A. red", "B. blue"
        choices = unmarked
    listed = listed_choices(problem)
    if [choice.upper() for choice in choices] == list(LETTERS[:len(listed)]):
        choices = listed  # the texts of these letters
    gold = gold_letter(gold, choices)
    told = [comparable(choice) for choice in listed]
    wanted = [comparable(choice) for choice in choices]
    as_written = comparable(problem).endswith(comparable(with_choices("", choices)))  # by this kit
    if told == wanted or as_written:
        return choices, gold, problem
    if listed_choices(problem, MARKS[:1]) or set(told) & set(wanted):
        raise Rejected("choices: the text lists others, or in another order: give them once")
    return choices, gold, None


def comparable(text: str) -> str:
    """Without what a picture's place in the row decides: `<image>` is `image 2` elsewhere."""
    return plain(re.sub(r"<?\bimage ?\d*\b>?", "image", text))


def kind_of(answer) -> str:
    """The type of a gold whose row names none."""
    if isinstance(answer, list):
        return "open"
    text = str(answer).strip()
    if number := re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", text):
        return "float" if number[1] else "integer"
    return "math" if re.search(r"[\d\\^=]", text) else "text"


@dataclass(frozen=True)
class Source:
    hub: str            # dataset id
    train: str | None   # the split to train on; None: not for training
    test: str | None    # the split to evaluate on
    convert: Callable   # columns -> record, or Rejected
    config: str | None = None  # of the dataset; * is all of them


SOURCES = {
    "geometry3k": Source("hiyouga/geometry3k", "train", "test", from_easyr1),
    "mmr1": Source("MMR1/MMR1-Math-RL-Data-v0", "train", None, from_easyr1),
    "virl39k": Source("PAPOGalaxy/PAPO_ViRL39K_train", "train", None, from_easyr1),
    "mmk12": Source("FanqingM/MMK12", "train", "test", from_mmk12),
    "mathvista": Source("AI4Math/MathVista", None, "testmini", from_mathvista),
    "mmmu": Source("MMMU/MMMU", None, "validation", from_mmmu, "*"),
    "scienceqa": Source("derek-thomas/ScienceQA", None, "test", from_scienceqa),
    "mathvision": Source("MathLLMs/MathVision", None, "test", from_mathvision),
    "mathverse": Source("AI4Math/MathVerse", None, "testmini", from_mathverse, "testmini"),
    "wemath": Source("We-Math/We-Math", None, "testmini", from_wemath),
}
OWN = Source("", "train", "test", from_own)


def hub_tables(name: str, source: Source, split: str) -> list[tuple[str, Dataset]]:
    reach_hub()
    configs = [source.config]
    try:
        if source.config == "*":
            configs = get_dataset_config_names(source.hub)
        tables = [load_dataset(source.hub, config, split=split) for config in configs]
    except Exception as error:  # no network, a changed layout: the hub's errors share no class
        raise UserError(f"source {name} could not be loaded from the hub ({source.hub}, "
                        f"{type(error).__name__}): give a local copy with --local {name}=PATH"
                        ) from error
    names = [f"{source.hub}/{config or 'default'}" for config in configs]
    return list(zip(names, tables))


def local_tables(name: str, source: Source, split: str, path: Path) -> list[tuple[str, Path]]:
    """`path` itself, its questions.jsonl, or its parquets unless they are named after another
    split."""
    def of_split(file: Path) -> bool:  # MathVerse has a testmini_text_only beside its testmini
        word, *_ = re.split("[-_.]" if source is OWN else "[-.]", file.name)
        return word == split or word.partition("_")[0] not in SPLITS

    lines = path / "questions.jsonl"
    if path.is_file():
        files = [path]
    elif source is OWN and lines.is_file():
        files = [lines]
    else:
        parquets = sorted(path.rglob("*.parquet"))
        files = [file for file in parquets if file.is_file() and of_split(file)]
    if not files:
        or_lines = " and no questions.jsonl" if source is OWN else ""
        raise UserError(f"--local {name}={path}: that folder has no parquet of split "
                        f"{split}{or_lines}")
    return [(str(file), file) for file in files]


def read_rows(name: str, path: Path | None, split: str) -> Iterator[tuple[str, int, Mapping | str]]:
    """(file, number of the row in it, row) of a split, from the hub or from `path`; one row in
    memory at a time."""
    source = SOURCES.get(name, OWN)
    split = getattr(source, split)
    if path is None:
        tables = hub_tables(name, source, split)
    else:
        tables = local_tables(name, source, split, path)
    for file, table in tables:
        with reading(file, "get it again"):
            if isinstance(table, Dataset):
                columns = table.column_names
            elif table.suffix == ".jsonl":
                yield from read_lines(table)
                continue
            else:
                table = pq.ParquetFile(table)
                columns = table.schema_arrow.names
            wanted = wanted_columns(file, columns, source)
            if isinstance(table, Dataset):
                batches = table.select_columns(wanted).with_format("arrow").iter(1)
            else:
                batches = table.iter_batches(1, columns=wanted)
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield file, number, row


def wanted_columns(file: str, columns: Sequence[str], source: Source) -> list[str]:
    """Those that the source's converter reads; a sentence where it needs one that is not there."""
    fields = signature(source.convert).parameters
    missing = [name for name, field in fields.items()
               if name not in columns and field.default is Parameter.empty]
    if missing:
        raise UserError(f"{file} lacks the columns {', '.join(missing)}: it is no copy of "
                        f"{source.hub or 'what the kit reads'}")
    return [name for name in fields if name in columns]


def read_lines(file: Path) -> Iterator[tuple[str, int, str]]:
    """(file, number, line) of JSON lines; bytes that are no text stay marked, for `parse_line`."""
    with open(file, encoding=encoding_of(file), errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf".decode("ascii", "surrogateescape"))
            if line.strip():
                yield str(file), number, line


def encoding_of(file: Path) -> str:
    """Of a text file: UTF-16 where its first bytes say so, UTF-8 where it is that throughout.

    Else it is of another encoding, in which a line may look like UTF-8 by chance, as a lone \\u56fe
    in GBK does: then ASCII, so that no line with any other letter is taken.
    """
    with open(file, "rb") as raw:
        start = raw.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        with open(file, encoding="utf-8-sig") as text:
            while text.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return "ascii"
    return "utf-8-sig"


def open_picture(raw: Mapping | str, folder: Path | None) -> Image.Image:
    """Decode a picture of unknown origin, in the row or in a file of the source's own folder;
    raises Rejected with the reason."""
    try:
        with Image.open(picture_file(raw, folder), formats=PICTURE_FORMATS) as picture:
            short, long = sorted(picture.size)  # known before anything is decoded
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


def picture_file(raw: Mapping | str, folder: Path | None) -> Path | io.BytesIO:
    """What holds a picture: the row's own bytes, or a file that lies within the source's folder."""
    if not isinstance(raw, str):
        if raw["bytes"] is not None:
            return io.BytesIO(raw["bytes"])
        raw = raw["path"]
    file = (folder / raw).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise Rejected("picture refused: its path leaves the source's folder")
    if not file.is_file():
        raise Rejected("picture missing: no such file")
    return file


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, or in floats, as bright as its own scale says: Pillow would clip."""
    values = np.asarray(picture, np.float32)
    highest = values.max()
    if not math.isfinite(highest):
        raise Rejected("picture unreadable: its brightness is no number")
    for white in (1 if picture.mode == "F" else 255, 255, 65535, highest):
        if highest <= white:
            return Image.fromarray((values.clip(0) * (255 / white)).astype(np.uint8))


def fit(picture: Image.Image, image_processor) -> Image.Image:
    """Scale a picture above the pixel budget to the size that the image processor chooses, its
    filter included.

    Then the processor finds nothing left to resize, and no picture is resampled twice. Smaller
    pictures stay.
    """
    side = image_processor.patch_size * image_processor.merge_size
    smallest, budget = (image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
    size = picture.size
    for _ in range(99):  # twice only for strips, left above the budget: no side is below a patch
        height, width = smart_resize(size[1], size[0], side, smallest, budget)
        if max(math.prod(size), width * height) <= budget:
            break
        size = (width, height)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def difference_hash(picture: Image.Image) -> int:
    """256 bits: whether brightness falls, by more than noise, from each cell of a 17 x 16 grid to
    the next."""
    cells = picture.convert("L").resize((17, 16), Image.Resampling.BOX).tobytes()
    return sum((cells[i] > cells[i + 1] + 2) << i for i in range(17 * 16) if i % 17 < 16)


def alike(hashes: Sequence[int], others: Sequence[int]) -> bool:
    """Whether pictures look alike, pair by pair: they differ in a quarter, at most, of the bits
    that are set in the one with fewer.

    Relative, for a sparse drawing sets few. Saved again as JPEG, or at half its size, a picture is
    like itself; so are drawings that differ in a label alone.
    """
    if len(hashes) != len(others):
        return False
    return all(4 * (one ^ two).bit_count() <= min(one.bit_count(), two.bit_count())
               for one, two in zip(hashes, others))


# From rows to questions


@contextmanager
def rejecting(rejected: list[dict], **where):
    """The work on one row: where it raises Rejected, the row goes to `rejected` with the reason."""
    try:
        yield
    except Rejected as error:
        rejected.append(where | {"reason": str(error)})


def to_question(name: str, split: str, row: Mapping | str, number: int) -> Question | None:
    """A row as a question with its pictures still encoded, None if it says that it is for the other
    split, or Rejected."""
    convert = SOURCES.get(name, OWN).convert
    fields = signature(convert).parameters
    try:
        texts = [row] if isinstance(row, str) else row.values()
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if longest > MOST_CHARACTERS:
            raise Rejected(f"too long: {longest} characters")
        if isinstance(row, str):
            row = parse_line(row, fields)
        missing = [key for key, field in fields.items()
                   if key not in row and field.default is Parameter.empty]
        if missing:
            raise Rejected(f"not a question: it lacks {', '.join(missing)}")
        question = convert(**{column: row[column] for column in fields if column in row})
        if question.get("split") not in (None, split):
            return None
        check_question(question)
    except Rejected:
        raise
    except Exception as error:  # a row may hold anything
        raise Rejected(f"not a question: {type(error).__name__} {str(error)[:100]}") from error
    own_id = question.get("id")
    if own_id in (None, ""):
        own_id = f"{split}-{number}"
    return question | {"id": f"{name}/{own_id}", "source": name, "split": split}


def parse_line(line: str, fields: Iterable[str]) -> dict:
    """A line of JSON as a row, or Rejected where it would be read as something else than meant."""
    if UNDECODED.search(line):
        raise Rejected("not UTF-8: save the file as UTF-8")
    if latex := ONE_BACKSLASH.search(line):
        name = latex[1][:20]
        raise Rejected(f"backslash: JSON reads \\{name} as no LaTeX, double it: \\\\{name}; behind "
                       "a line break or tab that is meant put a space")
    row = json.loads(line)
    unknown = [key for key in row if key not in fields]
    if unknown:
        raise Rejected(f"not a question: no field is called {unknown[0][:40]!r}, choose from "
                       f"{', '.join(fields)}")
    return row


def check_question(question: Question):
    """Reject what a converter let through and no parquet or grader can take."""
    texts = [question["problem"], *gold_texts(question), *question["choices"]]
    for name in ("id", "group", "unit"):
        if question.get(name) is not None:
            texts.append(str(question[name]))
    whole = " ".join(texts)
    whole.encode()  # half a surrogate pair fits no file
    if CONTROL.search(whole):
        raise Rejected("control characters: escaped LaTeX, such as \\beta read as \\b and eta, "
                       "looks like this")
    if not 0 <= (question.get("precision") or 0) <= 15:
        raise Rejected(f"not a question: precision {question['precision']}")
    if not question["images"]:
        raise Rejected("no picture")
    check_gold(question)


def chosen(name: str, split: str, path: Path | None, config: Config,
           rejected: list[dict]) -> Iterator[tuple[str, int, Question]]:
    """(file, number of the row in it, question) of the rows to take, pictures still encoded.

    A first pass, which decodes no picture, finds them: of `limit` each group has its share. An id
    there already gets -2, -3, ...
    """
    if name == "shapes":
        for number, made in enumerate(shapes_world(config.seed, config.limit)):
            if made["split"] == split:
                yield "shapes", number, made
        return
    numbers, ids, groups, repeats = [], {}, [], Counter()
    for number, (file, n, row) in enumerate(read_rows(name, path, split)):
        with rejecting(rejected, source=name, file=file, row=n, id=None):
            if question := to_question(name, split, row, number):
                unique = question["id"]
                while unique in ids:
                    repeats[question["id"]] += 1
                    unique = f"{question['id']}-{repeats[question['id']] + 1}"
                ids[unique] = None
                numbers.append(number)
                groups.append(question.get("group"))
    ids = list(ids)
    take = {numbers[i]: ids[i] for i in stratified(ids, groups, config.limit)}
    with tqdm(desc=f"{name} {split}", total=len(take), leave=False, disable=None) as bar:
        for number, (file, n, row) in enumerate(read_rows(name, path, split)):
            if number in take:
                yield file, n, to_question(name, split, row, number) | {"id": take[number]}
                bar.update()


def finish(question: Question, folder: Path | None, tokenizer, image_processor,
           most_tokens: int) -> Question:
    """Decode and scale the pictures, and count tokens; a prompt that is too long is rejected, never
    cut."""
    if len(question["problem"]) > 100 * most_tokens:
        raise Rejected(f"too long: {len(question['problem'])} characters")
    pictures, image_tokens = [], []
    for raw in question["images"]:
        picture = raw if isinstance(raw, Image.Image) else open_picture(raw, folder)
        picture = fit(picture, image_processor)
        patches = image_processor.get_number_of_image_patches(picture.height, picture.width)
        pictures.append(picture)
        image_tokens.append(patches // image_processor.merge_size**2)
    tokens = len(tokenize_prompt(question["problem"], image_tokens, tokenizer))
    if tokens > most_tokens:
        raise Rejected(f"too long: {tokens} tokens")
    return question | {"images": pictures, "image_tokens": sum(image_tokens),
                       "prompt_tokens": tokens}


def check_new(question: Question, seen: dict, benchmarks: dict):
    """Reject a training question that is there already, or that a benchmark asks too: the same text
    and like pictures. A benchmark is scored over all it has.

    `seen`: (split, problem, pictures) -> id. `benchmarks`: bare text -> [(hashes of pictures, id)]
    of test questions. Both grow.
    """
    digests = [hashlib.sha256(picture.tobytes()).digest() for picture in question["images"]]
    key = question["split"], question["problem"], *digests
    first = seen.setdefault(key, question["id"])
    if first != question["id"] and question["split"] == "train":
        raise Rejected(f"duplicate: of {first}")
    if question["source"] == "shapes":  # its splits share no question by construction
        return
    text = plain(question["text"])
    hashes = [difference_hash(picture) for picture in question["images"]]
    if question["split"] == "test":
        benchmarks.setdefault(text, []).append((hashes, question["id"]))
        return
    for others, other in benchmarks.get(text, []):
        if alike(hashes, others):
            raise Rejected(f"leak: also {other}")


# The stage


def check_config(config: Config) -> dict[str, Path]:
    """Fill in the preset; a sentence for what cannot work. Returns the sources to read locally."""
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown: choose from {', '.join(PRESETS)}")
    for name, value in PRESETS[config.preset].items():
        if getattr(config, name) in (None, []):
            setattr(config, name, value)
    names, local = [config.train, *config.benchmarks], {}
    for item in config.local:
        if not re.fullmatch(rf"(?!shapes=){SOURCE_NAME.pattern}=.+", item):
            raise UserError(f"--local {item} is not NAME=PATH with a name of letters, digits, _ . "
                            "and -, other than shapes")
        name, _, path = item.partition("=")
        local[name] = Path(path)
    for name in names:
        if name not in SOURCES and name not in local and name != "shapes":
            raise UserError(f"source {name} is unknown: choose from shapes, {', '.join(SOURCES)}, "
                            f"or give your own with --local {name}=PATH")
    for name in local:
        if name not in names:
            raise UserError(f"--local {name} is neither --train nor among --benchmarks: name it "
                            "there too")
    if config.train in SOURCES and SOURCES[config.train].train is None:
        raise UserError(f"--train {config.train} is a benchmark: trained on, its scores say "
                        "nothing, so choose another source")
    for name in config.benchmarks:
        if name in SOURCES and SOURCES[name].test is None:
            raise UserError(f"--benchmarks {name} has no test split: it is for --train")
    check_least(config, 1, "limit", "max_pixels", "max_prompt_tokens")
    return local


def fingerprint(path: Path) -> str:
    """Of a file, or of the names and contents of all files in a folder."""
    if not path.exists():
        raise UserError(f"{path} is missing: check --local")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digests = [(file.relative_to(path).as_posix(), sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


@lru_cache
def reach_hub():
    """Without a connection only the cache counts: the hub's own library would try again for half a
    minute at each file."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the network, a proxy or a setting says
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = True


@contextmanager
def loading(model: str):
    """The work on a model's files, of a folder or the hub: whatever they raise becomes a sentence."""
    if not Path(model).is_dir():
        reach_hub()
    try:
        yield
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"model {model} could not be loaded from the hub or a folder "
                        f"({type(error).__name__}): give a whole copy with --model FOLDER") from error


def load_model_parts(model: str, max_pixels: int) -> tuple:
    """Tokenizer and image processor, if the model is one of the families that the kit trains."""
    with loading(model):
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        tokenizer, image_processor = load_processors(model, max_pixels)
        side = int(image_processor.patch_size) * image_processor.merge_size
        image_processor(Image.new("RGB", (side, side)))  # it works
    if kind not in FAMILIES:
        raise UserError(f"{model} is a {kind} model: this kit trains {', '.join(FAMILIES)}")
    try:
        ids = tokenize_prompt("<image>", [1], tokenizer)
        pads = ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        whole = pads == 1 and INSTRUCTION in tokenizer.decode(ids)
    except Exception:  # none, or a broken one
        whole = False
    if not whole:
        raise UserError(f"{model} has no chat template for pictures or no whole tokenizer: copy "
                        "chat_template.jinja, tokenizer.json and tokenizer_config.json of the "
                        "published model there")
    if max_pixels < side**2:
        raise UserError(f"--max_pixels {max_pixels} is less than one image token: choose at least "
                        f"{side**2}")
    return tokenizer, image_processor


MADE_FROM = "made_from.json"  # beside the embedded model: its recipe


def hash_model(data: Path, model: str) -> dict[str, str]:
    """What identifies a model and its processors: file, relative to `data` where it lies there, ->
    sha256; of a hub model, name -> commit."""
    embedded = model == "embedded"
    if not embedded and not Path(model).is_dir():
        with loading(model):
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return {f"hub:{model}": config._commit_hash or "unknown"}
    folder = data / "model" if embedded else Path(model).resolve()
    kinds = (".safetensors", ".json", ".jinja", ".txt")
    files = [file for file in sorted(folder.iterdir())
             if file.suffix in kinds and file.name != MADE_FROM and file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{folder} has no weights as .safetensors, and others can hold code: save "
                        "them so with save_pretrained")
    for file in weights:
        with loading(str(folder)), safe_open(file, "np"):
            pass  # its header fits its length
    return {f"model/{file.name}" if embedded else str(file): sha256(file) for file in files}


def embedded_model(data: Path, seed: int, max_pixels: int):
    """Make data/model/ unless it was made by this very recipe: seed, pixels, packages and code."""
    recipe = {"seed": seed, "max_pixels": max_pixels, "versions": versions(),
              "code": sha256(Path(__file__))}
    note = data / "model" / MADE_FROM
    if note.exists() and read_jsonl(note) == [recipe]:
        print(f"{data / 'model'}: up to date")
        return
    print(f"{data / 'model'}: learning for three minutes, and again after a change of this file, "
          "--seed, --max_pixels or packages", flush=True)
    with replacing(data / "model") as part:
        make_embedded_model(part, seed, max_pixels)
        (part / note.name).write_text(json.dumps(recipe), encoding="utf-8")
        shutil.rmtree(data / "model", ignore_errors=True)


def prepare_source(name: str, config: Config, path: Path | None, processors: tuple,
                   benchmarks: dict, rejected: list[dict]) -> tuple[dict[str, int], dict[str, int]]:
    """Write data/questions/SOURCE.parquet, test questions first; returns how many there are of each
    split, and of how many the gold is compared as text although it should be maths."""
    splits = ["test"] if name in config.benchmarks else []
    if name == config.train:
        splits.append("train")
    counts, as_text = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    before, seen = len(rejected), {}
    folder = path.parent if path and not path.is_dir() else path

    def questions() -> Iterator[Question]:
        for split in splits:
            for file, n, question in chosen(name, split, path, config, rejected):
                with rejecting(rejected, source=name, file=file, row=n, id=question["id"]):
                    question = finish(question, folder, *processors, config.max_prompt_tokens)
                    check_new(question, seen, benchmarks)
                    counts[split] += 1
                    if not reads_as_maths(question):
                        as_text[split] += 1
                    yield question
            if not counts[split]:
                why = reasons(rejected[before:]) or "its files are empty"
                raise UserError(f"source {name} has no {split} question left: {why}")

    file = Path(config.data) / input_path(name, "clean")
    write_questions(file, questions(), {})
    told = []
    for split in splits:
        note = f" (golds compared as text: {as_text[split]})" if as_text[split] else ""
        told.append(f"{counts[split]} {split} questions{note}")
    why = f" ({reasons(rejected[before:])})" if len(rejected) > before else ""
    print(f"{file}: {', '.join(told)}, rejected {len(rejected) - before}{why}")
    return counts, as_text


def reasons(rejected: list[dict]) -> str:
    """How often each reason, without its details."""
    counts = Counter(row["reason"].partition(":")[0] for row in rejected)
    return ", ".join(f"{reason} {n}" for reason, n in counts.most_common())


def main(config: Config) -> dict:
    """Make the questions and, for preset tiny, the model; returns study.json."""
    warnings.filterwarnings("ignore", module="PIL")  # a doubtful picture is rejected, or taken
    local, data = check_config(config), Path(config.data)
    inputs = {name: fingerprint(path) for name, path in local.items()}
    model = config.model
    if model == "embedded":
        embedded_model(data, config.seed, config.max_pixels)
        model = str(data / "model")
    processors = load_model_parts(model, config.max_pixels)
    benchmarks = list(dict.fromkeys(config.benchmarks))
    plan = {"preset": config.preset, "model": config.model, "seed": config.seed,
            "max_pixels": config.max_pixels, "max_prompt_tokens": config.max_prompt_tokens,
            "limit": config.limit, "sources": {"train": config.train, "benchmarks": benchmarks},
            "versions": versions(), "code": sha256(Path(__file__)), "inputs": inputs,
            "model_files": hash_model(data, config.model)}
    path = data / "study.json"
    old = load_study(data) if path.exists() else None
    if old and is_current(data, old, plan):
        print(f"{data / 'questions'}: up to date")
        return old
    names = [name for name in benchmarks if name != config.train]
    names.append(config.train)  # last: its leaks are looked for in the benchmarks
    asked, rejected, counts, as_text = {}, [], {}, {}
    try:
        for name in names:
            counts[name], as_text[name] = prepare_source(
                name, config, local.get(name), processors, asked, rejected)
    finally:  # also where a source has no question left: here it says why
        write_jsonl(data / "questions" / "rejected.jsonl", rejected)
    artifacts = [*(input_path(name, "clean") for name in names), "questions/rejected.jsonl"]
    study = plan | {"questions": counts, "golds_as_text": as_text,
                    "artifacts": {name: sha256(data / name) for name in artifacts}}
    with replacing(path) as part:
        part.write_text(json.dumps(study, indent=1), encoding="utf-8")
    print(f"{data / 'questions' / 'rejected.jsonl'}: {len(rejected)} rows that can't be used, and "
          f"why\n{path}: the record of all this")
    return study


def is_current(data: Path, study: Mapping, plan: Mapping) -> bool:
    """Whether a study was made by this plan, and its artifacts are still there as they were made."""
    if any(study.get(key) != value for key, value in plan.items()):
        return False
    for name, digest in study["artifacts"].items():
        if not (data / name).exists() or sha256(data / name) != digest:
            return False
    return True


if __name__ == "__main__":
    run(main, Config, __doc__)
