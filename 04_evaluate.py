# SPDX-License-Identifier: MIT
"""Stage 4: every policy, and the base it came from, on every benchmark, clean and damaged.

Greedy decoding; the same prompts, batches and grader for all. Beside right or wrong each answer keeps what tells seeing
from guessing: its form, its length, whether it was cut, and how likely the gold answer was where the policy gave its
own. The difference of that between a clean and a blank picture is the visual information, in nats.

reads   data/study.json, data/questions/, data/corrupted/, data/policies/
writes  data/answers/POLICY/SOURCE/NAME.jsonl, a line per graded answer; NAME is clean or a corruption
run     python 04_evaluate.py                     # all policies and inputs: about a minute on 2 CPU cores
        python 04_evaluate.py --policies base standard-s0 --corruptions clean blank --limit 100
        python 04_evaluate.py --policies base path/to/my_adapter     # a LoRA of your own: does it depend on the picture?
"""
import functools
import importlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

prepare = importlib.import_module("01_prepare")  # before torch: it says how its threads wait
train = importlib.import_module("03_train_grpo")

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

Policy, Question, UserError, option = train.Policy, prepare.Question, prepare.UserError, prepare.option


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LORA_WEIGHT = re.compile(r"base_model\.model\.(.*language_model\.layers\..+)\.lora_[AB]\.weight")
LORA_SETTINGS = ("r lora_alpha target_modules rank_pattern alpha_pattern use_rslora lora_dropout base_model_name_or_path revision task_type "
                 "inference_mode auto_mapping peft_version exclude_modules layers_to_transform layers_pattern").split()


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    policies: list[str] = option([], "base, folders of data/policies, or paths of other LoRA adapters [base and all that are finished]")
    benchmarks: list[str] = option([], "sources of stage 1 [all benchmarks of the study]")
    corruptions: list[str] = option([], "inputs: clean, or names of stage 2 [all there are]")
    limit: int = option(None, "questions per benchmark, spread over its groups [all]")
    cache_gb: float = option(None, "memory for the questions answered together: lower it first [preset of stage 3]")
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


def answer(policy: Policy, questions: Sequence[Question], prompts: Sequence[prepare.Prompt], features, max_new_tokens: int,
           tokens_per_pass: int) -> list[dict]:
    """Greedy answers to a batch of questions, graded: rows of the answers file. `features` of the pictures as `train.look` returns them."""
    with torch.no_grad(), train.unpacked(policy):
        prefix = train.encode_prompts(policy, prompts, features)
        done = train.generate(policy, prefix, max_new_tokens)
        responses, grades, _ = train.grade_completions(policy, questions, done)
        golds = gold_logprobs(policy, prefix, questions, responses, tokens_per_pass)
    return [{"id": question["id"], "group": question["group"], "needs_image": question["needs_image"], "response": response,
             "answer": grade.answer, "gold": question["answer"], "correct": grade.correct, "well_formed": grade.well_formed,
             "truncated": not finished, "tokens": length, "gold_logprob": round(gold, 4)}
            for question, response, grade, finished, length, gold in zip(
                questions, responses, grades, done.finished.tolist(), done.lengths.tolist(), golds)]


def kept(file: Path, questions: Mapping[str, Question], origin: dict) -> list[dict]:
    """The answers that a file has to the first of `questions`, in their order, if they were made from `origin`; graded anew."""
    there = {row.get("id"): row for row in prepare.read_jsonl(file)} if file.exists() else {}
    rows = []
    for name, question in questions.items():
        row = there.get(name, {})
        if row | origin != row or not isinstance(row.get("response"), str):
            break
        grade = prepare.grade(row["response"], question)
        rows.append(row | {"answer": grade.answer, "correct": grade.correct, "well_formed": grade.well_formed})
    return rows


