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
run     python 04_evaluate.py                     # all policies and inputs: 1.5 minutes on 2 CPU cores
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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")  # before torch: it pins arithmetic and threads
corrupt = importlib.import_module("02_corrupt")
train = importlib.import_module("03_train_grpo")

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

Policy, Question = train.Policy, prepare.Question
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
    """Evaluate; returns the rows of each answers file, by its folders and name below data/answers/:
    (policy, source, clean or a corruption), with "train" before the last for training questions."""
    data = Path(config.data)
    study = prepare.load_study(data)
    check_config(config)
    policies = find_policies(config, study)
    adapters = tuple((who, folder) for who, (folder, _) in policies.items() if folder)
    model = Model(prepare.model_path(data, study), study["max_pixels"], adapters,
                  config.memory_gb, config.cache_gb, study["preset"])
    inputs = find_inputs(config, study, policies)
    batches = sum(len(asked.batches()) for asked in inputs)
    workers = prepare.count_workers(config.workers, batches, prepare.worker_bytes(study))
    print(amount(inputs, policies))
    if config.plan:
        print(measure(model, inputs, list(policies), workers))
        return {}
    with ExitStack() as locks:
        for folder in sorted({path.parent for asked in inputs for path in asked.files.values()}):
            locks.enter_context(prepare.locked(folder))
        found = evaluate(model, inputs, workers)
    rows_of = {}
    for asked in inputs:
        for who, path in asked.files.items():
            place = path.relative_to(data / "answers").with_suffix("").parts
            rows_of[place] = found[asked.name][who]
    return rows_of


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
    name: str                 # SOURCE NAME
    path: Path                # of the questions
    blank: Path | None        # the same without pictures, where each token's information is wanted
    rows: tuple[int, ...]     # of `path`, the longest prompt first: what does not fit shows at once
    max_new_tokens: int
    samples: int              # answers drawn to each question
    files: dict[str, Path]    # answers by policy
    origins: dict[str, dict]  # by policy, what stands in every line: what its answers come from

    def batches(self):
        """They depend on the study alone, not on workers, so that rounding does too."""
        return [self.rows[start:start + BATCH] for start in range(0, len(self.rows), BATCH)]

    def questions(self):
        """By id, without their pictures, in the order of `rows`."""
        table = open_questions(self.path).remove_columns("images")
        return {table[row]["id"]: table[row] for row in self.rows}


def find_inputs(config, study, policies):
    """What is asked: the test split of every benchmark under every input, and the training set clean
    and under what its policies were trained with."""
    data = Path(config.data)
    only = read_ids(config.only)
    inputs = []
    if "test" in config.splits:
        for source in config.benchmarks or study["sources"]["benchmarks"]:
            for name in input_names(config, study, source):
                limit = config.limit
                if name not in ("clean", *corrupt.CORE):
                    limit = limit or STRESS_LIMIT
                inputs.append(make_input(config, study, policies, source, name, "test", limit, only))
    if "train" in config.splits and not only:
        limit = config.limit or TRAIN_LIMIT
        source = study["sources"]["train"]
        damages = set()
        for run in finished_runs(data):
            damages |= {*run["settings"]["corruption"]}
        for name in ("clean", *sorted(damages or {"blank"})):
            there = (data / prepare.input_path(source, name)).exists()
            if there and name in (config.corruptions or [name]):
                inputs.append(make_input(config, study, policies, source, name, "train", limit))
    return inputs


