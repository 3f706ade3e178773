# SPDX-License-Identifier: MIT
"""Stage 4: every policy, and the base it came from, on every benchmark, clean and damaged.

Greedy decoding; the same prompts, batches and grader for all. Beside right or wrong each answer keeps
its form, its length and whether it was cut. Of each token of an answer to an intact question it keeps
the visual information, in nats: which words came from the picture, and which from habit.

Training questions are asked too, clean and damaged as in training: the paper's settings S1 to S8
(arXiv 2604.03179) cross how a policy was trained with how it is asked and whether it knows the
question.

reads   data/study.json, data/questions/, data/corrupted/, data/policies/
writes  data/answers/POLICY/SOURCE/NAME.jsonl, a line per graded answer; NAME is clean or a corruption
        data/answers/POLICY/SOURCE/train/NAME.jsonl, the same of training questions
run     python 04_evaluate.py                     # all policies and inputs: 1.5 to 2.5 minutes on 2 cores
        python 04_evaluate.py --plan              # what that is, and how long it takes
        python 04_evaluate.py --policies base standard-s0 --corruptions clean blank --limit 100
        python 04_evaluate.py --policies base path/to/my_adapter     # a LoRA of your own: does it look?
"""
import functools
import importlib
import json
import re
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")  # before torch: it pins arithmetic and threads
corrupt = importlib.import_module("02_corrupt")
train = importlib.import_module("03_train_grpo")

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

UserError, option = prepare.UserError, prepare.option

BATCH = 64  # questions dealt out together, whatever the number of workers
STRESS_LIMIT = 300  # questions per benchmark of inputs that no sentence of the report rests on
TRAIN_LIMIT = 160  # training questions: 4 points of standard error
SPLITS = ("test", "train")


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    policies: list[str] = option(
        [], "base, folders of data/policies, or paths of other LoRA adapters [base and all finished]")
    benchmarks: list[str] = option([], "sources of stage 1 [all benchmarks of the study]")
    corruptions: list[str] = option([], "inputs: clean, or names of stage 2 [all there are]")
    splits: list[str] = option(
        list(SPLITS), "test: the benchmarks' questions; train: those of the training set, "
                      "clean and damaged as in training")
    limit: int = option(
        None, f"questions per file, spread over their groups [all; {TRAIN_LIMIT} of the training "
              f"set; {STRESS_LIMIT} where {', '.join(corrupt.STRESS)} or a severity damaged them]")
    only: str = option(
        None, "file of ids, as report/strict-SOURCE.json: ask these questions alone [all]")
    samples: int = option(
        2, "answers drawn at temperature 1 to each question with a blank picture, beside the greedy "
           "one: can it be guessed?")
    workers: int = option(
        None, "processes, each a batch of questions at a time [one a card; without cards one a core, "
              "as memory allows]")
    memory_gb: float = option(
        None, "what weights and all that is computed may take: lower it first [what is free]")
    cache_gb: float = option(
        None, "for the questions answered together [what memory_gb leaves; no card: preset]")
    max_new_tokens: int = option(
        None, "tokens; a longer answer is cut [the most that any run of the study had]")
    plan: bool = option(False, "say what would be done and how long it takes, and end")


def main(config):
    """Evaluate; returns the rows of each answers file, by its place below data/answers/: (policy,
    source, clean or a corruption), with "train" before the last for training questions."""
    data = Path(config.data)
    study = prepare.load_study(data)
    check_config(config)
    load_policies.cache_clear()  # an adapter or a file may be another than at the last call
    open_questions.cache_clear()
    policies = find_policies(config, study)
    adapters = tuple((who, folder) for who, (folder, _) in policies.items() if folder)
    model = Model(prepare.model_path(data, study), study["max_pixels"], adapters,
                  config.memory_gb, config.cache_gb, study["preset"])
    inputs = find_inputs(config, study, policies)
    batches = sum(len(asked.batches()) for asked in inputs)
    workers = prepare.count_workers(config.workers, batches, prepare.worker_bytes(model.path))
    print(amount(inputs, policies))
    if config.plan:
        print(measure(model, inputs, workers))
        return {}
    with ExitStack() as locks:
        for folder in sorted({path.parent for asked in inputs for path in asked.files.values()}):
            locks.enter_context(prepare.locked(folder))
        return evaluate(model, inputs, workers)


