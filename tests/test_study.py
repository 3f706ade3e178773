# SPDX-License-Identifier: MIT
"""The whole study at its smallest: five stages hand on real files, and what stage 4 recorded any user of PEFT can get again."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from conftest import CORRUPTIONS, ROOT, run_stages
from stage import SMALLEST

RUNS = ["grounded-mismatch-s0", "hallucination-blank-s0", "mixed-blank-s0", "standard-s0"]
TRAINED = ["train/clean", "train/blank", "train/mismatch"]  # training questions, clean and as they were damaged in training


def test_every_artifact_of_the_design_exists(study):
    data, answers, _ = study
    sources = [f"corrupted/shapes/{name}.parquet" for name in CORRUPTIONS]
    runs = [f"policies/{run}/{name}" for run in RUNS
            for name in ("adapter_model.safetensors", "adapter_config.json", "config.json", "train.jsonl", "rollouts.jsonl")]
    rows = [f"answers/{policy}/shapes/{name}.jsonl" for policy in ["base", *RUNS] for name in ["clean", *CORRUPTIONS, *TRAINED]]
    for name in ["study.json", "questions/shapes.parquet", "questions/rejected.jsonl", "corrupted/preview.png", "report/index.html",
                 "report/results.json", "report/tables.md", "model/model.safetensors", *sources, *runs, *rows]:
        assert (data / name).is_file(), name
    assert {path.name for path in data.rglob("*") if path.name.endswith(".part") or path.name == "checkpoint.safetensors"} == set()
    assert len(answers) == 5 * (1 + len(CORRUPTIONS) + len(TRAINED)) and all(len(rows) == 40 for rows in answers.values())


def test_every_question_is_answered_or_rejected(study, prepare):
    data, answers, _ = study
    table = prepare.read_questions(data / "questions" / "shapes.parquet", "")
    of_split = {split: {row["id"] for row in table.remove_columns("images") if row["split"] == split} for split in ("test", "train")}
    for where, rows in answers.items():
        assert {row["id"] for row in rows} == of_split["train" if "train" in where else "test"]


def test_results_count_what_the_answers_say(study):
    _, answers, results = study
    for (policy, source, *where, name), rows in answers.items():
        if where:  # training questions have a table of their own
            continue
        entry = results["accuracy"][policy][source][name]
        assert (entry["n"], entry["correct"]) == (len(rows), sum(row["correct"] for row in rows))
        assert entry["ci95"][0] <= entry["accuracy"] <= entry["ci95"][1]


def test_a_second_run_makes_nothing_anew(study, prepare, corrupt, train, evaluate, report, monkeypatch):
    data, answers, _ = study
    keep = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.rglob("*")
            if path.is_file() and "report" not in path.parts and path.name != "preview.png"}
    monkeypatch.setattr(prepare, "warm_start", None)  # a second warm start would raise
    monkeypatch.setattr(evaluate, "answer", None)
    again, _ = run_stages(data, prepare, corrupt, train, evaluate, report)
    assert again == answers
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in keep} == keep


@pytest.mark.parametrize("run", RUNS[:1])
def test_plain_peft_gives_the_recorded_answers(study, prepare, run):
    """20 questions through AutoModel + PeftModel + generate, with nothing of stage 3: the same completions, token for token."""
    data, answers, _ = study
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "lm_head"])
    base = AutoModelForImageTextToText.from_pretrained(data / "model", quantization_config=nf4, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, data / "policies" / run).train()  # train mode: see load_policy; no dropout
    tokenizer, image_processor = prepare.load_processors(str(data / "model"), json.loads((data / "study.json").read_text())["max_pixels"])
    questions = {q["id"]: q for q in prepare.read_questions(data / "questions" / "shapes.parquet", "")}
    vision = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"])
    unused = range(len(tokenizer), base.get_input_embeddings().num_embeddings)
    for row in answers[run, "shapes", "clean"][:20]:
        prompt = prepare.encode(questions[row["id"]], tokenizer, image_processor)
        ids = torch.tensor([prompt.input_ids])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values,
                             image_grid_thw=prompt.image_grid_thw, mm_token_type_ids=(ids == base.config.image_token_id).int(),
                             max_new_tokens=24, do_sample=False, suppress_tokens=[*vision, *unused],
                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True) == row["response"]


@pytest.mark.parametrize("stage, options, says", [
    ("01_prepare", "--bench shapes", "error: --bench is no option: see --help"),
    ("02_corrupt", "--preview_rows -1", "error: --preview_rows -1 is too small: choose at least 0"),
    ("03_train_grpo", "--loss ppo", "error: --loss ppo is unknown: choose from dapo grpo dr_grpo"),
    ("04_evaluate", "--policies nope", "error: {data}/policies/nope holds no finished policy: choose from base, {runs}, run 03_train_grpo.py, or give the folder of an adapter (with --data {data})"),
    ("05_report", "--resamples -5", "error: --resamples -5 is too small: choose at least 40")])
def test_a_mistake_on_the_command_line_is_one_sentence(study, server, stage, options, says):
    """As a user meets it: nothing else on stderr, no traceback, exit code 2."""
    data, *_ = study
    done = server(stage, "--data", data, *options.split())
    assert (done.code, done.stderr.strip()) == (2, says.format(data=data, runs=", ".join(RUNS)))


WITHOUT_UNIX = """
import builtins, runpy, sys
usual, folder = builtins.__import__, sys.argv[1].rpartition("/")[0]

def refuse(name, globals=None, *more, **named):  # the libraries choose by the system's name: only the stages must do without
    if name in ("fcntl", "resource") and str((globals or {}).get("__file__", "")).startswith(folder):
        raise ImportError(name)
    return usual(name, globals, *more, **named)

builtins.__import__ = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_stages_run_without_what_only_some_systems_have(study, tmp_path):
    """As on Windows: no fcntl, no resource, a console in cp1252; and under PYTHONSAFEPATH, without the script's folder in sys.path."""
    data, script = shutil.copytree(study[0], tmp_path / "data"), tmp_path / "without_unix.py"
    script.write_text(WITHOUT_UNIX)
    (data / "report" / "results.json").unlink()
    for stage, options in SMALLEST.items():
        done = subprocess.run([sys.executable, script, ROOT / f"{stage}.py", "--data", data, *options], capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONSAFEPATH": "1"})
        assert done.returncode == 0, (stage, done.stderr)
    assert (data / "report" / "results.json").read_bytes() == (study[0] / "report" / "results.json").read_bytes()