def make_input(config, study, policies, source, name, split, limit, only=None):
    """One source, clean or damaged: which rows of it, what answers come from, where they go."""
    data = Path(config.data)
    made_from = prepare.check_input(data, study, source, name)
    path = data / prepare.input_path(source, name)
    blank = data / prepare.input_path(source, "blank")
    if name == "clean" and split == "test" and blank.exists():
        # each token's information is wanted, which depends on the blank picture too
        made_from |= prepare.check_input(data, study, source, "blank")
    else:
        blank = None
    packages = [f"{package} {number}" for package, number in prepare.versions().items()]
    settings = {"made_with": ", ".join(packages), "max_new_tokens": longest_answer(config, study)}
    samples = config.samples if name == "blank" and split == "test" else 0
    if samples:  # what is drawn is not kept, but its verdicts
        settings |= {"samples": samples, "graded_by": prepare.sha256(Path(prepare.__file__))}
    title, folder = f"{source} {name}", Path(source)
    if split == "train":
        title, folder = f"{source} training questions {name}", Path(source) / "train"
    files = {who: data / "answers" / who / folder / f"{name}.jsonl" for who in policies}
    return Input(
        name=title, path=path, blank=blank, rows=choose_rows(path, split, limit, only, config.only),
        max_new_tokens=settings["max_new_tokens"], samples=samples, files=files,
        origins={who: {"made_from": made_of | made_from, **settings}
                 for who, (_, made_of) in policies.items()})


def evaluate(model, inputs, workers):
    """Ask all inputs; returns the rows of each answers file by input and policy.

    A batch is asked again where any of its answers is missing, or was made from something else than
    its origin. This process alone writes: after each batch to NAME.jsonl.part, in the end the whole
    file, so that a kill costs the batches under way.
    """
    found, tasks, left = {}, {}, dict.fromkeys((asked.name for asked in inputs), 0)
    for asked in inputs:
        found[asked.name], missing = find_missing(asked)
        for number, (rows, policies) in missing.items():
            tasks[f"{asked.name}, batch {number}"] = model, asked, rows, policies
            left[asked.name] += 1
        if not missing:
            finish_input(asked, found[asked.name])
    answers = sum(len(rows) * len(policies) for _, _, rows, policies in tasks.values())

    with tqdm(total=answers, desc="answers", disable=None) as bar:
        def receive(task, answered):
            _, asked, _, _ = tasks[task]
            for who, rows in answered.items():
                prepare.append_jsonl(partial_path(asked.files[who]), rows)
                found[asked.name][who] |= {row["id"]: row for row in rows}
                bar.update(len(rows))
            left[asked.name] -= 1
            if left[asked.name] == 0:
                finish_input(asked, found[asked.name])
        prepare.deal_out(answer_batch, tasks, min(workers, len(tasks)), receive)
    return {name: {who: [*rows.values()] for who, rows in by_policy.items()}
            for name, by_policy in found.items()}


def answer_batch(model, asked, rows, policies):
    """The answers of some policies to some rows of an input: the task of a worker.

    Pictures are prepared, and seen by the frozen vision tower, once for all policies.
    """
    policy = load_policies(model)
    tables = [open_questions(path) for path in (asked.path, asked.blank) if path]
    lengths = [sum(table[row]["prompt_tokens"] for table in without_images(tables)) for row in rows]
    sizes = batch_sizes(model, policy, asked, max(lengths))
    answers = {who: [] for who in policies}
    # as many questions at a time as memory holds keys and values for
    for some in train.rollout_batches(policy, lengths, sizes.group_size, asked.max_new_tokens,
                                      sizes.cache_gb):
        questions = [tables[0][row] for row in rows[some]]
        encoded = []  # of each table, prompts and what is seen in their pictures
        for table in tables:
            prompts = [policy.encode(table[row]) for row in rows[some]]
            encoded.append((prompts, train.encode_images(policy, prompts)))
        draws = draw_numbers(policy, questions, asked) if asked.samples else None
        for who in policies:
            policy.use(None if who == "base" else who)
            try:
                answers[who] += answer(policy, questions, encoded, asked.max_new_tokens,
                                       sizes.micro_batch_tokens, draws)
            except FloatingPointError as error:
                raise UserError(f"{who} cannot be asked: {error}; its training broke, take an earlier "
                                "checkpoint of it") from error
    return {who: [row | asked.origins[who] for row in rows] for who, rows in answers.items()}


