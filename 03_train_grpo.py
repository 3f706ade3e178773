# SPDX-License-Identifier: MIT
"""Stage 3: GRPO by hand on a 4-bit model with a LoRA adapter.

Group Relative Policy Optimization (arXiv 2402.03300) asks a question, samples G completions, and pays each for being
better than its group. Conditions differ in the pictures alone: `standard` trains on clean questions, `hallucination` on
damaged ones only, `mixed` on both; `grounded` is `standard` with a term that pays for using the picture (`looking_pay`).
Questions, their order, and every other setting are the same.

Where this departs from textbook GRPO, and why:
- A prompt is encoded once, not G times: completions depend on the prompt only through its keys, values and last hidden
  state, so these become leaves, collect the gradients of all completions, and carry them through the prompt in one
  last backward pass. By the chain rule this is the exact gradient, at a fraction of the time and memory.
- Randomness is a function: token t of completion i of question q at step s comes from a number seeded by
  (seed, s, q, i). Whatever ran before, a resumed run continues bit for bit. Nothing is distributed inside a run: runs
  (conditions x seeds) are dealt out to worker processes, and one worker and eight give the same bytes.
- The default loss is DAPO's (arXiv 2503.14476): one mean over all completion tokens of the step, so that a long wrong
  answer is not cheaper per token; and a wider upper clip. `grpo` and `dr_grpo` are there to compare.
- Completions are drawn at temperature 1 from the whole distribution, as the gradient supposes (the paper: 0.7).
- No KL term by default: the base model is the adapter switched off, so `--kl` costs one more pass and no memory.
- One update per rollout by default. Then the probability ratio is 1 up to rounding and the clip never acts.
- Groups with equal rewards have no advantage: they are counted, and unless `--kl` or looking is paid for, cost no backward pass.

reads   data/study.json, data/questions/TRAIN.parquet, data/corrupted/TRAIN/NAME.parquet, data/model/ (preset tiny)
writes  data/policies/RUN/: adapter_model.safetensors, adapter_config.json, config.json, train.jsonl, rollouts.jsonl
run     python 03_train_grpo.py                       # three conditions, seeds 0 to 4: TIME on 2 CPU cores
        python 03_train_grpo.py --conditions grounded
        python 03_train_grpo.py --conditions hallucination --corruption blank misleading --seeds 0 1 2
"""
import hashlib
import importlib
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
prepare = importlib.import_module("01_prepare")  # before torch: it says how its threads wait
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before it is imported: on a CPU it asks for a package that the kit does without

import bitsandbytes as bnb
import numpy as np
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, DynamicCache

Prompt, Question, UserError, option = prepare.Prompt, prepare.Question, prepare.UserError, prepare.option

ENTROPY_GUARD = 2.0  # nats of a token: as if seven words were equally likely
CHUNK_BYTES = 2**26  # of logits in fp32: 110 positions of a vocabulary of 151,936
STRETCH = 128        # tokens that a captured step is replayed for: a capture takes about as long as a step without one
LOSSES = ("dapo", "grpo", "dr_grpo")
STOPPING = b"stopping after this step; once more stops at once\n"
# options that choose runs, or change rounding alone
NOT_SETTINGS = ("data", "conditions", "seeds", "steps", "workers", "sample_every", "memory_gb", "tokens_per_pass", "cache_gb", "checkpoint",
                "save_every")
CONDITIONS = ("standard", "hallucination", "mixed", "grounded")
LANGUAGE_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
REAL = {  # beside each: what the paper's trainer, EasyR1, takes as its default on eight cards
    "steps": 500,            # 4,000 questions, 1.9 epochs of geometry3k; there 15 epochs
    "prompts_per_step": 8,   # there 512, in 4 updates of 128
    "group_size": 8,         # there 5; more completions make up for fewer prompts
    "max_new_tokens": 1024,  # there 2,048; what is cut is counted in the log
    "learning_rate": 1e-5,   # there 1e-6 on all weights, and as here on LoRA
    "lora_rank": 32,         # there none, and the vision tower learns too: 40 GB for the 3B, by its own guide
    "tokens_per_pass": 8192,  # this and cache_gb only without a card: on one they follow from its memory
    "cache_gb": 2.0,         # 3B: 36,864 bytes a token, so that 64 completions of 1,024 take two waves; no change of results
    "checkpoint": True,
    "save_every": 10,        # 3B: 0.7 GB each
}
PRESETS = {
    "tiny": {"steps": 60, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 40, "learning_rate": 1e-3,
             "lora_rank": 16, "tokens_per_pass": 8192, "cache_gb": 0.25, "checkpoint": False, "save_every": 1},
    "3b": REAL,
    "7b": REAL | {"tokens_per_pass": 4096},
}


@dataclass
class Config:
    data: str = option("data", "the study's folder")
    conditions: list[str] = option(list(CONDITIONS[:3]), "which of: standard hallucination mixed grounded")
    corruption: list[str] = option([], "what damages a question; of several, each question gets one by its seed [blank; for grounded mismatch]")
    mixed_fraction: float = option(0.5, "share of damaged questions in condition mixed")
    looking_weight: float = option(0.2, "of what condition grounded pays for using the picture; 0 is standard")
    looking_bound: float = option(5.0, "nats a token beyond which more use of the picture earns nothing")
    seeds: list[int] = option([0, 1, 2, 3, 4], "one run per condition and seed; the report compares conditions seed by seed")
    workers: int = option(None, "processes, each a run at a time [one a card; without cards one a core, as memory allows]")
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
    memory_gb: float = option(None, "what weights and all that is computed may take; the next two follow [what is free on the card]")
    tokens_per_pass: int = option(None, "tokens in a pass of the update, prompts and padding too, at least a row [memory; no card: preset]")
    cache_gb: float = option(None, "for prompts and completions while sampling; more takes several waves [memory; no card: preset]")
    checkpoint: bool = option(None, "keep only each layer's input for the backward pass, and run the layer again there [preset]")
    save_every: int = option(None, "steps between checkpoints of three adapters' size: a kill costs the steps since, Ctrl-C none [preset]")
    sample_every: int = option(20, "steps between two completions shown on the terminal; all samples go to rollouts.jsonl")


# The policy: 4-bit base, trainable adapter, and what its sampler must know


@dataclass
class Policy:
    model: torch.nn.Module  # PeftModel, or the bare base
    tokenizer: object
    image_processor: object
    eos: torch.Tensor     # ids that end a completion
    banned: torch.Tensor  # ids never sampled: vision tokens, and rows of the vocabulary that no token uses
    unpack: bool = True   # whether memory holds the 4-bit weights as plain ones while they are in use

    @property
    def full(self) -> torch.nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.banned.device

    @property
    def dtype(self) -> torch.dtype:
        return self.full.get_input_embeddings().weight.dtype

    def use(self, adapter: str | None):
        """Answer as the policy of that adapter from now on; None: as the base."""
        if adapter is not None:
            self.model.set_adapter(module_name(adapter))
        if isinstance(self.model, PeftModel):
            (self.model.enable_adapter_layers if adapter is not None else self.model.disable_adapter_layers)()

    def encode(self, question: Question) -> Prompt:
        return prepare.encode(question, self.tokenizer, self.image_processor)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on cards that compute in it, and there fp32 products, which are the adapter's alone, in TF32: it has 10 bits where bf16 has 7.

    Else fp32, in full. In fp16, which older cards such as the T4 are faster in, activations of these models exceed its 65,504 and answers
    break, which no scaling of the loss repairs, and a token's share of the loss underflows. So such a card is slower, and skips no step.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.set_float32_matmul_precision("high" if native else "highest")
    return torch.bfloat16 if native else torch.float32


