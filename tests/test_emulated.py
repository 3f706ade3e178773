# SPDX-License-Identifier: MIT
"""The smallest study on other processors: emulated ones without this one's newer instructions, of two
vendors, leave the same bytes as the machine at hand."""
import os
import platform
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, artifacts

STAGES = [
    ["01_prepare", "--limit", "20"],
    ["02_corrupt", "--corruptions", "blank", "--preview_rows", "0", "--workers", "1"],
    ["03_train_grpo", "--conditions", "mixed", "--seeds", "0", "--steps", "2", "--prompts_per_step", "2", "--group_size", "4",
     "--max_new_tokens", "10", "--workers", "1"],
    ["04_evaluate", "--limit", "20", "--splits", "test", "--max_new_tokens", "10", "--workers", "1"],
]


def smallest_study(data, emulator=()):
    """Run the stages in one process; returns what they leave."""
    line = [*emulator, sys.executable, str(ROOT / "tests" / "stage_by_hash.py")]
    for stage in STAGES:
        line += [*stage, "--data", str(data), "AND"]
    done = subprocess.run(line[:-1], capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return artifacts(data)


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["Haswell", "EPYC-Rome"])
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the same bytes are promised on x86-64")
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian's qemu-user)")
def test_another_processor_leaves_the_same_bytes(tmp_path, processor):
    here = smallest_study(tmp_path / "here")
    assert any(name.endswith("adapter_model.safetensors") for name in here)
    there = smallest_study(tmp_path / "there", ["qemu-x86_64", "-cpu", processor])
    assert there.keys() == here.keys()
    assert [name for name in here if there[name] != here[name]] == []
