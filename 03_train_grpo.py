# SPDX-License-Identifier: MIT
"""Stage 3: GRPO by hand on a 4-bit model with a LoRA adapter.

Group Relative Policy Optimization (arXiv 2402.03300) asks a question, samples G completions, and
pays each for being better than its group. Conditions differ in what is damaged alone: `standard`
trains on clean questions, `hallucination` on damaged ones only, `mixed` on both; `grounded` is
`standard` with a bonus for using the picture (`grounding_bonus`). Questions, their order, the
random numbers and every other setting are the same.

One training step, each line a function below, as they call each other:

    train_step
        Questions.at              P questions, clean or damaged as the condition says
        roll_out                  G completions of each, at temperature 1
            reward                0.9 for a right answer in the box, 0.1 for the asked-for form
            group_advantages      (reward - mean of its group) / standard deviation of its group
        update                    clip the gradient, step AdamW
            accumulate_gradients  the sum over micro-batches of completions
                token_weights     how much each token counts: dapo, grpo or dr_grpo
                shared_prompts    encode each prompt once, and go backward through it once
                completion_losses
                    token_loss    the clipped surrogate, and the KL term if there is one

Where this departs from textbook GRPO, and why:
- In each pass a prompt is encoded once, not G times: completions depend on it only through its
  keys, values and last hidden state. So these become leaves (tensors cut off from
  the graph), collect the gradients of all completions, and carry them through the prompt in one
  last backward pass. By the chain rule this is the exact gradient, at a fraction of the time and
  memory (`shared_prompts`).
- Randomness is a function: token t of completion i of question q at step s comes from a number
  seeded by (seed, s, q, i), whatever ran before. Nothing is distributed inside a run: runs
  (conditions x seeds) are dealt out to worker processes. So on a processor a resumed run continues
  bit for bit, and one worker and eight give the same bytes. On a card both hold up to rounding, for
  threads add up gradients in the order in which they arrive.
- The default loss is DAPO's (arXiv 2503.14476): one mean over all completion tokens of the step, so
  that a long wrong answer is not cheaper per token; and a wider upper clip.
- Completions are drawn at temperature 1 from the whole distribution, as the gradient supposes (the
  paper: 0.7).
- No KL term by default. The base model is the adapter switched off, so `--kl` costs one more
  forward pass and no memory.
- One update per rollout by default. Then the probability ratio is 1 up to rounding and the clip
  never acts.
- Groups of equal reward have no advantage: they are counted (`frac_reward_zero_std`), and unless
  there is a KL term or a grounding bonus they cost no backward pass. A step of such groups alone
  changes nothing.

reads   data/study.json, data/questions/TRAIN.parquet, data/corrupted/TRAIN/NAME.parquet,
        data/model/ (preset tiny)
writes  data/policies/RUN/: adapter_model.safetensors, adapter_config.json, config.json,
        train.jsonl (a row a step), rollouts.jsonl (completions to read)
run     python 03_train_grpo.py                # three conditions, seeds 0 to 4: 4 to 5 minutes on 2 cores
        python 03_train_grpo.py --conditions grounded
        python 03_train_grpo.py --conditions hallucination --corruption blank misleading --seeds 0 1
The same command continues a run that was ended; a finished run is kept.
"""
import gc
import hashlib
import importlib
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

# before torch: memory that is given back in pieces can be given out whole
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")  # before torch: it says how its threads wait
# before it is imported: on a CPU it asks for a package that the kit does without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes as bnb
import numpy as np
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface, AutoModelForImageTextToText, BitsAndBytesConfig, DynamicCache,
)

UserError, option = prepare.UserError, prepare.option

# ------------------------------------------------------------------------------------------ config

CONDITIONS = {  # the share of its questions that each trains on damaged
    "standard": 0.0,
    "hallucination": 1.0,
    "mixed": None,  # `mixed_fraction`
    "grounded": 0.0,  # and a bonus for using the picture, see `grounding_bonus`
}
LOSSES = ("dapo", "grpo", "dr_grpo")

REAL = {  # beside each: what the paper's trainer, EasyR1, takes as its default on eight cards
    "steps": 500,                # 4,000 questions, 1.9 epochs of geometry3k; there 15 epochs
    "prompts_per_step": 8,       # there 512, in 4 updates of 128
    "group_size": 8,             # there 5; more completions make up for fewer prompts
    "max_new_tokens": 1024,      # there 2,048; what is cut is counted in the log
    "learning_rate": 1e-5,       # there 1e-6 on all weights, and as here on LoRA
    "lora_rank": 32,             # there none, and the vision tower learns too: 40 GB for the 3B
    "micro_batch_tokens": 8192,  # this and cache_gb without a card: on one they follow from memory
    "cache_gb": 2.0,             # 3B: 36,864 bytes a token, so 64 completions take two batches
    "checkpoint": True,
    "save_every": 10,            # 3B: 0.7 GB each
    "seeds": [0],                # there not stated; of the laptop's runs five, for luck is large
}
PRESETS = {
    "tiny": {
        "steps": 60, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 40,
        "learning_rate": 1e-3, "lora_rank": 16, "micro_batch_tokens": 8192, "cache_gb": 0.25,
        "checkpoint": False, "save_every": 1, "seeds": [0, 1, 2, 3, 4],
    },
    "2b": REAL,
    "3b": REAL,
    "7b": REAL | {"micro_batch_tokens": 4096},
}


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    # what is compared
    conditions: list[str] = option(
        ["standard", "hallucination", "mixed"], f"which of: {' '.join(CONDITIONS)}")
    corruption: list[str] = option(
        [], "what damages a question; of several, one is drawn each time it is asked "
        "[blank; for grounded mismatch]")
    mixed_fraction: float = option(
        0.5, "share of damaged questions in condition mixed, drawn anew each time one is asked")
    grounding_weight: float = option(
        0.2, "of the bonus that condition grounded pays for using the picture; 0 is standard")
    grounding_bound: float = option(
        5.0, "nats a token beyond which more use of the picture earns nothing")
    seeds: list[int] = option(
        [], "one run per condition and seed; the report compares seed by seed [preset]")
    workers: int = option(
        None, "processes, each a run at a time [one a card; without cards one a core, "
        "as memory allows]")
    # how much is sampled and learnt
    steps: int = option(None, "updates of the policy [preset]")
    prompts_per_step: int = option(None, "questions a step [preset]")
    group_size: int = option(None, "completions a question, at least 2 [preset]")
    max_new_tokens: int = option(
        None, "tokens; a longer completion is cut, and graded as it stands [preset]")
    learning_rate: float = option(
        None, "AdamW, constant, no weight decay (EasyR1: 0.01) [preset]")
    lora_rank: int = option(None, "of the adapter; its alpha is twice that [preset]")
    # the loss
    loss: str = option("dapo", f"how tokens are weighed: {', '.join(LOSSES)}")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = option(0.28, "and above 1 + this (arXiv 2503.14476; EasyR1: 0.3)")
    kl: float = option(0.0, "weight of the k3 estimate of KL(policy || base) (EasyR1: 0.01)")
    updates_per_batch: int = option(1, "optimizer steps on the same completions")
    max_grad_norm: float = option(1.0, "larger gradients are scaled down to it")
    # memory and files; none of these changes results beyond rounding
    memory_gb: float = option(
        None, "what weights and all that is computed may take; the next two follow "
        "[what is free on the card]")
    micro_batch_tokens: int = option(
        None, "tokens in a micro-batch of the update, prompts and padding too, at least a row "
        "[memory; no card: preset]")
    cache_gb: float = option(
        None, "for prompts and completions while sampling; more takes several rollout batches "
        "[memory; no card: preset]")
    checkpoint: bool = option(
        None, "keep only each layer's input for the backward pass, and run the layer again "
        "there [preset]")
    save_every: int = option(
        None, "steps between checkpoints of three adapters' size: a kill costs the steps since, "
        "Ctrl-C none [preset]")
    plan: bool = option(False, "say what would be done and how long it takes, and end")


# -------------------------------------------------------------------------------------------- runs


def main(config):
    """Train every condition with every seed; returns the config.json of each run."""
    study = prepare.load_study(Path(config.data))
    for name, value in PRESETS[study["preset"]].items():
        # those two follow from memory, which only the process that trains knows: `fit_memory`
        if getattr(config, name) in (None, []) and name not in ("micro_batch_tokens", "cache_gb"):
            setattr(config, name, value)
    check_config(config)

    tasks = {}
    for seed in config.seeds:
        for condition in config.conditions:
            run = run_name(condition, seed, config)
            tasks[run] = study, condition, seed, config
    for condition in config.conditions:
        for name in ("clean", *corruptions_of(condition, config)):  # before any run begins
            prepare.check_input(Path(config.data), study, study["sources"]["train"], name)
    model = prepare.model_path(Path(config.data), study)
    workers = prepare.count_workers(config.workers, len(tasks), prepare.worker_bytes(model))
    print(amount(len(tasks), config))
    if study["preset"] != "tiny" and not torch.cuda.is_available():
        print("torch finds no card that it can use (nvidia-smi shows card and driver): all is "
              "computed on the processor", flush=True)
    if config.plan:
        print(measure(study, config, len(tasks), workers))
        return []

    folders = {run: Path(config.data) / "policies" / run for run in tasks}
    shown = {run: len(step_rows(folder)) for run, folder in folders.items()}
    results = {}
    with tqdm(total=len(tasks) * config.steps, initial=sum(shown.values()), desc="steps",
              disable=None) as bar:
        show = partial(show_steps, folders, shown, bar, workers, config)
        if workers == 1:  # then the run itself tells, for nobody else watches
            tasks = {run: (*task, show) for run, task in tasks.items()}
        prepare.deal_out(train_run, tasks, workers, results.__setitem__, show)
    return [results[run] for run in folders]


