# SPDX-License-Identifier: MIT
"""The smallest study on other processors: emulated ones without this one's newer instructions, of two
vendors, leave the same bytes as the machine at hand."""
import json
import os
import platform
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, artifacts

# an emulated product of fp32 takes a thousand times as long: as few as exercise every path
WARM_START = {"scenes": 8, "blanks": 1, "vision_steps": 1, "first_steps": 1, "reasoned_steps": 1, "styled_steps": 1, "batch": 1}
STAGES = [
    ["01_prepare", "--limit", "20"],
    ["02_corrupt", "--corruptions", "blank", "--preview_rows", "0", "--workers", "1"],
    ["03_train_grpo", "--conditions", "mixed", "--seeds", "0", "--steps", "2", "--prompts_per_step", "1", "--group_size", "4",
     "--max_new_tokens", "6", "--workers", "1"],
    ["04_evaluate", "--policies", "mixed-blank-s0", "--corruptions", "blank", "--samples", "0", "--splits", "test", "--limit", "20",
     "--max_new_tokens", "6", "--workers", "1"],
]


def begin(data, emulator=()):
    """The stages in one process."""
    line = [*emulator, sys.executable, str(ROOT / "tests" / "stage_by_hash.py")]
    for stage in STAGES:
        line += [*stage, "--data", str(data), "AND"]
    return subprocess.Popen(line[:-1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "WARM_START": json.dumps(WARM_START)})


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the same bytes are promised on x86-64")
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian's qemu-user)")
def test_other_processors_leave_the_same_bytes(tmp_path):
    processes = {"here": begin(tmp_path / "here")}
    for processor in ("Haswell", "EPYC-Rome"):
        processes[processor] = begin(tmp_path / processor, ["qemu-x86_64", "-cpu", processor])
    for process in processes.values():
        said = process.communicate()[1]
        assert process.returncode == 0, said
    here, *others = (artifacts(tmp_path / name) for name in processes)
    assert "policies/mixed-blank-s0/adapter_model.safetensors" in here and "answers/mixed-blank-s0/shapes/blank.jsonl" in here
    for there in others:
        assert there.keys() == here.keys()
        assert [name for name in here if there[name] != here[name]] == []
