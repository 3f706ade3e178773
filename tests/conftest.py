# SPDX-License-Identifier: MIT
"""The stages as fixtures: a file name that begins with a digit can only be imported by import_module."""
import importlib
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network


def _stage(name):
    return pytest.fixture(scope="session", name=name[3:].split("_")[0])(lambda: importlib.import_module(name))


prepare = _stage("01_prepare")
corrupt = _stage("02_corrupt")
train = _stage("03_train_grpo")
evaluate = _stage("04_evaluate")
report = _stage("05_report")

CORRUPTIONS = ["blank", "removed", "mismatch", "blur", "blur-0.05", "misleading"]


def run_stages(data, prepare, corrupt, train, evaluate, report):
    prepare.main(prepare.Config(data=str(data), limit=40))
    corrupt.main(corrupt.Config(data=str(data), corruptions=CORRUPTIONS))
    train.main(train.Config(data=str(data), steps=2, prompts_per_step=4, group_size=4, max_new_tokens=24))
    answers = evaluate.main(evaluate.Config(data=str(data), max_new_tokens=24))
    return answers, report.main(report.Config(data=str(data)))


@pytest.fixture(scope="session")
def study(tmp_path_factory, prepare, corrupt, train, evaluate, report):
    """A study with a warm start of a few steps: the model knows next to nothing, the plumbing is the real one."""
    data, recipe = tmp_path_factory.mktemp("study") / "data", dict(prepare.WARM_START)
    prepare.WARM_START.update(scenes=64, vision_steps=3, first_steps=3, reasoned_steps=3, styled_steps=3, batch=8)
    answers, results = run_stages(data, prepare, corrupt, train, evaluate, report)
    prepare.WARM_START.update(recipe)
    return data, answers, results