def train_run(study, condition, seed, config, after_step=None):
    """Train one condition with one seed, or continue it; returns its config.json."""
    run = run_name(condition, seed, config)
    folder = Path(config.data) / "policies" / run
    questions = Questions(study, condition, seed, config)
    settings = run_settings(study, questions, config)
    with prepare.locked(folder):
        if (folder / "config.json").exists():
            # its steps are compared here: a run under way may be given more, a finished one not
            result = read_finished(folder, settings | {"steps": config.steps})
            print(f"{run} is finished: kept", flush=True)
            return result

        policy = load_policy(prepare.model_path(Path(config.data), study), study["max_pixels"],
                             lora_rank=config.lora_rank, seed=seed)
        optimizer = make_optimizer(policy, config)
        # adapter and AdamW's state come from the checkpoint; log rows of later steps go
        done = resume(folder, policy, optimizer, settings, config)  # steps that were made before
        longest = questions.longest()
        config = fit_memory(policy, config, PRESETS[study["preset"]], longest["prompt_tokens"])
        config = preflight(policy, longest, questions.grounded, config)

        with stopping() as stop_asked:
            for step in range(done + 1, config.steps + 1):
                row, samples = train_step(policy, optimizer, questions, step, config)
                if not math.isfinite(row["entropy"]):
                    raise UserError(f"{run} has logits that are not finite at step {step}: delete "
                                    f"{folder}, and lower --learning_rate")
                log_step(folder, row, samples)
                if after_step:
                    after_step()
                last = [row["skipped"] for row in step_rows(folder)[-3:]]
                if last == [True, True, True]:
                    raise UserError(f"{run} skipped three steps in a row, because a reward or a "
                                    f"gradient is not finite: look into {folder}/rollouts.jsonl, "
                                    "delete that folder, and lower --learning_rate")
                if stop_asked or step % config.save_every == 0:
                    save_checkpoint(folder, policy, optimizer, step, settings)
                if stop_asked:
                    raise KeyboardInterrupt
            return finish(folder, policy, study["model"], settings | {"steps": config.steps})


# ------------------------------------------------------------------------------- one step of GRPO
# P questions, G completions of each, R = P * G rows, T places for tokens.


def train_step(policy, optimizer, questions, step, config):
    """Roll out and update once; returns a row of train.jsonl and samples for rollouts.jsonl."""
    asked = questions.at(step - 1, config.prompts_per_step)
    damaged = ()
    if questions.grounded:  # the same questions without what their pictures say
        damaged = questions.at(step - 1, config.prompts_per_step, damaged=True)
    batch, row, samples = roll_out(policy, asked, step, questions.seed, config, damaged)
    row = {"step": step, **row, **update(policy, optimizer, batch, config)}
    row["peak_gb"] = round(peak_gb(policy), 3)
    return row, samples


@dataclass
class Completions:
    tokens: Tensor    # (R, T), padded on the right; row r belongs to prompt r // G
    logprobs: Tensor  # (R, T), in nats, as seen while sampling
    entropy: Tensor   # (R, T), in nats, of the distribution that each token was drawn from
    lengths: Tensor   # (R,), in tokens, the end-of-sequence token included
    finished: Tensor  # (R,), False where max_new_tokens cut the completion

    @property
    def mask(self):
        """(R, T), True where a token counts."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return places < self.lengths[:, None]


@dataclass
class Batch:
    """The completions of P questions, and what the loss needs of them."""
    prompts: list                 # P
    images: list                  # per prompt, per picture, its features: `encode_images`
    completions: Completions      # R
    advantages: Tensor            # (R,)
    correct: Tensor               # (R,), 1 or 0
    reference: Tensor = None      # (R, T), for --kl: log-probabilities under the base
    damaged: tuple = None         # for grounded: prompts and images of the damaged questions

    @property
    def group_size(self):
        return len(self.advantages) // len(self.prompts)


def roll_out(policy, questions, step, seed, config, damaged=()):
    """Sample a step's completions and reward them: a batch to learn from, log row, samples."""
    start = time.perf_counter()
    prompts = [policy.encode(question) for question in questions]
    images = encode_images(policy, prompts)  # once: the vision tower does not learn
    draws = completion_draws(questions, step, seed, config)
    completions = sample(policy, prompts, images, draws, config)

    texts, grades = grade_completions(policy, questions, completions)
    rewards = [reward(grade, text) for grade, text in zip(grades, texts)]
    rewards = torch.tensor(rewards, device=policy.device)
    rewards = rewards.view(len(questions), config.group_size)               # (P, G)
    advantages = group_advantages(rewards, scale=config.loss != "dr_grpo")  # (P, G)
    correct = torch.tensor([float(grade.correct) for grade in grades], device=policy.device)
    batch = Batch(prompts, images, completions, advantages.flatten(), correct)

    if config.kl:  # the base is the policy with its adapter off: no second copy of the model
        batch.reference = base_logprobs(policy, batch, config)
    if damaged:
        damaged_prompts = [policy.encode(question) for question in damaged]
        batch.damaged = damaged_prompts, encode_images(policy, damaged_prompts)

    # a reward that is no number still reaches the gradient, and the step is skipped
    rewards = rewards.nan_to_num(0.0, 0.0, 0.0)
    row = rollout_log(rewards, grades, completions)
    row["rollout_s"] = time.perf_counter() - start
    samples = []
    for p, question in enumerate(questions):  # the first completion of each question
        first = p * config.group_size
        samples.append({
            "step": step, "id": question["id"], "response": texts[first],
            "gold": question["answer"], "reward": round(rewards[p, 0].item(), 3),
        })
    return batch, row, samples


def completion_draws(questions, step, seed, config):
    """The numbers that decide each token of a step: (R, T), uniform in [0, 1).

    A token is the inverse of the cumulative distribution at its number (`generate`), which is
    sampling at temperature 1 without top-k or top-p.
    """
    draws, asked = [], Counter()
    for question in questions:
        for _ in range(config.group_size):
            # a question that is asked twice in a step goes on counting, so that it is not copied
            number = asked[question["id"]]
            asked[question["id"]] += 1
            draws.append(uniforms(seed, step, question["id"], number, config.max_new_tokens))
    return torch.from_numpy(np.stack(draws))