def load_policy(model: str, max_pixels: int, adapters: Mapping[str, Path] = {}, lora_rank: int = 0, seed: int = 0) -> Policy:
    """The base in NF4 with saved adapters, with a fresh one of `lora_rank`, or (neither given) alone.

    Vision tower and lm_head stay as they are: quantising them saves little and costs accuracy. Weights come from
    safetensors only, code never from the model's folder. The model stays in train mode (all dropout is 0), because
    bitsandbytes repacks the 4-bit weights of some CPUs in eval mode and cannot train afterwards.
    """
    kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    if kind not in prepare.FAMILIES:
        raise UserError(f"{model} is a {kind} model: this kit trains {', '.join(prepare.FAMILIES)}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = compute_dtype(device)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"])
    full = AutoModelForImageTextToText.from_pretrained(  # sdpa: the fused attention that allows a mask, for prompts have padding
        model, quantization_config=nf4, dtype=dtype, device_map={"": device}, attn_implementation="sdpa", use_safetensors=True,
        trust_remote_code=False)
    return make_policy(full, *prepare.load_processors(model, max_pixels), adapters, lora_rank, seed)


def make_policy(full: torch.nn.Module, tokenizer, image_processor, adapters: Mapping[str, Path] = {}, lora_rank: int = 0,
                seed: int = 0) -> Policy:
    """A loaded base as a policy, with adapters as `load_policy` says."""
    policy, device = full.requires_grad_(False), full.get_input_embeddings().weight.device
    as_product(full.model.visual.patch_embed.proj)
    for name, folder in adapters.items():
        if policy is full:
            policy = PeftModel.from_pretrained(full, folder, adapter_name=module_name(name))
        else:
            policy.load_adapter(folder, adapter_name=module_name(name))
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):  # of an adapter from elsewhere
            module.p = 0.0
    if lora_rank:
        torch.manual_seed(seed)  # of the adapter's random half
        policy = get_peft_model(full, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, bias="none",
                                                 target_modules=LANGUAGE_LINEARS, task_type="CAUSAL_LM"))
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    banned = [*tokenizer.convert_tokens_to_ids(names), *range(len(tokenizer), full.get_input_embeddings().num_embeddings)]
    eos = full.generation_config.eos_token_id
    eos = [eos] if isinstance(eos, int) else list(eos or [])
    return Policy(policy.train(), tokenizer, image_processor, torch.tensor(sorted({tokenizer.eos_token_id, *eos}), device=device),
                  torch.tensor(banned, device=device))


def module_name(adapter: str) -> str:
    """How torch may call it: `hallucination-blur-0.05-s0` has a point, which separates modules."""
    return adapter.replace(".", "%2E")


def is_packed(module) -> bool:
    return isinstance(module, bnb.nn.Linear4bit)


def as_product(patches: torch.nn.Conv3d):
    """A convolution whose windows do not overlap is a product, and twice as fast as one."""
    patches.forward = lambda pixels: linear(pixels.flatten(1), patches.weight.flatten(1), patches.bias)


@contextmanager
def unpacked(policy: Policy):
    """The 4-bit weights as plain ones for a while, if memory holds them: a small batch mostly unpacks.

    In fp32 the adapter is added to them, W + s B A: one product per layer instead of three. The gradient of that sum gathers over all
    passes and goes through it once, on leaving. In 16 bits the sum would round most of the adapter away: there the two stay apart, and
    without gradients the adapter is in 16 bits too: two products and a sum instead of PEFT's seven kernels, also where 4 bits stay packed.
    """
    changed, sums = [], []
    try:
        for module in policy.full.modules() if policy.unpack else ():
            if is_packed(module):
                plain = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                module.forward = partial(linear, weight=plain, bias=module.bias)
                changed.append(module)
        for module in policy.full.modules() if policy.unpack and policy.dtype == torch.float32 else ():
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                base, name = module.base_layer, module.active_adapters[0]
                plain = base.forward.keywords["weight"] if is_packed(base) else base.weight
                whole = plain + module.scaling[name] * (module.lora_B[name].weight @ module.lora_A[name].weight)
                leaf = whole.detach().requires_grad_(whole.requires_grad)
                module.forward = partial(linear, weight=leaf, bias=base.bias)
                vars(base).pop("forward", None)  # no second copy of the weight
                sums.append((whole, leaf))
                changed.append(module)
        for module in policy.full.modules() if policy.dtype != torch.float32 and not torch.is_grad_enabled() else ():
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                name = module.active_adapters[0]
                down, up = module.lora_A[name].weight.to(policy.dtype), (module.scaling[name] * module.lora_B[name].weight).to(policy.dtype)
                module.forward = partial(beside, module.base_layer, down, up)
                changed.append(module)
        yield
        carry_back([whole for whole, _ in sums], [leaf for _, leaf in sums])
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def beside(base: torch.nn.Module, down: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return base(x) + linear(linear(x, down), up)


def carry_back(roots: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]):
    """Carry the gradients that gathered in `leaves` on into the graphs that their values came from."""
    pairs = [(root, leaf.grad) for root, leaf in zip(roots, leaves) if root.requires_grad and leaf.grad is not None]
    if pairs:
        torch.autograd.backward(*zip(*pairs))


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

    @cached_property
    def bias(self) -> torch.Tensor:
        """(P, 1, 1, L): what a score of attention gets where padding stands."""
        return torch.zeros_like(self.mask, dtype=self.last_hidden.dtype).masked_fill(self.mask == 0, -torch.inf)[:, None, None]

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for pair in self.keys_values for tensor in pair] + [self.last_hidden]

    def as_leaves(self) -> "Prefix":
        """The same values cut off from the prompt's graph; gradients of completions gather in their `.grad`."""
        leaf = lambda tensor: tensor.detach().requires_grad_()
        return Prefix([(leaf(k), leaf(v)) for k, v in self.keys_values], leaf(self.last_hidden), self.mask, self.next_position)


def encode_prompts(policy: Policy, prompts: Sequence[Prompt], features: Sequence[list[SimpleNamespace]],
                   checkpoint_layers: bool = False) -> Prefix:
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
    with checkpointed(policy, cache) if checkpoint_layers else nullcontext():
        hidden = core(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
                      mm_encoder_outputs=pictures, past_key_values=cache, use_cache=True).last_hidden_state
    next_position = positions.masked_fill(mask == 0, -1).amax(dim=(0, 2)) + 1
    return Prefix([(layer.keys, layer.values) for layer in cache.layers], hidden[:, -1], mask.to(device), next_position.to(device))


class LayerCache:
    """Keys and values of one layer: those before, and the new ones behind them."""
    def __init__(self, before: Sequence[torch.Tensor]):
        self.keys_values = before

    def update(self, keys, values, *_, **__):
        new = keys, values
        self.keys_values = tuple(torch.cat(pair, 2) for pair in zip(self.keys_values, new)) if self.keys_values else new
        return self.keys_values


