# SPDX-License-Identifier: MIT
"""Stage 4: every policy, and the base it came from, on every benchmark, clean and damaged.

Greedy decoding; the same prompts, batches and grader for all. Beside right or wrong each answer keeps what tells seeing
from guessing: its form, its length, whether it was cut, and how likely the gold answer was where the policy gave its
own. The difference of that between a clean and a blank picture is the visual information, in nats. Along each answer to
an intact question it is told token by token: which words came from the picture, and which from habit.

reads   data/study.json, data/questions/, data/corrupted/, data/policies/
writes  data/answers/POLICY/SOURCE/NAME.jsonl, a line per graded answer; NAME is clean or a corruption
run     python 04_evaluate.py                     # all policies and inputs: two minutes on 2 CPU cores
        python 04_evaluate.py --policies base standard-s0 --corruptions clean blank --limit 100
        python 04_evaluate.py --policies base path/to/my_adapter     # a LoRA of your own: does it depend on the picture?
"""
import functools
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")  # before torch: it says how its threads wait
train = importlib.import_module("03_train_grpo")

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

Policy, Question, UserError, option = train.Policy, prepare.Question, prepare.UserError, prepare.option

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LORA_WEIGHT = re.compile(r"base_model\.model\.(.*language_model\.layers\..+)\.lora_[AB]\.weight")
OWN_NAME = re.compile(rf"(base|{'|'.join(train.CONDITIONS)})(-|$)")
BATCH = 64  # questions dealt out together, whatever the number of workers; a kill costs the batches under way
LORA_SETTINGS = ("r lora_alpha target_modules rank_pattern alpha_pattern use_rslora lora_dropout base_model_name_or_path revision task_type "
                 "inference_mode auto_mapping peft_version exclude_modules layers_to_transform layers_pattern").split()


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    policies: list[str] = option([], "base, folders of data/policies, or paths of other LoRA adapters [base and all that are finished]")
    benchmarks: list[str] = option([], "sources of stage 1 [all benchmarks of the study]")
    corruptions: list[str] = option([], "inputs: clean, or names of stage 2 [all there are]")
    limit: int = option(None, "questions per benchmark, spread over its groups [all]")
    only: str = option(None, "file of ids, as report/strict-SOURCE.json: ask these questions alone [all]")
    samples: int = option(8, "answers drawn at temperature 1 to each question without a picture, beside the greedy one: can it be guessed?")
    workers: int = option(None, "processes, each a batch of questions at a time [one a card; without cards one a core, as memory allows]")
    memory_gb: float = option(None, "what weights and all that is computed may take: lower it first [what is free on the card]")
    cache_gb: float = option(None, "for the questions answered together [what memory_gb leaves; without a card the preset of stage 3]")
    max_new_tokens: int = option(None, "tokens; a longer answer is cut [the most that any run of the study had]")


def answer_prefix(response: str) -> str:
    """The response up to where its answer begins; where it boxed none, a box is opened at its end."""
    head, box, _ = response.rpartition("\\boxed{")
    return (head if box else response) + "\\boxed{"


def split_gold(response: str, gold: str, tokenizer) -> tuple[list[int], list[int]]:
    """Tokens up to the gold answer, and those of the gold in its box: as one text, for `{D` may be a single token.

    The closing brace belongs to the answer: without it, gold 1 would also be paid for 12.
    """
    head, whole = (tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                   for text in (answer_prefix(response), answer_prefix(response) + gold + "}"))
    same = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), min(len(head), len(whole)))
    return whole[:same], whole[same:]


