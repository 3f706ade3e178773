# SPDX-License-Identifier: MIT
"""Stage 3: GRPO by hand on a 4-bit model with a LoRA adapter.

Group Relative Policy Optimization (arXiv 2402.03300) asks a question, samples G completions, and pays each for being
better than its group. Three conditions differ in the pictures alone: `standard` trains on clean questions,
`hallucination` on damaged ones only, `mixed` on both. Questions, their order, and every other setting are the same.

Where this departs from textbook GRPO, and why:
- A prompt is encoded once, not G times: completions depend on the prompt only through its keys, values and last hidden
  state, so these become leaves, collect the gradients of all completions, and carry them through the prompt in one
  last backward pass. By the chain rule this is the exact gradient, at a fraction of the time and memory.
- Randomness is a function: token t of completion i of question q at step s comes from a number seeded by
  (seed, s, q, i). Whatever ran before, a resumed run continues bit for bit.
- The default loss is DAPO's (arXiv 2503.14476): one mean over all completion tokens of the step, so that a long wrong
  answer is not cheaper per token; and a wider upper clip. `grpo` and `dr_grpo` are there to compare.
- Completions are drawn at temperature 1 from the whole distribution, as the gradient supposes (the paper: 0.7).
- No KL term by default: the base model is the adapter switched off, so `--kl` costs one more pass and no memory.
- One update per rollout by default. Then the probability ratio is 1 up to rounding and the clip never acts.
- Groups with equal rewards have no advantage; they are counted, not recomputed.

reads   data/study.json, data/questions/TRAIN.parquet, data/corrupted/TRAIN/NAME.parquet, data/model/ (preset tiny)
writes  data/policies/RUN/: adapter_model.safetensors, adapter_config.json, config.json, train.jsonl, rollouts.jsonl
run     python 03_train_grpo.py                       # all three conditions, seed 0: 4 minutes on 2 CPU cores
        python 03_train_grpo.py --conditions hallucination --corruption blank misleading --seeds 0 1 2
"""
import hashlib
import importlib
import io
import json
import math
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

prepare = importlib.import_module("01_prepare")  # before torch: it says how its threads wait

import numpy as np
import torch
from PIL import Image
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, DynamicCache

Prompt, Question, UserError, option = prepare.Prompt, prepare.Question, prepare.UserError, prepare.option

LOSSES = ("dapo", "grpo", "dr_grpo")
NOT_SETTINGS = ("data", "conditions", "seeds", "steps", "sample_every", "micro_batch", "prompts_per_pass")  # change no step beyond rounding
CONDITIONS = ("standard", "hallucination", "mixed")
LANGUAGE_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
REAL = {  # beside each: what the paper's trainer, EasyR1, takes as its default on eight cards
    "steps": 500,            # 4,000 questions, 1.9 epochs of geometry3k; there 15 epochs
    "prompts_per_step": 8,   # there 512, in 4 updates of 128: days on one card
    "group_size": 8,         # there 5; more completions make up for fewer prompts
    "max_new_tokens": 1024,  # there 2,048, which few answers on geometry3k need
    "learning_rate": 1e-5,   # there 1e-6 on all weights, and as here on LoRA
    "lora_rank": 32,         # there none, and the vision tower learns too: 40 GB at least
    "micro_batch": 4,
    "prompts_per_pass": 1,
}
PRESETS = {
    "tiny": {"steps": 100, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 40, "learning_rate": 1e-3,
             "lora_rank": 16, "micro_batch": 64, "prompts_per_pass": 8},
    "3b": REAL,
    "7b": REAL | {"micro_batch": 2},
}


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    conditions: list[str] = option(list(CONDITIONS), "which of: standard hallucination mixed")
    corruption: list[str] = option(["blank"], "what damages a question; of several, each question gets one by its seed")
    mixed_fraction: float = option(0.5, "share of damaged questions in condition mixed")
    seeds: list[int] = option([0], "one run per condition and seed")
    steps: int = option(None, "updates of the policy [preset]")
    prompts_per_step: int = option(None, "questions a step [preset]")
    group_size: int = option(None, "completions a question, at least 2 [preset]")
    max_new_tokens: int = option(None, "tokens; a longer completion is cut, and graded as it stands [preset]")
    learning_rate: float = option(None, "AdamW, constant, no weight decay (EasyR1: 0.01) [preset]")
    lora_rank: int = option(None, "of the adapter; its alpha is twice that [preset]")
    loss: str = option("dapo", "dapo, grpo or dr_grpo: how tokens are weighed")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = option(0.28, "and above 1 + this (arXiv 2503.14476; EasyR1: 0.3)")
    kl: float = option(0.0, "weight of the k3 estimate of KL(policy || base), per token (EasyR1: 0.01)")
    updates_per_batch: int = option(1, "optimizer steps on the same completions")
    max_grad_norm: float = option(1.0, "larger gradients are scaled down to it")
    micro_batch: int = option(None, "completions in one backward pass: lower it when memory is short [preset]")
    prompts_per_pass: int = option(None, "prompts encoded together in the update [preset]")
    sample_every: int = option(20, "steps between two completions shown on the terminal; all samples go to rollouts.jsonl")


