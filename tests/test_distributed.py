# SPDX-License-Identifier: MIT
"""Real processes, real signals: whatever ends a run, and on however many processes it goes on, it ends as one that nobody disturbed."""
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT

RUN = "grounded-blank+removed-s0"
TRAIN = ["03_train_grpo", "--conditions", "grounded", "--corruption", "blank", "removed", "--steps", "12", "--prompts_per_step", "5",
         "--group_size", "4", "--max_new_tokens", "12", "--tokens_per_pass", "96", "--lora_rank", "4", "--learning_rate", "1e-3"]
EVALUATE = ["04_evaluate", "--corruptions", "clean", "blank", "--max_new_tokens", "40", "--cache_gb", "0.001"]
STOPPED, LEFT = "stopped: the same command continues", "error: another process of this run has ended: the same command continues"
TIMES = ("rollout_s", "update_s", "seconds", "peak_gb")


def start(data, command, processes=1, cards=""):
    """A stage on that many processes of one thread each, without cards also where there are some."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    line = [sys.executable, *launcher, str(ROOT / "tests" / "stage_by_hash.py"), command[0], "--data", str(data), *command[1:]]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": cards})


def end(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def lines(*paths):
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def workers(process):
    """Those that torchrun started, by rank."""
    return [child.pid for child in psutil.Process(process.pid).children()]


def without_times(folder):
    """All that a run leaves: bytes of the adapter and of the samples, the log and config.json without wall time and memory."""
    timeless = lambda row: {key: value for key, value in row.items() if key not in TIMES}
    return {"config": timeless(json.loads((folder / "config.json").read_text())),
            "log": [timeless(json.loads(line)) for line in (folder / "train.jsonl").read_text().splitlines()],
            **{path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("config.json", "train.jsonl")}}


def same_up_to_rounding(folder, other):
    """The same completions; the adapter to 1e-5, the log to 1e-4."""
    adapter, truth = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    rows, whole = (without_times(path)["log"] for path in (folder, other))
    assert (folder / "rollouts.jsonl").read_bytes() == (other / "rollouts.jsonl").read_bytes()
    assert len(rows) == 12
    for row, true in zip(rows, whole):
        assert row == {key: value if value is None else pytest.approx(value, rel=1e-4, abs=1e-4) for key, value in true.items()}
    assert adapter.keys() == truth.keys() and max((adapter[name] - truth[name]).abs().max().item() for name in truth) < 1e-5
    assert max(value.abs().max().item() for name, value in truth.items() if "lora_B" in name) > 1e-3  # there was something to learn


@pytest.fixture(scope="module")
def undisturbed(study_folder, tmp_path_factory):
    data = shutil.copytree(study_folder, tmp_path_factory.mktemp("undisturbed") / "data")
    code, out = end(start(data, TRAIN))
    assert code == 0, out
    return data


@pytest.fixture
def data(study_folder, tmp_path):
    return pathlib.Path(shutil.copytree(study_folder, tmp_path / "data"))


def test_a_killed_run_continues_to_the_same_bytes(undisturbed, data):
    """Killed at a random moment, then asked to end as schedulers do, then left alone."""
    folder = data / "policies" / RUN
    process = start(data, TRAIN)
    wait_until(process, lambda: lines(folder / "train.jsonl") >= 2)
    time.sleep(random.Random(0).random())
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    process = start(data, TRAIN)
    wait_until(process, lambda: lines(folder / "train.jsonl") >= 8)
    process.send_signal(signal.SIGTERM)
    code, out = end(process)
    assert code == 130 and "stopping after this step; once more stops at once\n" in out and out.endswith(STOPPED + "\n")
    made = lines(folder / "train.jsonl")
    code, out = end(start(data, TRAIN))
    assert code == 0 and f"continues after step {made}\n" in out
    assert without_times(folder) == without_times(undisturbed / "policies" / RUN)


def test_a_run_goes_on_with_another_number_of_processes(undisturbed, data):
    """One process is stopped by Ctrl-C, two through torchrun; of two one is killed; one brings it to its end."""
    folder = data / "policies" / RUN
    for processes, least in ((1, 2), (2, 4), (2, 6)):
        process = start(data, TRAIN, processes)
        wait_until(process, lambda: lines(folder / "train.jsonl") >= least)
        process.send_signal(signal.SIGINT) if least < 6 else os.kill(workers(process)[1], signal.SIGKILL)
        code, out = end(process)
        assert code == 130 if processes == 1 else code != 0
        assert out.count(STOPPED) == (processes if least < 6 else 0) and out.count(LEFT) == (least == 6)
        assert "03_train_grpo.py\", line" not in out  # no traceback of ours: torchrun prints its own
    code, out = end(start(data, TRAIN))
    assert code == 0 and f"{RUN} continues after step" in out
    same_up_to_rounding(folder, undisturbed / "policies" / RUN)


def test_an_evaluation_goes_on_with_another_number_of_processes(undisturbed, tmp_path):
    """Of three processes one is killed, and one alone brings it to its end: the answers of one process, in its order."""
    truth, data = (pathlib.Path(shutil.copytree(undisturbed, tmp_path / name)) for name in ("truth", "data"))
    code, out = end(start(truth, EVALUATE))
    assert code == 0, out
    answers = lambda: [*(data / "answers").glob("*/shapes/*.jsonl*")]
    process = start(data, EVALUATE, 3)
    wait_until(process, lambda: lines(*answers()) >= 8)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, out = end(process)
    assert code != 0 and out.count(LEFT) + out.count(STOPPED) == 2 and "04_evaluate.py\", line" not in out
    assert any(path.suffix == ".part" and lines(path) for path in answers())
    code, out = end(start(data, EVALUATE))
    assert code == 0, out
    for path in (truth / "answers").glob("*/shapes/*"):
        rows, other = ([json.loads(line) for line in (root / path.relative_to(truth)).read_text().splitlines()] for root in (truth, data))
        assert other == [row | {"gold_logprob": pytest.approx(row["gold_logprob"], abs=1e-3)} for row in rows] and len(rows) == 20
    assert {path.relative_to(data) for path in answers()} == {path.relative_to(truth) for path in (truth / "answers").glob("*/shapes/*")}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_two_cards_share_a_run_and_an_evaluation(data):
    """The second process is killed at first; a third process would have no card."""
    process, log = start(data, TRAIN, 2, "0,1"), data / "policies" / RUN / "train.jsonl"
    wait_until(process, lambda: lines(log) >= 2)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert end(process)[0] != 0
    for command in (TRAIN, EVALUATE):
        code, out = end(start(data, command, 2, "0,1"))
        assert code == 0, out
    assert lines(log) == 12 and all(lines(path) == 20 for path in (data / "answers").glob("*/shapes/*"))
    assert "has no card: run torchrun --nproc_per_node=2" in end(start(data, EVALUATE, 3, "0,1"))[1]


def test_a_stage_of_one_process_says_so(data):
    done = subprocess.run([sys.executable, str(ROOT / "02_corrupt.py"), "--data", str(data)], capture_output=True, text=True,
                          env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and done.stderr.startswith("error: 02_corrupt.py is the work of one process: run it with python")
