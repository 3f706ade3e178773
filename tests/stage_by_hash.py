# SPDX-License-Identifier: MIT
"""A stage as its command line runs it, but the hash of a response is its verdict: random weights never answer right.

    python tests/stage_by_hash.py 03_train_grpo --data DIR ...
"""
import importlib
import sys

from conftest import hashed_grade

prepare = importlib.import_module("01_prepare")
prepare.grade = hashed_grade  # in the worker processes too: they import this file

if __name__ == "__main__":
    stage = importlib.import_module(sys.argv.pop(1))
    prepare.run(stage.main, stage.Config, stage.__doc__)