# The policy: 4-bit base, trainable adapter, and what its sampler must know


@dataclass
class Policy:
    model: torch.nn.Module  # PeftModel, or the bare base
    tokenizer: object
    image_processor: object
    eos: torch.Tensor     # ids that end a completion
    banned: torch.Tensor  # ids never sampled: vision tokens, and rows of the vocabulary that no token uses

    @property
    def full(self) -> torch.nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.banned.device

    def encode(self, question: Question) -> Prompt:
        return prepare.encode(question, self.tokenizer, self.image_processor)


def load_policy(model: str, max_pixels: int, adapter: Path | None = None, lora_rank: int = 0, seed: int = 0) -> Policy:
    """The base in NF4 with a saved adapter, with a fresh one of `lora_rank`, or (neither given) alone.

    Vision tower and lm_head stay as they are: quantising them saves little and costs accuracy. Weights come from
    safetensors only, code never from the model's folder. The model stays in train mode (all dropout is 0), because
    bitsandbytes repacks the 4-bit weights of some CPUs in eval mode and cannot train afterwards.
    """
    kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    if kind not in prepare.FAMILIES:
        raise UserError(f"{model} is a {kind} model: this kit trains {', '.join(prepare.FAMILIES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"])
    base = AutoModelForImageTextToText.from_pretrained(
        model, quantization_config=nf4, dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False)
    base.requires_grad_(False)
    if adapter is not None:
        base = PeftModel.from_pretrained(base, adapter)
    elif lora_rank:
        torch.manual_seed(seed)  # of the adapter's random half
        base = get_peft_model(base, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, bias="none",
                                               target_modules=LANGUAGE_LINEARS, task_type="CAUSAL_LM"))
    tokenizer, image_processor = prepare.load_processors(model, max_pixels)
    full = base.get_base_model() if isinstance(base, PeftModel) else base
    vocabulary = full.get_input_embeddings().num_embeddings
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    banned = [*tokenizer.convert_tokens_to_ids(names), *range(len(tokenizer), vocabulary)]
    eos = full.generation_config.eos_token_id
    eos = [eos] if isinstance(eos, int) else list(eos or [])
    return Policy(base.train(), tokenizer, image_processor, torch.tensor(sorted({tokenizer.eos_token_id, *eos}), device=device),
                  torch.tensor(banned, device=device))


# Encoding: pictures once a step, prompts once a group


@torch.no_grad()
def look(policy: Policy, prompts: Sequence[Prompt]) -> list[list[SimpleNamespace]]:
    """Features of every picture, from the frozen vision tower: per prompt, per picture."""
    pictures = [p for p in prompts if p.pixel_values is not None]
    if not pictures:
        return [[] for _ in prompts]
    seen = policy.full.get_image_features(torch.cat([p.pixel_values for p in pictures]).to(policy.device),
                                          torch.cat([p.image_grid_thw for p in pictures]).to(policy.device), return_dict=True)
    deep = seen.get("deepstack_features") or []  # Qwen3-VL feeds these to its first layers
    each = iter([SimpleNamespace(tokens=tokens, deep=[level[i] for level in deep]) for i, tokens in enumerate(seen.pooler_output)])
    return [[next(each) for _ in range(p.pictures)] for p in prompts]