def uniforms(seed, step, question_id, completion, n):
    """n numbers in [0, 1) that depend on their arguments alone, not on what was drawn before."""
    key = hashlib.sha256(f"{seed}|{step}|{question_id}|{completion}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    return np.random.Generator(generator).random(n)


def grade_completions(policy, questions, completions, box_only=True):
    """Decoded completions and their grades, R of each.

    Training reads the box alone; without `box_only` the benchmark's own rule applies.
    """
    think_opened = prepare.opens_think(policy.tokenizer)
    group = len(completions.tokens) // len(questions)
    texts, grades = [], []
    lengths = completions.lengths.tolist()
    for row, tokens in enumerate(completions.tokens.tolist()):
        text = policy.tokenizer.decode(tokens[:lengths[row]], skip_special_tokens=True)
        texts.append(text)
        grades.append(prepare.grade(text, questions[row // group], box_only, think_opened))
    return texts, grades


def reward(grade, text):
    """What a completion earns by its grade and its text, 0 to 1: a term of your own goes here."""
    return 0.9 * grade.correct + 0.1 * grade.well_formed


def group_advantages(rewards, scale):
    """(r - mean of its group) / (std of its group + 1e-4): (P, G) -> (P, G).

    arXiv 2402.03300, section 4.1.2. Without `scale` the division is left out, as Dr. GRPO does
    (arXiv 2503.20783): it favours questions of little spread. The deviation is the sample's, by
    G - 1. Groups of equal reward get 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    # exactly 0: the mean of equal numbers may be rounded off them, and Adam makes a whole step of
    # the smallest gradient
    differ = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    centred = centred * differ
    if scale:
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred


def token_weights(lengths, loss, max_new_tokens):
    """Weight of each token of each completion in the step's loss: (R,) lengths -> (R,) weights.

    Known before the first micro-batch, over all completions of the step, so that how the step is
    cut changes nothing. Completions of groups without an advantage count too, so in a step of many such
    groups the others weigh less; DAPO samples others in their place, which is left out here.
    dapo: every token counts alike, 1 / tokens of the step (arXiv 2503.14476, eq. 12)
    grpo: every completion counts alike, 1 / (R * its length) (arXiv 2402.03300, eq. 3)
    dr_grpo: every token alike, 1 / (R * max_new_tokens), whatever the lengths (arXiv 2503.20783)
    """
    lengths = lengths.float()
    if loss == "dapo":
        return torch.ones_like(lengths) / lengths.sum()
    if loss == "grpo":
        return 1 / (lengths * len(lengths))
    return torch.ones_like(lengths) / (len(lengths) * max_new_tokens)


def token_loss(logprobs, old_logprobs, advantages, reference, config):
    """The loss of each token, where the clip acted, and k3: all (R, T); advantages (R, 1).

        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl * k3
        r = exp(logprobs - old_logprobs), k3 = exp(d) - d - 1, d = reference - logprobs

    k3 is never negative, and an unbiased estimate of KL(policy || base) while tokens were drawn from
    this policy, as in the first update (Schulman, "Approximating KL divergence", 2020). Here alone
    the KL to the base enters the loss, and only with `reference`; that of `grounding_bonus` is
    another one, between two pictures.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    was_clipped = clipped_ratio * advantages < ratio * advantages
    k3 = torch.zeros_like(loss)
    if reference is not None:
        difference = reference - logprobs
        k3 = difference.exp() - difference - 1
        loss = loss + config.kl * k3
    return loss, was_clipped, k3


def accumulate_gradients(policy, batch, config):
    """Add the gradient of the step's loss to the adapter's `.grad`; returns sums over tokens."""
    weights = token_weights(batch.completions.lengths, config.loss, config.max_new_tokens)
    chosen, sums = prompts_to_learn_from(batch), Counter()
    with dequantized(policy):
        for rows, owner, leaves, damaged in shared_prompts(policy, batch, chosen, config):
            losses, log = completion_losses(policy, batch, rows, owner, leaves, damaged, config)
            log["loss"] = losses * weights[rows, None]
            log["loss"].sum().backward()
            for name, values in log.items():
                sums[name] += values.sum().item()
    return sums


def shared_prompts(policy, batch, chosen, config):
    """Encode the `chosen` prompts of a batch once each, and hand out their completions.

    The gradient of a shared prompt. A prompt acts on its completions only through the keys K and
    values V of its tokens in each layer, and the last hidden state z, which predicts their first
    token. So the loss is f(K, V, z, adapter), where K, V, z = g(prompt, adapter), and by the chain
    rule its gradient is the sum of two parts:

        df/d(adapter)  +  df/d(K, V, z) * d(K, V, z)/d(adapter)

    The second begins with df/d(K, V, z), which is a sum over the completions: it can be added up
    first, and go through the prompt once. This is exact, not an approximation.

    Yields micro-batches: rows of the batch, the place of each one's prompt among those that are
    encoded, these prompts, and for condition grounded the same prompts damaged.
    """
    group, most = batch.group_size, config.micro_batch_tokens
    prompt_lengths = [len(prompt.input_ids) for prompt in batch.prompts]
    for some in micro_batches(chosen, prompt_lengths, most):
        # 1. encode some prompts once, with their graph; `leaves` has the same K, V, z, cut off
        prompts = encode_some(policy, batch.prompts, batch.images, some, config.checkpoint)
        leaves, damaged, length = prompts.as_leaves(), None, prompts.length
        if batch.damaged:
            with torch.no_grad():  # nothing is learnt through the damaged prompts
                damaged = encode_some(policy, *batch.damaged, some)
            length += damaged.length
        # 2. each micro-batch of completions goes backward as far as the leaves: the first part
        # arrives in the adapter's .grad, and df/d(K, V, z) adds up in the leaves' .grad. A row
        # counts with the padded prompt before it, whose keys and values are copied for it
        lengths = (length + batch.completions.lengths).tolist()
        groups = torch.tensor(some)[:, None] * group + torch.arange(group)  # (prompts, G)
        for rows in micro_batches(groups.flatten().tolist(), lengths, most):
            owner = [some.index(row // group) for row in rows]
            # the caller goes backward through these rows before it asks for the next
            yield rows, torch.tensor(owner, device=policy.device), leaves, damaged
        # 3. all their completions done, the second part: once backward through the prompts, from
        # what the leaves collected
        backward_through(prompts.tensors(), leaves.tensors())


def prompts_to_learn_from(batch):
    """Places of the prompts whose completions have a gradient at all.

    In a group of equal reward all advantages are 0: nothing to learn, but for a KL term, which
    pulls on every token, and for the grounding bonus, which right completions earn.
    """
    learn = batch.advantages.view(-1, batch.group_size).ne(0).any(1)  # also where one is nan
    if batch.damaged:
        learn = learn | batch.correct.view(-1, batch.group_size).any(1)
    if batch.reference is not None:
        learn = torch.ones_like(learn)
    return learn.nonzero()[:, 0].tolist()


def completion_losses(policy, batch, rows, owner, leaves, damaged, config):
    """Loss of each token of the completions `rows`, (len(rows), T), and what is logged of each:
    0 behind a completion's end.

    owner: (len(rows),), the place of each one's prompt in `leaves` and `damaged`.
    """
    length = int(batch.completions.lengths[rows].max())
    mask = batch.completions.mask[rows, :length]
    tokens = batch.completions.tokens[rows, :length]
    old_logprobs = batch.completions.logprobs[rows, :length]
    if damaged is None:
        logprobs = score_tokens(policy, leaves, owner, tokens, config.checkpoint)
    else:
        logprobs, divergence, entropy = score_against(
            policy, leaves, damaged, owner, tokens, config.checkpoint)
    # padding may be a token that is never sampled: its logprob is -inf, and 0 * inf is no number
    logprobs = logprobs.masked_fill(~mask, 0)
    reference = None
    if batch.reference is not None:
        reference = batch.reference[rows, :length].masked_fill(~mask, 0)
    losses, clipped, k3 = token_loss(
        logprobs, old_logprobs, batch.advantages[rows, None], reference, config)
    log = {"kl": k3 * mask, "clipped": clipped * mask, "tokens": mask}
    if damaged is not None:
        bonus = grounding_bonus(divergence, entropy, batch.correct[rows], config.grounding_bound)
        losses = losses - config.grounding_weight * bonus
        log["grounding"] = divergence * mask  # of each of these tokens, paid or not
    return losses * mask, log


def update(policy, optimizer, batch, config):
    """`updates_per_batch` optimizer steps on a batch; returns its part of the log row.

    The row is of the last one. Where a gradient is not finite, that update and those after it are
    not made.
    """
    start = time.perf_counter()
    for _ in range(config.updates_per_batch):
        sums = accumulate_gradients(policy, batch, config)
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable(), config.max_grad_norm).item()
        skipped = not math.isfinite(norm + sums["loss"])
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if skipped:
            break
    tokens = max(1, sums["tokens"])
    # at a ratio of 1 the loss is about 0, for advantages add up to 0: look at the reward.
    # clip_ratio: share of tokens where the clip acted; clipped_ratio is that of cut completions
    row = {"loss": sums["loss"], "grad_norm": norm, "clip_ratio": sums["clipped"] / tokens}
    row["kl"] = sums["kl"] / tokens if config.kl else None
    row["grounding"] = sums["grounding"] / tokens if batch.damaged else None
    if skipped:  # JSON has no nan
        row = {name: None for name in row}
    return row | {"skipped": skipped, "update_s": time.perf_counter() - start}


ENTROPY_GUARD = 2.0  # nats of a token: as if seven words were equally likely


def grounding_bonus(divergence, entropy, correct, bound):
    """What condition `grounded` pays for each token, in nats: (R, T), (R, T), (R,) -> (R, T).

    A term of the loss, not of the reward: its gradient goes through KL(p || q), not through
    advantages.

        correct * [H(p) < 2] * min(KL(p || q), bound)

    p: the next-token distribution given the picture, q: that given the damaged one, along the
    policy's own completion. Where the picture says nothing, p = q, and KL is 0 with its gradient;
    where it does, pay grows with what it says. Guards against the collapse that PAPO (arXiv
    2507.06448) saw, where KL kept rising with answers of no sense: only right completions are paid;
    q is held fixed, so that nothing is earned by forgetting what to say without a picture; pay is
    bounded; and a token that could be any of many earns nothing.

    Tried on shapes and left, one seed each: KL - H (the policy settles on its likeliest words),
    KL + H (no gain), pay for wrong completions too and a weight of 1 (fewer right answers). Three
    seeds each: q of a blank picture (it pays for any picture, this one or another), advantages of a
    question in proportion to the information of its right answers (VPPO's idea, arXiv 2510.09285),
    a weight of 0.5: no gain. With 0.2 and another question's picture too, the luck of a seed
    exceeds the difference to `standard`.
    """
    return correct[:, None] * (entropy < ENTROPY_GUARD) * divergence.clamp(max=bound)


# ----------------------------------------------------- conditions: which questions, damaged or not


def corruptions_of(condition, config):
    """What damages the questions of a condition: blank pictures, as in the paper.

    `grounded` compares with another question's picture, see `grounding_bonus`.
    """
    if condition == "standard":
        return []
    if config.corruption:
        return config.corruption
    return ["mismatch"] if condition == "grounded" else ["blank"]


def run_name(condition, seed, config):
    """standard-s0, hallucination-blank-s0, mixed-blank+removed-s1, ..."""
    corruptions = "+".join(corruptions_of(condition, config))
    return f"{condition}-{corruptions}-s{seed}" if corruptions else f"{condition}-s{seed}"


class Questions:
    """The training questions of one run, clean or damaged as its condition says."""

    def __init__(self, study, condition, seed, config):
        self.condition, self.seed = condition, seed
        self.corruptions = corruptions_of(condition, config)
        self.damaged_share = CONDITIONS[condition]
        if condition == "mixed":
            self.damaged_share = config.mixed_fraction
        self.grounded = condition == "grounded" and config.grounding_weight > 0
        self.tables, self.made_from = {}, {}  # of each input the same questions in the same order
        data, source = Path(config.data), study["sources"]["train"]
        for name in ["clean", *self.corruptions]:
            self.made_from |= prepare.check_input(data, study, source, name)
            path = data / prepare.input_path(source, name)
            table = prepare.read_questions(path, "run 01_prepare.py")
            train = [row for row, split in enumerate(table["split"]) if split == "train"]
            self.tables[name] = table.select(train)
        self.ids = self.tables["clean"]["id"][:]

    def at(self, step, count, damaged=False):
        """The questions of a step (from 0) as the condition says, or all of them damaged."""
        chosen, asked = [], Counter()
        for index in schedule(len(self.ids), self.seed, step, count):
            question_id = self.ids[index]
            key = f"{self.seed}|{step}|{question_id}"
            key += "|again" * asked[question_id]  # draws of their own if asked twice in a step
            rng = random.Random(key)
            asked[question_id] += 1
            version = "clean"
            if damaged or rng.random() < self.damaged_share:
                version = rng.choice(self.corruptions)
            chosen.append(self.tables[version][index])
        return chosen

    def longest(self):
        """The one of most tokens, under any of its inputs."""
        table = max(self.tables.values(), key=lambda table: max(table["prompt_tokens"][:]))
        return table[int(np.argmax(table["prompt_tokens"][:]))]


def schedule(n_questions, seed, step, count):
    """Which questions a step asks: epochs of seeded shuffles, a function of the step alone."""
    chosen = []
    for k in range(step * count, (step + 1) * count):
        epoch, place = divmod(k, n_questions)
        order = list(range(n_questions))
        random.Random(f"{seed}|{epoch}").shuffle(order)
        chosen.append(order[place])
    return chosen


# --------------------------------------------------------------------- logging: a row for each step


def rollout_log(rewards, grades, completions):
    """What train.jsonl says of a rollout; names are TRL's where the quantity is TRL's."""
    tokens = int(completions.lengths.sum())
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),  # within a group
        "correct": np.mean([grade.correct for grade in grades]),
        "well_formed": np.mean([grade.well_formed for grade in grades]),
        # share of groups in which all completions earned the same: their advantages are 0
        "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "completion_length": tokens / len(grades),   # tokens
        "clipped_ratio": 1 - completions.finished.float().mean().item(),  # cut by max_new_tokens
        "entropy": completions.entropy.sum().item() / tokens,  # nats a token
        "completion_tokens": tokens,  # of the step
    }


# what is printed of a row
STEP_LINE = ("reward", "correct", "well_formed", "frac_reward_zero_std", "completion_length",
             "clipped_ratio", "entropy", "kl", "grounding", "grad_norm", "rollout_s", "update_s",
             "peak_gb")


def log_step(folder, row, samples):
    """Write a step down, its samples first: a row says that its step is whole."""
    prepare.append_jsonl(folder / "rollouts.jsonl", samples)
    prepare.append_jsonl(folder / "train.jsonl", [row])


def step_rows(folder):
    """The rows of train.jsonl so far."""
    path = folder / "train.jsonl"
    return prepare.read_jsonl(path) if path.exists() else []


def show_steps(folders, shown, bar, workers, config):
    """Print the steps that runs have logged since the last call, and move the bar."""
    told = max(shown.values()) > 1
    for run, folder in folders.items():
        rows = step_rows(folder)
        if not told and len(rows) > 1:
            tqdm.write(forecast(rows, len(folders), workers, config))
            told = True
        for row in rows[shown[run]:]:
            parts = [f"{run} {row['step']:4d}/{config.steps}"]
            parts += [f"{name} {row[name]:.3g}" for name in STEP_LINE if row[name] is not None]
            if row["skipped"]:
                parts.append("skipped: a reward or gradient is not finite")
            tqdm.write("  ".join(parts))
        bar.update(len(rows) - shown[run])
        shown[run] = len(rows)  # fewer where a run goes back to its checkpoint


# ==================================================================================================
# Below: the machine room. You can fork this kit without reading on.
# ==================================================================================================

# --------------------------------------------------------------------------------- before a start
# What will be done and how long it takes, and one sentence for what cannot work.


def amount(runs, config):
    completions = runs * config.steps * config.prompts_per_step * config.group_size
    return (f"{runs} runs x {config.steps} steps x {config.prompts_per_step} prompts x "
            f"{config.group_size} completions: {completions:,} completions of at most "
            f"{config.max_new_tokens} tokens")


def measure(study, config, runs, workers):
    """Time and memory of the whole stage, from the first steps of a run that is thrown away."""
    prepare.begin_worker(0)
    policy = load_policy(prepare.model_path(Path(config.data), study), study["max_pixels"],
                         lora_rank=config.lora_rank)
    questions = Questions(study, config.conditions[0], config.seeds[0], config)
    config = fit_memory(policy, config, PRESETS[study["preset"]], questions.longest()["prompt_tokens"])
    optimizer = make_optimizer(policy, config)
    rows = [train_step(policy, optimizer, questions, step, config)[0] for step in range(1, 5)]
    return forecast(rows, runs, workers, config)


def forecast(rows, runs, workers, config):
    """Time and memory of the whole stage, from rows of train.jsonl."""
    seconds = [row["rollout_s"] + row["update_s"] for row in rows[1:]]  # the first also warms up
    rounds = math.ceil(runs / workers)  # a worker trains one run at a time
    minutes = float(np.mean(seconds)) * config.steps * rounds / 60
    return (f"about {minutes:.1f} minutes with {workers} workers, each of which takes "
            f"{max(row['peak_gb'] for row in rows):.1f} GB")


def check_config(config):
    """One sentence for what cannot work."""
    for condition in config.conditions:
        if condition not in CONDITIONS:
            raise UserError(f"--conditions {condition} is unknown: choose from "
                            f"{' '.join(CONDITIONS)}")
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss} is unknown: choose from {' '.join(LOSSES)}")
    prepare.check_once(config, "conditions", "corruption", "seeds")
    for seed in config.seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"--seeds {seed} is not between 0 and 2^63: choose another")
    # one completion has nothing to be compared with
    prepare.check_least(config, 2, "group_size")
    prepare.check_least(config, 1, "steps", "workers", "prompts_per_step", "max_new_tokens",
                        "lora_rank", "micro_batch_tokens", "updates_per_batch", "save_every")
    prepare.check_least(config, 1e-9, "learning_rate", "max_grad_norm", "memory_gb", "cache_gb")
    prepare.check_least(config, 0, "kl", "clip_low", "clip_high", "grounding_weight",
                        "grounding_bound")
    if asked_only := {"edited", "kept"} & {*config.corruption}:
        raise UserError(f"--corruption {min(asked_only)} is for asking, not for training: its gold is "
                        "the answer to the picture before the edit")
    if "clean" in config.corruption:
        raise UserError("--corruption clean damages nothing: for clean questions use "
                        "--conditions standard")
    if not 0 < config.mixed_fraction < 1:
        raise UserError(f"--mixed_fraction {config.mixed_fraction} is not between 0 and 1: "
                        "for 0 or 1 use --conditions standard or hallucination")


# ------------------------------------------------------------------------------- loading a policy
# A policy is a base model in NF4, 4 bits a weight, which stays as it is, and a LoRA adapter on the
# linear layers of its language model, which learns. Stage 4 loads it here too, with several
# adapters at a time.

# the linear layers of all three families; a list, for servers refuse a regular expression
LANGUAGE_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# what the language model was called before transformers 4.52, and in PEFT files of that time
OLD_ADAPTER_NAMES = {r"^(language_model\.model|model)\.layers": "model.language_model.layers"}
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>")


@dataclass
class Policy:
    model: torch.nn.Module   # PeftModel, or the bare base
    full: torch.nn.Module    # the model of transformers, without PEFT around it
    tokenizer: object
    image_processor: object
    eos: Tensor              # ids that end a completion
    banned: Tensor           # ids never sampled: vision tokens, and ids that no token has
    dequantize: bool = True  # whether memory holds 4-bit weights as plain ones while in use
    patches: int = 8192      # encoded at a time, or one prompt's; four make an image token

    @property
    def device(self):
        return self.banned.device

    @property
    def dtype(self):
        return self.full.get_input_embeddings().weight.dtype

    def trainable(self):
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def use(self, adapter):
        """Answer as the policy of that adapter from now on; None: as the base."""
        if adapter is not None:
            self.model.set_adapter(module_name(adapter))
            self.model.enable_adapter_layers()
        elif isinstance(self.model, PeftModel):
            self.model.disable_adapter_layers()

    def encode(self, question):
        return prepare.encode(question, self.tokenizer, self.image_processor)


def compute_dtype(device):
    """bf16 on cards that compute in it; else fp32, in full.

    With bf16, fp32 products, which are the adapter's alone, are in TF32: it has 10 bits where bf16
    has 7. In fp16, which older cards such as the T4 are faster in, activations of these models
    exceed its 65,504 and answers break, which no scaling of the loss repairs, and a token's share
    of the loss underflows. So such a card is slower, and skips no step.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.set_float32_matmul_precision("high" if native else "highest")
    return torch.bfloat16 if native else torch.float32


def load_policy(model, max_pixels, adapters={}, lora_rank=0, seed=0):
    """The base in NF4 with saved adapters, with a fresh one of `lora_rank`, or (neither) alone.

    Vision tower and lm_head stay as they are: quantising them saves little and costs accuracy.
    Weights come from safetensors only, code never from the model's folder.
    """
    gc.collect()  # an earlier run's model: bitsandbytes' weights and their modules hold each other
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.reset_peak_memory_stats()
    dtype = compute_dtype(device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"])
    full = AutoModelForImageTextToText.from_pretrained(
        model, quantization_config=nf4, dtype=dtype, device_map={"": device},
        attn_implementation="sdpa",  # fused, and allows a mask, for prompts have padding
        use_safetensors=True, trust_remote_code=False)
    tokenizer, image_processor = prepare.load_processors(model, max_pixels)
    return make_policy(full, tokenizer, image_processor, adapters, lora_rank, seed)


def make_policy(full, tokenizer, image_processor, adapters={}, lora_rank=0, seed=0):
    """A loaded base as a policy, with adapters as `load_policy` says.

    The model stays in train mode, with all dropout 0, because bitsandbytes repacks the 4-bit
    weights of some CPUs in eval mode and cannot train afterwards.
    """
    model = full.requires_grad_(False)
    as_product(full.model.visual.patch_embed.proj)
    for name, folder in adapters.items():
        if model is full:
            model = PeftModel.from_pretrained(
                full, folder, module_name(name), key_mapping=OLD_ADAPTER_NAMES)
        else:
            model.load_adapter(folder, module_name(name), key_mapping=OLD_ADAPTER_NAMES)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # of an adapter from elsewhere
            module.p = 0.0
    if lora_rank:
        torch.manual_seed(seed)  # of the adapter's random half
        model = get_peft_model(full, LoraConfig(
            r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, bias="none",
            target_modules=LANGUAGE_LINEARS, exclude_modules=".*visual.*",
            task_type="CAUSAL_LM"))

    vocabulary, device = full.get_input_embeddings().weight.shape[0], full.device
    banned = [*tokenizer.convert_tokens_to_ids(VISION_TOKENS), *range(len(tokenizer), vocabulary)]
    eos = full.generation_config.eos_token_id or []  # of some models one, of some a list
    if isinstance(eos, int):
        eos = [eos]
    eos = sorted({tokenizer.eos_token_id, *eos})
    return Policy(model.train(), full, tokenizer, image_processor,
                  torch.tensor(eos, device=device), torch.tensor(banned, device=device))


def module_name(adapter):
    """How torch may call an adapter: `hallucination-blur-0.05-s0` has a point, which separates
    modules, and a folder may be called `train`, which modules have already."""
    return "policy_" + adapter.replace(".", "%2E")


def as_product(patches):
    """A convolution whose windows do not overlap is a product, and twice as fast as one."""
    def forward(pixels):
        return linear(pixels.flatten(1), patches.weight.flatten(1), patches.bias)

    patches.forward = forward


# ------------------------------------------------------------------- 4-bit weights as plain ones
# Each product with a 4-bit weight unpacks it first, and with a small batch that is most of the
# work. So where memory holds them, weights are unpacked once for a whole rollout, and once for a
# whole update.


@contextmanager
def dequantized(policy):
    """The 4-bit weights as plain ones for a while, if memory holds them.

    In fp32 the adapter is added to them, W + s B A: one product per layer instead of three. The
    gradient of that sum gathers over all micro-batches and goes through it once, on leaving. In 16
    bits the sum would round most of the adapter away: there the two stay apart, and without
    gradients the adapter is in 16 bits too: two products and a sum instead of PEFT's seven kernels.
    """
    changed, sums, leaves, merged = [], [], [], set()
    in_fp32 = policy.dtype == torch.float32
    for module in policy.full.modules():  # a layer with an adapter comes before its base layer
        adapted = isinstance(module, LoraLayer) and is_adapted(module)
        if adapted and in_fp32 and policy.dequantize:
            base, (up, down) = module.base_layer, lora_matrices(module)
            whole = plain_weight(base) + up @ down
            leaf = whole.detach().requires_grad_(whole.requires_grad)
            module.forward = partial(linear, weight=leaf, bias=base.bias)
            sums.append(whole)
            leaves.append(leaf)
            merged.add(base)
        elif adapted and not in_fp32 and not torch.is_grad_enabled():
            up, down = lora_matrices(module)
            module.forward = partial(lora_forward, module.base_layer, up.to(policy.dtype),
                                     down.to(policy.dtype))
        elif is_packed(module) and policy.dequantize and module not in merged:
            module.forward = partial(linear, weight=plain_weight(module), bias=module.bias)
        else:
            continue
        changed.append(module)
    try:
        yield
        backward_through(sums, leaves)
    finally:
        for module in changed:
            del module.forward  # from now on that of its class


def is_packed(module):
    return isinstance(module, bnb.nn.Linear4bit)


def plain_weight(base):
    if is_packed(base):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    return base.weight


def is_adapted(layer):
    """Whether the adapter in use changes this layer: another policy's may, and it may not."""
    return not layer.disable_adapters and layer.active_adapters[0] in layer.lora_A


def lora_matrices(layer):
    """s B (out, rank) and A (rank, in) of the adapter in use."""
    name = layer.active_adapters[0]
    return layer.scaling[name] * layer.lora_B[name].weight, layer.lora_A[name].weight


def lora_forward(base, up, down, x):
    return base(x) + linear(linear(x, down), up)


def backward_through(roots, leaves):
    """Carry the gradients that gathered in `leaves` into the graphs that their values came from."""
    # a leaf that nothing depended on has none, as keys and values if completions are one token long
    reached = [(root, leaf) for root, leaf in zip(roots, leaves) if leaf.grad is not None]
    if reached:
        torch.autograd.backward([root for root, _ in reached], [leaf.grad for _, leaf in reached])


# ---------------------------------------------------------------------------- encoding, or prefill
# Pictures go through the frozen vision tower once a step, prompts through the language model once a
# group. What a prompt leaves behind, a PromptCache, is all that sampling and scoring need of it.


@torch.no_grad()
def encode_images(policy, prompts):
    """What the frozen vision tower sees: per prompt, per picture, a tuple of tensors.

    The first, (image tokens, hidden), stands in the places of the picture's placeholders; a
    Qwen3-VL adds the others, of the same shape, after its first layers.
    """
    shown = [p for p, prompt in enumerate(prompts) if prompt.pictures]
    sizes = {p: len(prompts[p].pixel_values) for p in shown}  # in patches
    features = [[] for _ in prompts]
    for some in micro_batches(shown, sizes, policy.patches):
        pixels = torch.cat([prompts[p].pixel_values for p in some]).to(policy.device)
        grids = torch.cat([prompts[p].image_grid_thw for p in some]).to(policy.device)
        output = policy.full.get_image_features(pixels, grids, return_dict=True)
        seen = zip(output.pooler_output, *(output.get("deepstack_features") or []))
        for p in some:
            features[p] = list(islice(seen, prompts[p].pictures))
    return features


@dataclass
class PromptCache:
    """All that completions need of P encoded prompts, padded on the left to a common length L."""
    keys_values: list      # per layer K and V, each (P, kv heads, L, head dim)
    last_hidden: Tensor    # (P, hidden): predicts the first completion token
    mask: Tensor           # (P, L), 1 where a prompt token stands
    next_position: Tensor  # (P,), of the first completion token, the same on all three axes

    @property
    def length(self):
        return self.mask.shape[1]

    @cached_property
    def bias(self):
        """(P, 1, 1, L): what a score of attention gets where padding stands."""
        return minus_infinity(self.mask == 0)[:, None, None]

    def tensors(self):
        """K and V of each layer, and z."""
        return [self.last_hidden, *chain(*self.keys_values)]

    def as_leaves(self):
        """The same values, cut off from the prompt's graph; gradients gather in their `.grad`."""
        last_hidden, *keys_values = [x.detach().requires_grad_() for x in self.tensors()]
        pairs = list(zip(keys_values[::2], keys_values[1::2]))
        return replace(self, keys_values=pairs, last_hidden=last_hidden)


def minus_infinity(where):
    """-inf where a score of attention must not count, else 0, in fp32 as scores are."""
    return torch.zeros_like(where, dtype=torch.float32).masked_fill(where, -torch.inf)


def encode_prompts(policy, prompts, images, checkpoint_layers=False):
    """Run P prompts once. With gradients enabled the result carries the graph of the prompts."""
    core, device = policy.full.model, policy.device
    padded = policy.tokenizer.pad(
        {"input_ids": [prompt.input_ids for prompt in prompts]}, padding_side="left",
        return_attention_mask=True, return_tensors="pt")
    ids, mask = padded["input_ids"], padded["attention_mask"]                     # (P, L)
    grids, pictures = None, None
    if any(images):  # in the form in which transformers takes features instead of pixels
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts if prompt.pictures])
        tokens, *levels = zip(*chain(*images))
        pictures = {"image": SimpleNamespace(pooler_output=tokens, deepstack_features=levels)}
    # positions are computed here: left alone, the model takes them from an earlier call
    positions, _ = core.get_rope_index(
        ids, mm_token_type_ids=(ids == core.config.image_token_id).int(), image_grid_thw=grids,
        attention_mask=mask)                                                      # (3, P, L)
    cache, mask = DynamicCache(), mask.to(device)
    seen = mask
    if on_old_card(policy):  # (P, 1, L, L)
        seen = mask.bool()[:, None, None] & mask.new_ones(2 * ids.shape[1:]).bool().tril()
    with checkpointed(policy) if checkpoint_layers else nullcontext():
        hidden = core(
            input_ids=ids.to(device), attention_mask=seen,
            position_ids=positions.to(device), mm_encoder_outputs=pictures,
            past_key_values=cache, use_cache=True).last_hidden_state              # (P, L, hidden)
    next_position = positions.amax(dim=(0, 2)) + 1  # padding has position 1
    keys_values = [(layer.keys, layer.values) for layer in cache.layers]
    return PromptCache(keys_values, hidden[:, -1], mask, next_position.to(device))