@dataclass(frozen=True)
class Model:
    """What a worker loads, and the memory it may take."""
    path: str
    max_pixels: int
    adapters: tuple[tuple[str, Path], ...]  # (policy, its folder)
    memory_gb: float | None
    cache_gb: float | None
    preset: str


@dataclass(frozen=True)
class Input:
    """The questions of one source, clean or damaged, that all policies are asked."""
    name: str                   # SOURCE NAME, or SOURCE train NAME
    paths: list[Path]           # of the questions; of blank ones, if each token's information is wanted
    ids: dict[int, str]         # by row, the longest prompt first: what does not fit shows at once
    max_new_tokens: int
    samples: int                # answers drawn to each question
    files: dict[tuple, Path]    # of answers, by place below data/answers/: a policy's name is first
    origins: dict[tuple, dict]  # what stands in every line of them: what these answers come from

    def batches(self):
        """Lists of rows, which depend on the study alone, not on workers, so that rounding does too."""
        rows = [*self.ids]
        return [rows[start:start + BATCH] for start in range(0, len(rows), BATCH)]


def find_inputs(config, study, policies):
    """What is asked: the test split of every benchmark under every input, and the training set clean
    and under what its policies were trained with."""
    data = Path(config.data)
    chosen = []
    for source in config.benchmarks or study["sources"]["benchmarks"]:
        for name in input_names(config, source):
            limit = None if name in ("clean", *corrupt.CORE) else STRESS_LIMIT
            chosen.append((source, name, "test", limit))
    damages = set()
    for run in finished_runs(data).values():
        damages |= {*run["settings"]["corruption"]}
    source = study["sources"]["train"]
    for name in ("clean", *sorted(damages or {"blank"})):
        there = (data / prepare.input_path(source, name)).exists()
        if there and name in (config.corruptions or [name]) and not config.only:
            chosen.append((source, name, "train", TRAIN_LIMIT))
    inputs = [make_input(config, study, policies, source, name, split, config.limit or limit)
              for source, name, split, limit in chosen if split in config.splits]
    inputs = [asked for asked in inputs if asked.ids]  # --only may name questions of one source alone
    if not inputs:
        raise UserError("nothing is asked: choose other --splits or --corruptions, or an --only "
                        "that names questions of them")
    return inputs


def make_input(config, study, policies, source, name, split, limit):
    """One source, clean or damaged: which rows of it, what answers come from, where they go."""
    data, test = Path(config.data), split == "test"
    made_from = prepare.check_input(data, study, source, name)
    paths = [data / prepare.input_path(source, name)]
    blank = data / prepare.input_path(source, "blank")
    if name == "clean" and test and blank.exists():
        # each token's information is wanted, which depends on the blank picture too
        made_from |= prepare.check_input(data, study, source, "blank")
        paths.append(blank)
    packages = [f"{package} {number}" for package, number in prepare.versions().items()]
    new_tokens, samples = longest_answer(config, study), 0
    settings = {"made_with": ", ".join(packages), "max_new_tokens": new_tokens}
    if name == "blank" and test and config.samples:
        samples = config.samples  # what is drawn is not kept, but its verdicts
        settings |= {"samples": samples, "graded_by": prepare.sha256(Path(prepare.__file__))}
    place = (source, name) if test else (source, "train", name)
    files, origins = {}, {}
    for who, (_, made_of) in policies.items():
        files[who, *place] = data.joinpath("answers", who, *place[:-1], f"{name}.jsonl")
        origins[who, *place] = {"made_from": made_of | made_from, **settings}
    return Input(" ".join(place), paths, choose_rows(paths[0], split, limit, config.only),
                 new_tokens, samples, files, origins)