@dataclass
class Prefix:
    """All that completions need of P encoded prompts, padded on the left to a common length L."""
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # per layer, each (P, kv heads, L, head dim)
    last_hidden: torch.Tensor    # (P, hidden): predicts the first completion token
    mask: torch.Tensor           # (P, L), 1 where a prompt token stands
    next_position: torch.Tensor  # (P,), of the first completion token, the same on all three axes

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for pair in self.keys_values for tensor in pair] + [self.last_hidden]

    def as_leaves(self) -> "Prefix":
        """The same values cut off from the prompt's graph; gradients of completions gather in their `.grad`."""
        leaf = lambda tensor: tensor.detach().requires_grad_()
        return Prefix([(leaf(k), leaf(v)) for k, v in self.keys_values], leaf(self.last_hidden), self.mask, self.next_position)


def encode_prompts(policy: Policy, prompts: Sequence[Prompt], features: Sequence[list[SimpleNamespace]]) -> Prefix:
    """Run P prompts once. With gradients enabled the result carries the graph of the prompts."""
    length, device = max(len(p.input_ids) for p in prompts), policy.device
    ids = torch.full((len(prompts), length), policy.tokenizer.pad_token_id)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt.input_ids):] = torch.tensor(prompt.input_ids)
        mask[row, length - len(prompt.input_ids):] = 1
    core, seen = policy.full.model, [picture for pictures in features for picture in pictures]
    grids = torch.cat([p.image_grid_thw for p in prompts if p.image_grid_thw is not None]) if seen else None
    types = (ids == core.config.image_token_id).int()
    # positions are computed here: left alone, the model takes them from what it remembers of an earlier call
    positions, _ = core.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask)
    pictures = None
    if seen:
        levels = len(seen[0].deep)
        pictures = {"image": SimpleNamespace(pooler_output=[p.tokens for p in seen],
                                             deepstack_features=[[p.deep[level] for p in seen] for level in range(levels)])}
    cache = DynamicCache()
    hidden = core(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
                  mm_encoder_outputs=pictures, past_key_values=cache, use_cache=True).last_hidden_state
    next_position = positions.masked_fill(mask == 0, -1).amax(dim=(0, 2)) + 1
    return Prefix([(layer.keys, layer.values) for layer in cache.layers], hidden[:, -1], mask.to(device), next_position.to(device))


def decode_step(policy: Policy, cache: DynamicCache, tokens: torch.Tensor, mask: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Hidden states (R, n, hidden) of n more tokens (R, n) behind a cache; `start` (R,) is the first one's position."""
    positions = (start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)).expand(3, -1, -1)
    return policy.full.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                             use_cache=True).last_hidden_state