def on_old_card(policy):
    """Whether a card computes in fp32, as a T4. No fast kernel of it knows heads that share keys
    and values, and transformers, which repeats them beside a mask, drops a mask without padding."""
    return policy.device.type == "cuda" and policy.dtype == torch.float32


def encode_some(policy, prompts, images, some, checkpoint_layers=False):
    """The prompts at the places `some`."""
    return encode_prompts(policy, [prompts[p] for p in some], [images[p] for p in some],
                          checkpoint_layers)


# --------------------------------------------------------------------------- scoring completions
# The update and the KL term's reference need log-probabilities of tokens that are known already: a
# forward over whole completions behind their prompt's keys and values. Memory bounds how many go at
# a time, and the logits of one position of a large vocabulary take 600 kB.

CHUNK_BYTES = 2**26  # of logits in fp32: 110 positions of a vocabulary of 151,936


def micro_batches(rows, lengths, tokens):
    """Rows in order of falling length, cut so that each part has at most that many tokens with its
    padding, or is one row."""
    rows = sorted(rows, key=lambda row: -lengths[row])
    while rows:
        count = max(1, tokens // lengths[rows[0]])
        yield rows[:count]
        rows = rows[count:]


def next_logprobs(policy, hidden):
    """log p(next token | ...) in fp32 over the tokens that may be sampled, in nats:
    (n, hidden) -> (n, vocabulary)."""
    head = policy.full.lm_head
    if hidden.dtype == torch.bfloat16 and isinstance(head, torch.nn.Linear):
        logits = HeadIn16Bits.apply(hidden, head.weight)
    else:  # also where an adapter from elsewhere sits on the head
        logits = head(hidden).float()
    return logits.index_fill(-1, policy.banned, -torch.inf).log_softmax(-1)


class HeadIn16Bits(torch.autograd.Function):
    """Logits in fp32 of hidden states (n, hidden) and a frozen head (vocabulary, hidden) in 16
    bits. Rounded to 16 bits, logits of 16 to 32 are off by up to 0.06, and the likeliest tie."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        return product_in_fp32(hidden, weight.T)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.weight.dtype) @ ctx.weight, None


def product_in_fp32(a, b):
    """a @ b in fp32, (..., n, k) and (..., k, m) -> (..., n, m); in 16 bits without a derivative.

    A card sums products of 16 bits in fp32 anyway, and rounds the result unless it is told not to.
    """
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    matrices = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    return torch.bmm(*matrices, out_dtype=torch.float32).view(*a.shape[:-1], -1)


def score_tokens(policy, prompts, owner, tokens, checkpoint_layers=False):
    """log p, in nats, of each token of completions (R, T) of the prompts `owner` (R,): (R, T)."""
    def logprobs_of(targets, hidden):
        return next_logprobs(policy, hidden).gather(1, targets[:, None])[:, 0]

    hidden = completion_hidden(policy, prompts, owner, tokens, checkpoint_layers)
    return in_chunks(policy, logprobs_of, tokens, hidden)


def score_against(policy, prompts, damaged, owner, tokens, checkpoint_layers=False):
    """As `score_tokens`, and of the distribution p that each token comes from KL(p || q) to the q
    given the damaged prompt, through which no gradient flows, and p's entropy: (3, R, T)."""
    def scores_of(targets, hidden, other):
        logprobs = next_logprobs(policy, hidden)
        own = logprobs.gather(1, targets[:, None])[:, 0]
        p = logprobs.exp()
        # p is 0 at banned tokens, and 0 * -inf is no number
        logprobs = logprobs.index_fill(-1, policy.banned, 0)
        with torch.no_grad():
            q_logprobs = next_logprobs(policy, other).index_fill(-1, policy.banned, 0)
        divergence = (p * (logprobs - q_logprobs)).sum(-1)
        return torch.stack([own, divergence, -(p * logprobs).sum(-1)])

    hidden = completion_hidden(policy, prompts, owner, tokens, checkpoint_layers)
    with torch.no_grad():
        other = completion_hidden(policy, damaged, owner, tokens)
    return in_chunks(policy, scores_of, tokens, hidden, other)


def in_chunks(policy, function, *inputs):
    """Apply a function of (positions, ...) to inputs (R, T, ...), one chunk of positions at a time.

    It makes logits, which so exist for one chunk only; the backward pass makes them again.
    """
    vocabulary = policy.full.get_input_embeddings().num_embeddings
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    chunks = list(zip(*(tensor.flatten(0, 1).split(size) for tensor in inputs)))
    if len(chunks) > 1:
        function = partial(checkpoint, function, use_reentrant=False)
    outputs = [function(*chunk) for chunk in chunks]
    return torch.cat(outputs, -1).unflatten(-1, inputs[0].shape[:2])


def completion_hidden(policy, prompts, owner, tokens, checkpoint_layers=False):
    """Hidden states (R, T, hidden), of which the one at t predicts token t of (R, T) tokens."""
    # index_select: its backward pass on a CPU adds up in one order, that of plain indexing as threads
    # arrive; on a card both add as threads arrive, or nearly so
    first = prompts.last_hidden.index_select(0, owner)[:, None]  # (R, 1, hidden)
    known = tokens[:, :-1]
    if not known.shape[1]:
        return first
    cache = DynamicCache([(keys.index_select(0, owner), values.index_select(0, owner))
                          for keys, values in prompts.keys_values])
    mask = torch.cat([prompts.mask[owner], torch.ones_like(known)], 1)
    places = torch.arange(known.shape[1], device=tokens.device)
    positions = prompts.next_position[owner, None] + places
    with checkpointed(policy) if checkpoint_layers else nullcontext():
        later = policy.full.model(
            input_ids=known, attention_mask=mask, position_ids=positions.expand(3, -1, -1),
            past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([first, later], 1)


@torch.no_grad()
def base_logprobs(policy, batch, config):
    """log p of each token (R, T) under the base, which is the policy with its adapter off."""
    logprobs, chosen = torch.zeros_like(batch.completions.logprobs), range(len(batch.prompts))
    with policy.model.disable_adapter(), dequantized(policy):
        for rows, owner, prompts, _ in shared_prompts(policy, batch, chosen, config):
            length = int(batch.completions.lengths[rows].max())
            tokens = batch.completions.tokens[rows, :length]
            logprobs[rows, :length] = score_tokens(policy, prompts, owner, tokens)
    return logprobs


# --------------------------------------------------------------------------- checkpointed layers
# A layer that keeps only its input for the backward pass, and runs again there, takes a fifth of
# the memory and a third more time. transformers switches the KV cache off where it does so, for a
# layer that runs again would append to it again; the shared prompt needs both.


@contextmanager
def checkpointed(policy):
    """Each run of a layer has a cache that begins with what was there before, and what it appended
    is a result of the layer, through which gradients flow."""
    layers = policy.full.model.language_model.layers

    # the cache has a name of its own, for `again` must not hold it: it holds results, whose graph
    # holds `again`, and a backward pass that runs out of memory would leave that ring for good
    def run(number, forward, hidden, past_key_values, **rest):
        cached = past_key_values.layers
        before = [(layer.keys, layer.values) for layer in cached[number:number + 1]]

        def again(hidden, *before):
            own = DynamicCache()
            if before:
                own.update(*before, number)
            output = forward(hidden, past_key_values=own, **rest)
            return output, own.layers[number].keys, own.layers[number].values

        output, *keys_values = checkpoint(again, hidden, *chain(*before), use_reentrant=False)
        cached[number:number + 1] = DynamicCache([keys_values]).layers
        return output

    for number, layer in enumerate(layers):
        layer.forward = partial(run, number, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


# ----------------------------------------------------------------- decoding with a shared KV cache
# All completions of a rollout batch are decoded together, a token at a time. The keys and values of
# a prompt are read once for its whole group, and nowhere is there a copy of them for each
# completion; completions that have ended leave the batch.

STRETCH = 128  # tokens that a captured step is replayed for: a capture takes as long as a few steps


def sample(policy, prompts, images, draws, config):
    """G completions of each prompt, as many prompts at a time as `cache_gb` holds."""
    lengths, parts = [len(prompt.input_ids) for prompt in prompts], []
    draws = draws.view(len(prompts), config.group_size, -1)  # (P, G, T)
    with torch.no_grad(), dequantized(policy):
        for some in rollout_batches(policy, lengths, config.group_size, config.max_new_tokens,
                                    config.cache_gb):
            cache = encode_prompts(policy, prompts[some], images[some])
            numbers = draws[some].flatten(0, 1).to(policy.device)
            parts.append(generate(policy, cache, config.max_new_tokens, numbers))
    columns = zip(*(vars(part).values() for part in parts))
    return Completions(*map(torch.cat, columns))


def rollout_batches(policy, lengths, group, max_new_tokens, cache_gb):
    """Slices of prompts of these lengths that are sampled together, `group` completions of each: as
    many as memory holds if all were as long as the longest, at least one."""
    size = 1e9 * cache_gb // question_bytes(policy, max(lengths), group, max_new_tokens)
    size = max(1, int(size))
    return [slice(start, start + size) for start in range(0, len(lengths), size)]


class CompletionCache:
    """Keys and values of R completions so far, per layer; those of their prompts stay apart.

    Nothing moves from one token to the next: buffers have all places from the start, and a tensor,
    `column`, says where the next is written, as a captured step needs it.
    """

    def __init__(self, places, column):
        self.places, self.column = places, column
        self.layers = []  # each (2, R, kv heads, places, head dim)
        self.seen = 1     # the places, from the first, that attention looks at

    def update(self, keys, values, layer, *_, **__):
        """As transformers calls it: (R, kv heads, 1, head dim) -> (R, kv heads, seen, head dim)."""
        if layer == len(self.layers):
            rows, heads, _, size = keys.shape
            self.layers.append(keys.new_zeros(2, rows, heads, self.places, size))
        store = self.layers[layer]
        store[0].index_copy_(2, self.column, keys)
        store[1].index_copy_(2, self.column, values)
        return store[:, :, :, :self.seen].unbind()

    def bias(self):
        """(seen,): what a score of attention gets at the places that are not written yet."""
        places = torch.arange(self.seen, device=self.column.device)
        return minus_infinity(places > self.column)

    def get_seq_length(self, *_):
        return self.seen

    def keep(self, rows):
        for number, store in enumerate(self.layers):  # twice the memory of one layer, not of all
            self.layers[number] = store[:, rows]


@dataclass
class GroupLayout:
    """Which of R rows belong to which of P prompts, with S places for each prompt."""
    table: Tensor  # (P, S): the rows of each prompt, then any row
    place: Tensor  # (R,): where a row stands in the flattened table
    full: bool     # every prompt has S rows: the table is the rows in order

    @classmethod
    def of(cls, owner, prompts):
        """owner: (R,), the prompt of each row, in rising order."""
        counts = torch.bincount(owner, minlength=prompts)                  # (P,)
        places = torch.arange(int(counts.max()), device=owner.device)      # (S,)
        filled = (places < counts[:, None]).flatten()                      # (P * S,)
        table = (filled.cumsum(0) - 1).clamp(min=0).view(prompts, -1)      # rows in rising order
        return cls(table, filled.nonzero()[:, 0], len(owner) == len(filled))

    def gather(self, rows):
        """(R, heads, n, size) -> (P, heads, S * n, size): what meets a prompt's keys or values."""
        grouped = rows.unflatten(0, self.table.shape) if self.full else rows[self.table]
        return grouped.transpose(1, 2).flatten(2, 3)

    def scatter(self, grouped):
        """Back again."""
        places = grouped.unflatten(2, (self.table.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return places if self.full else places[self.place]


def attend(module, query, key, value, mask, scaling, prompts, layout, bias, **_):
    """Attention of one new token per row to its prompt and its own completion.

    query (R, heads, 1, d), key and value (R, kv heads, t, d), of the completion so far. Scores are
    in fp32: the keys of a Qwen2 have large biases, and scores of thousands, rounded to 16 bits, are
    off by several nats.
    """
    rows, kv_heads, own_length, size = key.shape
    prompt_keys, prompt_values = prompts.keys_values[module.layer_idx]  # (P, kv heads, L, d)
    # the heads that share a kv head stand side by side: (R, kv heads, heads / kv heads, d)
    query = query.view(rows, kv_heads, -1, size)
    if query.dtype == torch.float32:  # in 16 bits it would be rounded: there scores are scaled
        query, scaling = scaling * query, 1.0
    to_prompt = product_in_fp32(layout.gather(query), prompt_keys.transpose(2, 3)) + prompts.bias
    to_own = product_in_fp32(query, key.transpose(2, 3)) + bias
    scores = scaling * torch.cat([layout.scatter(to_prompt), to_own], -1)
    weights = scores.softmax(-1).to(query.dtype)
    on_prompt, on_own = weights.split([prompts.length, own_length], -1)
    seen = layout.scatter(layout.gather(on_prompt) @ prompt_values) + on_own @ value
    return seen.reshape(rows, 1, -1, size), None


# a name without a mask of its own: transformers then prepares none
AttentionInterface.register("shared_prompt", attend)


def decode_step(policy, prompts, layout, cache, tokens, position):
    """Hidden states (R, hidden) of one more token (R, 1) in each row, at `position` (R,)."""
    text = policy.full.model.language_model
    usual = text.config._attn_implementation
    text.config._attn_implementation = "shared_prompt"
    try:
        hidden = text(
            input_ids=tokens, position_ids=position[:, None].expand(3, -1, -1),
            past_key_values=cache, use_cache=True,
            prompts=prompts, layout=layout, bias=cache.bias()).last_hidden_state
    finally:
        text.config._attn_implementation = usual
    return hidden[:, 0]


def captured(step, device):
    """On a card the same step as a CUDA graph: its kernels, some thousand, then wait for one
    launch, not each for Python. Where the capture fails, the step as it is."""
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # records, without running
            step()
    except RuntimeError as error:  # memory is out; whatever else it is, the step will say
        torch.cuda.set_stream(stream)  # a capture that cannot end stays on its own
        print(f"decoding without a CUDA graph: {error}", flush=True)
        return step
    return graph.replay


@torch.no_grad()
def generate(policy, prompts, max_new_tokens, draws=None, stretch=None):
    """Complete every prompt G times in one batch.

    `draws` (P * G, max_new_tokens), uniform in [0, 1), picks each token by the inverse of the
    cumulative distribution; None takes the likeliest token, G = 1. T of what returns is
    `max_new_tokens`.

    For a `stretch` of tokens [on a card 128, else 1] all shapes stay, and nothing waits for the
    device: so on a card its second step is captured, and replayed to its end. Rows that have ended
    leave the batch between two stretches.
    """
    count, device = len(prompts.mask), policy.device
    rows = count if draws is None else len(draws)
    if stretch is None:
        stretch = STRETCH if device.type == "cuda" else 1
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    logprobs, entropy = torch.zeros(2, rows, max_new_tokens, device=device)
    alive = torch.arange(rows, device=device)                # the rows that have not ended
    owner = alive // (rows // count)                         # (R,), the prompt of each row
    column = torch.zeros(1, dtype=torch.long, device=device)  # of the newest token
    layout, cache = GroupLayout.of(owner, count), CompletionCache(max_new_tokens, column)

    def draw(hidden):
        logp = next_logprobs(policy, hidden)
        probabilities = logp.exp()
        if draws is None:
            token = logp.argmax(-1, keepdim=True)
        else:
            # fp64: a sum over 150,000 tokens must not lose the small ones
            cdf = probabilities.cumsum(-1, dtype=torch.float64)
            number = draws[alive, column, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, number, right=True).clamp(max=cdf.shape[1] - 1)
        tokens[alive, column] = token[:, 0]
        logprobs[alive, column] = logp.gather(1, token)[:, 0]
        entropy[alive, column] = torch.special.entr(probabilities).sum(-1)

    def step():
        newest = tokens[alive, column, None]
        position = prompts.next_position[owner[alive]] + column
        hidden = decode_step(policy, prompts, layout, cache, newest, position)
        column.add_(1)
        draw(hidden)

    draw(prompts.last_hidden[owner])
    for t in range(max_new_tokens - 1):
        if t % stretch == 0:
            ended = torch.isin(tokens[alive, :t + 1], policy.eos).any(1)
            stay = (~ended).nonzero()[:, 0]
            if not len(stay):
                break
            if len(stay) < len(alive):
                alive = alive[stay]
                cache.keep(stay)
                layout = GroupLayout.of(owner[alive], count)
            cache.seen, run = min(t + stretch, max_new_tokens), step
        elif t % stretch == 1:  # after one that ran: it made what is made once, as prompts.bias
            run = captured(step, device)
        run()
    return until_end(policy, tokens, logprobs, entropy)


def until_end(policy, tokens, logprobs, entropy):
    """All (R, T), without what was drawn behind the first end-of-sequence token."""
    ends = torch.isin(tokens, policy.eos)
    behind = ends.cumsum(1) > ends.long()
    return Completions(
        tokens.masked_fill(behind, policy.tokenizer.pad_token_id), logprobs.masked_fill(behind, 0),
        entropy.masked_fill(behind, 0), (~behind).sum(1), ends.any(1))


# ------------------------------------------------------------------- memory: a plan and a preflight
# How many prompts are sampled and how many completions are learnt from at a time changes no result
# beyond rounding, so it follows from memory: first by counting bytes (`fit_memory`), then by running the
# largest step there can be before step 1, and cutting it smaller where it does not fit.


def token_bytes(policy):
    """Of a token: keys and values in all layers, the inputs of all layers, and a number in the
    widest place of a layer.

    A layer at work holds, counted at the shapes of the 3B and the 7B, up to 16 bytes of the last
    where it only encodes, and 30 where it runs again for the backward pass: in 16 bits as in 32,
    for the adapter is in 32.
    """
    text, size = policy.full.config.text_config, policy.dtype.itemsize
    head = policy.full.model.language_model.layers[0].self_attn.head_dim
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head * size
    return cached, text.num_hidden_layers * text.hidden_size * size, text.intermediate_size


def question_bytes(policy, length, group, max_new_tokens):
    """What a question adds to the peak of sampling, with a prompt of that length: while it is
    encoded, or completed `group` times."""
    cached, _, width = token_bytes(policy)
    # log p, p and its sums, in fp32 and fp64
    drawing = 28 * policy.full.get_input_embeddings().num_embeddings
    return length * cached + max(length * 16 * width, group * (max_new_tokens * cached + drawing))


def fit_memory(policy, config, preset, longest):
    """The config with `cache_gb` and `micro_batch_tokens` where they are not given.

    They are what memory leaves; without a card and without --memory_gb, the preset's. Also decides
    whether the 4-bit weights are dequantized. longest: tokens of the longest prompt.
    """
    memory_gb, card = config.memory_gb, policy.device.type == "cuda"
    if card and memory_gb is None:
        memory_gb = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 1e9
    if memory_gb is None:
        _, plain_bytes = weight_bytes(policy)
        policy.dequantize = 2 * plain_bytes < psutil.virtual_memory().available
        cache_gb, tokens = preset["cache_gb"], preset["micro_batch_tokens"]
    else:
        cache_gb, tokens = divide_memory(policy, config, memory_gb, longest)
    if card:  # beyond it torch says that memory is out
        share = 1e9 * memory_gb / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    return replace(config, memory_gb=memory_gb, cache_gb=config.cache_gb or cache_gb,
                   micro_batch_tokens=config.micro_batch_tokens or tokens)


def weight_bytes(policy):
    """Of all weights as they lie, and of the 4-bit ones dequantized."""
    packed = [module for module in policy.full.modules() if is_packed(module)]
    numbers = sum(math.prod(module.weight.quant_state.shape) for module in packed)
    lying = sum(parameter.nbytes for parameter in policy.model.parameters())
    # in fp32 also with the adapter added, and the gradient of that
    copies = 1 if policy.dtype == torch.bfloat16 else 3
    # 64 packed numbers share a scale of a byte, and 256 of these one of four
    return lying + numbers // 63, copies * policy.dtype.itemsize * numbers


def divide_memory(policy, config, memory_gb, longest):
    """GB for sampling and tokens of a micro-batch that fit into that memory.

    A twentieth is left for gaps between tensors. The rest goes first to weights, gradients, Adam's
    two averages and some chunks of logits, then to dequantized weights if they take less than half
    of what is left. A micro-batch holds as many tokens of prompts as of completions: of each token
    keys and values twice (with gradients, or as a row's copies), each layer's input, and one layer
    at work [without --checkpoint all of them].
    """
    held, plain_bytes = weight_bytes(policy)
    held += 6 * CHUNK_BYTES + 3 * sum(parameter.nbytes for parameter in policy.trainable())
    left = 0.95e9 * memory_gb - held
    policy.dequantize = 2 * plain_bytes < left
    if policy.dequantize:
        left -= plain_bytes
    cached, inputs, width = token_bytes(policy)
    token = 4 * cached + 2 * inputs + 30 * width
    if not config.checkpoint:
        token = 4 * cached + 60 * width * policy.full.config.text_config.num_hidden_layers
    sampling = question_bytes(policy, longest, config.group_size, config.max_new_tokens)
    # of a patch on its way through the vision tower, counted at the shapes of all families
    vision_width = len(policy.full.model.visual.patch_embed.proj.weight)
    patch = (32 + 9 * policy.dtype.itemsize) * vision_width
    policy.patches = min(Policy.patches, int(left // patch))
    needed = max(sampling, (longest + config.max_new_tokens) * token, 4 * longest * patch)
    if left < needed:
        raise UserError(
            f"{memory_gb:.1f} GB of memory are too little: {held / 1e9:.1f} GB are held all the "
            f"time, and one question takes up to {needed / 1e9:.1f}: lower --group_size or "
            "--max_new_tokens, or 01_prepare.py --max_pixels")
    return left / 1e9, int(left // token)


def preflight(policy, longest, grounded, config):
    """A step of the worst size before step 1: the longest prompt each time, completions that never
    end, and no optimizer.

    It shows what memory and time a step can take at most. Where a card's memory does not hold it,
    it is cut smaller: the config with which it went through returns.
    """
    worst = [longest] * config.prompts_per_step
    while True:
        start = time.perf_counter()
        try:
            rehearse(policy, worst, grounded, config)
            break
        except torch.OutOfMemoryError as error:
            if config.micro_batch_tokens < longest["prompt_tokens"]:  # a row at a time already
                raise UserError(
                    "a step of the largest size does not fit into memory "
                    f"({str(error).splitlines()[0]}): lower --group_size, --max_new_tokens or "
                    "--prompts_per_step, or 01_prepare.py --max_pixels") from error
        finally:
            policy.model.zero_grad(set_to_none=True)
        config = replace(config, cache_gb=config.cache_gb / 2,
                         micro_batch_tokens=config.micro_batch_tokens // 2)
    print(f"preflight: the largest step takes {time.perf_counter() - start:.1f} s and "
          f"{peak_gb(policy):.2f} GB, in micro-batches of {config.micro_batch_tokens} tokens and "
          f"with {config.cache_gb:.2f} GB to sample in", flush=True)
    return config


def rehearse(policy, questions, grounded, config):
    """A whole step without the optimizer."""
    endless = replace(policy, eos=torch.full_like(policy.eos, -1))
    batch, _, _ = roll_out(endless, questions, 0, 0, config, questions if grounded else ())
    # whatever they earned, each group has something to learn
    batch.advantages = torch.linspace(-1, 1, len(batch.advantages), device=policy.device)
    accumulate_gradients(endless, batch, config)


def peak_gb(policy):
    """Most memory held so far, in GB: of the card, or without one of the process."""
    if policy.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # Linux
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        return int(peak[1]) * 1024 / 1e9
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 1e9  # Windows; macOS tells what is held now


# ---------------------------------------------------------------- the files of a run, and its end
# A run is a folder. While it runs it has its log and a checkpoint, which is moved into place whole;
# config.json comes last and says that the run is finished. So a kill at any moment costs the steps
# since the checkpoint, and the continued run is the same: byte for byte, on a card up to rounding.

# options that choose runs, or change rounding alone: a run may continue under others
NOT_SETTINGS = {"data", "plan", "conditions", "seeds", "steps", "workers", "memory_gb",
                "micro_batch_tokens", "cache_gb", "checkpoint", "save_every"}
CHECKPOINT = "checkpoint.safetensors"
STOPPING = b"stopping after this step; once more stops at once\n"


def run_settings(study, questions, config):
    """What decides a run's numbers: it continues, and counts as finished, only under the same."""
    settings = {name: value for name, value in vars(config).items() if name not in NOT_SETTINGS}
    settings |= {"condition": questions.condition, "seed": questions.seed,
                 "corruption": questions.corruptions, "model": study["model"],
                 "made_from": questions.made_from | study["model_files"], **prepare.versions()}
    # what another condition's settings are must not matter
    if questions.condition != "mixed":
        del settings["mixed_fraction"]
    if questions.condition != "grounded":
        del settings["grounding_weight"], settings["grounding_bound"]
    return settings


def check_settings(folder, old, new):
    """Stop where a run began with other settings, and say which."""
    was = {**old, **old["made_from"]}  # each artifact by its name
    now = {**new, **new["made_from"]}
    changed = [f"{key} was {was.get(key)}, is {now.get(key)}" for key in {**was, **now}
               if key != "made_from" and was.get(key) != now.get(key)]
    if changed:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changed)}): delete "
                        "that folder, or choose another --data")


def make_optimizer(policy, config):
    """AdamW; its state begins with zeros, so that a checkpoint has something to be copied into."""
    # fused: the other forms take a square root that differs between processors
    optimizer = torch.optim.AdamW(
        policy.trainable(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    for parameter in policy.trainable():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=policy.device),
            "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def run_state(policy, optimizer):
    """All that a step changes: adapter and optimizer."""
    state = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            state[f"adapter.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                state[f"{key}.{name}"] = value
    return state


def checksum(state):
    """Differs if any bit does: of what lies on a disk for days."""
    return str(sum(zlib.crc32(value.cpu().numpy()) for value in state.values()))


def save_checkpoint(folder, policy, optimizer, step, settings):
    """State, settings and the number of finished steps, in place of the checkpoint before."""
    state = run_state(policy, optimizer)
    meta = {"step": str(step), "settings": json.dumps(settings), "checksum": checksum(state)}
    with prepare.replacing(folder / CHECKPOINT) as part:
        save_file(state, part, metadata=meta)


def resume(folder, policy, optimizer, settings, config):
    """Restore the checkpoint, if there is one; returns the number of its steps."""
    step, path, state = 0, folder / CHECKPOINT, run_state(policy, optimizer)
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                meta, saved = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
            if checksum(saved) != meta["checksum"]:
                raise OSError("its content is not what was written")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): delete {folder}") from error
        check_settings(folder, json.loads(meta["settings"]), settings)
        for name, value in state.items():
            value.copy_(saved[name])
        step = int(meta["step"])
        print(f"{folder.name} continues after step {step}", flush=True)
    if step > config.steps:
        raise UserError(f"{folder} has already made {step} steps, not {config.steps}: delete that "
                        "folder, or ask for more --steps")
    for name in ("train.jsonl", "rollouts.jsonl"):  # later steps are about to be made again
        rows = prepare.read_jsonl(folder / name) if (folder / name).exists() else []
        prepare.write_jsonl(folder / name, [row for row in rows if row["step"] <= step])
    return step


def finish(folder, policy, model, settings):
    """The adapter as PEFT writes it, then config.json, which says that the run is whole."""
    save_adapter(folder, policy, model)
    device = torch.cuda.get_device_name() if policy.device.type == "cuda" else "cpu"
    result = {"policy": folder.name, "settings": settings, "device": device}
    with prepare.replacing(folder / "config.json") as part:
        part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return read_finished(folder, settings)


def save_adapter(folder, policy, model):
    """adapter_model.safetensors and adapter_config.json, of the base called `model`."""
    settings = policy.model.peft_config["default"]
    settings.base_model_name_or_path = model  # not where this machine keeps it
    settings.target_modules = sorted(settings.target_modules)  # a set has no order of its own
    whole = folder / ".adapter.part"
    # not "auto", which asks the hub whether embeddings changed
    policy.model.save_pretrained(whole, save_embedding_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with prepare.replacing(folder / name) as part:
            (whole / name).replace(part)
    prepare.remove(whole)


def read_run(folder):
    """config.json of a finished run."""
    shape = {"settings": {"made_from": dict, "max_new_tokens": int}}
    return prepare.read_json(folder / "config.json", shape,
                             f"delete {folder} and run 03_train_grpo.py again")


def read_finished(folder, settings):
    """The same, if these are its settings; what a run needs on its way goes."""
    result = read_run(folder)
    check_settings(folder, result["settings"], settings)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


@contextmanager
def stopping():
    """Collects Ctrl-C, and SIGTERM as schedulers and stage 3 itself send it, so that the step under
    way can end; a second one ends at once.

    A worker is deaf to Ctrl-C (`prepare.start_worker`) and stays so.
    """
    asked, usual = [], {}

    def ask(number, _):
        asked.append(number)
        for each in usual:
            signal.signal(each, signal.default_int_handler)
        if multiprocessing.parent_process() is None:
            os.write(2, STOPPING)  # print may have been interrupted itself

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            usual[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if asked:  # while the run was finishing: no other begins
        raise KeyboardInterrupt


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