def evaluate(model, inputs, workers):
    """Ask all inputs; returns the rows of each answers file, as `main` does.

    A batch is asked again where any of its answers is missing, or was made from something else than
    its origin. This process alone writes: after each batch to NAME.jsonl.part, in the end the whole
    file, so that a kill costs the batches under way.
    """
    found, tasks, left = {}, {}, Counter()  # place -> id -> row; name -> task; input -> open tasks
    for asked in inputs:
        found |= previous_answers(asked)
        for number, rows in enumerate(asked.batches(), 1):
            ids = {asked.ids[row] for row in rows}
            places = [place for place in asked.files if ids - found[place].keys()]
            if places:
                tasks[f"{asked.name}, batch {number}"] = model, asked, rows, places
                left[asked.name] += 1
        if left[asked.name]:
            for place, path in asked.files.items():  # without a last line that was half written
                prepare.write_jsonl(partial_path(path), found[place].values())
        else:
            finish_input(asked, found)
    total = sum(count_answers(*task) for _, *task in tasks.values())
    tasks = typical_first(tasks)

    with tqdm(total=total, desc="answers", disable=None) as bar:
        def receive(name, result):
            _, *task = tasks[name]
            asked, answers = task[0], result[0]
            if left.total() == len(tasks):  # the first
                tqdm.write(forecast(task, result, total, workers))
            for place, rows in answers.items():
                prepare.append_jsonl(partial_path(asked.files[place]), rows)
                found[place] |= {row["id"]: row for row in rows}
            bar.update(count_answers(*task))
            left[asked.name] -= 1
            if left[asked.name] == 0:
                finish_input(asked, found)
        prepare.deal_out(answer_batch, tasks, min(workers, len(tasks)), receive)
    for asked in inputs:
        for place in asked.files:
            found[place] = [found[place][name] for name in asked.ids.values()]
    return found


def answer_batch(model, asked, rows, places):
    """The answers of some policies to some rows of an input, the seconds that they took, and the GB:
    the task of a worker.

    Pictures are prepared, and seen by the frozen vision tower, once for all policies.
    """
    policy = load_policies(model)
    start = time.perf_counter()
    tables = list(map(open_questions, asked.paths))
    lengths = tables[0].select_columns("prompt_tokens")[rows]["prompt_tokens"]
    lengths = [len(tables) * length for length in lengths]  # blank a prompt is as long
    # how much is answered at a time, as stage 3 plans it
    sizes = train.Config(
        memory_gb=model.memory_gb, cache_gb=model.cache_gb, checkpoint=True,
        group_size=max(1, asked.samples), max_new_tokens=asked.max_new_tokens)
    sizes = train.fit_memory(policy, sizes, train.PRESETS[model.preset], max(lengths))
    answers = {place: [] for place in places}
    for some in train.rollout_batches(policy, lengths, sizes.group_size, asked.max_new_tokens,
                                      sizes.cache_gb):
        versions = [[*table.select(rows[some])] for table in tables]  # of each question
        encoded = []  # of each version, prompts and what is seen in their pictures
        for questions in versions:
            prompts = [policy.encode(question) for question in questions]
            encoded.append((prompts, train.encode_images(policy, prompts)))
        draws = None
        if asked.samples:
            draws = train.completion_draws(versions[0], 0, 0, sizes).to(policy.device)
        for place in places:
            for row in answer(policy, place[0], versions[0], encoded, sizes, draws):
                answers[place].append(row | asked.origins[place])
    return answers, time.perf_counter() - start, train.peak_gb(policy)


@torch.no_grad()
def answer(policy, who, questions, encoded, sizes, draws=None):
    """Greedy answers to a batch of questions, graded: rows of the answers file.

    `encoded`: (prompts, image features) of the questions, and, where each token's information is
    wanted, of the same questions blank. `draws`: as of `train.generate`, where answers are drawn too.
    """
    policy.use(None if who == "base" else who)
    with train.dequantized(policy):  # 4-bit weights as plain ones for the whole batch
        cache = train.encode_prompts(policy, *encoded[0])
        done = train.generate(policy, cache, sizes.max_new_tokens)
        if not done.logprobs[done.mask].isfinite().all():
            raise UserError(f"{who} cannot be asked: its logits are not finite; its training broke: "
                            "train it again with a lower learning rate")
        responses, grades = train.grade_completions(policy, questions, done, box_only=False)
        lengths = done.lengths.tolist()
        more = {"tokens": lengths, "truncated": done.finished.logical_not().tolist()}
        if len(encoded) == 2:
            blank = train.encode_prompts(policy, *encoded[1])
            more["token_texts"] = [
                token_texts(tokens[:length], policy.tokenizer)
                for tokens, length in zip(done.tokens.tolist(), lengths)]
            more["token_nats"] = token_information(policy, blank, done, sizes.micro_batch_tokens)
        if draws is not None:
            drawn = train.generate(policy, cache, sizes.max_new_tokens, draws)
            _, verdicts = train.grade_completions(policy, questions, drawn, box_only=False)
            right = np.array([grade.correct for grade in verdicts])
            more["drawn_right"] = right.reshape(len(questions), -1).sum(1).tolist()
    rows = []
    for i, question in enumerate(questions):
        row = {
            "id": question["id"],
            "group": question["group"],
            "needs_image": question["needs_image"],
            "response": responses[i],
            "answer": grades[i].answer,  # as the grader read it
            "gold": question["answer"],
            "correct": grades[i].correct,
            "well_formed": grades[i].well_formed,
        }
        if prepare.opens_think(policy.tokenizer):  # for a later grader, which sees no tokenizer
            row["think_opened"] = True
        rows.append(row | {name: values[i] for name, values in more.items()})
    return rows