@torch.no_grad()
def answer(policy, questions, encoded, max_new_tokens, micro_batch_tokens, draws=None):
    """Greedy answers to a batch of questions, graded: rows of the answers file.

    `encoded`: (prompts, image features) of the questions, and, where each token's information is
    wanted, of the same questions blank. `draws`: as of `train.generate`, where answers are drawn too.
    """
    with train.dequantized(policy):  # 4-bit weights as plain ones for the whole batch
        cache = train.encode_prompts(policy, *encoded[0])
        done = train.generate(policy, cache, max_new_tokens)
        if not done.logprobs[done.mask].isfinite().all():
            raise FloatingPointError("its logits are not finite")
        responses, grades = train.grade_completions(
            policy, questions, done, box_only=False)
        if draws is not None:
            drawn = train.generate(policy, cache, max_new_tokens, draws)
            _, drawn_grades = train.grade_completions(policy, questions, drawn, box_only=False)
        if len(encoded) == 2:
            blank = train.encode_prompts(policy, *encoded[1])
            nats = token_information(policy, blank, done, micro_batch_tokens)
    think_opened = prepare.opens_think(policy.tokenizer)
    rows = []
    for i, question in enumerate(questions):
        row = answer_row(question, responses[i], grades[i], think_opened)
        length = done.lengths[i].item()
        row["tokens"] = length
        row["truncated"] = not done.finished[i].item()
        if len(encoded) == 2:
            row["token_texts"] = token_texts(done.tokens[i, :length].tolist(), policy.tokenizer)
            row["token_nats"] = nats[i]
        if draws is not None:
            group = len(draws) // len(questions)
            own = drawn_grades[i * group:(i + 1) * group]
            row["drawn_right"] = sum(grade.correct for grade in own)
        rows.append(row)
    return rows


def answer_row(question, response, grade, think_opened):
    """What every line of an answers file holds, whatever was asked."""
    row = {
        "id": question["id"],
        "group": question["group"],
        "needs_image": question["needs_image"],
        "response": response,
        "answer": grade.answer,  # as the grader read it
        "gold": question["answer"],
        "correct": grade.correct,
        "well_formed": grade.well_formed,
    }
    if think_opened:  # for a later grader, which sees no tokenizer
        row["think_opened"] = True
    return row


# Which words came from the picture.


def token_information(policy, blank, done, micro_batch_tokens):
    """log p(token | picture) - log p(token | blank) of each token of each completion.

    `done`: completions of the intact prompts, whose log-probabilities are known from decoding;
    `blank`: the same prompts with blank pictures.
    """
    lengths = done.lengths.tolist()
    nats = [[]] * len(lengths)  # of unequal lengths
    whole = [blank.mask.shape[1] + length for length in lengths]
    for rows in train.micro_batches(range(len(lengths)), whole, micro_batch_tokens):
        tokens = done.tokens[rows, :lengths[rows[0]]]
        owners = torch.tensor(rows, device=policy.device)
        without = train.score_tokens(policy, blank, owners, tokens)
        difference = done.logprobs[rows, :tokens.shape[1]] - without
        for row, line in zip(rows, difference.tolist()):
            nats[row] = [round(x, 3) for x in line[:lengths[row]]]
    return nats


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


# Plan: what will be done, counted, and how long it takes, by a batch of each input.


def amount(inputs, policies):
    greedy = len(policies) * sum(len(asked.rows) for asked in inputs)
    drawn = len(policies) * sum(len(asked.rows) * asked.samples for asked in inputs)
    return (f"{len(policies)} policies x {len(inputs)} inputs: {greedy:,} greedy answers and {drawn:,} "
            f"drawn ones of at most {inputs[0].max_new_tokens} tokens")