@torch.no_grad()
def gold_logprobs(policy: Policy, prefix: train.PromptCache, questions: Sequence[Question], responses: Sequence[str],
                  micro_batch_tokens: int) -> list[float]:
    """log p(gold answer | question, the policy's own reasoning), in nats, teacher-forced inside the policy's own box.

    The reasoning is the greedy one, and stands for the sum over all that the policy might have reasoned.
    """
    pairs = [split_gold(response, prepare.gold_texts(question)[0], policy.tokenizer) for question, response in zip(questions, responses)]
    lengths, out = [prefix.mask.shape[1] + len(head) + len(gold) for head, gold in pairs], [0.0] * len(pairs)
    for rows in train.micro_batches(range(len(pairs)), lengths, micro_batch_tokens):
        whole = torch.full((len(rows), lengths[rows[0]] - prefix.mask.shape[1]), policy.tokenizer.pad_token_id)
        for ids, row in zip(whole, rows):
            ids[:lengths[row] - prefix.mask.shape[1]] = torch.tensor(sum(pairs[row], []))
        logprobs = train.score_tokens(policy, prefix, torch.tensor(rows, device=policy.device), whole.to(policy.device))
        for line, row in zip(logprobs, rows):
            head, gold = pairs[row]
            out[row] = line[len(head):len(head) + len(gold)].sum().item()
    return out


@torch.no_grad()
def token_information(policy: Policy, without: train.PromptCache, done: train.Completions, micro_batch_tokens: int) -> list[list[float]]:
    """log p(token | picture) - log p(token | no picture), in nats, of each token of each completion, given those before it.

    `done`: completions of the intact prompts, whose log-probabilities are known from decoding; `without`: the same prompts, blank.
    """
    out, lengths = [[]] * len(done.tokens), done.lengths.tolist()
    for rows in train.micro_batches(range(len(lengths)), [without.mask.shape[1] + length for length in lengths], micro_batch_tokens):
        tokens = done.tokens[rows, :lengths[rows[0]]]
        nats = done.logprobs[rows, :tokens.shape[1]] - train.score_tokens(policy, without, torch.tensor(rows, device=policy.device), tokens)
        for row, line in zip(rows, nats.tolist()):
            out[row] = [round(x, 3) for x in line[:lengths[row]]]
    return out


def pieces_of(tokens: Sequence[int], tokenizer) -> list[str]:
    """The text of each token; a character that several tokens share belongs to the last of them."""
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:end], skip_special_tokens=True)
        whole = not text.endswith("\ufffd")
        pieces.append(text if whole else "")
        start = end if whole else start
    return pieces


def answer(policy: Policy, questions: Sequence[Question], prompts: Sequence[prepare.Prompt], features, max_new_tokens: int,
           micro_batch_tokens: int, without: tuple | None = None, draws: torch.Tensor | None = None) -> list[dict]:
    """Greedy answers to a batch of questions, graded: rows of the answers file. `features` of the pictures as `train.encode_images` returns them.

    `without`: prompts and features of the same questions, blank, where each token's information is wanted; `draws` as of
    `train.generate`, where answers are also drawn.
    """
    with torch.no_grad(), train.dequantized(policy):
        prefix = train.encode_prompts(policy, prompts, features)
        done = train.generate(policy, prefix, max_new_tokens)
        responses, grades = train.grade_completions(policy, questions, done, box_only=False)
        golds = gold_logprobs(policy, prefix, questions, responses, micro_batch_tokens)
        if draws is not None:
            others = train.generate(policy, prefix, max_new_tokens, draws)
            _, drawn = train.grade_completions(policy, questions, others, box_only=False)
        if without:
            nats = token_information(policy, train.encode_prompts(policy, *without), done, micro_batch_tokens)
    rows = [{"id": question["id"], "group": question["group"], "needs_image": question["needs_image"], "response": response,
             "answer": grade.answer, "gold": question["answer"], "correct": grade.correct, "well_formed": grade.well_formed,
             "truncated": not finished, "tokens": length, "gold_logprob": round(gold, 4)}
            for question, response, grade, finished, length, gold in zip(
                questions, responses, grades, done.finished.tolist(), done.lengths.tolist(), golds)]
    for i, row in enumerate(rows):
        if prepare.opens_think(policy.tokenizer):  # for a later grader, which sees no tokenizer
            row["think_opened"] = True
        if without:
            row |= {"pieces": pieces_of(done.tokens[i, :row["tokens"]].tolist(), policy.tokenizer), "nats": nats[i]}
        if draws is not None:
            samples = len(drawn) // len(rows)
            row["drawn_right"] = sum(grade.correct for grade in drawn[i * samples:(i + 1) * samples])
    return rows