# Which words came from the picture.


def token_information(policy, blank, done, micro_batch_tokens):
    """log p(token | picture) - log p(token | blank) of each token of each completion.

    `done`: completions of the intact prompts, whose log-probabilities are known from decoding;
    `blank`: the same prompts with blank pictures.
    """
    lengths = done.lengths.tolist()
    whole = [blank.length + length for length in lengths]
    without = torch.zeros_like(done.logprobs)
    for rows in train.micro_batches(range(len(lengths)), whole, micro_batch_tokens):
        tokens = done.tokens[rows, :lengths[rows[0]]]
        owners = torch.tensor(rows, device=policy.device)
        without[rows, :tokens.shape[1]] = train.score_tokens(policy, blank, owners, tokens)
    nats = (done.logprobs - without).tolist()
    return [[round(x, 3) for x in line[:length]] for line, length in zip(nats, lengths)]


def token_texts(tokens, tokenizer):
    """The text of each token; a character that several share belongs to the last of them."""
    texts = []
    start = 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:end], skip_special_tokens=True)
        if text.endswith("\ufffd"):  # half a character
            text = ""
        else:
            start = end
        texts.append(text)
    return texts


# Below: the machine room; you can fork this kit without reading on.


# Plan: what will be done, counted, and how long it takes, by a batch.


def amount(inputs, policies):
    greedy = len(policies) * sum(len(asked.ids) for asked in inputs)
    drawn = sum(count_answers(asked, asked.ids, policies) for asked in inputs) - greedy
    return (f"{len(policies)} policies x {len(inputs)} inputs: {greedy:,} greedy answers and {drawn:,} "
            f"drawn ones of at most {inputs[0].max_new_tokens} tokens")


def count_answers(asked, rows, policies):
    """Greedy ones and drawn ones."""
    return len(rows) * len(policies) * (1 + asked.samples)


def measure(model, inputs, workers):
    """Time and memory of the whole stage, from one batch, whose answers are thrown away."""
    prepare.begin_worker(0)
    tasks = {}
    for asked in inputs:
        for rows in asked.batches():
            tasks[len(tasks)] = model, asked, rows, asked.files
    _, *task = next(iter(typical_first(tasks).values()))
    total = sum(count_answers(asked, asked.ids, asked.files) for asked in inputs)
    return forecast(task, answer_batch(model, *task), total, workers)


def typical_first(tasks):
    """The tasks, but first a batch that says how long all take: of middling prompts, neither drawn
    from nor asked blank too where there is such an input."""
    def extras(name):
        _, asked, *_ = tasks[name]
        return len(asked.paths) + asked.samples

    if not tasks:
        return {}
    _, plain, *_ = tasks[min(tasks, key=extras)]
    batches = [name for name, (_, asked, *_) in tasks.items() if asked is plain]
    first = batches[len(batches) // 2]
    return {first: tasks[first]} | tasks


def forecast(task, result, answers, workers):
    """Time and memory of so many answers, from a task of a worker and its result."""
    _, seconds, peak_gb = result
    minutes = seconds / count_answers(*task) * answers / workers / 60
    return (f"about {minutes:.1f} minutes with {workers} workers, each of which takes "
            f"{peak_gb:.1f} GB")


# Workers: each loads the model once with all adapters, and keeps a few tables of questions open.


@functools.lru_cache(maxsize=1)
def load_policies(model):
    """One model with all adapters; stops if one does not fit it, or fits in part, which PEFT lets pass."""
    adapters = dict(model.adapters)
    try:
        policy = train.load_policy(model.path, model.max_pixels, adapters)
    except Exception as error:  # PEFT raises whatever a setting of the wrong kind leads to
        names = ", ".join(map(str, adapters.values()))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"an adapter ({names}) does not fit {model.path}: {reason}") from error
    for who, folder in adapters.items():
        own = get_peft_model_state_dict(policy.model, adapter_name=train.module_name(who),
                                        save_embedding_layers=False)
        with safe_open(folder / ADAPTER[1], "pt") as file:
            saved = {LORA_WEIGHT.fullmatch(name)[1] for name in file.keys()}
        if lacking := saved ^ {LORA_WEIGHT.fullmatch(name)[1] for name in own}:
            raise UserError(f"{folder} does not fit {model.path}: {len(lacking)} of its matrices have "
                            f"no counterpart, such as {min(lacking)}")
    return policy