def measure(model, inputs, policies, workers):
    """Time and memory of the whole stage, from the middle batch of each input asked of one policy and
    of two."""
    prepare.begin_worker(0)
    policy = load_policies(model)

    def ask(asked, some, whom):
        start = time.perf_counter()
        answer_batch(model, asked, some, whom)
        return (time.perf_counter() - start) / len(some)

    ask(inputs[0], inputs[0].batches()[0], policies[:1])  # warms up
    seconds = 0.0
    for asked in inputs:
        batches = asked.batches()
        middle = batches[len(batches) // 2]  # batches go from the longest prompts to the shortest
        one = ask(asked, middle, policies[-1:])
        more = 0.0
        if len(policies) > 1:  # pictures are seen once for all policies
            more = max(0.0, ask(asked, middle, policies[-2:]) - one)
        seconds += (one + more * (len(policies) - 1)) * len(asked.rows) / workers
    return (f"about {seconds / 60:.1f} minutes with {workers} workers, each of which takes "
            f"{train.peak_gb(policy):.1f} GB")


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
    there = [name for name, _ in policy.model.named_parameters()]
    for who, folder in adapters.items():
        ending = f".{train.module_name(who)}.weight"
        own = {name for name in there if name.endswith(ending)}
        with safe_open(folder / ADAPTER[1], "pt") as file:
            saved = {current_name(name).removesuffix(".weight") + ending for name in file.keys()}
        if lacking := saved ^ own:
            raise UserError(f"{folder} does not fit {model.path}: {len(lacking)} of its matrices have "
                            f"no counterpart, such as {min(lacking)}")
    return policy


@functools.lru_cache(maxsize=4)
def open_questions(path):
    return prepare.read_questions(path, "run 02_corrupt.py")


def without_images(tables):
    return [table.remove_columns("images") for table in tables]


def batch_sizes(model, policy, asked, longest):
    """How much of a batch is answered at a time, as stage 3 plans it."""
    wanted = train.Config(
        memory_gb=model.memory_gb, cache_gb=model.cache_gb, checkpoint=True,
        group_size=max(1, asked.samples), max_new_tokens=asked.max_new_tokens)
    return train.fit_memory(policy, wanted, train.PRESETS[model.preset], longest)


def draw_numbers(policy, questions, asked):
    """(questions * samples, tokens) numbers in [0, 1) that depend on the question alone."""
    rows = []
    for question in questions:
        for i in range(asked.samples):
            rows.append(train.uniforms(0, 0, question["id"], i, asked.max_new_tokens))
    return torch.from_numpy(np.stack(rows)).to(policy.device)


# Answers files: beside one lies its .part while it grows. What is there is graded anew, so that a
# better grader needs no model.


def find_missing(asked):
    """(by policy the rows that are there, by id; number of a batch -> its rows, the policies to ask)."""
    questions = asked.questions()
    found = {}
    for who, path in asked.files.items():
        found[who] = previous_answers([path, partial_path(path)], questions, asked.origins[who])
    names = dict(zip(asked.rows, questions))  # row -> id
    missing = {}
    for number, rows in enumerate(asked.batches(), 1):
        policies = [who for who in found if not all(names[row] in found[who] for row in rows)]
        if policies:
            missing[number] = rows, policies
    if missing:
        for who, path in asked.files.items():  # without a last line that was half written
            prepare.write_jsonl(partial_path(path), found[who].values())
    return found, missing


def previous_answers(files, questions, origin):
    """Answers in these files to `questions` that were made from `origin`, by id, graded anew; of two
    to the same question the later."""
    rows = {}
    for file in files:
        for row in prepare.read_jsonl(file) if file.exists() else ():
            # a row may be of another study, or no answer at all
            known = row.get("id") in questions and isinstance(row.get("response"), str)
            if not known or row | origin != row:
                continue
            opened = row.get("think_opened", False)
            grade = prepare.grade(row["response"], questions[row["id"]], think_opened=opened)
            rows[row["id"]] = row | {"answer": grade.answer, "correct": grade.correct,
                                     "well_formed": grade.well_formed}
    return rows


def partial_path(path):
    """Beside an answers file: what is answered of it so far, batch by batch."""
    return path.with_name(f"{path.name}.part")


def finish_input(asked, found):
    """Write the answers files, and say how many answers are right."""
    right = []
    for who, path in asked.files.items():
        found[who] = {name: found[who][name] for name in asked.questions()}
        write_answers(path, found[who], asked.origins[who])
        share = sum(row["correct"] for row in found[who].values()) / len(found[who])
        right.append(f"{who} {share:.1%}")
    tqdm.write(f"{asked.name}, n = {len(asked.rows)}: {', '.join(right)}")


def write_answers(path, rows, origin):
    """Write the whole file, unless it has these answers under today's verdicts; others of the same
    origin stay."""
    old = {}
    if path.exists():
        old = {row["id"]: row for row in prepare.read_jsonl(path)}
    new = {name: row for name, row in old.items() if row | origin == row} | rows
    if new != old:
        prepare.write_jsonl(path, new.values())
    partial_path(path).unlink(missing_ok=True)


# Which questions: rows of a file, chosen by ids and groups alone.


def input_names(config, study, source):
    """clean and the corruptions of a benchmark that are asked."""
    benchmarks = study["sources"]["benchmarks"]
    data = Path(config.data)
    if source not in benchmarks:
        raise UserError(f"{source} is no benchmark of {data / 'study.json'}: run 01_prepare.py with "
                        f"--benchmarks {source}, or choose from {', '.join(benchmarks)}")
    there = sorted(path.stem for path in (data / "corrupted" / source).glob("*.parquet"))
    return config.corruptions or ["clean", *there]


def choose_rows(path, split, limit, only, only_file):
    """Rows of a split, `limit` of them spread over the groups, the longest prompt first."""
    table = open_questions(path).remove_columns("images")
    # columns one by one: a row would decode its pictures
    rows = [row for row, its in enumerate(table["split"]) if its == split]
    ids = table["id"][:]
    if only is not None:
        rows = [row for row in rows if ids[row] in only]
    if not rows:
        raise UserError(f"{only_file or path} names no question of the {split} split of {path}: choose "
                        "other --benchmarks or --splits")
    groups = table["group"][:]
    numbers = prepare.stratified([ids[row] for row in rows], [groups[row] for row in rows], limit)
    lengths = table["prompt_tokens"][:]
    return tuple(sorted((rows[number] for number in numbers), key=lambda row: -lengths[row]))


def read_ids(path):
    """The ids that a file of stage 5 names; None: no file is asked for."""
    if path is None:
        return None
    try:
        return set(map(str, json.loads(Path(path).read_text(encoding="utf-8"))["ids"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--only {path} is no file of ids, such as stage 5 writes "
                        f"(report/strict-SOURCE.json): {error}") from error


def longest_answer(config, study):
    """Tokens that every policy may use, whichever are asked."""
    if config.max_new_tokens:
        return config.max_new_tokens
    runs = [run["settings"]["max_new_tokens"] for run in finished_runs(Path(config.data))]
    return max(runs, default=train.PRESETS[study["preset"]]["max_new_tokens"])


def finished_runs(data):
    return [train.read_run(path.parent) for path in sorted((data / "policies").glob("*/config.json"))]


def check_config(config):
    prepare.check_least(config, 1, "limit", "max_new_tokens", "workers")
    prepare.check_least(config, 0, "samples")
    prepare.check_least(config, 1e-9, "memory_gb", "cache_gb")
    for split in config.splits:
        if split not in SPLITS:
            raise UserError(f"--splits {split} is unknown: choose from {' '.join(SPLITS)}")


# Policies: runs of stage 3, and any LoRA of the language model that PEFT saved. Vision tower and
# base are shared by all, so settings that change them, or that only a later PEFT knows, are refused.

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LORA_WEIGHT = re.compile(r"base_model\.model\.(.*language_model\.layers\..+)\.lora_[AB]\.weight")
OWN_NAME = re.compile(rf"(base|{'|'.join(train.CONDITIONS)})(-|$)")
LORA_SETTINGS = (
    "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora lora_dropout "
    "base_model_name_or_path revision task_type inference_mode auto_mapping peft_version "
    "exclude_modules layers_to_transform layers_pattern").split()


def find_policies(config, study):
    """Name -> (folder of its adapter, None for the base; what it was made from, artifact -> sha256)."""
    data = Path(config.data)
    finished = sorted(path.parent.name for path in (data / "policies").glob("*/config.json"))
    found = {}
    for name in config.policies or ["base", *finished]:
        folder = Path(name).resolve()
        if name == "base":
            found[name] = None, study["model_files"]
        elif name in finished:
            found[name] = own_run(data, study, name)
        elif not folder.is_dir():
            raise UserError(f"{data / 'policies' / name} holds no finished policy: choose from "
                            f"{', '.join(['base', *finished])}, run 03_train_grpo.py, or give the folder "
                            "of an adapter")
        elif OWN_NAME.match(folder.name) or folder.name in found:
            raise UserError(f"{folder}: {folder.name} is the name of a policy of this kit, or given "
                            "twice: rename the folder")
        else:
            trained_on = check_adapter(folder)
            if Path(trained_on).name != Path(study["model"]).name:
                print(f"note: {folder} was trained on {trained_on or 'a base that it does not name'}, "
                      f"and is asked here on {study['model']}")
            hashes = {str(path): prepare.sha256(path) for path in map(folder.joinpath, ADAPTER)}
            found[folder.name] = folder, study["model_files"] | hashes
    return found


def own_run(data, study, name):
    """A finished run of this study, as `find_policies` returns it."""
    folder, again = data / "policies" / name, "run 03_train_grpo.py again"
    made_from = train.read_run(folder)["settings"]["made_from"]
    questions = {artifact: digest for artifact, digest in made_from.items()
                 if artifact not in study["model_files"]}
    prepare.check_fresh(data, folder, questions, f"delete that folder and {again}")
    if not made_from.items() >= study["model_files"].items():
        raise UserError(f"{folder} was trained on another model than {study['model']}: delete it and "
                        f"{again}")
    check_adapter(folder)
    hashes = {(path.relative_to(data)).as_posix(): prepare.sha256(path)
              for path in map(folder.joinpath, ADAPTER)}
    return folder, study["model_files"] | hashes


def current_name(weight):
    """The name of a saved matrix under today's transformers: before 4.52 the language model was called
    `model` or `language_model.model`."""
    for old, now in train.OLD_ADAPTER_NAMES.items():
        weight = re.sub(old.replace("^", r"(?<=^base_model\.model\.)"), now, weight)
    return weight


def check_adapter(folder):
    """Stop unless the folder holds a plain LoRA of the language model, as PEFT saves it; returns the
    model that it says it is of."""
    try:
        settings = dict(json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8")))
        with safe_open(folder / ADAPTER[1], "pt") as file:
            names = list(file.keys())
            tensors = {current_name(name): file.get_tensor(name) for name in names}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no adapter (adapter_config.json and adapter_model.safetensors, as "
                        f"PEFT saves them: {error}): save or train it again") from error
    usual = LoraConfig().to_dict()
    odd = [] if tensors else ["empty"]
    if len(tensors) < len(names):
        odd.append("two names of one matrix")
    for key, value in settings.items():
        # what is at its usual value changes nothing, whatever it means
        if key not in LORA_SETTINGS and value and value != usual.get(key):
            odd.append(f"{key} {value}")
    if settings.get("peft_type") != "LORA":
        odd.append("no peft_type LORA")
    for name, tensor in tensors.items():
        if not LORA_WEIGHT.fullmatch(name):
            odd.append(name)
        elif not tensor.float().isfinite().all():
            raise UserError(f"{folder} holds a value that is not finite in {name}: its training broke, "
                            "take an earlier checkpoint of it")
    if odd:
        raise UserError(f"{folder} is no plain LoRA of the language model ({odd[0]}): this kit cannot "
                        "compare it")
    return str(settings.get("base_model_name_or_path") or "")


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
