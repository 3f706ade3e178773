# SPDX-License-Identifier: MIT
"""The stages as fixtures: a file name that begins with a digit can only be imported by import_module."""
import importlib
import math
import os
import pathlib
import re
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
importlib.import_module("01_prepare").fix_arithmetic(1)  # before torch is loaded; as in a worker process

import datasets
import hypothesis
import torch
import transformers as hf

import stage
from stage import hashed_grade


def _stage(name):
    return pytest.fixture(scope="session", name=name[3:].split("_")[0])(lambda: importlib.import_module(name))


prepare = _stage("01_prepare")
corrupt = _stage("02_corrupt")
train = _stage("03_train_grpo")
evaluate = _stage("04_evaluate")
report = _stage("05_report")

# the same examples on every machine, until EXAMPLES asks for more of them
hypothesis.settings.register_profile("kit", deadline=None, derandomize="EXAMPLES" not in os.environ)
hypothesis.settings.load_profile("kit")

VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
CORRUPTIONS = stage.SMALLEST["02_corrupt"][3:]


def sharpen(model):
    """Random weights large enough that attention, positions and pictures decide the next token."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3 if "embed" in name or "lm_head" in name else parameter[0].numel() ** -0.5)
    return model


def tiny_model(kind, tokenizer, vocabulary=576):
    """A few layers of each family that the kit trains; Qwen3-VL feeds pictures to its first layers too."""
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in VISION}
    text = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]})
    small = dict(depth=2, num_heads=4)
    config_class, model_class, text_more, vision = {
        "qwen2_vl": (hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, {}, dict(embed_dim=64, hidden_size=64, mlp_ratio=2)),
        "qwen2_5_vl": (hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, {}, dict(
            hidden_size=64, intermediate_size=128, out_hidden_size=64, fullatt_block_indexes=[1], window_size=56)),
        "qwen3_vl": (hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, {"head_dim": 16}, dict(
            hidden_size=64, intermediate_size=128, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])),
    }[kind]
    return sharpen(model_class(config_class(
        text_config=text | text_more, vision_config=small | vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=False)))


@pytest.fixture(scope="session")
def tokenizer(prepare):
    return prepare.make_tokenizer(0)


@pytest.fixture(scope="session")
def base_folder(prepare, tokenizer, tmp_path_factory):
    """The embedded architecture with random weights, as a folder that stages 1 and 3 load like any model."""
    folder = tmp_path_factory.mktemp("model")
    processor = prepare.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    for part in (sharpen(prepare.make_model(tokenizer)), tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def study_folder(prepare, corrupt, base_folder, tmp_path_factory):
    """What stages 1 and 2 leave behind; tests that write take a copy."""
    data = tmp_path_factory.mktemp("study")
    prepare.main(prepare.Config(model=str(base_folder), data=str(data), limit=20))
    corrupt.main(corrupt.Config(data=str(data), workers=1, corruptions=["blank", "misleading", "removed"], preview_rows=0))
    return data


@pytest.fixture(scope="session")
def model(base_folder):
    return str(base_folder)


def run_stages(data, *modules):
    results = []
    for module, options in zip(modules, stage.SMALLEST.values()):
        (config,) = hf.HfArgumentParser(module.Config).parse_args_into_dataclasses(["--data", str(data), *options])
        results.append(module.main(config))
    return results[3], results[4]


def artifacts(data):
    """Path -> content of all in a data folder, but for what a clock or the memory says, and where PEFT found the base."""
    told = re.compile(rb'("|&#34;)(\w+_s|seconds|peak_gb)\1: [\d.e-]+|(?<="base_model_name_or_path": )"[^"]*"')
    files = [path for path in sorted(data.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    content = lambda path: told.sub(b"", path.read_bytes()) if path.suffix in (".json", ".jsonl", ".html") else path.read_bytes()
    return {str(path.relative_to(data)): content(path) for path in files}


@pytest.fixture(scope="session")
def study(tmp_path_factory, prepare, corrupt, train, evaluate, report):
    """A study with a warm start of a few steps: the model knows next to nothing, the plumbing is the real one."""
    data, recipe = tmp_path_factory.mktemp("study") / "data", dict(prepare.WARM_START)
    prepare.WARM_START.update(stage.WARM_START)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "grade", stage.paid_by_hash(prepare.grade))
        answers, results = run_stages(data, prepare, corrupt, train, evaluate, report)
    prepare.WARM_START.update(recipe)
    return data, answers, results


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Where the processes stand and what they take for home: what they leave there is found."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def server(home):
    os.makedirs(home / "tmp")
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home / "tmp")}
    server = stage.Server(cwd=home, env=environment)
    yield server
    server.close()


def undecoded(table):
    """The same rows with pictures as bytes."""
    return table.cast_column("images", datasets.List(datasets.Image(decode=False)))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="what takes minutes: simulated studies, an emulated processor")
    parser.addoption("--card", action="store_true", help="what needs a CUDA card, which is hidden from all other tests")
    parser.addoption("--within", type=float, default=math.inf, help="seconds after which no further test begins: it is skipped")


def pytest_configure(config):
    config.ends = time.monotonic() + config.getoption("--within")
    config.addinivalue_line("markers", "slow: runs with --slow alone")
    config.addinivalue_line("markers", "card: runs with --card alone")
    if not config.getoption("--card"):  # before anything asks for a card, and for processes that tests start
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """Either the tests of minutes, or those of a card, or all the others."""
    def asked(item):
        return all(config.getoption(f"--{name}") == (name in item.keywords) for name in ("slow", "card"))

    wanted = [item for item in items if asked(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.ends:
        pytest.skip("no time is left (--within)")
