# SPDX-License-Identifier: MIT
"""Real processes, real signals: however many workers there are and whatever ends them, a study ends as one that nobody disturbed."""
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

from conftest import ROOT

RUNS = ["hallucination-blank+removed-s0", "hallucination-blank+removed-s1", "standard-s0", "standard-s1"]
TRAIN = ["03_train_grpo", "--conditions", "standard", "hallucination", "--corruption", "blank", "removed", "--seeds", "0", "1", "--steps", "6",
         "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "12", "--micro_batch_tokens", "96", "--lora_rank", "4"]
EVALUATE = ["04_evaluate", "--corruptions", "clean", "blank", "removed", "--max_new_tokens", "12", "--samples", "2"]
STOPPED = "stopped: the same command continues"
TIMES = ("rollout_s", "update_s", "seconds", "peak_gb")


def start(data, command, workers, **environment):
    line = [sys.executable, str(ROOT / "tests" / "stage_by_hash.py"), command[0], "--data", str(data), *command[1:], "--workers", str(workers)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment)


def end(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def finish(data, command, workers=1, **environment):
    code, out = end(start(data, command, workers, **environment))
    assert code == 0, out
    return out


def lines(*paths):
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def workers_of(process):
    """Worker processes, in the order of their numbers; one more child keeps track of what they share."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def left(data, *folders):
    """All that a study leaves, without wall time and memory."""
    found = {}
    for path in sorted(path for folder in folders for path in (data / folder).rglob("*") if path.is_file() and path.suffix != ".lock"):
        content = path.read_bytes()
        if path.name in ("config.json", "train.jsonl"):
            rows = map(json.loads, content.splitlines()) if path.suffix == ".jsonl" else [json.loads(content)]
            content = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        found[str(path.relative_to(data))] = content
    return found


@pytest.fixture(scope="module")
def undisturbed(study_folder, tmp_path_factory):
    """One worker, which is the process itself."""
    data = pathlib.Path(shutil.copytree(study_folder, tmp_path_factory.mktemp("undisturbed") / "data"))
    finish(data, TRAIN)
    finish(data, EVALUATE)
    return data


@pytest.fixture
def data(study_folder, tmp_path):
    return pathlib.Path(shutil.copytree(study_folder, tmp_path / "data"))


@pytest.mark.slow
@pytest.mark.parametrize("workers, threads, seed", [(2, "2", "1"), (3, "8", "2")])
def test_the_number_of_workers_changes_no_byte(undisturbed, data, workers, threads, seed):
    """Nor do environment variables for threads, nor the seed of Python's hashes."""
    for command in (TRAIN, EVALUATE):
        finish(data, command, workers, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, PYTHONHASHSEED=seed)
    truth = left(undisturbed, "policies", "answers")
    assert left(data, "policies", "answers") == truth
    assert {f"policies/{run}/adapter_model.safetensors" for run in RUNS} < truth.keys()
    assert any(row["grad_norm"] for row in truth["policies/standard-s0/train.jsonl"])  # there was something to learn


@pytest.mark.slow
def test_a_killed_stage_continues_to_the_same_bytes(undisturbed, data):
    """Killed at a random moment, with its workers; then asked to end as schedulers do; then left alone."""
    logs = [data / "policies" / run / "train.jsonl" for run in RUNS]
    process = start(data, TRAIN, 2)
    wait_until(process, lambda: lines(*logs) >= 3)
    time.sleep(random.Random(0).random())
    workers = workers_of(process)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    psutil.wait_procs(workers, timeout=5)
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    process = start(data, TRAIN, 2)
    made = lines(*logs)
    wait_until(process, lambda: lines(*logs) >= made + 3)
    process.send_signal(signal.SIGTERM)
    code, out = end(process)
    assert code == 130 and out.endswith(STOPPED + "\n") and "Traceback" not in out
    assert "continues after step" in finish(data, TRAIN, 2)
    assert left(data, "policies") == left(undisturbed, "policies")


@pytest.mark.slow
def test_a_killed_worker_costs_its_own_run_alone(undisturbed, data):
    logs = [data / "policies" / run / "train.jsonl" for run in RUNS]
    process = start(data, TRAIN, 2)
    wait_until(process, lambda: lines(*logs) >= 3)
    workers_of(process)[0].kill()
    code, out = end(process)
    told = out.splitlines()[-1]
    assert code == 2 and told.startswith("error: the worker process of ") and any(f"of {run} was killed" in told for run in RUNS)
    assert "Traceback" not in out
    finish(data, TRAIN, 2)
    assert left(data, "policies") == left(undisturbed, "policies")


@pytest.mark.slow
def test_a_killed_evaluation_continues_to_the_same_bytes(undisturbed, tmp_path):
    """A worker, then all: whole batches stay, and the rest is answered as if nothing had happened."""
    data = pathlib.Path(shutil.copytree(undisturbed, tmp_path / "data"))
    shutil.rmtree(data / "answers")
    answers = lambda: [*(data / "answers").glob("*/shapes/*.jsonl*")]
    for whole in (False, True):
        process = start(data, EVALUATE, 2)
        made = lines(*answers())
        wait_until(process, lambda: lines(*answers()) > made)
        process.kill() if whole else workers_of(process)[1].kill()
        code, out = end(process)
        assert code == (-signal.SIGKILL if whole else 2) and "Traceback" not in out
    finish(data, EVALUATE, 2)
    assert left(data, "answers") == left(undisturbed, "answers")


@pytest.mark.slow
def test_two_commands_share_a_folder_but_never_a_run(undisturbed, data):
    """Seeds apart, at the same time; and of two on the same run the second ends with a sentence."""
    first = start(data, [*TRAIN, "--seeds", "0"], 1)
    second = start(data, [*TRAIN, "--seeds", "1"], 1)
    wait_until(first, lambda: lines(data / "policies" / "standard-s0" / "train.jsonl") >= 1)
    os.kill(first.pid, signal.SIGSTOP)
    code, out = end(start(data, [*TRAIN, "--seeds", "0"], 1))
    os.kill(first.pid, signal.SIGCONT)
    assert code == 2 and out.splitlines()[-1].startswith(f"error: {data / 'policies' / 'standard-s0'} is in use by another run")
    assert end(first)[0] == end(second)[0] == 0
    assert left(data, "policies") == left(undisturbed, "policies")


@pytest.mark.parametrize("command, workers, says", [
    (TRAIN, 0, "--workers 0 is too small: choose at least 1"),
    (TRAIN, 5, "--workers 5 is more than there is to do, or more than there are cards: choose at most 4"),
    (EVALUATE, 100, "--workers 100 is more than there is to do, or more than there are cards: choose at most")])
def test_a_number_of_workers_that_cannot_be_is_one_sentence(data, server, command, workers, says):
    done = server(command[0], "--data", data, *command[1:], "--workers", workers)
    assert done.code == 2 and done.stderr.startswith(f"error: {says}"), done.stderr


def test_each_worker_has_a_card_of_its_own(prepare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert prepare.count_workers(None, 15, 1e9) == prepare.count_workers(2, 15, 1e9) == 2
    with pytest.raises(prepare.UserError, match="choose at most 2$"):
        prepare.count_workers(3, 15, 1e9)
    assert prepare.count_workers(3, 15, 1e9, cards=0) == 3  # of files to damage


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_a_worker_out_of_memory_is_one_sentence(prepare, error):
    with pytest.raises(prepare.UserError, match="^the worker process of mixed-blank-s1 ran out of memory: the same command continues"):
        with prepare.outliving("mixed-blank-s1"):
            raise error
    with pytest.raises(RuntimeError, match="^another"), prepare.outliving("mixed-blank-s1"):
        raise RuntimeError("another")