def already_answered(path: Path, questions: Mapping[str, Question], origin: dict) -> list[dict]:
    """The answers that `path`, or the .part file of an evaluation that was interrupted, already has; under the verdicts of today's grader."""
    part = part_of(path)
    old, new = (kept(file, questions, origin) for file in (path, part))
    if len(new) == len(questions) > len(old):  # killed before it was moved into place
        part.replace(path)
        return new
    if len(old) == len(questions):
        verdicts, there = {row["id"]: row for row in old}, prepare.read_jsonl(path)
        if any(verdicts.get(row["id"], row) != row for row in there):  # the grader has changed
            prepare.write_jsonl(path, [verdicts.get(row["id"], row) for row in there])
    return max(old, new, key=len)


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def evaluate(load: Callable[[], Policy], table: Dataset, rows: Sequence[int], paths: Mapping[str, Path], origins: Mapping[str, dict],
             cache_gb: float, tokens_per_pass: int, title: str) -> dict[str, list[dict]]:
    """Answer the questions `rows` of a table under every policy; `paths` and `origins` (it stands in every line) by policy.

    Pictures are prepared, and seen by the frozen vision tower, once for all policies. Whole batches go to a .part file as they are
    made: an interrupted evaluation continues there. Answers that were made from something else than their origin are made again.
    """
    texts = table.remove_columns("images")
    questions = {question["id"]: question for question in (texts[row] for row in rows)}
    done = {who: already_answered(path, questions, origins[who]) for who, path in paths.items()}
    waiting = [who for who in paths if len(done[who]) < len(rows)]
    if not waiting:
        return done
    policy, lengths, max_new_tokens = load(), table["prompt_tokens"][:], origins[waiting[0]]["max_new_tokens"]  # the same for all
    batches = list(train.waves(policy, [lengths[row] for row in rows], 1, max_new_tokens, cache_gb))
    for who in waiting:  # the last batch may be half written
        done[who] = done[who][:max((batch.stop for batch in batches if batch.stop <= len(done[who])), default=0)]
        prepare.write_jsonl(part_of(paths[who]), done[who])
    with tqdm(total=len(rows) * len(waiting), initial=sum(len(done[who]) for who in waiting), desc=title, leave=False, disable=None) as bar:
        for batch in batches:
            todo = [who for who in waiting if batch.stop > len(done[who])]
            if not todo:
                continue
            asked = [table[row] for row in rows[batch]]
            prompts = [policy.encode(question) for question in asked]
            features = train.look(policy, prompts)
            for who in todo:
                policy.use(None if who == "base" else who)
                new = [row | origins[who] for row in answer(policy, asked, prompts, features, max_new_tokens, tokens_per_pass)]
                prepare.append_jsonl(part_of(paths[who]), new)
                done[who] += new
                if batch.stop == len(rows):
                    part_of(paths[who]).replace(paths[who])
                bar.update(len(new))
    return done


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
            found[name] = (folder, model_files | {str(path.relative_to(data)): prepare.sha256(path) for path in map(folder.joinpath, ADAPTER)})
        elif (folder := Path(name)).is_dir() and folder.resolve().name not in ("base", *finished, *found):
            check_adapter(folder)
            folder = folder.resolve()
            found[folder.name] = (folder, model_files | {str(path): prepare.sha256(path) for path in map(folder.joinpath, ADAPTER)})
        elif folder.is_dir():
            raise UserError(f"{folder}: a policy is called {folder.resolve().name} already: rename the folder")
        else:
            raise UserError(f"{data / 'policies' / name} holds no finished policy: choose from {', '.join(['base', *finished])}, "
                            "run 03_train_grpo.py, or give the folder of an adapter")
    return found


def check_adapter(folder: Path):
    """Stop unless the folder holds a plain LoRA of the language model, as PEFT saves it.

    The vision tower and the base are shared by all policies: settings that change them, or that only a later PEFT knows, are refused.
    """
    try:
        settings = dict(json.loads((folder / ADAPTER[0]).read_text()))
        with safe_open(folder / ADAPTER[1], "pt") as file:
            names = list(file.keys())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no adapter (adapter_config.json and adapter_model.safetensors, as PEFT saves them: {error}): save or train it again") from error
    usual = LoraConfig().to_dict()
    odd = [f"{key} {value}" for key, value in settings.items() if key not in LORA_SETTINGS and value and value != usual.get(key)]
    odd += ["no peft_type LORA"] * (settings.get("peft_type") != "LORA") + [name for name in names if not LORA_WEIGHT.fullmatch(name)][:1]
    if odd or not names:
        raise UserError(f"{folder} is no plain LoRA of the language model ({(odd or ['empty'])[0]}): this kit cannot compare it")


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
            inputs.append((source, name, prepare.check_input(data, study, source, name)))
    return inputs


def main(config: Config) -> dict[tuple[str, str, str], list[dict]]:
    """Evaluate; returns the rows of each answers file by (policy, source, clean or corruption)."""
    data = Path(config.data)
    study = prepare.load_study(data)
    prepare.check_least(config, 1, "limit", "max_new_tokens")
    prepare.check_least(config, 1e-9, "cache_gb")
    preset = train.PRESETS[study["preset"]]
    policies, inputs, answers = find_policies(config, study), find_inputs(config, study), {}
    runs = [train.read_run(path.parent)["settings"]["max_new_tokens"] for path in (data / "policies").glob("*/config.json")]
    max_new_tokens = config.max_new_tokens or max(runs, default=preset["max_new_tokens"])  # whichever policies are asked
    made_with = ", ".join(map(" ".join, prepare.versions().items()))
    adapters = {who: folder for who, (folder, _) in policies.items() if folder}
    load = functools.cache(lambda: load_policies(prepare.model_path(data, study), study["max_pixels"], adapters))
    for source, name, questions in inputs:
        start = time.perf_counter()
        table = prepare.read_questions(data / prepare.input_path(source, name), "run 02_corrupt.py")
        ids, groups, splits, lengths = (table[column][:] for column in ("id", "group", "split", "prompt_tokens"))
        tests = [row for row, split in enumerate(splits) if split == "test"]
        chosen = [tests[i] for i in prepare.stratified([ids[row] for row in tests], [groups[row] for row in tests], config.limit)]
        chosen.sort(key=lambda row: -lengths[row])  # what does not fit into memory shows at once, and there is little padding
        origins = {who: {"made_from": made_from | questions, "made_with": made_with, "max_new_tokens": max_new_tokens}
                   for who, (_, made_from) in policies.items()}
        paths = {who: data / "answers" / who / source / f"{name}.jsonl" for who in policies}
        done = evaluate(load, table, chosen, paths, origins, config.cache_gb or preset["cache_gb"], preset["tokens_per_pass"],
                        f"{source} {name}")
        answers |= {(who, source, name): rows for who, rows in done.items()}
        right = [f"{who} {sum(row['correct'] for row in rows) / len(rows):.1%}" for who, rows in done.items()]
        print(f"{source} {name}, n = {len(chosen)}: {', '.join(right)} ({time.perf_counter() - start:.0f} s)")
    return answers


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
