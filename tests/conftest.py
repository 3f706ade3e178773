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