def kept(files: Iterable[Path], questions: Mapping[str, Question], origin: dict) -> dict[str, dict]:
    """Answers in these files to `questions` that were made from `origin`, by id, graded anew; of two to the same question the later."""
    rows = {}
    for row in (row for file in files if file.exists() for row in prepare.read_jsonl(file)):
        if row.get("id") in questions and row | origin == row and isinstance(row.get("response"), str):
            grade = prepare.grade(row["response"], questions[row["id"]], think_opened=row.get("think_opened", False))
            rows[row["id"]] = row | {"answer": grade.answer, "correct": grade.correct, "well_formed": grade.well_formed}
    return rows


def part(path: Path) -> Path:
    """Beside an answers file: what is answered of it so far, batch by batch."""
    return path.with_name(f"{path.name}.part")


def settle(path: Path, rows: dict[str, dict], origin: dict):
    """Write the whole file, unless it has these answers under today's verdicts; others of the same origin stay."""
    old = {row["id"]: row for row in prepare.read_jsonl(path)} if path.exists() else {}
    new = {name: row for name, row in old.items() if row | origin == row} | rows
    if new != old:
        prepare.write_jsonl(path, new.values())
    part(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Asker:
    """What a worker needs to load the policies, and the memory it may take."""
    model: str
    max_pixels: int
    adapters: tuple[tuple[str, Path], ...]  # (policy, its folder)
    memory_gb: float | None
    cache_gb: float | None
    preset: str


@dataclass(frozen=True)
class Input:
    """The questions of one source, clean or damaged, that all policies are asked."""
    name: str               # SOURCE NAME
    path: Path              # of the questions
    blank: Path | None      # the same without their pictures, where each token's information is wanted
    rows: tuple[int, ...]   # of `path`, the longest prompt first: what does not fit shows at once, and there is little padding
    max_new_tokens: int
    samples: int            # answers drawn to each question
    files: dict[str, Path]  # answers by policy
    origins: dict[str, dict]  # by policy, what stands in every line: what its answers were made from

    def batches(self) -> list[tuple[int, ...]]:
        return [self.rows[start:start + BATCH] for start in range(0, len(self.rows), BATCH)]

    def questions(self) -> dict[str, Question]:
        """By id, without their pictures, in the order of `rows`."""
        table = prepare.read_questions(self.path, "run 02_corrupt.py").remove_columns("images")
        return {table[row]["id"]: table[row] for row in self.rows}


@functools.lru_cache(maxsize=1)
def loaded(model: str, max_pixels: int, adapters: tuple) -> Policy:
    """Once in each worker."""
    return load_policies(model, max_pixels, dict(adapters))


@functools.lru_cache(maxsize=4)
def opened(path: Path) -> Dataset:
    return prepare.read_questions(path, "run 02_corrupt.py")


def answer_batch(asker: Asker, asked: Input, rows: Sequence[int], policies: Sequence[str]) -> dict[str, list[dict]]:
    """The answers of some policies to some rows of an input: the task of a worker.

    Pictures are prepared, and seen by the frozen vision tower, once for all policies. Answers are drawn by numbers that depend on the
    question alone.
    """
    policy = loaded(asker.model, asker.max_pixels, asker.adapters)
    tables = [opened(path) for path in (asked.path, asked.blank) if path]
    columns = [table["prompt_tokens"][:] for table in tables]
    lengths = [sum(column[row] for column in columns) for row in rows]
    wanted = train.Config(memory_gb=asker.memory_gb, cache_gb=asker.cache_gb, checkpoint=True, group_size=max(1, asked.samples),
                          max_new_tokens=asked.max_new_tokens)
    sizes = train.plan(policy, wanted, train.PRESETS[asker.preset], max(lengths))
    answers = {who: [] for who in policies}
    for some in train.rollout_batches(policy, lengths, sizes.group_size, asked.max_new_tokens, sizes.cache_gb):
        questions = [tables[0][row] for row in rows[some]]
        prompts, *without = [[policy.encode(table[row]) for row in rows[some]] for table in tables]
        features = train.encode_images(policy, prompts)
        without = (without[0], train.encode_images(policy, without[0])) if without else None
        draws = None
        if asked.samples:
            draws = torch.from_numpy(np.stack([train.uniforms(0, 0, question["id"], i, asked.max_new_tokens)
                                               for question in questions for i in range(asked.samples)])).to(policy.device)
        for who in policies:
            policy.use(None if who == "base" else who)
            answers[who] += answer(policy, questions, prompts, features, asked.max_new_tokens, sizes.micro_batch_tokens, without, draws)
    return {who: [row | asked.origins[who] for row in rows] for who, rows in answers.items()}


def evaluate(asker: Asker, inputs: Sequence[Input], workers: int) -> dict[str, dict[str, list[dict]]]:
    """Ask all inputs; returns the rows of each answers file by input and policy.

    Batches depend on the study alone, so that rounding does too. One is asked again where any of its answers is missing, or was made from
    something else than its origin; this process alone writes.
    """
    found, tasks, left = {}, {}, Counter()
    for asked in inputs:
        questions = asked.questions()
        found[asked.name] = {}
        for who, path in asked.files.items():
            found[asked.name][who] = kept([path, part(path)], questions, asked.origins[who])
        names = dict(zip(asked.rows, questions))
        for number, rows in enumerate(asked.batches()):
            missing = [who for who, rows_of in found[asked.name].items() if any(names[row] not in rows_of for row in rows)]
            if missing:
                tasks[f"{asked.name}, batch {number + 1}"] = asker, asked, rows, missing
                left[asked.name] += 1
        for who, path in asked.files.items():
            if left[asked.name]:  # without a last line that was half written
                prepare.write_jsonl(part(path), found[asked.name][who].values())

    def finish(asked: Input):
        rows = found[asked.name]
        for who, path in asked.files.items():
            rows[who] = {name: rows[who][name] for name in asked.questions()}
            settle(path, rows[who], asked.origins[who])
        right = [f"{who} {sum(row['correct'] for row in its.values()) / len(its):.1%}" for who, its in rows.items()]
        tqdm.write(f"{asked.name}, n = {len(asked.rows)}: {', '.join(right)}")

    def receive(task: str, answers: dict[str, list[dict]]):
        _, asked, _, _ = tasks[task]
        for who, rows in answers.items():
            prepare.append_jsonl(part(asked.files[who]), rows)
            found[asked.name][who] |= {row["id"]: row for row in rows}
            bar.update(len(rows))
        left[asked.name] -= 1
        if not left[asked.name]:
            finish(asked)

    for asked in inputs:
        if not left[asked.name]:
            finish(asked)
    with tqdm(total=sum(len(rows) * len(missing) for _, _, rows, missing in tasks.values()), desc="answers", disable=None) as bar:
        prepare.deal_out(answer_batch, tasks, min(workers, len(tasks)), receive)
    return {asked.name: {who: [*rows.values()] for who, rows in found[asked.name].items()} for asked in inputs}


def find_policies(config: Config, study: dict) -> dict[str, tuple[Path | None, dict[str, str]]]:
    """Name -> (folder of its adapter, or None for the base; what it was made from: artifact -> sha256)."""
    data, model_files = Path(config.data), study["model_files"]
    finished = sorted(path.parent.name for path in (data / "policies").glob("*/config.json"))
    found = {}
    for name in config.policies or ["base", *finished]:
        if name == "base":
            found[name] = (None, model_files)
        elif name in finished:
            folder = data / "policies" / name
            made_from = train.read_run(folder)["settings"]["made_from"]
            files = {artifact: digest for artifact, digest in made_from.items() if artifact not in model_files}
            prepare.check_fresh(data, folder, files, "delete that folder and run 03_train_grpo.py again")
            if not made_from.items() >= model_files.items():
                raise UserError(f"{folder} was trained on another model than {study['model']}: delete it and run 03_train_grpo.py again")
            check_adapter(folder)
            found[name] = (folder, model_files | {path.relative_to(data).as_posix(): prepare.sha256(path) for path in map(folder.joinpath, ADAPTER)})
        elif (folder := Path(name).resolve()).is_dir() and not OWN_NAME.match(folder.name) and folder.name not in found:
            trained_on = check_adapter(folder)
            if Path(trained_on).name != Path(study["model"]).name:
                print(f"note: {folder} was trained on {trained_on or 'a base that it does not name'}, and is asked here on {study['model']}")
            found[folder.name] = (folder, model_files | {str(path): prepare.sha256(path) for path in map(folder.joinpath, ADAPTER)})
        elif folder.is_dir():
            raise UserError(f"{folder}: {folder.name} is the name of a policy of this kit, or given twice: rename the folder")
        else:
            raise UserError(f"{data / 'policies' / name} holds no finished policy: choose from {', '.join(['base', *finished])}, "
                            "run 03_train_grpo.py, or give the folder of an adapter")
    return found


def check_adapter(folder: Path) -> str:
    """Stop unless the folder holds a plain LoRA of the language model, as PEFT saves it; returns the model that it says it is of.

    The vision tower and the base are shared by all policies: settings that change them, or that only a later PEFT knows, are refused.
    """
    try:
        settings = dict(json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8")))
        with safe_open(folder / ADAPTER[1], "pt") as file:
            names = list(file.keys())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no adapter (adapter_config.json and adapter_model.safetensors, as PEFT saves them: {error}): "
                        "save or train it again") from error
    usual = LoraConfig().to_dict()
    odd = [f"{key} {value}" for key, value in settings.items() if key not in LORA_SETTINGS and value and value != usual.get(key)]
    odd += ["no peft_type LORA"] * (settings.get("peft_type") != "LORA") + [name for name in names if not LORA_WEIGHT.fullmatch(name)][:1]
    if odd or not names:
        raise UserError(f"{folder} is no plain LoRA of the language model ({(odd or ['empty'])[0]}): this kit cannot compare it")
    return str(settings.get("base_model_name_or_path") or "")


def load_policies(model: str, max_pixels: int, adapters: Mapping[str, Path]) -> Policy:
    """One model with all adapters; stops if one does not fit it, or fits in part, which PEFT does not mind."""
    try:
        policy = train.load_policy(model, max_pixels, adapters)
    except (ValueError, RuntimeError, KeyError) as error:
        names = ", ".join(map(str, adapters.values()))
        raise UserError(f"an adapter ({names}) does not fit {model}: {str(error).splitlines()[0]}") from error
    there = {name for name, _ in policy.model.named_parameters()}
    for who, folder in adapters.items():
        with safe_open(folder / ADAPTER[1], "pt") as file:
            wanted = {name.removesuffix("weight") + f"{train.module_name(who)}.weight" for name in file.keys()}
        own = {name for name in there if f".{train.module_name(who)}.weight" in name}
        if wanted != own:
            raise UserError(f"{folder} does not fit {model}: {len(wanted ^ own)} of its matrices have no counterpart, such as "
                            f"{min(wanted ^ own)}")
    return policy


def find_inputs(config: Config, study: dict) -> list[tuple[str, str, dict[str, str]]]:
    """(source, clean or a corruption, what it was made from) of every file of questions to answer."""
    data, inputs = Path(config.data), []
    for source in config.benchmarks or study["sources"]["benchmarks"]:
        if source not in study["sources"]["benchmarks"]:
            raise UserError(f"{source} is no benchmark of {data / 'study.json'}: run 01_prepare.py with --benchmarks {source}, "
                            f"or choose from {', '.join(study['sources']['benchmarks'])}")
        there = sorted(path.stem for path in (data / "corrupted" / source).glob("*.parquet"))
        for name in config.corruptions or ["clean", *there]:
            scored = prepare.check_input(data, study, source, "blank") if name == "clean" and "blank" in there else {}  # `token_information`
            inputs.append((source, name, prepare.check_input(data, study, source, name) | scored))
    return inputs


def read_ids(path: str | None) -> set[str] | None:
    """The ids that a file of stage 5 names; None: no file is asked for."""
    try:
        return set(map(str, json.loads(Path(path).read_text(encoding="utf-8"))["ids"])) if path else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--only {path} is no file of ids, such as stage 5 writes (report/strict-SOURCE.json): {error}") from error


def make_inputs(config: Config, study: dict, policies: Mapping[str, tuple]) -> list[Input]:
    """What is to be asked: every input of every source, of each the questions of the test split that the options leave."""
    data, only, inputs = Path(config.data), read_ids(config.only), []
    runs = [train.read_run(path.parent)["settings"]["max_new_tokens"] for path in (data / "policies").glob("*/config.json")]
    # whichever policies are asked
    max_new_tokens = config.max_new_tokens or max(runs, default=train.PRESETS[study["preset"]]["max_new_tokens"])
    for source, name, made_from in find_inputs(config, study):
        path = data / prepare.input_path(source, name)
        table = prepare.read_questions(path, "run 02_corrupt.py")
        ids, groups, splits, lengths = (table[column][:] for column in ("id", "group", "split", "prompt_tokens"))
        tests = [row for row, split in enumerate(splits) if split == "test" and (only is None or ids[row] in only)]
        if not tests:
            raise UserError(f"{config.only} names no question of {source}: choose --benchmarks that it speaks of")
        chosen = [tests[i] for i in prepare.stratified([ids[row] for row in tests], [groups[row] for row in tests], config.limit)]
        chosen.sort(key=lambda row: -lengths[row])
        settings = {"made_with": ", ".join(map(" ".join, prepare.versions().items())), "max_new_tokens": max_new_tokens}
        samples = config.samples if name in prepare.NO_PICTURE else 0
        if samples:  # what is drawn is not kept, but its verdicts
            settings |= {"samples": samples, "graded_by": prepare.sha256(Path(prepare.__file__))}
        inputs.append(Input(
            f"{source} {name}", path, next((data / other for other in made_from if data / other != path), None), tuple(chosen),
            max_new_tokens, samples, {who: data / "answers" / who / source / f"{name}.jsonl" for who in policies},
            {who: {"made_from": made_of | made_from, **settings} for who, (_, made_of) in policies.items()}))
    return inputs


def main(config: Config) -> dict[tuple[str, str, str], list[dict]]:
    """Evaluate; returns the rows of each answers file by (policy, source, clean or corruption)."""
    data = Path(config.data)
    study = prepare.load_study(data)
    prepare.check_least(config, 1, "limit", "max_new_tokens", "workers")
    prepare.check_least(config, 0, "samples")
    prepare.check_least(config, 1e-9, "memory_gb", "cache_gb")
    policies = find_policies(config, study)
    adapters = tuple((who, folder) for who, (folder, _) in policies.items() if folder)
    asker = Asker(prepare.model_path(data, study), study["max_pixels"], adapters, config.memory_gb, config.cache_gb, study["preset"])
    inputs = make_inputs(config, study, policies)
    batches = sum(len(asked.batches()) for asked in inputs)
    workers = prepare.count_workers(config.workers, batches, prepare.worker_bytes(study))
    with ExitStack() as locks:
        for folder in sorted({path.parent for asked in inputs for path in asked.files.values()}):
            locks.enter_context(prepare.locked(folder))
        found = evaluate(asker, inputs, workers)
    return {(who, *name.split()): rows for name, answers in found.items() for who, rows in answers.items()}


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