@functools.lru_cache(maxsize=4)
def open_questions(path):
    return prepare.read_questions(path, "run 02_corrupt.py")


# Answers files: beside one lies its .part while it grows. What is there is graded anew, so that a
# better grader needs no model.


def previous_answers(asked):
    """Place -> id -> row of its files that was made from its origin, of two to the same question the
    later; those to questions that are asked are graded anew."""
    questions = open_questions(asked.paths[0]).remove_columns("images").select([*asked.ids]).to_list()
    found = {}
    for place, path in asked.files.items():
        rows = {}
        for file in (path, partial_path(path)):
            for name, row in read_answers(file).items():
                if row | asked.origins[place] == row:
                    rows[name] = row
        for question in questions:
            if row := rows.get(question["id"]):
                opened = row.get("think_opened", False)
                grade = prepare.grade(row["response"], question, think_opened=opened)
                row |= {"answer": grade.answer, "correct": grade.correct,
                        "well_formed": grade.well_formed}
        found[place] = rows
    return found


def read_answers(path):
    """Id -> row of a file, if it is there; a row may be of another study, or no answer at all."""
    rows = prepare.read_jsonl(path) if path.exists() else []
    return {row["id"]: row for row in rows if prepare.has_shape(row, {"id": str, "response": str})}


def partial_path(path):
    """Beside an answers file: what is answered of it so far, batch by batch."""
    return path.with_name(f"{path.name}.part")


def finish_input(asked, found):
    """Write the answers files, and say how many answers are right.

    Answers of the same origin to other questions stay; a file that says the same is left.
    """
    told = []
    for place, path in asked.files.items():
        rows, right = found[place], 0
        for name in asked.ids.values():
            rows[name] = rows.pop(name)  # in order, whichever batch was the first
            right += rows[name]["correct"]
        if rows != read_answers(path):
            prepare.write_jsonl(path, rows.values())
        partial_path(path).unlink(missing_ok=True)
        told.append(f"{place[0]} {right / len(asked.ids):.1%}")
    tqdm.write(f"{asked.name}, n = {len(asked.ids)}: {', '.join(told)}")


# Which questions: rows of a file, chosen by ids and groups alone.


def input_names(config, source):
    """clean and the corruptions of a benchmark that are asked."""
    folder = Path(config.data) / "corrupted" / source
    return config.corruptions or ["clean", *sorted(path.stem for path in folder.glob("*.parquet"))]


def choose_rows(path, split, limit, only):
    """Row -> id of questions of a split, `limit` of them spread over the groups, the longest prompt
    first."""
    columns = ["id", "split", "group", "prompt_tokens"]
    table = open_questions(path).select_columns(columns).to_pandas()
    table = table[table["split"] == split]
    if table.empty:
        raise UserError(f"{path} has no question of the {split} split: choose other --benchmarks or "
                        "--splits")
    if only:
        strict = prepare.read_json(Path(only), {"ids": [str]}, "give --only a file of ids, such as stage "
                                   "5 writes (report/strict-SOURCE.json)")
        table = table[table["id"].isin(strict["ids"])]
        if table.empty:  # its ids are of another source
            return {}
    table = table.iloc[prepare.stratified(table["id"], table["group"], limit)]
    return table.sort_values("prompt_tokens", ascending=False, kind="stable")["id"].to_dict()


def longest_answer(config, study):
    """Tokens that every policy may use, whichever are asked."""
    runs = finished_runs(Path(config.data)).values()
    default = train.PRESETS[study["preset"]]["max_new_tokens"]
    longest = max([run["settings"]["max_new_tokens"] for run in runs], default=default)
    return config.max_new_tokens or longest


def finished_runs(data):
    """Name -> config.json."""
    paths = sorted((data / "policies").glob("*/config.json"))
    return {path.parent.name: train.read_run(path.parent) for path in paths}