@contextmanager
def checkpointed(policy: Policy, cache: DynamicCache):
    """Layers keep only their input for the backward pass, and run again there.

    transformers switches the cache off where it checkpoints, for a layer that runs again would append to it again. Here each run of
    a layer has a cache that begins with what was there before, and what it appended is a result, through which gradients flow.
    """
    layers = policy.full.model.language_model.layers

    def run(number, forward, hidden, **rest):
        def again(hidden, *before):
            own = LayerCache(before)
            out = forward(hidden, **rest | {"past_key_values": own})
            return out, *own.keys_values
        before = (cache.layers[number].keys, cache.layers[number].values) if cache.get_seq_length(number) else ()
        out, keys, values = checkpoint(again, hidden, *before, use_reentrant=False)
        cache.layers[number:] = [*DynamicCache([(keys, values)]).layers, *cache.layers[number + 1:]]
        return out
    for number, layer in enumerate(layers):
        layer.forward = partial(run, number, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


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
    entropy: torch.Tensor   # (R, T), of the distribution that each token was drawn from, in nats
    lengths: torch.Tensor   # (R,), the end-of-sequence token included
    finished: torch.Tensor  # (R,), False where max_new_tokens cut the completion

    @classmethod
    def join(cls, parts: Sequence["Completions"]) -> "Completions":
        """Those of several waves, cut to the longest."""
        whole = cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))
        longest = int(whole.lengths.max())
        whole.tokens, whole.logprobs, whole.entropy = (x[:, :longest] for x in (whole.tokens, whole.logprobs, whole.entropy))
        return whole

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]


class OwnTokens:
    """Keys and values of R completions so far, per layer; those of their prompts stay in the Prefix, once for the whole group.

    Nothing moves from one token to the next: buffers have all places from the start, and a tensor, `at`, says where the next is written.
    """
    def __init__(self, places: int, at: torch.Tensor):
        self.places, self.at, self.stores = places, at, []  # per layer (2, R, kv heads, places, head dim)
        self.seen = 1  # the places, from the first, that attention looks at

    def update(self, keys, values, layer: int, *_, **__):
        if layer == len(self.stores):
            self.stores.append(keys.new_zeros(2, *keys.shape[:2], self.places, keys.shape[3]))
        for store, new in zip(self.stores[layer], (keys, values)):
            store.index_copy_(2, self.at, new)
        return self.stores[layer][:, :, :, :self.seen].unbind()

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """(seen,): what a score of attention gets at the places that are not written yet."""
        places = torch.arange(self.seen, device=self.at.device)
        return torch.zeros(self.seen, dtype=dtype, device=self.at.device).masked_fill(places > self.at, -torch.inf)

    def get_seq_length(self, *_) -> int:
        return self.seen

    def keep(self, rows: torch.Tensor):
        for layer, store in enumerate(self.stores):  # one at a time: twice the memory of a layer, not of all
            self.stores[layer] = store[:, rows]