def next_logprobs(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
    """log p(next token | ...) in fp32 over the tokens that may be sampled: (..., hidden) -> (..., vocabulary)."""
    logits = policy.full.lm_head(hidden).float()
    return logits.index_fill(-1, policy.banned, -torch.inf).log_softmax(-1)


# Rollout


def uniforms(seed: int, step: int, question_id: str, completion: int, n: int) -> np.ndarray:
    """n numbers in [0, 1) that depend on their arguments alone, not on what was drawn before."""
    key = hashlib.sha256(f"{seed}|{step}|{question_id}|{completion}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(n)


@dataclass
class Completions:
    tokens: torch.Tensor    # (R, T), padded on the right; row r belongs to prompt r // G
    logprobs: torch.Tensor  # (R, T), as seen while sampling
    lengths: torch.Tensor   # (R,), the end-of-sequence token included
    finished: torch.Tensor  # (R,), False where max_new_tokens cut the completion

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]


@torch.no_grad()
def generate(policy: Policy, prefix: Prefix, max_new_tokens: int, draws: torch.Tensor | None = None) -> Completions:
    """Complete every prompt of `prefix` G times in one batch.

    `draws` (P * G, max_new_tokens), uniform in [0, 1), picks each token by the inverse of the cumulative distribution;
    None takes the likeliest token, G = 1. A row that has ended leaves the batch.
    """
    group = 1 if draws is None else len(draws) // len(prefix.mask)
    rows, device = len(prefix.mask) * group, policy.device
    out = Completions(torch.full((rows, max_new_tokens), policy.tokenizer.pad_token_id, device=device),
                      torch.zeros(rows, max_new_tokens, device=device), torch.full((rows,), max_new_tokens, device=device),
                      torch.zeros(rows, dtype=torch.bool, device=device))
    cache = DynamicCache(prefix.keys_values)
    cache.batch_repeat_interleave(group)
    mask, position = prefix.mask.repeat_interleave(group, 0), prefix.next_position.repeat_interleave(group)
    hidden, alive = prefix.last_hidden.repeat_interleave(group, 0), torch.arange(rows, device=device)
    for t in range(max_new_tokens):
        logprobs = next_logprobs(policy, hidden)
        if draws is None:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            cdf = logprobs.double().exp().cumsum(-1)  # double: a sum over 150,000 tokens must not lose the small ones
            token = torch.searchsorted(cdf, draws[alive, t, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        out.tokens[alive, t], out.logprobs[alive, t] = token[:, 0], logprobs.gather(1, token)[:, 0]
        ended = torch.isin(token[:, 0], policy.eos)
        if ended.any():
            out.finished[alive[ended]], out.lengths[alive[ended]] = True, t + 1
            stay = (~ended).nonzero()[:, 0]
            alive, token, mask, position = alive[stay], token[stay], mask[stay], position[stay]
            cache.batch_select_indices(stay)
        if not len(alive) or t == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        hidden = decode_step(policy, cache, token, mask, position + t)[:, -1]
    longest = int(out.lengths.max())
    out.tokens, out.logprobs = out.tokens[:, :longest], out.logprobs[:, :longest]
    return out


# Loss


def group_advantages(rewards: torch.Tensor, scale: bool) -> torch.Tensor:
    """(r - mean of its group) / (std of its group + 1e-4): (P, G) -> (P, G) (arXiv 2402.03300, section 4.1.2).

    Without `scale` the division is left out, as Dr. GRPO does (arXiv 2503.20783): it favours questions of little spread.
    """
    differ = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)  # the mean of equal numbers may be rounded off them,
    centred = (rewards - rewards.mean(1, keepdim=True)) * differ            # and Adam makes a whole step of the smallest gradient
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale else centred


def token_weights(lengths: torch.Tensor, loss: str, max_new_tokens: int) -> torch.Tensor:
    """Weight of each token of each completion in the step's loss: (R,) lengths -> (R,) weights.

    Known before the first micro-batch, over all completions of the step, so that how the step is cut changes nothing.
    dapo: every token counts alike (arXiv 2503.14476, eq. 12); grpo: every completion (arXiv 2402.03300, eq. 3);
    dr_grpo: every token, divided by the constant that a completion could have had (arXiv 2503.20783).
    """
    lengths = lengths.float()
    if loss == "dapo":
        return torch.ones_like(lengths) / lengths.sum()
    if loss == "grpo":
        return 1 / (lengths * len(lengths))
    return torch.ones_like(lengths) / (len(lengths) * max_new_tokens)


def token_loss(logprobs, old_logprobs, advantages, reference, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate per token plus the KL penalty, and where the clip acted; all (R, T), advantages (R, 1).

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl * k3, r = exp(logprobs - old), k3 = exp(d) - d - 1 with
    d = reference - logprobs (Schulman, "Approximating KL divergence", 2020): unbiased and never negative.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if reference is not None:
        difference = reference - logprobs
        loss = loss + config.kl * (difference.exp() - difference - 1)
    return loss, clipped * advantages < ratio * advantages


def score_tokens(policy: Policy, prefix: Prefix, rows: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and entropy (no gradient), in nats, of each completion token (R, T), given the prompts `rows` (R,) of `prefix`.

    The vocabulary's logits exist only for one chunk of positions at a time; the backward pass computes them again.
    """
    hidden = prefix.last_hidden[rows][:, None]
    if tokens.shape[1] > 1:
        cache = DynamicCache([(k[rows], v[rows]) for k, v in prefix.keys_values])
        mask = torch.cat([prefix.mask[rows], prefix.mask.new_ones(len(rows), tokens.shape[1] - 1)], 1)
        behind = decode_step(policy, cache, tokens[:, :-1], mask, prefix.next_position[rows])
        hidden = torch.cat([hidden, behind], 1)  # (R, T, hidden): position t predicts token t

    def chunk(hidden, target):
        logprobs = next_logprobs(policy, hidden)
        with torch.no_grad():
            entropy = torch.special.entr(logprobs.exp()).sum(-1)
        return logprobs.gather(1, target[:, None])[:, 0], entropy

    parts = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in zip(hidden.flatten(0, 1).split(1024), tokens.flatten().split(1024))]
    logprobs, entropy = (torch.cat(column).view(tokens.shape) for column in zip(*parts))
    return logprobs, entropy


# One step


@dataclass
class Batch:
    """P questions with their G completions each, and what the loss needs of them."""
    prompts: list[Prompt]
    features: list[list[SimpleNamespace]]
    completions: Completions
    advantages: torch.Tensor        # (P * G,)
    reference: torch.Tensor | None  # (P * G, T) log-probabilities under the base


def accumulate_gradients(policy: Policy, batch: Batch, config: Config) -> dict[str, float]:
    """Add the gradient of the whole step's loss to the adapter's `.grad`; returns sums over tokens for the log."""
    done, group = batch.completions, len(batch.advantages) // len(batch.prompts)
    weights = token_weights(done.lengths, config.loss, config.max_new_tokens)
    sums = dict.fromkeys(("loss", "entropy", "kl", "clipped", "tokens"), 0.0)
    spread = batch.advantages.view(-1, group).abs().amax(1) > 0
    active = [p for p in range(len(batch.prompts)) if spread[p] or batch.reference is not None]
    for some in (active[i:i + config.prompts_per_pass] for i in range(0, len(active), config.prompts_per_pass)):
        graph = encode_prompts(policy, [batch.prompts[p] for p in some], [batch.features[p] for p in some])
        leaves = graph.as_leaves()
        all_rows = torch.tensor([p * group + i for p in some for i in range(group)], device=policy.device)
        owners = torch.arange(len(some), device=policy.device).repeat_interleave(group)
        for rows, owner in zip(all_rows.split(config.micro_batch), owners.split(config.micro_batch)):
            length = int(done.lengths[rows].max())
            mask, tokens = done.mask[rows, :length], done.tokens[rows, :length]
            logprobs, entropy = score_tokens(policy, leaves, owner, tokens)
            logprobs = logprobs.masked_fill(~mask, 0)  # padding may be a banned token: -inf, and 0 * inf is no number
            reference = None if batch.reference is None else batch.reference[rows, :length].masked_fill(~mask, 0)
            losses, clipped = token_loss(logprobs, done.logprobs[rows, :length], batch.advantages[rows, None], reference, config)
            loss = (losses * weights[rows, None] * mask).sum()
            loss.backward()
            sums["loss"] += loss.item()
            sums["entropy"] += (entropy * mask).sum().item()
            sums["clipped"] += (clipped & mask).sum().item()
            sums["tokens"] += mask.sum().item()
            if reference is not None:
                difference = (reference - logprobs.detach()) * mask
                sums["kl"] += (difference.exp() - difference - 1).sum().item()
        roots = [(root, leaf.grad) for root, leaf in zip(graph.tensors(), leaves.tensors()) if root.requires_grad and leaf.grad is not None]
        torch.autograd.backward(*zip(*roots))
    return sums


def grade_completions(policy: Policy, questions: Sequence[Question], done: Completions) -> tuple[list[str], list, torch.Tensor]:
    """Decoded completions, their grades, and the rewards (P, G): 0.9 for a correct answer, 0.1 for the asked-for form."""
    group = len(done.tokens) // len(questions)
    texts = [policy.tokenizer.decode(tokens[:length], skip_special_tokens=True)
             for tokens, length in zip(done.tokens.tolist(), done.lengths.tolist())]
    grades = [prepare.grade(text, questions[i // group]) for i, text in enumerate(texts)]
    rewards = torch.tensor([0.9 * g.correct + 0.1 * g.well_formed for g in grades], device=policy.device)
    return texts, grades, rewards.view(len(questions), group)


def roll_out(policy: Policy, questions: Sequence[Question], step: int, seed: int, config: Config) -> tuple[Batch, dict, list[dict]]:
    """Sample a step's completions and grade them: the batch to learn from, its log row, and readable samples."""
    start, group = time.perf_counter(), config.group_size
    prompts = [policy.encode(question) for question in questions]
    features = look(policy, prompts)
    draws = np.stack([uniforms(seed, step, q["id"], i, config.max_new_tokens) for q in questions for i in range(group)])
    with torch.no_grad():
        prefix = encode_prompts(policy, prompts, features)
    done = generate(policy, prefix, config.max_new_tokens, torch.from_numpy(draws).to(policy.device))
    texts, grades, rewards = grade_completions(policy, questions, done)
    reference = None
    if config.kl:
        with torch.no_grad(), policy.model.disable_adapter():
            base = encode_prompts(policy, prompts, features)
            owners = torch.arange(len(prompts), device=policy.device).repeat_interleave(group)
            reference = torch.cat([score_tokens(policy, base, owner, tokens)[0] for owner, tokens in zip(
                owners.split(config.micro_batch), done.tokens.split(config.micro_batch))])
    advantages = group_advantages(rewards, scale=config.loss != "dr_grpo").flatten()
    n = len(texts)
    row = {"reward": rewards.mean().item(), "correct": sum(g.correct for g in grades) / n,
           "well_formed": sum(g.well_formed for g in grades) / n,
           "equal_groups": (rewards.amax(1) - rewards.amin(1) < 1e-6).float().mean().item(),
           "length": done.lengths.float().mean().item(), "truncated": 1 - done.finished.float().mean().item(),
           "rollout_s": time.perf_counter() - start}
    samples = [{"step": step, "id": questions[i // group]["id"], "completion": i % group, "response": texts[i],
                "answer": grades[i].answer, "gold": questions[i // group]["answer"], "reward": round(rewards.flatten()[i].item(), 3)}
               for i in range(0, n, group)]
    return Batch(prompts, features, done, advantages, reference), row, samples


def learn(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config) -> dict:
    """`updates_per_batch` optimizer steps on a batch; returns the log row's part."""
    start = time.perf_counter()
    for _ in range(config.updates_per_batch):
        sums = accumulate_gradients(policy, batch, config)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise UserError(f"the gradient is {norm}: lower --learning_rate, or report the completions in rollouts.jsonl")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = max(sums["tokens"], 1)
    return {"loss": sums["loss"], "entropy": sums["entropy"] / tokens, "kl": sums["kl"] / tokens, "clipped": sums["clipped"] / tokens,
            "gradient_norm": norm, "update_s": time.perf_counter() - start}


# Data: which question at which step, damaged or not


def schedule(ids: Sequence[str], seed: int, step: int, count: int) -> list[int]:
    """Rows of the questions of a step: epochs of seeded shuffles, a function of the step alone."""
    chosen = []
    for k in range(step * count, (step + 1) * count):
        epoch, place = divmod(k, len(ids))
        order = list(range(len(ids)))
        random.Random(f"{seed}|{epoch}").shuffle(order)
        chosen.append(order[place])
    return chosen


class Questions:
    """The training questions of one run, clean or damaged as its condition says."""

    def __init__(self, study: dict, condition: str, seed: int, config: Config):
        data, source = Path(config.data), study["sources"]["train"]
        names = [] if condition == "standard" else config.corruption
        self.share = {"standard": 0.0, "hallucination": 1.0, "mixed": config.mixed_fraction}[condition]
        self.seed, self.names, self.tables, self.made_from = seed, names, {}, {}
        for name in ["clean", *names] if self.share < 1 else names:
            self.made_from |= prepare.check_input(data, study, source, name)
            self.tables[name] = prepare.read_questions(data / prepare.input_path(source, name), "run 01_prepare.py")
        first = next(iter(self.tables.values()))
        self.rows = [row for row, split in enumerate(first["split"]) if split == "train"]
        if not self.rows:
            raise UserError(f"{data / prepare.input_path(source, 'clean')} has no training questions: run 01_prepare.py --train SOURCE")
        self.ids = [first["id"][:][row] for row in self.rows]

    def longest(self) -> Question:
        """The question that takes most memory, by the size of its pictures and text; no picture is decoded for it."""
        def size(place: tuple[str, int]) -> float:
            row = raw[place[0]][place[1]]
            pixels = sum(math.prod(Image.open(io.BytesIO(image["bytes"])).size) for image in row["images"])
            return pixels / 28**2 + len(row["problem"]) / 4  # about one token for 28 x 28 pixels, and for 4 letters
        raw = {name: prepare.undecoded(table) for name, table in self.tables.items()}
        name, row = max(((name, row) for name in self.tables for row in self.rows), key=size)
        return self.tables[name][row]

    def at(self, step: int, count: int) -> list[Question]:
        chosen = []
        for index in schedule(self.ids, self.seed, step, count):
            draw = random.Random(f"{self.seed}|{step}|{self.ids[index]}")
            name = draw.choice(self.names) if draw.random() < self.share else "clean"
            chosen.append(self.tables[name][self.rows[index]])
        return chosen


# Checkpoints: one safetensors file, so that it exists whole or not at all


def save_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int, settings: dict):
    """Adapter, optimizer state and the number of finished steps."""
    tensors = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            tensors[f"adapter.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
    with prepare.replacing(path) as part:
        save_file(tensors, part, metadata={"step": str(step), "settings": json.dumps(settings)})


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer, settings: dict) -> int:
    """Restore what `save_checkpoint` wrote, if it is there; returns the number of finished steps."""
    if not path.exists():
        return 0
    with safe_open(path, "pt", device=str(policy.device)) as file:
        meta = file.metadata()
        check_settings(path.parent.parent, json.loads(meta["settings"]), settings)
        names = set(file.keys())
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(file.get_tensor(f"adapter.{name}"))
                optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                                              if f"{key}.{name}" in names}
    return int(meta["step"])


def check_settings(folder: Path, old: dict, new: dict):
    """A run continues, or counts as done, only under the settings that it began with."""
    changed = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changed)}): delete that folder, or choose another --data")


def keep_rows(path: Path, steps: int):
    """Drop the rows of steps that the checkpoint does not hold: they are about to be made again."""
    rows = [row for row in prepare.read_jsonl(path) if row["step"] <= steps] if path.exists() else []
    prepare.write_jsonl(path, rows)


# A run


def preflight(policy: Policy, questions: Questions, config: Config) -> None:
    """One update at the worst size before step 1: memory, picture tokens, trainable parameters."""
    trainable = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    if not trainable:
        raise UserError("no parameter is trainable: the adapter found no linear layer in the language model")
    prompt = policy.encode(questions.longest())
    features = look(policy, [prompt])
    tokens = sum(len(picture.tokens) for picture in features[0])
    placeholders = prompt.input_ids.count(policy.full.config.image_token_id)
    if tokens != placeholders:
        raise UserError(f"{prompt.pictures} pictures have {placeholders} image tokens but {tokens} features: "
                        "the image processor is not the model's")
    rows, length = config.group_size, config.max_new_tokens
    done = Completions(torch.randint(100, (rows, length), device=policy.device, generator=torch.Generator(policy.device).manual_seed(0)),
                       torch.full((rows, length), -1.0, device=policy.device), torch.full((rows,), length, device=policy.device),
                       torch.ones(rows, dtype=torch.bool, device=policy.device))
    advantages = torch.linspace(-1, 1, rows, device=policy.device)
    reference = torch.zeros_like(done.logprobs) - 1 if config.kl else None
    accumulate_gradients(policy, Batch([prompt], features, done, advantages, reference), config)
    for parameter in policy.model.parameters():
        parameter.grad = None
    print(f"preflight: {trainable / 1e6:.2f} M trainable parameters, longest prompt {len(prompt.input_ids)} tokens "
          f"({tokens} of the picture), peak {peak_gb(policy):.2f} GB")


def peak_gb(policy: Policy) -> float:
    """Most memory held so far, in GB: of the card, or without one of the process."""
    if policy.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def one_line(run: str, row: dict, steps: int) -> str:
    tokens_per_s = row["completion_tokens"] / (row["rollout_s"] + row["update_s"])
    return (f"{run} {row['step']:4d}/{steps}  reward {row['reward']:.3f}  correct {row['correct']:.3f}  formed {row['well_formed']:.3f}  "
            f"flat {row['equal_groups']:.2f}  length {row['length']:5.1f}  cut {row['truncated']:.2f}  entropy {row['entropy']:.2f}  "
            f"kl {row['kl']:.3f}  clip {row['clipped']:.3f}  grad {row['gradient_norm']:.2f}  "
            f"{row['rollout_s']:.2f}+{row['update_s']:.2f} s  {tokens_per_s:,.0f} tok/s  {row['peak_gb']:.2f} GB")


def train_run(study: dict, condition: str, seed: int, config: Config) -> dict:
    """Train one condition with one seed, or continue it; returns its config.json."""
    data = Path(config.data)
    run = run_name(condition, seed, config)
    folder = data / "policies" / run
    questions = Questions(study, condition, seed, config)
    settings = {"condition": condition, "seed": seed, "model": study["model"], "made_from": questions.made_from | study["model_files"],
                **{f.name: getattr(config, f.name) for f in fields(Config) if f.name not in NOT_SETTINGS}}
    if condition != "mixed":
        del settings["mixed_fraction"]
    if condition == "standard":
        del settings["corruption"]
    if (folder / "config.json").exists():
        done = json.loads((folder / "config.json").read_text())
        check_settings(folder, done["settings"], settings | {"steps": config.steps})
        print(f"{run} is finished: kept")
        return done
    start = time.perf_counter()
    policy = load_policy(prepare.model_path(data, study), study["max_pixels"], lora_rank=config.lora_rank, seed=seed)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0)
    finished = load_checkpoint(folder / "checkpoint" / "state.safetensors", policy, optimizer, settings)
    if finished > config.steps:
        raise UserError(f"{folder} has already made {finished} steps, not {config.steps}: delete that folder, or ask for more --steps")
    for name in ("train.jsonl", "rollouts.jsonl"):
        keep_rows(folder / name, finished)
    preflight(policy, questions, config)
    if finished:
        print(f"{run} continues after step {finished}")
    for step in tqdm(range(finished + 1, config.steps + 1), initial=finished, total=config.steps, desc=run, disable=None):
        row = train_step(policy, optimizer, questions, step, seed, config, folder)
        save_checkpoint(folder / "checkpoint" / "state.safetensors", policy, optimizer, step, settings)
        tqdm.write(one_line(run, row, config.steps))
    save_adapter(folder, policy)
    result = {"policy": run, "settings": settings | {"steps": config.steps}, "versions": prepare.versions(),
              "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else "cpu",
              "peak_gb": round(peak_gb(policy), 3), "seconds": round(time.perf_counter() - start, 1)}
    with prepare.replacing(folder / "config.json") as part:  # last: it says that the run is whole
        part.write_text(json.dumps(result, indent=1))
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return result


def train_step(policy, optimizer, questions: Questions, step: int, seed: int, config: Config, folder: Path) -> dict:
    """Rollout, update, and their rows in train.jsonl and rollouts.jsonl."""
    batch, row, samples = roll_out(policy, questions.at(step - 1, config.prompts_per_step), step, seed, config)
    before = [p.detach().clone() for p in policy.model.parameters() if p.requires_grad] if step == 1 else []
    row = {"step": step, **row, **learn(policy, optimizer, batch, config), "completion_tokens": int(batch.completions.lengths.sum())}
    if before and row["gradient_norm"] > 0 and all(map(torch.equal, before, (p for p in policy.model.parameters() if p.requires_grad))):
        raise UserError("step 1 had a gradient but changed no weight: the adapter is not what the optimizer holds")
    row["peak_gb"] = round(peak_gb(policy), 3)
    prepare.append_jsonl(folder / "train.jsonl", [row])
    prepare.append_jsonl(folder / "rollouts.jsonl", samples)
    if config.sample_every and step % config.sample_every == 0:
        tqdm.write(f"  {samples[0]['id']}: {samples[0]['response']!r}, gold {samples[0]['gold']!r}, reward {samples[0]['reward']}")
    return row


def save_adapter(folder: Path, policy: Policy):
    """adapter_model.safetensors and adapter_config.json as PEFT writes them."""
    part = folder / ".adapter.part"
    policy.model.save_pretrained(part)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (part / name).replace(folder / name)
    shutil.rmtree(part)


def run_name(condition: str, seed: int, config: Config) -> str:
    return f"{condition}-s{seed}" if condition == "standard" else f"{condition}-{'+'.join(config.corruption)}-s{seed}"


def main(config: Config) -> list[dict]:
    """Train every condition with every seed; returns their config.json."""
    study = prepare.load_study(Path(config.data))
    for name, value in PRESETS[study["preset"]].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    check_config(config)
    return [train_run(study, condition, seed, config) for seed in config.seeds for condition in config.conditions]


def check_config(config: Config):
    """One sentence for what cannot work."""
    for condition in config.conditions:
        if condition not in CONDITIONS:
            raise UserError(f"--conditions {condition} is unknown: choose from {' '.join(CONDITIONS)}")
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss} is unknown: choose from {' '.join(LOSSES)}")
    if config.group_size < 2:
        raise UserError(f"--group_size {config.group_size} leaves nothing to compare a completion with: choose at least 2")
    for name in ("steps", "prompts_per_step", "max_new_tokens", "lora_rank", "micro_batch", "prompts_per_pass", "updates_per_batch"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is too small: choose at least 1")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name} {getattr(config, name)} would change no weight: choose a positive number")
    if "clean" in config.corruption:
        raise UserError("--corruption clean damages nothing: for clean questions use --conditions standard")
    if not 0 < config.mixed_fraction < 1:
        raise UserError(f"--mixed_fraction {config.mixed_fraction} is not between 0 and 1: "
                        "for 0 or 1 use --conditions standard or hallucination")


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
