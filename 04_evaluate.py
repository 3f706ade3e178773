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
        torchrun --nproc_per_node=2 04_evaluate.py       # the questions are dealt out to two processes
        python 04_evaluate.py --policies base path/to/my_adapter     # a LoRA of your own: does it depend on the picture?
"""
import functools
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
def gold_logprobs(policy: Policy, prefix: train.Prefix, questions: Sequence[Question], responses: Sequence[str],
                  tokens_per_pass: int) -> list[float]:
    """log p(gold answer | question, the policy's own reasoning), in nats, teacher-forced inside the policy's own box.

    The reasoning is the greedy one, and stands for the sum over all that the policy might have reasoned.
    """
    pairs = [split_gold(response, prepare.gold_texts(question)[0], policy.tokenizer) for question, response in zip(questions, responses)]
    lengths, out = [prefix.mask.shape[1] + len(head) + len(gold) for head, gold in pairs], [0.0] * len(pairs)
    for rows in train.passes(range(len(pairs)), lengths, tokens_per_pass):
        whole = torch.full((len(rows), lengths[rows[0]] - prefix.mask.shape[1]), policy.tokenizer.pad_token_id)
        for ids, row in zip(whole, rows):
            ids[:lengths[row] - prefix.mask.shape[1]] = torch.tensor(sum(pairs[row], []))
        logprobs = train.score_tokens(policy, prefix, torch.tensor(rows, device=policy.device), whole.to(policy.device))
        for line, row in zip(logprobs, rows):
            head, gold = pairs[row]
            out[row] = line[len(head):len(head) + len(gold)].sum().item()
    return out


@torch.no_grad()
def token_information(policy: Policy, without: train.Prefix, done: train.Completions, tokens_per_pass: int) -> list[list[float]]:
    """log p(token | picture) - log p(token | no picture), in nats, of each token of each completion, given those before it.

    `done`: completions of the intact prompts, whose log-probabilities are known from decoding; `without`: the same prompts, blank.
    """
    out, lengths = [[]] * len(done.tokens), done.lengths.tolist()
    for rows in train.passes(range(len(lengths)), [without.mask.shape[1] + length for length in lengths], tokens_per_pass):
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
           tokens_per_pass: int, without: tuple | None = None, draws: torch.Tensor | None = None) -> list[dict]:
    """Greedy answers to a batch of questions, graded: rows of the answers file. `features` of the pictures as `train.look` returns them.

    `without`: prompts and features of the same questions, blank, where each token's information is wanted; `draws` as of
    `train.generate`, where answers are also drawn.
    """
    with torch.no_grad(), train.unpacked(policy):
        prefix = train.encode_prompts(policy, prompts, features)
        done = train.generate(policy, prefix, max_new_tokens)
        responses, grades, _ = train.grade_completions(policy, questions, done, reward=False)
        golds = gold_logprobs(policy, prefix, questions, responses, tokens_per_pass)
        if draws is not None:
            others = train.generate(policy, prefix, max_new_tokens, draws)
            _, drawn, _ = train.grade_completions(policy, questions, others, reward=False)
        if without:
            nats = token_information(policy, train.encode_prompts(policy, *without), done, tokens_per_pass)
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


def part(path: Path, rank: int | str = "*", size: int | str = "*") -> str:
    """Name of the file beside `path` to which one of `size` processes appends its answers."""
    return f"{path.name}.{rank}of{size}.part"


def settle(path: Path, rows: dict[str, dict], origin: dict):
    """Write the whole file, unless it has these answers under today's verdicts; others of the same origin stay, and the parts go."""
    old = {row["id"]: row for row in prepare.read_jsonl(path)} if path.exists() else {}
    new = {name: row for name, row in old.items() if row | origin == row} | rows
    if new != old:
        prepare.write_jsonl(path, new.values())
    for file in path.parent.glob(part(path)):
        file.unlink()


def evaluate(load: Callable[[], Policy], table: Dataset, blank: Dataset | None, rows: Sequence[int], paths: Mapping[str, Path],
             origins: Mapping[str, dict], config: Config, preset: Mapping, title: str) -> dict[str, list[dict]]:
    """Answer the questions `rows` of a table under every policy; `paths` and `origins` (it stands in every line) by policy.

    `blank`: the same questions without their pictures, where each token's information is wanted. Where origins have `samples`, so many
    answers are drawn as well, by numbers that depend on the question alone.

    What has no answer yet is dealt out to the processes, and each appends whole batches to a file of its own: an interrupted evaluation
    continues there, and where the number of processes is another one now, the rest is dealt out anew. Pictures are prepared, and seen by
    the frozen vision tower, once for all policies. Answers that were made from something else than their origin are made again.
    """
    (rank, size), texts = train.world(), table.remove_columns("images")
    questions = {question["id"]: question for question in (texts[row] for row in rows)}
    done, new, own = {}, {}, {}  # answers by policy and id: what all processes see, what this one adds, and its file for that
    for who, path in paths.items():
        others = {*path.parent.glob(part(path))} - {*path.parent.glob(part(path, size=size))}
        done[who] = kept([*sorted(others), path], questions, origins[who])
        if len(done[who]) < len(rows):
            own[who] = path.with_name(part(path, rank, size))
            new[who] = kept([own[who]], questions, origins[who])
            prepare.write_jsonl(own[who], new[who].values())  # without a last line that was half written
    train.check_same(next(iter(paths.values())).parent, {who: sorted(done[who]) for who in own})
    share = [(row, name) for row, name in zip(rows, questions) if any(name not in done[who] for who in own)][rank::size]
    batches = []
    if any(name not in done[who] and name not in new[who] for _, name in share for who in own):
        policy, settings = load(), next(iter(origins.values()))  # the same for all
        lengths = np.sum([source["prompt_tokens"][:] for source in (table, blank) if source], axis=0)
        max_new_tokens, samples = settings["max_new_tokens"], settings.get("samples", 0)
        lengths = [lengths[row] for row, _ in share]
        wanted = train.Config(memory_gb=config.memory_gb, cache_gb=config.cache_gb, checkpoint=True, group_size=max(1, samples),
                              max_new_tokens=max_new_tokens)
        sizes = train.plan(policy, wanted, preset, max(lengths))
        batches = [share[some] for some in train.waves(policy, lengths, sizes.group_size, max_new_tokens, sizes.cache_gb)]
    with tqdm(total=len(share) * len(own), desc=title, leave=False, disable=rank > 0 or None) as bar:
        for batch in batches:
            places = {who: [i for i, (_, name) in enumerate(batch) if name not in done[who]] for who in own}
            todo = [who for who in own if any(batch[i][1] not in new[who] for i in places[who])]
            if todo:
                asked = [table[row] for row, _ in batch]
                prompts, bare = [policy.encode(question) for question in asked], [policy.encode(blank[row]) for row, _ in batch if blank]
                features, without = train.look(policy, prompts), train.look(policy, bare)
                draws = [[train.uniforms(0, 0, name, i, max_new_tokens) for i in range(samples)] for _, name in batch]
            for who in todo:
                policy.use(None if who == "base" else who)
                its = lambda items: [items[i] for i in places[who]]
                drawn = torch.from_numpy(np.concatenate(its(draws))).to(policy.device) if samples else None
                answers = [row | origins[who] for row in answer(policy, *map(its, (asked, prompts, features)), max_new_tokens, sizes.tokens_per_pass,
                                                                (its(bare), its(without)) if blank else None, drawn)]
                prepare.append_jsonl(own[who], answers)
                new[who] |= {row["id"]: row for row in answers}
            bar.update(len(batch) * len(own))
    for more in train.gather(new):
        done = {who: rows | more.get(who, {}) for who, rows in done.items()}
    done = {who: {name: rows[name] for name in questions} for who, rows in done.items()}
    train.by_first(lambda: [settle(path, done[who], origins[who]) for who, path in paths.items()])
    return {who: [*rows.values()] for who, rows in done.items()}


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
            trained_on, asked_on = check_adapter(folder), str(data / "model") if study["model"] == "embedded" else study["model"]
            whole = (lambda path: Path(path).resolve()) if study["model"] == "embedded" else lambda path: Path(path).name
            if whole(trained_on) != whole(asked_on):
                print(f"note: {folder} was trained on {trained_on or 'a base that it does not name'}, and is asked here on {asked_on}")
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


@train.joined()
def main(config: Config) -> dict[tuple[str, str, str], list[dict]]:
    """Evaluate; returns the rows of each answers file by (policy, source, clean or corruption)."""
    data = Path(config.data)
    study = prepare.load_study(data)
    prepare.check_least(config, 1, "limit", "max_new_tokens")
    prepare.check_least(config, 0, "samples")
    prepare.check_least(config, 1e-9, "memory_gb", "cache_gb")
    preset = train.PRESETS[study["preset"]]
    policies, inputs, answers, only = find_policies(config, study), find_inputs(config, study), {}, read_ids(config.only)
    runs = [train.read_run(path.parent)["settings"]["max_new_tokens"] for path in (data / "policies").glob("*/config.json")]
    max_new_tokens = config.max_new_tokens or max(runs, default=preset["max_new_tokens"])  # whichever policies are asked
    made_with = ", ".join(map(" ".join, prepare.versions().items()))
    adapters = {who: folder for who, (folder, _) in policies.items() if folder}
    load = functools.cache(lambda: load_policies(prepare.model_path(data, study), study["max_pixels"], adapters))
    for source, name, questions in inputs:
        start = time.perf_counter()
        table = prepare.read_questions(data / prepare.input_path(source, name), "run 02_corrupt.py")
        blank = next((prepare.read_questions(data / path, "") for path in questions if path != prepare.input_path(source, name)), None)
        ids, groups, splits, lengths = (table[column][:] for column in ("id", "group", "split", "prompt_tokens"))
        tests = [row for row, split in enumerate(splits) if split == "test" and (only is None or ids[row] in only)]
        if not tests:
            raise UserError(f"{config.only} names no question of {source}: choose --benchmarks that it speaks of")
        chosen = [tests[i] for i in prepare.stratified([ids[row] for row in tests], [groups[row] for row in tests], config.limit)]
        chosen.sort(key=lambda row: -lengths[row])  # what does not fit into memory shows at once, and there is little padding
        settings = {"made_with": made_with, "max_new_tokens": max_new_tokens}
        if name in prepare.NO_PICTURE and config.samples:  # what is drawn is not kept, but its verdicts
            settings |= {"samples": config.samples, "graded_by": prepare.sha256(Path(prepare.__file__))}
        origins = {who: {"made_from": made_from | questions, **settings} for who, (_, made_from) in policies.items()}
        paths = {who: data / "answers" / who / source / f"{name}.jsonl" for who in policies}
        done = evaluate(load, table, blank, chosen, paths, origins, config, preset, f"{source} {name}")
        answers |= {(who, source, name): rows for who, rows in done.items()}
        right = [f"{who} {sum(row['correct'] for row in rows) / len(rows):.1%}" for who, rows in done.items()]
        print(f"{source} {name}, n = {len(chosen)}: {', '.join(right)} ({time.perf_counter() - start:.0f} s)")
    return answers


if __name__ == "__main__":
    prepare.run(main, Config, __doc__, several=True)
