# SPDX-License-Identifier: MIT
"""Coverage-guided fuzzing, by hand: the grader never raises, bad options and hostile sources end in a sentence or a reason.

    pip install atheris && python tests/fuzz.py grader -atheris_runs=100000
    python tests/fuzz.py options -atheris_runs=50000
    python tests/fuzz.py loaders -atheris_runs=50000

Whatever escapes is printed with the input that did it; `-seed=N` and a folder of inputs are libFuzzer's own options.
"""
import contextlib
import importlib
import io
import os
import pathlib
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
with atheris.instrument_imports(include=["01_prepare"]):
    prepare = importlib.import_module("01_prepare")
from PIL import Image

TEXTS = ("<think>", "</think>", "\\boxed{", "}", "<answer>", "</answer>", "(A)", "B.", "3.5", "-1/2", "\\frac", "\\sqrt", "^", "pi",
         "[1, 2]", "answer is ", "<image>", "<image 2>", "<|image_pad|>", "\n", "nan", "1e999", "x")
FIELDS = ("problem", "images", "answer", "answer_type", "choices", "id", "group", "unit", "precision", "split", "needs_image")
OPTIONS = ("--preset", "--train", "--benchmarks", "--local", "--limit", "--seed", "--max_pixels", "--max_prompt_tokens", "--model",
           "shapes", "mathvista", "tiny", "mine=x", "-1", "0", "nan", "1e9", "--", "@x", "--data")


def text(data, most=8):
    parts = (TEXTS[data.ConsumeIntInRange(0, len(TEXTS) - 1)] if data.ConsumeBool() else data.ConsumeUnicode(12)
             for _ in range(data.ConsumeIntInRange(0, most)))
    return "".join(parts)


def grader(raw):
    """Any response to any question that stage 1 would take: no exception, nor more than a few seconds."""
    data = atheris.FuzzedDataProvider(raw)
    kind = prepare.ANSWER_TYPES[data.ConsumeIntInRange(0, len(prepare.ANSWER_TYPES) - 1)]
    choices = [text(data, 3) for _ in range(data.ConsumeIntInRange(0, 5))] if kind == "choice" else []
    question = {"problem": "", "answer": text(data, 3), "answer_type": kind, "choices": choices,
                "source": data.PickValueInList(["mine", *prepare.BENCHMARKS]), "precision": data.PickValueInList([None, 0, 2])}
    try:
        prepare.check_gold(question)
    except prepare.Rejected:
        question |= {"answer": "A" if choices else "3", "answer_type": "choice" if choices else "integer"}
    response = text(data, 20)
    prepare.grade(response, question, reward=data.ConsumeBool(), think_opened=data.ConsumeBool())
    prepare.reads_as_maths(question)


def options(raw):
    """Any command line: a config or one sentence."""
    data = atheris.FuzzedDataProvider(raw)
    words = [OPTIONS[data.ConsumeIntInRange(0, len(OPTIONS) - 1)] if data.ConsumeBool() else data.ConsumeUnicode(8)
             for _ in range(data.ConsumeIntInRange(0, 8))]
    parser = prepare.HfArgumentParser(prepare.Config, allow_abbrev=False)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
        prepare.check_config(config)
    except SystemExit as end:  # argparse's own words
        assert end.code in (0, 2)
    except prepare.UserError:
        pass


def loaders(raw):
    """A line, a picture or a parquet: taken or refused with a reason."""
    data = atheris.FuzzedDataProvider(raw)
    what = data.ConsumeIntInRange(0, 3)
    try:
        if what == 0:  # a line as it is
            prepare.to_question("mine", "test", data.ConsumeUnicode(300), 0)
        elif what == 1:  # fields of any kind
            kinds = (lambda: text(data), lambda: data.ConsumeInt(9), lambda: data.ConsumeFloat(), lambda: None,
                     lambda: [text(data, 3), text(data, 3)], lambda: {text(data, 1): text(data, 1)}, lambda: "choice",
                     lambda: "test", lambda: ["0.png"])
            row = {name: kinds[data.ConsumeIntInRange(0, len(kinds) - 1)]() for name in FIELDS if data.ConsumeBool()}
            prepare.to_question("mine", "test", {"problem": text(data), "images": ["0.png"], "answer": text(data, 3)} | row, 0)
        elif what == 2:  # a picture, from a real one's beginning
            kind = data.PickValueInList(list(SEEDS))
            start = SEEDS[kind][:data.ConsumeIntInRange(0, len(SEEDS[kind]))]
            picture = prepare.open_picture({"bytes": start + data.ConsumeBytes(data.remaining_bytes()), "path": None}, None)
            assert picture.mode == "RGB"
        else:
            (FOLDER / "a.parquet").write_bytes(b"PAR1" + data.ConsumeBytes(data.remaining_bytes()) + b"PAR1")
            list(prepare.read_rows("mine", FOLDER, "test"))
    except (prepare.Rejected, prepare.UserError) as error:
        assert 0 < len(str(error)) < 1000


def saved(kind):
    buffer = io.BytesIO()
    Image.effect_noise((12, 9), 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


if __name__ == "__main__":
    SEEDS, FOLDER = {kind: saved(kind) for kind in prepare.PICTURE_FORMATS}, pathlib.Path(tempfile.mkdtemp())
    target = {"grader": grader, "options": options, "loaders": loaders}[sys.argv.pop(1)]
    atheris.Setup([sys.argv[0], "-max_len=600", "-len_control=0", "-timeout=300", *sys.argv[1:]], target)
    atheris.Fuzz()