@dataclass
class Sharing:
    """Which of R rows belong to which of P prompts, with S places for each prompt."""
    table: torch.Tensor  # (P, S): the rows of each prompt, then any row
    place: torch.Tensor  # (R,): where a row stands in the flattened table
    full: bool           # every prompt has S rows: the table is the rows in order, and nothing needs to be copied

    @classmethod
    def of(cls, owner: torch.Tensor, prompts: int) -> "Sharing":
        counts = torch.bincount(owner, minlength=prompts)
        most, first = int(counts.max()), counts.cumsum(0) - counts
        place = owner * most + torch.arange(len(owner), device=owner.device) - first[owner]
        table = place.new_zeros(prompts * most).scatter(0, place, torch.arange(len(owner), device=owner.device))
        return cls(table.view(prompts, most), place, len(owner) == prompts * most)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, heads, n, size) -> (P, heads, S * n, size): what meets a prompt's keys or values, all rows together."""
        table = rows.unflatten(0, self.table.shape) if self.full else rows[self.table]
        return table.transpose(1, 2).flatten(2, 3)

    def scatter(self, together: torch.Tensor) -> torch.Tensor:
        """Back again."""
        rows = together.unflatten(2, (self.table.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.full else rows[self.place]


def attend(module, query, key, value, mask, scaling: float, prefix: Prefix, sharing: Sharing, bias: torch.Tensor, **_):
    """Attention of one new token per row to its prompt and its own completion: query (R, heads, 1, d), key, value (R, kv heads, t, d).

    The keys and values of a prompt are read once for all its rows, and nowhere is there a copy of them for each.
    """
    prompt_keys, prompt_values = prefix.keys_values[module.layer_idx]  # (P, kv heads, L, d)
    query = scaling * query.view(len(query), key.shape[1], -1, query.shape[3])  # the heads that share a kv head side by side
    before = sharing.scatter(sharing.gather(query) @ prompt_keys.transpose(2, 3) + prefix.bias)
    weights = torch.cat([before, query @ key.transpose(2, 3) + bias], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    before, own = weights.split([before.shape[3], key.shape[2]], -1)
    seen = sharing.scatter(sharing.gather(before) @ prompt_values) + own @ value
    return seen.reshape(len(query), 1, -1, query.shape[3]), None


AttentionInterface.register("shared_prefix", attend)  # without a mask of its own: transformers then prepares none


def decode_step(policy: Policy, prefix: Prefix, sharing: Sharing, own: OwnTokens, tokens: torch.Tensor, position: torch.Tensor):
    """Hidden states (R, hidden) of one more token (R, 1) in each row, at `position` (R,)."""
    text = policy.full.model.language_model
    usual, text.config._attn_implementation = text.config._attn_implementation, "shared_prefix"
    try:
        hidden = text(input_ids=tokens, position_ids=position[:, None].expand(3, -1, -1), past_key_values=own, use_cache=True,
                      prefix=prefix, sharing=sharing, bias=own.bias(policy.dtype)).last_hidden_state
    finally:
        text.config._attn_implementation = usual
    return hidden[:, 0]


def captured(step: Callable, device: torch.device) -> Callable:
    """On a card the same step as a CUDA graph: its kernels, some thousand, then wait for one launch, not each for Python."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # records, without running it; NCCL's own thread may go on
        step()
    return graph.replay


@torch.no_grad()
def generate(policy: Policy, prefix: Prefix, max_new_tokens: int, draws: torch.Tensor | None = None,
             stretch: int | None = None) -> Completions:
    """Complete every prompt of `prefix` G times in one batch.

    `draws` (P * G, max_new_tokens), uniform in [0, 1), picks each token by the inverse of the cumulative distribution;
    None takes the likeliest token, G = 1. T of what returns is `max_new_tokens`.

    For a `stretch` of tokens [on a card 128, else 1] all shapes stay, and nothing waits for the device: so on a card its second step is
    captured, and replayed to its end. Rows that have ended leave the batch between two stretches.
    """
    group = 1 if draws is None else len(draws) // len(prefix.mask)
    rows, device = len(prefix.mask) * group, policy.device
    stretch = stretch or (STRETCH if device.type == "cuda" else 1)
    tokens = torch.full((rows, max_new_tokens), policy.tokenizer.pad_token_id, device=device)
    taken, entropy = torch.zeros(2, rows, max_new_tokens, device=device)
    owner, at = torch.arange(rows, device=device) // group, torch.zeros(1, dtype=torch.long, device=device)  # at: the newest token's column
    own, alive, sharing = OwnTokens(max_new_tokens, at), torch.arange(rows, device=device), Sharing.of(owner, len(prefix.mask))

    def draw(hidden):
        logprobs = next_logprobs(policy, hidden)
        probabilities = logprobs.exp()
        if draws is None:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            cdf = probabilities.cumsum(-1, dtype=torch.float64)  # a sum over 150,000 tokens must not lose the small ones
            token = torch.searchsorted(cdf, draws[alive, at, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        tokens[alive, at], taken[alive, at] = token[:, 0], logprobs.gather(1, token)[:, 0]
        entropy[alive, at] = torch.special.entr(probabilities).sum(-1)

    def step():
        hidden = decode_step(policy, prefix, sharing, own, tokens[alive, at, None], prefix.next_position[owner[alive]] + at)
        at.add_(1)
        draw(hidden)

    draw(prefix.last_hidden[owner])
    for t in range(max_new_tokens - 1):
        if t % stretch == 0:
            stay = (~torch.isin(tokens[alive, max(0, t + 1 - stretch):t + 1], policy.eos).any(1)).nonzero()[:, 0]
            if not len(stay):
                break
            if len(stay) < len(alive):
                alive = alive[stay]
                own.keep(stay)
                sharing = Sharing.of(owner[alive], len(prefix.mask))
            own.seen, run = min(t + stretch, max_new_tokens), step
        elif t % stretch == 1:  # after one that ran: it made what is made once, as prefix.bias
            run = captured(step, device)
        run()
    ends = torch.isin(tokens, policy.eos)
    finished = ends.any(1)
    lengths = torch.where(finished, ends.int().argmax(1) + 1, max_new_tokens)  # of several the first
    behind = torch.arange(max_new_tokens, device=device) >= lengths[:, None]
    return Completions(tokens.masked_fill(behind, policy.tokenizer.pad_token_id), taken.masked_fill(behind, 0),
                       entropy.masked_fill(behind, 0), lengths, finished)


# Memory: what a step may hold at a time


def token_bytes(policy: Policy) -> tuple[int, int, int]:
    """Of a token: keys and values in all layers, the inputs of all layers, and a number in the widest place of a layer.

    A layer at work holds, counted at the shapes of the 3B and the 7B, up to 16 bytes of the last where it only encodes, and
    30 where it runs again for the backward pass: in 16 bits as in 32, for the adapter is in 32.
    """
    text, size = policy.full.config.text_config, policy.dtype.itemsize
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (2 * text.num_hidden_layers * text.num_key_value_heads * head * size, text.num_hidden_layers * text.hidden_size * size,
            text.intermediate_size)


def question_bytes(policy: Policy, length: int, group: int, max_new_tokens: int) -> int:
    """What a question adds to the peak of sampling, with a prompt of that length: while it is encoded, or completed `group` times."""
    cached, _, width = token_bytes(policy)
    drawing = 28 * policy.full.get_input_embeddings().num_embeddings  # log p, p and its sums in fp32 and fp64
    return length * cached + max(length * 16 * width, group * (max_new_tokens * cached + drawing))


def waves(policy: Policy, lengths: Sequence[int], group: int, max_new_tokens: int, cache_gb: float) -> Iterator[slice]:
    """Runs of prompts of these lengths, in order, that can be sampled together, `group` completions of each; at least one prompt."""
    start, longest = 0, 0
    for stop, length in enumerate(lengths):
        longest = max(longest, length)
        if stop > start and (stop + 1 - start) * question_bytes(policy, longest, group, max_new_tokens) > cache_gb * 1e9:
            yield slice(start, stop)
            start, longest = stop, length
    yield slice(start, len(lengths))


def plan(policy: Policy, config: Config, preset: Mapping, longest: int) -> Config:
    """The config with `cache_gb` and `tokens_per_pass` where they are not given: what memory leaves, or the preset's without a card and
    without --memory_gb. Also decides whether the 4-bit weights are unpacked while they are in use.

    Memory first goes to weights, gradients, Adam's two averages and some chunks of logits, then to unpacked weights if they take less than
    half of the rest. A pass holds as many tokens of prompts as of completions: of each token keys and values twice (with gradients, or as
    a row's copies), each layer's input, and one layer at work [without --checkpoint all of them].
    """
    copies = 1 if policy.dtype == torch.bfloat16 else 3  # plain, with the adapter added, and the gradient of that
    plain = copies * policy.dtype.itemsize * sum(math.prod(m.weight.quant_state.shape) for m in policy.full.modules() if is_packed(m))
    memory_gb, card = config.memory_gb, policy.device.type == "cuda"
    if card and memory_gb is None:
        memory_gb = 0.95 * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 1e9  # a rest for gaps between tensors
    if memory_gb is None:
        policy.unpack = 2 * plain < psutil.virtual_memory().available
        cache_gb, tokens_per_pass = preset["cache_gb"], preset["tokens_per_pass"]
    else:
        held = 6 * CHUNK_BYTES + sum(p.nbytes * (4 if p.requires_grad else 1) for p in policy.model.parameters())
        left, layers = 1e9 * memory_gb - held, policy.full.config.text_config.num_hidden_layers
        policy.unpack = 2 * plain < left
        left -= plain * policy.unpack
        cached, inputs, width = token_bytes(policy)
        token = 4 * cached + (2 * inputs + 30 * width if config.checkpoint else 2 * layers * 30 * width)
        need = max(question_bytes(policy, longest, config.group_size, config.max_new_tokens), (longest + config.max_new_tokens) * token)
        if left < need:
            raise UserError(f"{memory_gb:.1f} GB of memory are too little: {held / 1e9:.1f} GB are held all the time, and one question "
                            f"takes up to {need / 1e9:.1f}: lower --group_size or --max_new_tokens, or 01_prepare.py --max_pixels")
        cache_gb, tokens_per_pass = left / 1e9, int(left // token)
        if card:  # beyond it torch says that memory is out
            torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * memory_gb / torch.cuda.mem_get_info()[1]))
    return replace(config, memory_gb=memory_gb, cache_gb=config.cache_gb or cache_gb,
                   tokens_per_pass=config.tokens_per_pass or tokens_per_pass)


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


def token_loss(logprobs, old_logprobs, advantages, reference, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clipped surrogate per token plus the KL penalty; where the clip acted; and k3; all (R, T), advantages (R, 1).

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl * k3, r = exp(logprobs - old), k3 = exp(d) - d - 1 with
    d = reference - logprobs (Schulman, "Approximating KL divergence", 2020): unbiased and never negative; 0 without a reference.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    difference = torch.zeros_like(logprobs) if reference is None else reference - logprobs
    k3 = difference.exp() - difference - 1
    return -torch.minimum(ratio * advantages, clipped * advantages) + config.kl * k3, clipped * advantages < ratio * advantages, k3


def looking_pay(divergence: torch.Tensor, entropy: torch.Tensor, correct: torch.Tensor, bound: float) -> torch.Tensor:
    """What condition `grounded` pays for each token of a completion, in nats: (R, T), (R, T), (R,) -> (R, T).

        correct * [H(p) < 2] * min(KL(p || q), bound)

    p: the next-token distribution given the picture, q: that given the damaged one, along the policy's own completion. Where the picture
    says nothing, p = q, and KL is 0 with its gradient; where it does, pay grows with what it says. Guards against the collapse that PAPO
    (arXiv 2507.06448) saw, where KL kept rising with answers of no sense: only right completions are paid; q is held fixed, so that nothing
    is earned by forgetting what to say without a picture; pay is bounded; and a token that could be any of many earns nothing.

    Tried on shapes and left, one seed each: KL - H (the policy settles on its likeliest words), KL + H (no gain), pay for wrong completions
    too and a weight of 1 (fewer right answers). Three seeds each: q of a blank picture (it pays for any picture, this one or another),
    advantages of a question in proportion to the information of its right answers (VPPO's idea, arXiv 2510.09285), a weight of 0.5: no gain.
    With 0.2 and another question's picture too, the luck of a seed exceeds the difference to `standard`.
    """
    return correct[:, None] * (entropy < ENTROPY_GUARD) * divergence.clamp(max=bound)


def score_tokens(policy: Policy, prefix: Prefix, rows: torch.Tensor, tokens: torch.Tensor, checkpoint_layers: bool = False,
                 against: Prefix | None = None) -> torch.Tensor:
    """log p, in nats, of each completion token (R, T), given the prompts `rows` (R,) of `prefix`.

    With `against`, the same prompts damaged: (3, R, T), that and, of the distribution p that each token comes from, KL(p || q) to the one
    given the damaged prompt, through which no gradient flows, and p's entropy.

    The vocabulary's logits exist only for one chunk of positions at a time; where there are several, the backward pass makes them again.
    """
    hidden = completion_hidden(policy, prefix, rows, tokens, checkpoint_layers)
    with torch.no_grad():
        damaged = [completion_hidden(policy, against, rows, tokens)] if against else []

    def chunk(target, hidden, other=None):
        logprobs = next_logprobs(policy, hidden)
        own = logprobs.gather(1, target[:, None])[:, 0]
        if other is None:
            return own
        with torch.no_grad():
            there = next_logprobs(policy, other).index_fill(-1, policy.banned, 0)
        p, logprobs = logprobs.exp(), logprobs.index_fill(-1, policy.banned, 0)  # p is 0 there, and -inf * 0 no number
        return torch.stack([own, (p * (logprobs - there)).sum(-1), -(p * logprobs).sum(-1)])

    size = max(1, CHUNK_BYTES // (4 * policy.full.get_input_embeddings().num_embeddings))
    pieces = list(zip(*(x.flatten(0, 1).split(size) for x in (tokens, hidden, *damaged))))
    parts = [chunk(*piece) if len(pieces) == 1 else checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(parts, -1).unflatten(-1, tokens.shape)


def completion_hidden(policy: Policy, prefix: Prefix, rows: torch.Tensor, tokens: torch.Tensor, checkpoint_layers: bool = False) -> torch.Tensor:
    """Hidden states (R, T, hidden) of which the one at position t predicts token t of the completions (R, T) of prompts `rows` (R,)."""
    # index_select, for the backward pass of plain indexing adds up in the order in which threads arrive
    hidden = prefix.last_hidden.index_select(0, rows)[:, None]
    if tokens.shape[1] > 1:
        each = lambda tensor: tensor.index_select(0, rows) if len(tensor) > 1 else tensor.expand(len(rows), -1, -1, -1)
        cache = DynamicCache([(each(k), each(v)) for k, v in prefix.keys_values])
        mask = torch.cat([prefix.mask[rows], prefix.mask.new_ones(len(rows), tokens.shape[1] - 1)], 1)
        positions = prefix.next_position[rows, None] + torch.arange(tokens.shape[1] - 1, device=tokens.device)
        with checkpointed(policy, cache) if checkpoint_layers else nullcontext():
            behind = policy.full.model(input_ids=tokens[:, :-1], attention_mask=mask, position_ids=positions.expand(3, -1, -1),
                                       past_key_values=cache, use_cache=True).last_hidden_state
        hidden = torch.cat([hidden, behind], 1)
    return hidden


# One step


@dataclass
class Batch:
    """P questions with their G completions each, and what the loss needs of them."""
    prompts: list[Prompt]
    features: list[list[SimpleNamespace]]
    completions: Completions
    advantages: torch.Tensor        # (P * G,)
    reference: torch.Tensor | None  # (P * G, T) log-probabilities under the base
    correct: torch.Tensor           # (P * G,), 1 or 0
    damaged: tuple[list[Prompt], list] | None = None  # the same prompts without their pictures, and what is seen then


def passes(rows: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows in order of falling length, cut so that one pass has at most that many tokens with its padding, or one row."""
    rows = sorted(rows, key=lambda row: -lengths[row])
    while rows:
        count = max(1, tokens // lengths[rows[0]])
        yield rows[:count]
        rows = rows[count:]


def completions_of(some: list[int], group: int, lengths: Sequence[int], prompt: int, tokens: int) -> Iterator[tuple]:
    """The completions of some prompts in passes: rows, where in `some` each one's prompt stands, and the length of the longest.

    Each row counts with the `prompt` tokens (padded) before it: their keys and values are copied for it.
    """
    for rows in passes([p * group + i for p in some for i in range(group)], [prompt + length for length in lengths], tokens):
        yield rows, torch.tensor([some.index(row // group) for row in rows]), lengths[rows[0]]


def accumulate_gradients(policy: Policy, batch: Batch, config: Config) -> dict[str, float]:
    """Add the gradient of the whole step's loss to the adapter's `.grad`; returns sums over tokens for the log."""
    done, group = batch.completions, len(batch.advantages) // len(batch.prompts)
    weights = token_weights(done.lengths, config.loss, config.max_new_tokens)
    sums = dict.fromkeys(("loss", "kl", "clipped", "looking", "tokens"), 0.0)
    spread = batch.advantages.view(-1, group).ne(0).any(1)  # also where one is no number, so that it is seen
    paid = batch.correct.view(-1, group).any(1) & (batch.damaged is not None)
    active = [p for p in range(len(batch.prompts)) if spread[p] or paid[p] or batch.reference is not None]
    lengths, against = done.lengths.tolist(), None
    with unpacked(policy):
        for some in passes(active, [len(prompt.input_ids) for prompt in batch.prompts], config.tokens_per_pass):
            if batch.damaged:
                with torch.no_grad():
                    against = encode_prompts(policy, *([items[p] for p in some] for items in batch.damaged))
            graph = encode_prompts(policy, [batch.prompts[p] for p in some], [batch.features[p] for p in some], config.checkpoint)
            leaves = graph.as_leaves()
            before = graph.mask.shape[1] + (against.mask.shape[1] if against else 0)
            for rows, owner, length in completions_of(some, group, lengths, before, config.tokens_per_pass):
                mask, tokens = done.mask[rows, :length], done.tokens[rows, :length]
                scores = score_tokens(policy, leaves, owner.to(policy.device), tokens, config.checkpoint, against)
                logprobs, divergence, entropy = scores if batch.damaged else (scores, torch.zeros_like(scores), torch.zeros_like(scores))
                logprobs = logprobs.masked_fill(~mask, 0)  # padding may be a banned token: -inf, and 0 * inf is no number
                reference = None if batch.reference is None else batch.reference[rows, :length].masked_fill(~mask, 0)
                losses, clipped, kl = token_loss(logprobs, done.logprobs[rows, :length], batch.advantages[rows, None], reference, config)
                if batch.damaged:
                    losses = losses - config.looking_weight * looking_pay(divergence, entropy, batch.correct[rows], config.looking_bound)
                (losses * weights[rows, None] * mask).sum().backward()
                for name, value in {"loss": losses * weights[rows, None], "kl": kl, "clipped": clipped, "looking": divergence,
                                    "tokens": mask}.items():
                    sums[name] += (value.detach() * mask).sum().item()
            carry_back(graph.tensors(), leaves.tensors())
    return sums


def grade_completions(policy: Policy, questions: Sequence[Question], done: Completions,
                      reward: bool = True) -> tuple[list[str], list, torch.Tensor]:
    """Decoded completions, their grades, and the rewards (P, G): 0.9 for a correct answer, 0.1 for the asked-for form.

    Training reads the box alone; without `reward` the benchmark's own rule applies.
    """
    think_opened = prepare.opens_think(policy.tokenizer)
    group = len(done.tokens) // len(questions)
    texts = [policy.tokenizer.decode(tokens[:length], skip_special_tokens=True)
             for tokens, length in zip(done.tokens.tolist(), done.lengths.tolist())]
    grades = [prepare.grade(text, questions[i // group], reward, think_opened) for i, text in enumerate(texts)]
    rewards = torch.tensor([0.9 * g.correct + 0.1 * g.well_formed for g in grades], device=policy.device)
    return texts, grades, rewards.view(len(questions), group)


@torch.no_grad()
def score_base(policy: Policy, prompts: Sequence[Prompt], features, done: Completions, config: Config) -> torch.Tensor:
    """log p of each token (P * G, T) under the base, which is the policy with its adapter off."""
    logprobs, group, lengths = torch.zeros_like(done.logprobs), len(done.tokens) // len(prompts), done.lengths.tolist()
    with policy.model.disable_adapter(), unpacked(policy):
        for some in passes(range(len(prompts)), [len(prompt.input_ids) for prompt in prompts], config.tokens_per_pass):
            prefix = encode_prompts(policy, [prompts[p] for p in some], [features[p] for p in some])
            for rows, owner, length in completions_of(some, group, lengths, prefix.mask.shape[1], config.tokens_per_pass):
                logprobs[rows, :length] = score_tokens(policy, prefix, owner.to(policy.device), done.tokens[rows, :length])
    return logprobs


def occurrences(items: Sequence) -> list[int]:
    """How often each item stands before its place."""
    return [items[:k].count(item) for k, item in enumerate(items)]


def roll_out(policy: Policy, questions: Sequence[Question], step: int, seed: int, config: Config,
             damaged: Sequence[Question] = ()) -> tuple[Batch, dict, list[dict]]:
    """Sample a step's completions and grade them: a batch to learn from, the log row, and readable samples."""
    start, group = time.perf_counter(), config.group_size
    before = occurrences([question["id"] for question in questions])  # asked twice in a step, it is completed otherwise
    prompts, others = ([policy.encode(question) for question in some] for some in (questions, damaged))
    features, unseen = look(policy, prompts), look(policy, others)
    draws = torch.from_numpy(np.stack([uniforms(seed, step, question["id"], k * group + i, config.max_new_tokens)
                                       for question, k in zip(questions, before) for i in range(group)]))
    lengths, parts = [len(prompt.input_ids) for prompt in prompts], []
    with torch.no_grad(), unpacked(policy):
        for wave in waves(policy, lengths, group, config.max_new_tokens, config.cache_gb):
            rows = slice(wave.start * group, wave.stop * group)
            prefix = encode_prompts(policy, prompts[wave], features[wave])
            parts.append(generate(policy, prefix, config.max_new_tokens, draws[rows].to(policy.device)))
    done = Completions.join(parts)
    texts, grades, rewards = grade_completions(policy, questions, done)
    reference = score_base(policy, prompts, features, done, config) if config.kl else None
    advantages = group_advantages(rewards, scale=config.loss != "dr_grpo").flatten()
    earned = rewards.nan_to_num(0.0, 0.0, 0.0)  # for the log; what is no number still reaches the gradient, and the step is skipped
    samples = [{"step": step, "id": question["id"], "completion": before[p] * group, "response": texts[p * group],
                "answer": grades[p * group].answer, "gold": question["answer"], "reward": round(earned[p, 0].item(), 3)}
               for p, question in enumerate(questions)]
    tokens = int(done.lengths.sum())
    correct = torch.tensor([float(grade.correct) for grade in grades], device=policy.device)
    row = {"reward": earned.mean().item(), "correct": correct.mean().item(),
           "well_formed": float(np.mean([grade.well_formed for grade in grades])), "length": tokens / len(texts),
           "equal_groups": (earned.amax(1) - earned.amin(1) < 1e-6).float().mean().item(),
           "truncated": 1 - done.finished.float().mean().item(), "entropy": done.entropy.sum().item() / tokens,
           "completion_tokens": tokens, "rollout_s": time.perf_counter() - start}
    return Batch(prompts, features, done, advantages, reference, correct, (others, unseen) if others else None), row, samples


def learn(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config) -> dict:
    """`updates_per_batch` optimizer steps on a batch; returns the log row's part."""
    start, parameters = time.perf_counter(), [p for p in policy.model.parameters() if p.requires_grad]
    for _ in range(config.updates_per_batch):
        sums = accumulate_gradients(policy, batch, config)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        skipped = not math.isfinite(norm + sums["loss"])
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if skipped:
            break
    tokens = sums["tokens"]  # of groups with unequal rewards, of paid ones; with --kl of all
    return {"loss": None if skipped else sums["loss"], "kl": sums["kl"] / tokens if config.kl and not skipped else None,
            "clipped": sums["clipped"] / tokens if tokens else None,
            "looking": sums["looking"] / tokens if batch.damaged and tokens and not skipped else None,
            "gradient_norm": None if skipped else norm, "skipped": skipped,
            "update_s": time.perf_counter() - start}


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
        names = damage_of(condition, config)
        self.share = {"standard": 0.0, "hallucination": 1.0, "mixed": config.mixed_fraction, "grounded": 0.0}[condition]
        self.paid = condition == "grounded" and config.looking_weight > 0
        self.seed, self.names, self.tables, self.made_from = seed, names, {}, {}
        for name in ["clean", *names] if self.share < 1 else names:
            self.made_from |= prepare.check_input(data, study, source, name)
            self.tables[name] = prepare.read_questions(data / prepare.input_path(source, name), "run 01_prepare.py")
        first = next(iter(self.tables.values()))
        self.rows = [row for row, split in enumerate(first["split"]) if split == "train"]
        if not self.rows:
            raise UserError(f"{data / prepare.input_path(source, 'clean')} has no training questions: run 01_prepare.py --train SOURCE")
        ids = first["id"][:]
        self.ids = [ids[row] for row in self.rows]

    def longest(self) -> Question:
        """The one of most tokens, under any of its inputs."""
        lengths = {(name, row): tokens for name, table in self.tables.items() for row, tokens in enumerate(table["prompt_tokens"][:])}
        name, row = max(((name, row) for name in self.tables for row in self.rows), key=lengths.__getitem__)
        return self.tables[name][row]

    def at(self, step: int, count: int, damaged: bool = False) -> list[Question]:
        """The questions of a step as the condition says, or all of them damaged."""
        chosen = []
        indices = schedule(self.ids, self.seed, step, count)
        for index, k in zip(indices, occurrences(indices)):
            draw = random.Random(f"{self.seed}|{step}|{self.ids[index]}" + k * "|again")
            name = draw.choice(self.names) if damaged or draw.random() < self.share else "clean"
            chosen.append(self.tables[name][self.rows[index]])
        return chosen


# Checkpoints: a safetensors file each, the newest two


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names and values: after a power cut a file may have its length and yet not its content."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int, settings: dict):
    """Adapter, optimizer state and the number of finished steps; of the earlier ones only the last is kept."""
    tensors = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            tensors[f"adapter.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
    path = folder / f"{step:06d}.safetensors"
    with prepare.replacing(path) as part:
        save_file(tensors, part, metadata={"step": str(step), "settings": json.dumps(settings), "sha256": digest(tensors)})
    earlier = sorted(other for other in folder.glob("*.safetensors") if other.name < path.name)
    for other in {*folder.iterdir()} - {path, *earlier[-1:]}:
        other.unlink()


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, settings: dict, logged: int) -> int:
    """Restore the newest whole checkpoint whose steps are all among the `logged` ones; returns the number of its steps, 0 without any."""
    paths = sorted(folder.glob("*.safetensors"))
    while paths:
        path = paths.pop()
        try:
            with safe_open(path, "pt") as file:
                meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
            step, old = int(meta["step"]), json.loads(meta["settings"])
            if digest(tensors) != meta["sha256"] or step > logged:
                raise ValueError
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            print(f"{path} is damaged, or train.jsonl lacks its steps: {f'back to {paths[-1].name}' if paths else 'starting again'}")
            continue
        check_settings(folder.parent, old, settings)
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(tensors[f"adapter.{name}"])
                optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(policy.device, copy=True)
                                              for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
        return step
    return 0


def check_settings(folder: Path, old: dict, new: dict):
    """A run continues, or counts as done, only under the settings that it began with."""
    differ = lambda one, two: [key for key in {**one, **two} if one.get(key) != two.get(key)]
    changed = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in differ(old, new) if key != "made_from"]
    changed += [f"another {name}" for name in differ(old.get("made_from", {}), new.get("made_from", {}))]
    if changed:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changed)}): delete that folder, or choose another --data")


def rows_until(path: Path, step: float = math.inf) -> list[dict]:
    """Rows of a log up to that step."""
    return [row for row in prepare.read_jsonl(path) if row["step"] <= step] if path.exists() else []


# A run


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Collects Ctrl-C, and SIGTERM as schedulers and stage 3 itself send it, so that the step under way can end; a second one ends at once.

    A worker is deaf to Ctrl-C (`prepare.start_worker`) and stays so.
    """
    asked = []

    def ask(number, _):
        asked.append(number)
        for each in usual:
            signal.signal(each, signal.default_int_handler)
        if multiprocessing.parent_process() is None:
            os.write(2, STOPPING)  # print may have been interrupted itself

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if handler != signal.SIG_IGN}
    for number in usual:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


def preflight(policy: Policy, questions: Questions, config: Config) -> Config:
    """A whole step of the worst size before step 1, without the optimizer: the longest prompt each time, completions that never end.

    It shows what memory and time a step can take at most, and that placeholders, features and trainable parameters are there. Where a
    card's memory does not hold it, it is cut smaller: the config with which it went through returns.
    """
    trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    if not trainable:
        raise UserError("no parameter is trainable: the adapter found no linear layer in the language model")
    question, count = questions.longest(), config.prompts_per_step
    prompt = policy.encode(question)
    tokens = sum(len(picture.tokens) for picture in look(policy, [prompt])[0])
    placeholders = prompt.input_ids.count(policy.full.config.image_token_id)
    if tokens != placeholders:
        raise UserError(f"{prompt.pictures} pictures have {placeholders} image tokens but {tokens} features: "
                        "the image processor is not the model's")
    endless, length = replace(policy, eos=torch.full_like(policy.eos, -1)), len(prompt.input_ids)
    worst = [question] * config.prompts_per_step
    while True:
        start, failed = time.perf_counter(), None
        wave = next(waves(policy, [length] * count, config.group_size, config.max_new_tokens, config.cache_gb)).stop
        rows = min(count * config.group_size, max(1, config.tokens_per_pass // (length + config.max_new_tokens)))
        try:
            batch = roll_out(endless, worst, 0, 0, config, worst if questions.paid else ())[0]
            batch.advantages = torch.linspace(-1, 1, len(batch.advantages), device=policy.device)
            accumulate_gradients(endless, batch, config)
        except torch.OutOfMemoryError as error:
            failed = str(error).splitlines()[0]
        for parameter in trainable:
            parameter.grad = None
        if failed is None:
            break
        if wave * rows == 1:
            raise UserError(f"a step of the largest size does not fit into memory ({failed}): lower --group_size, --max_new_tokens or "
                            "--prompts_per_step, or 01_prepare.py --max_pixels")
        batch, config = None, replace(config, cache_gb=config.cache_gb / 2, tokens_per_pass=max(1, config.tokens_per_pass // 2))
    tqdm.write(f"preflight: {sum(p.numel() for p in trainable) / 1e6:.2f} M trainable parameters, longest prompt {length} tokens "
          f"({tokens} of the picture); the largest step samples {wave * config.group_size} completions at a time, "
          f"learns from {rows} at a time, and takes {time.perf_counter() - start:.1f} s and {peak_gb(policy):.2f} GB"
          + (f" of {config.memory_gb:.2f}" if config.memory_gb else "") + ("" if policy.unpack else "; 4-bit weights are not unpacked"))
    return config


def peak_gb(policy: Policy) -> float:
    """Most memory held so far, in GB: of the card, or without one of the process."""
    if policy.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) * 1024 / 1e9
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 1e9  # Windows; macOS tells only what is held now


def one_line(run: str, row: dict, steps: int) -> str:
    tokens_per_s = row["completion_tokens"] / (row["rollout_s"] + row["update_s"])
    return (f"{run} {row['step']:4d}/{steps}  reward {row['reward']:.3f}  correct {row['correct']:.3f}  formed {row['well_formed']:.3f}  "
            f"flat {row['equal_groups']:.2f}  length {row['length']:5.1f}  cut {row['truncated']:.2f}  entropy {row['entropy']:.2f}  "
            + (f"kl {row['kl']:.3f}  " if row["kl"] is not None else "")
            + (f"looks {row['looking']:.2f}  " if row["looking"] is not None else "")
            + f"clip {row['clipped'] or 0:.3f}  "
            + ("skipped: a reward or gradient is not finite  " if row["skipped"] else f"grad {row['gradient_norm']:.2f}  ")
            + f"{row['rollout_s']:.2f}+{row['update_s']:.2f} s  {tokens_per_s:,.0f} tok/s  {row['peak_gb']:.2f} GB")


def train_run(study: dict, condition: str, seed: int, config: Config, after_step: Callable[[], None] = lambda: None) -> dict:
    """Train one condition with one seed, or continue it; returns its config.json."""
    data = Path(config.data)
    run = run_name(condition, seed, config)
    folder = data / "policies" / run
    questions = Questions(study, condition, seed, config)
    settings = {"condition": condition, "seed": seed, "model": study["model"], "made_from": questions.made_from | study["model_files"],
                **prepare.versions(), **{f.name: getattr(config, f.name) for f in fields(Config) if f.name not in NOT_SETTINGS}}
    if condition != "mixed":
        del settings["mixed_fraction"]
    settings["corruption"] = damage_of(condition, config)
    if condition == "standard":
        del settings["corruption"]
    if condition != "grounded":
        del settings["looking_weight"], settings["looking_bound"]
    with prepare.locked(folder):
        if (folder / "config.json").exists():
            done = read_run(folder)
            check_settings(folder, done["settings"], settings | {"steps": config.steps})
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            tqdm.write(f"{run} is finished: kept")
            return done
        return make_run(study, run, settings, questions, config, after_step)


def make_run(study: dict, run: str, settings: dict, questions: Questions, config: Config, after_step: Callable[[], None]) -> dict:
    """Steps from the last checkpoint to the end; returns config.json."""
    data, seed = Path(config.data), settings["seed"]
    folder = data / "policies" / run
    policy = load_policy(prepare.model_path(data, study), study["max_pixels"], lora_rank=config.lora_rank, seed=seed)
    policy.model.peft_config["default"].base_model_name_or_path = study["model"]  # not where this machine keeps it
    # fused: the other forms take a square root that differs between processors
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0,
                                  fused=True)
    log, samples = folder / "train.jsonl", folder / "rollouts.jsonl"
    finished = load_checkpoint(folder / "checkpoint", policy, optimizer, settings, len(rows_until(log)))
    if finished > config.steps:
        raise UserError(f"{folder} has already made {finished} steps, not {config.steps}: delete that folder, or ask for more --steps")
    rows = rows_until(log, finished)  # later ones are about to be made again
    for path in (log, samples):
        prepare.write_jsonl(path, rows_until(path, finished))
    config = plan(policy, config, PRESETS[study["preset"]], questions.longest()["prompt_tokens"])
    config = preflight(policy, questions, config)
    if finished:
        tqdm.write(f"{run} continues after step {finished}")
    with stopping() as asked:
        for step in range(finished + 1, config.steps + 1):
            rows.append(train_step(policy, optimizer, questions, step, seed, config, folder))
            after_step()
            if len(rows) > 2 and all(row["skipped"] for row in rows[-3:]):
                raise UserError(f"{run} skipped steps {step - 2} to {step}, because a reward or a gradient is not finite: look into "
                                f"{samples}, delete {folder}, and lower --learning_rate")
            if asked or step % config.save_every == 0:
                save_checkpoint(folder / "checkpoint", policy, optimizer, step, settings)
            if asked:
                raise KeyboardInterrupt
        result = {"policy": run, "settings": settings | {"steps": config.steps},
                  "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else "cpu", "unpacked": policy.unpack,
                  "skipped": sum(row["skipped"] for row in rows), "peak_gb": max(row["peak_gb"] for row in rows),
                  "seconds": round(sum(row["rollout_s"] + row["update_s"] for row in rows), 1)}
        finish(folder, policy, result)
    return result


def train_step(policy, optimizer, questions: Questions, step: int, seed: int, config: Config, folder: Path) -> dict:
    """Rollout, update, and their rows in train.jsonl and rollouts.jsonl."""
    asked = questions.at(step - 1, config.prompts_per_step)
    damaged = questions.at(step - 1, config.prompts_per_step, damaged=True) if questions.paid else ()
    batch, row, samples = roll_out(policy, asked, step, seed, config, damaged)
    before = [p.detach().clone() for p in policy.model.parameters() if p.requires_grad] if step == 1 else []
    row = {"step": step, **row, **learn(policy, optimizer, batch, config), "peak_gb": round(peak_gb(policy), 3)}
    if before and row["gradient_norm"] and all(map(torch.equal, before, (p for p in policy.model.parameters() if p.requires_grad))):
        raise UserError("step 1 had a gradient but changed no weight: the adapter is not what the optimizer holds")
    prepare.append_jsonl(folder / "rollouts.jsonl", samples)
    prepare.append_jsonl(folder / "train.jsonl", [row])
    return row


def finish(folder: Path, policy: Policy, result: dict):
    """Adapter, then config.json: it says that the run is whole."""
    save_adapter(folder, policy)
    with prepare.replacing(folder / "config.json") as part:
        part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def save_adapter(folder: Path, policy: Policy):
    """adapter_model.safetensors and adapter_config.json as PEFT writes them."""
    whole = folder / ".adapter.part"
    prepare.remove(whole)  # of a process that was killed
    try:
        policy.model.save_pretrained(whole, save_embedding_layers=False)  # "auto" asks the hub whether they changed
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            with prepare.replacing(folder / name) as part:
                (whole / name).replace(part)
    finally:
        prepare.remove(whole)


def read_run(folder: Path) -> dict:
    """config.json of a finished run."""
    shape = {"settings": {"made_from": dict, "max_new_tokens": int}}
    return prepare.read_json(folder / "config.json", shape, f"delete {folder} and run 03_train_grpo.py again")


def run_name(condition: str, seed: int, config: Config) -> str:
    damage = damage_of(condition, config)
    return f"{condition}-{'+'.join(damage)}-s{seed}" if damage else f"{condition}-s{seed}"


def damage_of(condition: str, config: Config) -> list[str]:
    """What damages the questions of a condition: blank, as in the paper; for grounded another question's picture, see `looking_pay`."""
    return [] if condition == "standard" else config.corruption or (["mismatch"] if condition == "grounded" else ["blank"])


class Progress:
    """One bar over all runs, a line for each step of each, and now and then a completion: read from what the runs log."""

    def __init__(self, folders: Mapping[str, Path], config: Config):
        self.folders, self.config, self.shown = folders, config, {run: len(rows_until(folder / "train.jsonl")) for run, folder in folders.items()}
        self.bar = tqdm(total=config.steps * len(folders), initial=sum(self.shown.values()), desc="steps", disable=None)

    def show(self):
        """What is new since the last call."""
        for run, folder in self.folders.items():
            rows = rows_until(folder / "train.jsonl")
            for row in rows[self.shown[run]:]:
                tqdm.write(one_line(run, row, self.config.steps))
                if self.config.sample_every and row["step"] % self.config.sample_every == 0:
                    sample = next(sample for sample in prepare.read_jsonl(folder / "rollouts.jsonl") if sample["step"] == row["step"])
                    tqdm.write(f"  {sample['id']}: {sample['response']!r}, gold {sample['gold']!r}, reward {sample['reward']}")
            self.bar.update(len(rows) - self.shown[run])
            self.shown[run] = len(rows)  # fewer where a run goes back to its checkpoint


def main(config: Config) -> list[dict]:
    """Train every condition with every seed; returns their config.json."""
    study = prepare.load_study(Path(config.data))
    for name, value in PRESETS[study["preset"]].items():
        if getattr(config, name) is None and name not in ("tokens_per_pass", "cache_gb"):  # these two follow from memory: `plan`
            setattr(config, name, value)
    check_config(config)
    tasks = {run_name(condition, seed, config): (study, condition, seed, config) for seed in config.seeds for condition in config.conditions}
    workers = prepare.count_workers(config.workers, len(tasks), prepare.worker_bytes(study))
    progress = Progress({run: Path(config.data) / "policies" / run for run in tasks}, config)
    if workers == 1:  # the run itself tells, for nobody else watches
        tasks = {run: (*task, progress.show) for run, task in tasks.items()}
    done = {}
    with progress.bar:
        prepare.deal_out(train_run, tasks, workers, done.__setitem__, progress.show)
    return [done[run] for run in tasks]


def check_config(config: Config):
    """One sentence for what cannot work."""
    for condition in config.conditions:
        if condition not in CONDITIONS:
            raise UserError(f"--conditions {condition} is unknown: choose from {' '.join(CONDITIONS)}")
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss} is unknown: choose from {' '.join(LOSSES)}")
    if config.group_size < 2:
        raise UserError(f"--group_size {config.group_size} leaves nothing to compare a completion with: choose at least 2")
    prepare.check_least(config, 1, "steps", "workers", "prompts_per_step", "max_new_tokens", "lora_rank", "tokens_per_pass", "updates_per_batch",
                        "save_every")
    prepare.check_least(config, 1e-9, "learning_rate", "max_grad_norm", "memory_gb", "cache_gb")
    prepare.check_least(config, 0, "kl", "clip_low", "clip_high", "sample_every", "looking_weight", "looking_bound")
    if "clean" in config.corruption:
        raise UserError("--corruption clean damages nothing: for clean questions use --conditions standard")
    if not 0 < config.mixed_fraction < 1:
        raise UserError(f"--mixed_fraction {config.mixed_fraction} is not between 0 and 1: "
                        "for 0 or 1 use --conditions standard or hallucination")


if __name__ == "__main__":
    prepare.run(main, Config, __doc__)
