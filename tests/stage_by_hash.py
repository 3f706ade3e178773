# SPDX-License-Identifier: MIT
"""Stages as their command lines run them, but with a short warm start (WARM_START changes it), and the hash of a response is
its verdict: a model of a few steps never answers right.

    python tests/stage_by_hash.py 03_train_grpo --data DIR ... [AND 04_evaluate --data DIR ...]
"""
import importlib
import json
import os
import sys

from conftest import hashed_grade
from stage import WARM_START

prepare = importlib.import_module("01_prepare")
prepare.grade = hashed_grade  # in the worker processes too: they import this file
prepare.WARM_START.update(json.loads(os.environ.get("WARM_START", "null")) or WARM_START)

if __name__ == "__main__":
    arguments = sys.argv[1:]
    while arguments:
        end = arguments.index("AND") if "AND" in arguments else len(arguments)
        name, *sys.argv[1:] = arguments[:end]
        stage = importlib.import_module(name)
        prepare.run(stage.main, stage.Config, stage.__doc__)
        arguments = arguments[end + 1:]