def check_config(config):
    prepare.check_once(config, "benchmarks", "corruptions", "splits")
    prepare.check_least(config, 1, "limit", "max_new_tokens", "workers")
    prepare.check_least(config, 0, "samples")
    prepare.check_least(config, 1e-9, "memory_gb", "cache_gb")
    for split in config.splits:
        if split not in SPLITS:
            raise UserError(f"--splits {split} is unknown: choose from {' '.join(SPLITS)}")


# Policies: runs of stage 3, and any LoRA of the language model that PEFT saved. Vision tower and
# base are shared by all, so settings that change them, or that only a later PEFT knows, are refused.

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# before transformers 4.52 the language model was called `model` or `language_model.model`
LORA_WEIGHT = re.compile(
    r"base_model\.model\.(?:model|language_model\.model|model\.language_model)"
    r"\.(layers\..+\.lora_[AB]\.weight)")
OWN_NAME = re.compile(rf"(base|{'|'.join(train.CONDITIONS)})(-|$)")
LORA_SETTINGS = (
    "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora lora_dropout "
    "base_model_name_or_path revision task_type inference_mode auto_mapping peft_version "
    "exclude_modules layers_to_transform layers_pattern").split()


def find_policies(config, study):
    """Name -> (folder of its adapter, None for the base; what it was made from, artifact -> sha256)."""
    data = Path(config.data)
    runs = finished_runs(data)
    found = {}
    for name in config.policies or ["base", *runs]:
        if name == "base":
            found[name] = None, study["model_files"]
            continue
        folder = Path(name).resolve()
        if folder.parent == (data / "policies").resolve():
            name = folder.name
        if name in runs:
            folder = data / "policies" / name
            check_run(data, study, folder, runs[name]["settings"]["made_from"])
        elif not folder.is_dir():
            raise UserError(f"{data / 'policies' / name} holds no finished policy: choose from "
                            f"{', '.join(['base', *runs])}, run 03_train_grpo.py, or give the folder "
                            "of an adapter")
        elif OWN_NAME.match(folder.name) or folder.name in found:
            raise UserError(f"{folder}: {folder.name} is the name of a policy of this kit, or given "
                            "twice: rename the folder")
        trained_on = check_adapter(folder)
        if name not in runs and Path(trained_on).name != Path(study["model"]).name:
            print(f"note: {folder} was trained on {trained_on or 'a base that it does not name'}, "
                  f"and is asked here on {study['model']}")
        made_of = dict(study["model_files"])
        for path in map(folder.joinpath, ADAPTER):
            artifact = path.relative_to(data) if name in runs else path
            made_of[artifact.as_posix()] = prepare.sha256(path)
        found[folder.name] = folder, made_of
    return found


def check_run(data, study, folder, made_from):
    """Stop unless a run of stage 3 learnt from this study's questions, and on its model."""
    again = "run 03_train_grpo.py again"
    questions = {artifact: digest for artifact, digest in made_from.items()
                 if artifact not in study["model_files"]}
    prepare.check_fresh(data, folder, questions, f"delete that folder and {again}")
    if not made_from.items() >= study["model_files"].items():
        raise UserError(f"{folder} was trained on another model than {study['model']}: delete it and "
                        f"{again}")


def check_adapter(folder):
    """Stop unless the folder holds a plain LoRA of the language model, as PEFT saves it; returns the
    model that it says it is of."""
    try:
        settings = dict(json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8")))
        with safe_open(folder / ADAPTER[1], "pt") as file:
            names = list(file.keys())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no adapter (adapter_config.json and adapter_model.safetensors, as "
                        f"PEFT saves them: {error}): save or train it again") from error
    usual = LoraConfig().to_dict()
    odd = []
    for key, value in settings.items():
        # what is at its usual value changes nothing, whatever it means
        if key not in LORA_SETTINGS and value and value != usual.get(key):
            odd.append(f"{key} {value}")
    matrices = set()
    for name in names:
        if match := LORA_WEIGHT.fullmatch(name):
            matrices.add(match[1])
        else:
            odd.append(name)
    if len(matrices) < len(names):
        odd.append("two names of one matrix")
    if odd:
        raise UserError(f"{folder} is no plain LoRA of the language model ({odd[0]}): this kit cannot "
                        "compare it")
    return str(settings.get("base_model_name_or_path") or "")


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
