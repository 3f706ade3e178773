# SPDX-License-Identifier: MIT
"""Stage 3: the shared prompt changes no number, what is sampled is what is trained, and a run depends on its settings alone.

The truth is a plain forward over whole sequences, one completion at a time, with positions counted by hand and the losses
written as the papers write them.
"""

import contextlib
import dataclasses
import gc
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import weakref
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import ROOT, VISION, hashed_grade, tiny_model

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STEP = dict(prompts_per_step=4, group_size=4, max_new_tokens=12, micro_batch_tokens=96, cache_gb=1.0, lora_rank=4, learning_rate=1e-2)
RUN = {"steps": 4, "seeds": [0], "workers": 1, "conditions": ["mixed"], "corruption": ["blank", "removed"]}  # some prompts of a step have no picture


# Models, questions, a study


def stir(policy):
    """An adapter that does something: LoRA's B begins at zero, where the policy is the base and half the gradient is missing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture
def data(study_folder, tmp_path):
    """A study of one's own: files are copied, none is shared."""
    return shutil.copytree(study_folder, tmp_path / "data")


@pytest.fixture(scope="session")
def policies(prepare, train, tokenizer, base_folder):
    """Kind -> policy with a stirred adapter: three families in fp32, and what the kit itself loads, in NF4."""
    made = {}

    def get(kind):
        if kind == "nf4" and kind not in made:
            made[kind] = stir(train.load_policy(str(base_folder), 112 * 112, lora_rank=4, seed=0))
        elif kind not in made:
            model = tiny_model(kind, tokenizer)
            patch = model.config.vision_config.patch_size
            processor = prepare.Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": 56 * 56, "longest_edge": 128 * 128})
            made[kind] = stir(train.make_policy(model, tokenizer, processor, lora_rank=4))
        return made[kind]

    return get


def question(name, sizes, text, **more):
    rng = np.random.default_rng(len(name) + sum(map(sum, sizes)))
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    return {"id": name, "problem": text, "images": pictures, "answer": "2", "answer_type": "integer", "choices": []} | more


# pictures of different sizes and shapes, two pictures with text between them, none at all
QUESTIONS = [question("one", [(56, 84)], "<image>How many?"),
             question("large", [(128, 96)], "<image>A longer question: how many circles are there?"),
             question("two", [(64, 64), (96, 56)], "<image>This and that: <image>Which has more squares?"),
             question("none", [], "Ann has 3 pens and gets 4 more. How many pens?")]


# The plain way: one whole sequence at a time


def positions_by_hand(policy, prompt, tokens):
    """(3, 1, L): text counts on; a picture takes its rows and columns, and the text behind it the largest number + 1."""
    image, merge = policy.full.config.image_token_id, policy.full.config.vision_config.spatial_merge_size
    grids = iter([] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist())
    ids, columns, at = [*prompt.input_ids, *tokens], [], 0
    while len(columns) < len(ids):
        if ids[len(columns)] == image:
            _, height, width = (n // merge for n in next(grids))
            columns += [(at, at + y, at + x) for y in range(height) for x in range(width)]
            at += max(height, width)
        else:
            columns.append((at, at, at))
            at += 1
    return torch.tensor(columns).T[:, None]


def plain_forward(policy, prompt, tokens):
    """log p over the vocabulary (T, V) before each of the tokens, from one forward over prompt and completion."""
    logits = policy.full(input_ids=torch.tensor([[*prompt.input_ids, *tokens]]), pixel_values=prompt.pixel_values,
                         image_grid_thw=prompt.image_grid_thw, position_ids=positions_by_hand(policy, prompt, tokens),
                         use_cache=False).logits[0, len(prompt.input_ids) - 1:-1]
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool)
    forbidden[policy.banned] = True
    return torch.where(forbidden, -torch.inf, logits.float()).log_softmax(-1)


def plain_logprobs(policy, prompt, tokens):
    return plain_forward(policy, prompt, tokens)[torch.arange(len(tokens)), torch.tensor(tokens)]


def paper_loss(config, logprobs, old, advantages, reference):
    """The step's loss as the papers write it; lists of one tensor per completion."""
    total = 0.0
    for i, advantage in enumerate(advantages):
        ratio = torch.exp(logprobs[i] - old[i])
        terms = torch.min(ratio * advantage, torch.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage)
        if reference is not None:  # k3: pi_ref / pi - log(pi_ref / pi) - 1
            terms = terms - config.kl * (torch.exp(reference[i]) / torch.exp(logprobs[i]) - (reference[i] - logprobs[i]) - 1)
        total = total + {"dapo": terms.sum() / sum(len(row) for row in logprobs),
                         "grpo": terms.mean() / len(logprobs),
                         "dr_grpo": terms.sum() / (len(logprobs) * config.max_new_tokens)}[config.loss]
    return -total


def trainable(policy):
    return {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}


def shared_gradient(train, policy, batch, config):
    """What the kit computes: the gradient by parameter, and the sums for the log."""
    for parameter in policy.model.parameters():
        parameter.grad = None
    sums = train.accumulate_gradients(policy, batch, config)
    gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(policy).items()}
    policy.model.zero_grad(set_to_none=True)
    return gradient, sums


def largest_error(gradient, truth):
    """Over the adapter's matrices, the relative error in the Euclidean norm."""
    assert all(value.norm() > 0 for value in truth.values())
    return max(((gradient[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth)


def hand_made_batch(train, policy, group=3, longest=7):
    """Random completions of 1 to `longest` tokens, some of which end: a Batch without old and reference log-probabilities."""
    rng = np.random.default_rng(0)
    allowed = np.setdiff1d(np.arange(576), policy.banned.numpy())
    lengths = [*range(1, longest + 1)] * len(QUESTIONS)
    completions = [[*map(int, rng.choice(allowed, n - 1)), int(policy.eos[0]) if n % 2 else int(rng.choice(allowed))]
                   for n in lengths[:group * len(QUESTIONS)]]
    lengths = torch.tensor([len(row) for row in completions])
    tokens = torch.tensor([row + [policy.tokenizer.pad_token_id] * (longest - len(row)) for row in completions])
    prompts = [policy.encode(q) for q in QUESTIONS]
    done = train.Completions(tokens, torch.zeros(tokens.shape), torch.zeros(tokens.shape), lengths, lengths % 2 == 1)
    advantages = torch.tensor(rng.standard_normal(len(completions)), dtype=torch.float32)
    return completions, train.Batch(prompts, train.encode_images(policy, prompts), done, advantages, torch.zeros_like(advantages))


def padded(rows, width):
    """What stands behind a completion must not matter: 9 is no log-probability."""
    return torch.stack([torch.cat([row, torch.full((width - len(row),), 9.0)]) for row in rows])


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_gradient_of_the_shared_prompt_is_that_of_whole_sequences(train, policies, kind, monkeypatch):
    """For each loss, with and without KL, the clip active, however the step is cut into passes and chunks, checkpointed or not."""
    policy = policies(kind)
    completions, batch = hand_made_batch(train, policy)
    prompts = [batch.prompts[i // 3] for i in range(len(completions))]
    logprobs = [plain_logprobs(policy, *pair) for pair in zip(prompts, completions)]
    noise = torch.Generator().manual_seed(2)
    old = [row.detach() + 0.3 * torch.randn(row.shape, generator=noise) for row in logprobs]
    with torch.no_grad(), policy.model.disable_adapter():
        reference = [plain_logprobs(policy, *pair) for pair in zip(prompts, completions)]
    assert max((a - b).abs().max() for a, b in zip(reference, logprobs)) > 0.1  # the adapter does something
    batch.completions.logprobs = padded(old, 7)
    cuts = [(t, c, b) for t in (1, 120, 2000) for c in (False, True) for b in ((2**26,) if kind == "nf4" else (2**26, 4 * 576 * 5))]
    worst, spread, unpack = 0.0, 0.0, itertools.cycle([True, True, False, True, False])  # plain weights with the adapter added, and PEFT's own forward
    for loss in train.LOSSES:
        for kl in (0.0, 0.1):
            config = train.Config(loss=loss, kl=kl, max_new_tokens=10)
            loss_value = paper_loss(config, logprobs, old, batch.advantages, reference if kl else None)
            truth = dict(zip(trainable(policy), torch.autograd.grad(loss_value, list(trainable(policy).values()), retain_graph=True)))
            step, first = dataclasses.replace(batch, reference=padded(reference, 7) if kl else None), None
            for config.micro_batch_tokens, config.checkpoint, chunk in cuts:
                monkeypatch.setattr(train, "CHUNK_BYTES", chunk)
                gradient, sums = shared_gradient(train, dataclasses.replace(policy, dequantize=next(unpack)), step, config)
                worst, first = max(worst, largest_error(gradient, truth)), first or gradient
                spread = max(spread, largest_error(gradient, first))
                assert sums["loss"] == pytest.approx(loss_value.item(), rel=1e-4)
    print(f"{kind}: largest relative error of a gradient {worst:.1e}, largest difference between two ways of cutting {spread:.1e}")
    assert worst < 1e-4 and spread < (2e-5 if kind == "nf4" else 1e-5)  # nf4 also: weights unpacked with the adapter added, or neither

    ratios = torch.exp(torch.cat(logprobs) - torch.cat(old))
    signs = torch.cat([a.expand(len(row)) for a, row in zip(batch.advantages, logprobs)]) > 0
    outside = ((ratios > 1.28) & signs) | ((ratios < 0.8) & ~signs)
    assert outside.sum() > 5 and sums["clipped"] == outside.sum()
    assert sums["tokens"] == len(ratios)
    gap = torch.cat(reference) - torch.cat(logprobs)
    assert sums["kl"] == pytest.approx((gap.exp() - gap - 1).sum().item(), rel=1e-3)


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
@pytest.mark.parametrize("loss, kl", [("dapo", 0.0), ("grpo", 0.1), ("dr_grpo", 0.0)])
def test_gradient_of_grounding_is_that_of_whole_sequences(train, policies, kind, loss, kl, monkeypatch):
    """What `grounded` adds: KL to the distribution given a blank picture, bounded, of tokens with little entropy, on right completions alone;
    weighed like any token of the step's loss, however it is cut."""
    policy = policies(kind)
    completions, batch = hand_made_batch(train, policy)
    prompts = [batch.prompts[i // 3] for i in range(len(completions))]
    blank = [policy.encode(q | {"images": [Image.new("RGB", p.size, (90, 140, 60)) for p in q["images"]]}) for q in QUESTIONS]
    correct = torch.tensor([i % 3 < 2 for i in range(len(completions))], dtype=torch.float32)
    correct[:3] = 0  # a question that nobody got right earns nothing
    batch.advantages[3:6] = 0  # and one whose answers are all alike can
    logprobs = [plain_logprobs(policy, *pair) for pair in zip(prompts, completions)]
    with torch.no_grad(), policy.model.disable_adapter():
        reference = [plain_logprobs(policy, *pair) for pair in zip(prompts, completions)] if kl else None
    batch.completions.logprobs = padded([row.detach() for row in logprobs], 7)
    step = dataclasses.replace(batch, correct=correct, damaged=(blank, train.encode_images(policy, blank)), reference=padded(reference, 7) if kl else None)
    config = train.Config(loss=loss, kl=kl, max_new_tokens=10, grounding_weight=0.7, grounding_bound=0.5)
    monkeypatch.setattr(train, "ENTROPY_GUARD", 3.0)
    value, bounded, spread = paper_loss(config, logprobs, [row.detach() for row in logprobs], batch.advantages, reference), 0, 0
    for i, tokens in enumerate(completions):
        p = plain_forward(policy, prompts[i], tokens)
        with torch.no_grad():
            q = plain_forward(policy, blank[i // 3], tokens)
        sampled = torch.isfinite(p[0])
        p, q = p[:, sampled], q[:, sampled]
        weight = {"dapo": 1 / sum(map(len, completions)), "grpo": 1 / len(tokens) / len(completions), "dr_grpo": 1 / len(completions) / 10}[loss]
        for t in range(len(tokens)):
            divergence, entropy = (p[t].exp() * (p[t] - q[t])).sum(), -(p[t].exp() * p[t]).sum()
            bounded, spread = bounded + (float(divergence) > 0.5), spread + (float(entropy) > 3.0)
            value = value - 0.7 * correct[i] * (entropy < 3.0) * torch.clip(divergence, max=0.5) * weight
    assert all(0 < some < sum(map(len, completions)) for some in (bounded, spread))
    truth = dict(zip(trainable(policy), torch.autograd.grad(value, list(trainable(policy).values()))))
    for config.micro_batch_tokens, config.checkpoint, chunk in ((1, False, 2**26), (120, True, 2**26), (2000, False, 4 * 576 * 5)):
        monkeypatch.setattr(train, "CHUNK_BYTES", chunk)
        gradient, sums = shared_gradient(train, policy, step, config)
        assert largest_error(gradient, truth) < 1e-4
        assert sums["loss"] == pytest.approx(value.item(), rel=1e-4)


def test_the_gradient_is_the_same_to_the_bit_each_time(train, policies):
    """At the size of the default study, where threads share the work: sums in the order of their arrival would differ in the last bit."""
    policy, rng = policies("nf4"), np.random.default_rng(0)
    allowed = np.setdiff1d(np.arange(576), policy.banned.numpy())
    prompts = [policy.encode(q) for q in QUESTIONS * 2]
    tokens = torch.from_numpy(rng.choice(allowed, (64, 24)))
    done = train.Completions(tokens, torch.full(tokens.shape, -6.0), torch.ones(tokens.shape),
                             torch.from_numpy(rng.integers(1, 25, 64)), torch.ones(64, dtype=torch.bool))
    batch = train.Batch(prompts, train.encode_images(policy, prompts), done, torch.from_numpy(rng.standard_normal(64)).float(), torch.zeros(64))
    gradients = [shared_gradient(train, policy, batch, train.Config(micro_batch_tokens=4096, max_new_tokens=24))[0] for _ in range(6)]
    assert all(torch.equal(gradients[0][name], again[name]) for again in gradients[1:] for name in again)


def test_what_stands_behind_the_end_of_sequence_is_not_trained(train, policies):
    policy = policies("qwen2_5_vl")
    completions, batch = hand_made_batch(train, policy)
    batch.completions.logprobs = torch.full_like(batch.completions.logprobs, -5.0)
    batch.reference = torch.full_like(batch.completions.logprobs, -6.0)
    config = train.Config(kl=0.1, micro_batch_tokens=80, max_new_tokens=10)
    gradient, sums = shared_gradient(train, policy, batch, config)
    done = batch.completions
    behind = ~done.mask
    assert (done.mask.sum(1) == done.lengths).all() and behind.any()
    for filler in (7, int(policy.banned[0])):  # any token, and one whose probability is 0: some models pad with a vision token
        changed = dataclasses.replace(done, tokens=torch.where(behind, filler, done.tokens))
        under_base = torch.where(behind, -torch.inf if filler in policy.banned else 500.0, batch.reference)
        kept = dataclasses.replace(batch, completions=changed, reference=under_base)
        again, same = shared_gradient(train, policy, kept, config)
        assert largest_error(again, gradient) < 1e-6
        assert same == pytest.approx(sums)


def test_the_end_of_sequence_is_trained(train, policies):
    """A completion that is nothing but its end has a gradient, and pushing it up makes the end likelier."""
    policy = policies("qwen2_5_vl")
    _, batch = hand_made_batch(train, policy)
    eos = policy.eos[:1, None]
    done = train.Completions(eos, torch.full((1, 1), -5.0), torch.ones(1, 1), torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.bool))
    batch = train.Batch(batch.prompts[:1], batch.images[:1], done, torch.ones(1), torch.zeros(1))
    gradient, _ = shared_gradient(train, policy, batch, train.Config(micro_batch_tokens=1, max_new_tokens=10, clip_high=1e9))
    before = plain_logprobs(policy, batch.prompts[0], eos[0].tolist()).item()
    with torch.no_grad():
        for name, parameter in trainable(policy).items():
            parameter -= 0.01 * gradient[name]
        after = plain_logprobs(policy, batch.prompts[0], eos[0].tolist()).item()
        for name, parameter in trainable(policy).items():
            parameter += 0.01 * gradient[name]
    assert after > before + 1e-4


class Logits(TorchDispatchMode):
    """The most positions, of all tensors as wide as the vocabulary, that any operation returns; the head's own weight aside."""
    def __init__(self, head):
        super().__init__()
        self.most, self.head, self.width = 0, head.data_ptr(), len(head)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.width and out.data_ptr() != self.head:
            self.most = max(self.most, out.numel() // self.width)
        return out


@pytest.mark.parametrize("positions", [3, 16])
def test_logits_never_take_more_than_a_chunk(train, policies, monkeypatch, positions):
    """Forward and backward, over 4 completions of 20 tokens: no more positions at a time than CHUNK_BYTES says, and the same gradient."""
    policy, gradients = policies("qwen2_5_vl"), []
    prompts = [policy.encode(q) for q in QUESTIONS[:2]]
    tokens = torch.randint(20, 200, (4, 20), generator=torch.Generator().manual_seed(0))
    for chunk in (4 * 576 * positions, 2**26):
        monkeypatch.setattr(train, "CHUNK_BYTES", chunk)
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        with Logits(policy.full.lm_head.weight) as logits:
            logprobs = train.score_tokens(policy, prefix, torch.tensor([0, 0, 1, 1]), tokens)
            gradient = torch.autograd.grad(logprobs.sum(), list(trainable(policy).values()))
        gradients.append(torch.cat([part.flatten() for part in gradient]))
        assert logits.most == (positions if chunk < 2**26 else 80)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())


def test_equal_rewards_cost_nothing(train, policies, monkeypatch):
    """Without KL such a group is not even encoded, and the others' gradient stays; with KL it still pulls to the base."""
    policy = policies("qwen2_5_vl")
    completions, batch = hand_made_batch(train, policy)
    batch.completions.logprobs = torch.full_like(batch.completions.logprobs, -5.0)
    batch.advantages[3:9] = 0
    encoded, encode = [], train.encode_prompts
    monkeypatch.setattr(train, "encode_prompts", lambda policy, prompts, *rest: encoded.extend(prompts) or encode(policy, prompts, *rest))
    config = train.Config(micro_batch_tokens=80, max_new_tokens=10, loss="grpo")
    gradient, sums = shared_gradient(train, policy, batch, config)
    assert encoded == [batch.prompts[3], batch.prompts[0]]  # the longer first
    assert sums["tokens"] == sum(map(len, completions[:3] + completions[9:]))
    value = paper_loss(config, [plain_logprobs(policy, batch.prompts[i // 3], row) for i, row in enumerate(completions)],
                       [torch.full((len(row),), -5.0) for row in completions], batch.advantages, None)
    truth = dict(zip(trainable(policy), torch.autograd.grad(value, list(trainable(policy).values()))))
    assert largest_error(gradient, truth) < 1e-4
    encoded.clear()
    batch.advantages[:], batch.reference = 0, torch.full_like(batch.completions.logprobs, -6.0)
    gradient, _ = shared_gradient(train, policy, batch, config := dataclasses.replace(config, kl=0.1))
    assert len(encoded) == 4 and all(value.norm() > 0 for value in gradient.values())
    encoded.clear()
    batch.reference = None
    gradient, sums = shared_gradient(train, policy, batch, config)
    assert not encoded and not any(value.any() for value in gradient.values()) and not any(sums.values())


# Sampling


@pytest.fixture
def often_ending(policies):
    """A policy with twenty tokens that end: completions of all lengths."""
    policy = policies("qwen2_5_vl")
    return dataclasses.replace(policy, eos=torch.arange(100, 160))


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_sampled_tokens_and_their_logprobs_are_those_of_a_plain_forward(train, policies, kind):
    """Each token is where its number falls in the cumulative distribution; its log-probability is the training forward's."""
    policy = dataclasses.replace(policies(kind), eos=torch.arange(100, 160))
    config = train.Config(group_size=5, max_new_tokens=6, micro_batch_tokens=24, cache_gb=1.0, kl=0.1)
    batch, row, _ = train.roll_out(policy, QUESTIONS, 5, 3, config)
    done, worst = batch.completions, 0.0
    prefix = train.encode_prompts(policy, batch.prompts, batch.images)
    trained = train.score_tokens(policy, prefix, torch.arange(4).repeat_interleave(5), done.tokens)
    entropies = []
    for r, length in enumerate(done.lengths.tolist()):
        prompt, tokens = batch.prompts[r // 5], done.tokens[r, :length].tolist()
        with torch.no_grad():
            truth = plain_forward(policy, prompt, tokens)
            entropies += [-sum(p * math.log(p) for p in row.exp().tolist() if p) for row in truth]
            with policy.model.disable_adapter():
                base = plain_logprobs(policy, prompt, tokens)
        numbers = train.uniforms(3, 5, QUESTIONS[r // 5]["id"], r % 5, length)
        cdf = truth.double().exp().cumsum(-1)
        for t, token in enumerate(tokens):
            assert (cdf[t, token - 1] if token else 0) - 1e-5 <= numbers[t] <= cdf[t, token] + 1e-5
        worst = max(worst, (truth[torch.arange(length), tokens] - done.logprobs[r, :length]).abs().max().item(),
                    (trained[r, :length] - done.logprobs[r, :length]).abs().max().item(),
                    (base - batch.reference[r, :length]).abs().max().item())
        ends = [token in policy.eos.tolist() for token in tokens]
        assert not any(ends[:-1]) and ends[-1] == done.finished[r].item() and (ends[-1] or length == 6)
    print(f"{kind}: largest error of a log-probability {worst:.1e}")
    assert worst < 1e-4
    assert len(set(done.lengths.tolist())) > 2 and 0 < row["clipped_ratio"] < 1
    assert row["clipped_ratio"] == pytest.approx(1 - done.finished.float().mean().item())
    assert row["completion_length"] == pytest.approx(done.lengths.float().mean().item())
    assert row["entropy"] == pytest.approx(statistics.mean(entropies), rel=1e-4)


def test_completions_do_not_depend_on_what_else_is_in_the_batch(train, often_ending):
    config = train.Config(group_size=4, max_new_tokens=12, cache_gb=1.0)
    together = train.roll_out(often_ending, QUESTIONS, 2, 0, config)[0].completions
    backwards = train.roll_out(often_ending, QUESTIONS[::-1], 2, 0, config)[0].completions
    in_waves = train.roll_out(often_ending, QUESTIONS, 2, 0, dataclasses.replace(config, cache_gb=1e-9))[0].completions
    assert (in_waves.tokens * in_waves.mask == together.tokens * together.mask).all() and (in_waves.lengths == together.lengths).all()
    assert ((in_waves.logprobs - together.logprobs) * together.mask).abs().max() < 1e-5 and (in_waves.finished == together.finished).all()
    for i, q in enumerate(QUESTIONS):
        alone = train.roll_out(often_ending, [q], 2, 0, dataclasses.replace(config, group_size=2))[0].completions
        for g in range(4):
            row = together.tokens[4 * i + g, :together.lengths[4 * i + g]].tolist()
            other = 4 * (3 - i) + g
            assert row == backwards.tokens[other, :backwards.lengths[other]].tolist()
            if g < 2:
                assert row == alone.tokens[g, :alone.lengths[g]].tolist()
    assert len(set(together.lengths.tolist())) > 3


class Recorded(TorchDispatchMode):
    """The operations of a step, to run again on the very same tensors, as a card replays a graph."""
    def __init__(self, step):
        super().__init__()
        self.calls, self.ran = [], False
        with self:
            step()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls if self.ran else ():  # a card does not run what it records: the first time is done
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.ran = True


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_a_replayed_step_draws_what_steps_one_by_one_draw(train, policies, monkeypatch, kind):
    """Whatever the stretch, with rows that end inside it; nothing in a step waits for the device, which a captured graph cannot."""
    policy, recorded = dataclasses.replace(policies(kind), eos=torch.arange(100, 130), dequantize=kind != "nf4"), []
    prompts = [policy.encode(q) for q in QUESTIONS]
    draws = torch.from_numpy(np.stack([train.uniforms(0, 4, "q", i, 21) for i in range(16)]))

    def record(step, device):
        recorded.append(Recorded(step))
        return recorded[-1].replay

    monkeypatch.setattr(train, "captured", record)
    with torch.no_grad(), train.dequantized(policy):
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        for some in (draws, None):
            truth = train.generate(policy, prefix, 21, some)
            assert not recorded and len(set(truth.lengths.tolist())) > (3 if some is not None else 0)
            for stretch in (2, 8, 64):
                done = train.generate(policy, prefix, 21, some, stretch)
                assert torch.equal(done.tokens, truth.tokens) and torch.equal(done.lengths, truth.lengths)
                assert torch.equal(done.finished, truth.finished)
                assert (done.logprobs - truth.logprobs).abs().max() < 1e-4 and (done.entropy - truth.entropy).abs().max() < 1e-4
                assert recorded and all(step.ran for step in recorded)
                names = {str(function) for step in recorded for function, *_ in step.calls}
                assert any("index_copy_" in name for name in names) and not any(word in name for name in names for word in ("scalar", "nonzero"))
                recorded.clear()


def test_a_question_asked_twice_in_a_step_is_completed_anew(train, often_ending):
    """The first time as if it were asked once, then by draws of its own; the log counts all."""
    config = train.Config(group_size=4, max_new_tokens=12, cache_gb=1.0)
    texts = lambda done, p: [done.tokens[r, :done.lengths[r]].tolist() for r in range(4 * p, 4 * p + 4)]
    once = train.roll_out(often_ending, QUESTIONS[:2], 2, 0, config)[0].completions
    batch, row, samples = train.roll_out(often_ending, [*QUESTIONS[:2], QUESTIONS[0], QUESTIONS[0]], 2, 0, config)
    done = batch.completions
    assert [texts(done, p) for p in (0, 1)] == [texts(once, p) for p in (0, 1)]
    assert len({str(tokens) for p in (0, 2, 3) for tokens in texts(done, p)}) == 12
    draws = [train.uniforms(0, 2, "one", i, 1)[0] for i in range(12)]
    first = torch.cat([done.tokens[4 * p:4 * p + 4, 0] for p in (0, 2, 3)])
    again = train.generate(often_ending, train.encode_prompts(often_ending, batch.prompts[:1], batch.images[:1]), 1, torch.tensor(draws)[:, None])
    assert first.tolist() == again.tokens[:, 0].tolist()


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20), group=st.integers(1, 8), new=st.integers(1, 50), cache_gb=st.floats(1e-9, 0.05))
@settings(max_examples=100)
def test_rollout_batches_hold_every_prompt_once_and_keep_the_ceiling(train, policies, lengths, group, new, cache_gb):
    """Each is as large as it can be at the longest prompt: one more would not fit."""
    text = policies("qwen2_5_vl").full.config.text_config
    cached = 2 * 3 * 2 * 16 * 4  # keys and values, layers, kv heads, head dim, bytes
    cost = max(lengths) * cached + max(max(lengths) * 16 * text.intermediate_size, group * (new * cached + 28 * 576))
    found = train.rollout_batches(policies("qwen2_5_vl"), lengths, group, new, cache_gb)
    sizes = [len(lengths[some]) for some in found]
    assert [n for some in found for n in range(len(lengths))[some]] == [*range(len(lengths))]
    assert all(size == 1 or size * cost <= cache_gb * 1e9 for size in sizes) and min(sizes) > 0
    assert all((size + 1) * cost > cache_gb * 1e9 for size in sizes[:-1])


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), tokens=st.integers(1, 400))
def test_micro_batches_hold_every_row_once_and_keep_the_budget(train, lengths, tokens):
    found = list(train.micro_batches(range(len(lengths)), lengths, tokens))
    assert sorted(row for rows in found for row in rows) == [*range(len(lengths))]
    for rows in found:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= tokens
        assert lengths[rows[0]] == max(lengths[row] for row in rows)  # what the loop takes as their length


def test_numbers_are_uniform_and_change_with_each_argument(train):
    key = (0, 1, "shapes/train-0001", 0)
    numbers = train.uniforms(*key, 4000)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert chisquare(np.histogram(numbers, 20, (0, 1))[0]).pvalue > 1e-5
    assert (train.uniforms(*key, 10) == numbers[:10]).all()  # a longer completion begins with the same draws
    for i, other in enumerate((1, 2, "shapes/train-0002", 1)):
        assert not np.isin(train.uniforms(*key[:i], other, *key[i + 1:], 100), numbers).any()


def test_first_tokens_are_distributed_like_the_softmax(train, policies):
    policy, n = policies("qwen2_5_vl"), 6000
    prompts = [policy.encode(QUESTIONS[0])]
    with torch.no_grad():
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        expected = n * plain_forward(policy, prompts[0], [0])[0].double().exp().numpy()
    draws = torch.from_numpy(np.stack([train.uniforms(0, 1, "one", i, 1) for i in range(n)]))
    tokens = train.generate(policy, prefix, 1, draws).tokens[:, 0]
    observed = np.bincount(tokens.numpy(), minlength=len(expected))
    likely = expected >= 5
    assert likely.sum() > 10
    pool = lambda counts: np.array([*counts[likely], counts[~likely].sum()]) / counts.sum() * n  # fp32 does not add up to n
    assert chisquare(pool(observed), pool(expected)).pvalue > 1e-5


def generated_by_transformers(model, policy, prompt, most):
    """The greedy completion as transformers finds it, positions and cache its own."""
    ids = torch.tensor([prompt.input_ids])
    pictures = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **pictures, do_sample=False, max_new_tokens=most,
                           mm_token_type_ids=(ids == model.config.image_token_id).int(), suppress_tokens=policy.banned.tolist(),
                           eos_token_id=policy.eos.tolist(), pad_token_id=policy.tokenizer.pad_token_id)
    return whole[0, len(prompt.input_ids):].tolist()


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_greedy_is_what_transformers_generates(train, policies, kind):
    policy = policies(kind)
    prompts = [policy.encode(q) for q in QUESTIONS]
    with torch.no_grad():
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        free = train.generate(policy, prefix, 16)
        ending = dataclasses.replace(policy, eos=free.tokens[:2, 5].sort().values)  # then these two end, at the latest there
        done = train.generate(ending, prefix, 16)
    assert (done.lengths[:2] <= 6).all() and done.finished[:2].all()
    for row, prompt in enumerate(prompts):
        assert free.tokens[row, :free.lengths[row]].tolist() == generated_by_transformers(policy.full, policy, prompt, 16)
        assert done.tokens[row, :done.lengths[row]].tolist() == generated_by_transformers(policy.full, ending, prompt, 16)


def test_vision_tokens_and_unused_rows_are_never_sampled(train, prepare, policies, monkeypatch):
    """Even a model that wants nothing else, and the extreme numbers 0 and 1 - 2**-53."""
    loaded, policy = policies("nf4"), policies("qwen2_5_vl")
    forbidden = {*loaded.tokenizer.convert_tokens_to_ids(list(VISION)), *range(len(loaded.tokenizer), 576)}
    assert {*loaded.banned.tolist()} == forbidden and loaded.eos.tolist() == [loaded.tokenizer.eos_token_id]
    forbidden = [0, *forbidden]  # the first and the last row of the vocabulary: where the extreme numbers would fall
    policy = dataclasses.replace(policy, banned=torch.tensor(forbidden))
    biased = torch.nn.Linear(64, 576)
    biased.weight, biased.bias.data = policy.full.lm_head.weight, torch.zeros(576)
    biased.bias.data[forbidden] = 50.0
    monkeypatch.setitem(policy.full._modules, "lm_head", biased.requires_grad_(False))
    prompts = [policy.encode(q) for q in QUESTIONS]
    numbers = torch.rand(40, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    numbers[::10], numbers[1::10] = 0.0, 1 - 2.0**-53
    with torch.no_grad():
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        assert np.isin(biased(prefix.last_hidden).argmax(-1), forbidden).all()  # it does want them
        for draws in (None, numbers):
            done = train.generate(policy, prefix, 6, draws)
            assert not np.isin(done.tokens[done.mask], forbidden).any()
        logprobs = train.next_logprobs(policy, prefix.last_hidden)
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(4)) and (logprobs[:, forbidden] == -torch.inf).all()
    assert done.logprobs.isfinite().all()


# Advantages, weights, loss: closed forms


groups_of = lambda g: st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0]), min_size=g, max_size=g), min_size=1, max_size=5)


@given(st.integers(2, 9).flatmap(groups_of), st.booleans())
@settings(max_examples=200)
def test_group_advantages(train, rows, scale):
    got = train.group_advantages(torch.tensor(rows), scale)
    for mine, row in zip(got.tolist(), rows):
        mean, deviation = statistics.mean(row), statistics.stdev(row)
        assert mine == pytest.approx([(r - mean) / (deviation + 1e-4 if scale else 1) for r in row], abs=1e-4)


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1.0])
def test_equal_rewards_have_no_advantage_at_all(train, reward):
    """Exactly 0 at every group size, though the rounded mean of 8 times 0.9 is not 0.9 in fp32."""
    for size in range(2, 65):
        for scale in (True, False):
            assert not train.group_advantages(torch.full((4, size), reward), scale).any()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
@settings(max_examples=100)
def test_token_weights(train, lengths):
    n, limit = len(lengths), 50
    for loss, weight in {"dapo": lambda o: 1 / sum(lengths), "grpo": lambda o: 1 / (n * o), "dr_grpo": lambda o: 1 / (n * limit)}.items():
        got = train.token_weights(torch.tensor(lengths), loss, limit)
        assert got.tolist() == pytest.approx([weight(o) for o in lengths], rel=1e-5)
        if loss != "dr_grpo":  # an average: weights over all tokens add up to 1
            assert (got * torch.tensor(lengths)).sum().item() == pytest.approx(1, rel=1e-4)


numbers = st.floats(-4, 0, width=32)


@given(numbers, numbers, st.none() | numbers, st.floats(-2, 2, width=32), st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.floats(0, 1))
@settings(max_examples=300)
def test_token_loss(train, new, old, reference, advantage, low, high, kl):
    config = train.Config(clip_low=low, clip_high=high, kl=kl)
    variable = torch.tensor([[new]], requires_grad=True)
    reference_row = None if reference is None else torch.tensor([[reference]])
    loss, acted, penalty = train.token_loss(variable, torch.tensor([[old]]), torch.tensor([[advantage]]), reference_row, config)
    ratio = math.exp(new - old)
    bounded = min(max(ratio, 1 - low), 1 + high)
    k3 = 0 if reference is None else math.exp(reference - new) - (reference - new) - 1
    assert k3 >= 0 and penalty.item() == pytest.approx(k3, rel=1e-4, abs=1e-5)
    assert loss.item() == pytest.approx(-min(ratio * advantage, bounded * advantage) + kl * k3, rel=1e-4, abs=1e-4)
    if min(abs(ratio - 1 + low), abs(ratio - 1 - high)) < 1e-4 or abs(advantage) < 1e-4:
        return  # on the edge rounding decides
    outside = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    assert acted.item() == outside
    slope = (0 if outside else -ratio * advantage) + (0 if reference is None else kl * (1 - math.exp(reference - new)))
    assert torch.autograd.grad(loss.sum(), variable)[0].item() == pytest.approx(slope, rel=1e-3, abs=1e-3)


# The policy


def test_adapter_sits_on_the_language_model_and_the_base_is_nf4_there(train, policies):
    import bitsandbytes as bnb

    policy = policies("nf4")
    layers = policy.full.config.text_config.num_hidden_layers
    adapted = {name.removesuffix(".lora_A.default.weight") for name, _ in policy.model.named_parameters() if "lora_A" in name}
    wanted = {f"base_model.model.model.language_model.layers.{i}.{block}_proj" for i in range(layers) for block in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    assert adapted == wanted
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if ".base_layer.weight" in name:
            assert isinstance(parameter, bnb.nn.Params4bit) and parameter.dtype == torch.uint8 and parameter.quant_state.quant_type == "nf4"
        else:
            assert not isinstance(parameter, bnb.nn.Params4bit) and parameter.is_floating_point(), name
    quantised = {name for name, module in policy.full.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert quantised == {name.removeprefix("base_model.model.") + ".base_layer" for name in wanted}


@pytest.mark.parametrize("kind", KINDS)
def test_patches_seen_as_a_product_are_what_the_convolution_sees(train, tokenizer, kind):
    patches = tiny_model(kind, tokenizer).model.visual.patch_embed
    pixels = torch.randn(10, patches.proj.weight[0].numel(), generator=torch.Generator().manual_seed(0))
    truth = patches(pixels)
    train.as_product(patches.proj)
    assert torch.allclose(patches(pixels), truth, atol=1e-5 * truth.abs().max().item()) and truth.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_finds_every_linear_layer_of_each_family(train, policies, kind):
    full = policies(kind).full
    linears = {name for name, module in full.named_modules() if isinstance(module, torch.nn.Linear) and "lora" not in name}
    adapted = {name + ".base_layer" for name, module in full.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name for name in linears if "language_model" in name} and len(adapted) == 21


@pytest.mark.slow
def test_adapter_config_is_the_same_bytes_whatever_the_seed_of_hashes(base_folder, tmp_path):
    """PEFT keeps the names of the modules as a set, whose order differs between processes; a list of suffixes is what servers take."""
    script = """if True:
        import importlib, pathlib, sys
        train = importlib.import_module("03_train_grpo")
        train.save_adapter(pathlib.Path(sys.argv[2]), train.load_policy(sys.argv[1], 112 * 112, lora_rank=4), "the base")"""
    contents = []
    for seed in ("1", "2", "3"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run([sys.executable, "-c", script, str(base_folder), str(folder)], check=True, cwd=ROOT,
                       env=os.environ | {"PYTHONHASHSEED": seed, "CUDA_VISIBLE_DEVICES": ""})
        contents.append((folder / "adapter_config.json").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    settings = json.loads(contents[0])
    assert settings["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert settings["exclude_modules"] == ".*visual.*" and settings["base_model_name_or_path"] == "the base"


@pytest.mark.parametrize("name", ["train", "eval", "half", "type", "keys", "forward", "default", "policy", "a.b"])
def test_an_adapters_folder_may_have_any_name(train, base_folder, policies, tmp_path, name):
    """Also one that torch's modules have as a method, or with a point in it."""
    (tmp_path / name).mkdir()
    train.save_adapter(tmp_path / name, policies("nf4"), "the base")
    loaded = train.load_policy(str(base_folder), 112 * 112, {name: tmp_path / name, "other": tmp_path / name})
    loaded.use(name)
    tokens, rows = torch.randint(20, 200, (4, 12), generator=torch.Generator().manual_seed(0)), torch.arange(4)

    def scored(policy):
        prompts = [policy.encode(q) for q in QUESTIONS]
        return train.score_tokens(policy, train.encode_prompts(policy, prompts, train.encode_images(policy, prompts)), rows, tokens)
    with torch.no_grad():
        assert torch.allclose(scored(loaded), scored(policies("nf4")), atol=1e-4)


def state_hashes(model):
    """Every tensor of a model, quantisation constants included."""
    return {name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, value in model.state_dict().items() if isinstance(value, torch.Tensor) and value.numel()}


def test_a_step_changes_the_adapter_and_nothing_else(train, prepare, base_folder, monkeypatch):
    grade_by_hash(prepare, monkeypatch)
    policy = stir(train.load_policy(str(base_folder), 112 * 112, lora_rank=4))
    before = state_hashes(policy.model)
    optimizer = torch.optim.AdamW(trainable(policy).values(), lr=1e-2, weight_decay=0.0)
    config = train.Config(**STEP, kl=0.05, updates_per_batch=2)
    batch, _, _ = train.roll_out(policy, QUESTIONS, 1, 0, config)
    row = train.update(policy, optimizer, batch, config)
    after = state_hashes(policy.model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "lora_" in name} and set(before) == set(after)
    assert any("absmax" in name for name in before)  # the constants of NF4 were looked at
    assert row["kl"] > 0 and row["clip_ratio"] > 0  # on the second update the ratio is not 1, and the clip acts


def test_saved_adapter_is_plain_peft(train, base_folder, policies, tmp_path):
    """Whoever has the folder needs none of this code: PEFT and transformers load it and answer alike."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    train.save_adapter(tmp_path, policies("nf4"), "the base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ours = train.load_policy(str(base_folder), 112 * 112, {"saved": tmp_path})
    assert not trainable(ours)
    prompts = [ours.encode(q) for q in QUESTIONS]
    with torch.no_grad():
        done = train.generate(ours, train.encode_prompts(ours, prompts, train.encode_images(ours, prompts)), 12)
        bare = train.load_policy(str(base_folder), 112 * 112)
        without = train.generate(bare, train.encode_prompts(bare, prompts, train.encode_images(bare, prompts)), 12)
    assert without.tokens.tolist() != done.tokens.tolist()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "lm_head"])
    base = AutoModelForImageTextToText.from_pretrained(base_folder, quantization_config=nf4, dtype=torch.float32, device_map="cpu")
    plain = PeftModel.from_pretrained(base, tmp_path).train()  # in eval mode some CPUs compute in bfloat16
    for prompt, tokens, length in zip(prompts, done.tokens.tolist(), done.lengths.tolist()):
        assert tokens[:length] == generated_by_transformers(plain, ours, prompt, 12)


def test_the_adapter_in_16_bits_beside_16_bit_weights(train, tokenizer, policies):
    """As sampling on a card has it: as close to fp32 as PEFT's own forward, which computes it in fp32; with gradients it is PEFT's."""
    policy, prompts = policies("qwen2_5_vl"), [policies("qwen2_5_vl").encode(q) for q in QUESTIONS]
    tokens, rows = torch.randint(20, 200, (4, 12), generator=torch.Generator().manual_seed(0)), torch.arange(4)
    half = train.make_policy(tiny_model("qwen2_5_vl", tokenizer), tokenizer, policy.image_processor, lora_rank=4)
    half.model.load_state_dict(policy.model.state_dict())
    for name, parameter in half.model.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    scored = lambda policy: train.score_tokens(policy, train.encode_prompts(policy, prompts, train.encode_images(policy, prompts)), rows, tokens)
    with torch.no_grad():
        truth, peft = scored(policy), scored(half)
        with train.dequantized(half):
            ours = scored(half)
        assert torch.equal(scored(half), peft) and not torch.equal(ours, peft)
    with train.dequantized(half):
        assert torch.equal(scored(half), peft)
    with torch.no_grad(), half.model.disable_adapter(), train.dequantized(half):
        assert (scored(half) - truth).abs().mean() > 5 * (peft - truth).abs().mean()  # the adapter does something
    assert (ours - truth).abs().mean() < 1.2 * (peft - truth).abs().mean()


@pytest.mark.card
def test_sampled_logprobs_are_the_training_forwards_on_a_card(train, base_folder):
    """The kernels of rollout and update differ, and compute in 16 bits: a ratio off by a few per cent stays inside the clip."""
    policy = stir(train.load_policy(str(base_folder), 112 * 112, lora_rank=4))
    config = train.Config(group_size=4, max_new_tokens=12, micro_batch_tokens=48, cache_gb=1.0)
    batch, _, _ = train.roll_out(policy, QUESTIONS, 1, 0, config)
    owners = torch.arange(4, device=policy.device).repeat_interleave(4)
    with torch.no_grad():
        prefix = train.encode_prompts(policy, batch.prompts, batch.images)
        trained = train.score_tokens(policy, prefix, owners, batch.completions.tokens)
    assert ((trained - batch.completions.logprobs) * batch.completions.mask).abs().max() < 0.1
    batch.advantages = torch.linspace(-1, 1, 16, device=policy.device)
    assert train.accumulate_gradients(policy, batch, config)["clipped"] == 0
    assert all(parameter.grad.isfinite().all() for parameter in trainable(policy).values())


@pytest.mark.card
@pytest.mark.parametrize("unpack", [True, False])
def test_a_captured_step_draws_what_the_same_step_draws_on_a_card(train, base_folder, monkeypatch, unpack):
    """To the token, over three captures; against steps of other shapes log-probabilities are equal up to rounding, until a token differs."""
    policy = stir(train.load_policy(str(base_folder), 112 * 112, lora_rank=4))
    policy = dataclasses.replace(policy, dequantize=unpack, eos=torch.arange(100, 110, device=policy.device))
    prompts = [policy.encode(q) for q in QUESTIONS]
    draws = torch.from_numpy(np.stack([train.uniforms(0, 4, "q", i, 24) for i in range(16)])).to(policy.device)
    with torch.no_grad(), train.dequantized(policy):
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        replayed, single = (train.generate(policy, prefix, 24, draws, stretch) for stretch in (8, 1))
        monkeypatch.setattr(train, "captured", lambda step, device: step)
        stepped = train.generate(policy, prefix, 24, draws, 8)
    assert torch.equal(replayed.tokens, stepped.tokens) and torch.equal(replayed.logprobs, stepped.logprobs)
    same = (replayed.tokens == single.tokens).long().cumprod(1).bool() & single.mask
    assert same[:, 0].all() and same.sum() > 0.5 * single.mask.sum()
    assert (replayed.logprobs - single.logprobs)[same].abs().max() < 0.1


def test_cards_are_hidden():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


# What a card meets first, as far as a CPU can show it


@pytest.fixture
def in_bf16(train, tokenizer):
    """A policy in bf16 on the CPU, and the same weights in fp32, with keys whose biases are as large as a Qwen2's."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        full = tiny_model("qwen2_5_vl", tokenizer)
        generator = torch.Generator().manual_seed(2)
        for layer in full.model.language_model.layers:
            layer.self_attn.k_proj.bias.data = 200 * torch.randn(layer.self_attn.k_proj.bias.shape, generator=generator)
        full = full.to(torch.bfloat16).to(dtype)  # rounded once, so that both have the same weights
        made.append(train.make_policy(full, tokenizer, None))
    return made


def test_attention_scores_are_not_rounded(train, in_bf16):
    """One layer's attention, sampled token by token: its result, from keys with large biases, against the same in fp64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    rows, heads, kv_heads, length, own, size = 6, 8, 2, 30, 7, 128
    bias = 60 * draw(kv_heads, 1, size)
    query = 20 * draw(rows, heads, 1, size)
    keys, own_keys = draw(2, kv_heads, length, size) + bias, draw(rows, kv_heads, own, size) + bias
    values, own_values = draw(2, kv_heads, length, size), draw(rows, kv_heads, own, size)
    query, keys, own_keys, values, own_values = (x.bfloat16() for x in (query, keys, own_keys, values, own_values))
    prompts = train.PromptCache([(keys, values)], torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(2, length), torch.zeros(2))
    owner = torch.arange(rows) // 3
    seen, _ = train.attend(SimpleNamespace(layer_idx=0), query, own_keys, own_values, None, size ** -0.5, prompts,
                           train.GroupLayout.of(owner, 2), torch.zeros(own))
    whole_keys = torch.cat([keys[owner], own_keys], 2).double().repeat_interleave(heads // kv_heads, 1)
    whole_values = torch.cat([values[owner], own_values], 2).double().repeat_interleave(heads // kv_heads, 1)
    scores = query.double() @ whole_keys.transpose(2, 3) * size ** -0.5
    truth = (scores.softmax(-1) @ whole_values).transpose(1, 2)
    assert scores.abs().max() > 1000
    assert (seen.double() - truth).norm() < 0.01 * truth.norm()


def test_logits_are_not_rounded(train, in_bf16):
    """log p and its gradient, of logits of 16 to 32, against fp32."""
    rounded, exact = in_bf16
    weight = rounded.full.lm_head.weight.data.mul_(20)
    exact.full.lm_head.weight.data = weight.float()
    hidden = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, truth = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    found, wanted = train.next_logprobs(rounded, ours), train.next_logprobs(exact, truth)
    assert found.dtype == torch.float32 and 16 < (truth.detach() @ weight.float().T).abs().max()
    sampled = wanted.isfinite()
    assert (found - wanted)[sampled].abs().max() < 1e-4 and torch.equal(found.argmax(1), wanted.argmax(1))
    for logprobs in (found, wanted):
        logprobs[:, 5].sum().backward()
    assert (ours.grad.float() - truth.grad).norm() < 0.01 * truth.grad.norm()


def test_an_adapter_on_the_head_still_counts(train, tokenizer):
    full = tiny_model("qwen2_5_vl", tokenizer).to(torch.bfloat16)
    plain = train.make_policy(full, tokenizer, None)
    hidden = torch.randn(3, 64).bfloat16()
    before = train.next_logprobs(plain, hidden)
    plain.model = train.get_peft_model(full, train.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    assert not torch.equal(train.next_logprobs(plain, hidden), before)


def test_a_backward_that_fails_leaves_no_tensor(train, policies):
    """A checkpointed layer that runs out of memory when it runs again: nothing of its graph stays, so that a smaller step has the room."""
    policy = policies("qwen2_5_vl")
    prompts = [policy.encode(q) for q in QUESTIONS[:2]]
    images = train.encode_images(policy, prompts)

    def tensors():
        torch.zeros(1, requires_grad=True).sum().backward()  # on a CPU torch keeps what a failed backward pass had queued until the next
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    def fail():
        graph = train.encode_prompts(policy, prompts, images, checkpoint_layers=True)

        def no_memory(*_):
            raise torch.OutOfMemoryError("no")

        hook = policy.full.model.language_model.layers[1].mlp.register_forward_pre_hook(no_memory)
        try:
            graph.last_hidden.sum().backward()
        except torch.OutOfMemoryError:
            return True
        finally:
            hook.remove()

    policy.model.zero_grad(set_to_none=True)
    before = tensors()
    assert fail()
    policy.model.zero_grad(set_to_none=True)
    assert tensors() == before


def test_a_command_holds_one_model_at_a_time(train, prepare, data, monkeypatch):
    """Runs follow each other in a process: the model of the first is gone before that of the second is loaded, with no collection between."""
    grade_by_hash(prepare, monkeypatch)
    models, real = [], train.AutoModelForImageTextToText.from_pretrained

    def load(*arguments, **more):
        assert not [model for model in models if model()]
        full = real(*arguments, **more)
        models.append(weakref.ref(full))
        return full

    monkeypatch.setattr(train.AutoModelForImageTextToText, "from_pretrained", load)
    gc.disable()
    try:
        run(train, data, steps=1, seeds=[0, 1])
    finally:
        gc.enable()
    assert len(models) == 2


def test_adams_averages_are_there_in_the_preflight(train, prepare, data, monkeypatch):
    """Memory that step 1 would take first is taken before sizes are found."""
    grade_by_hash(prepare, monkeypatch)
    optimizers, held = [], []
    make, preflight = train.make_optimizer, train.preflight
    monkeypatch.setattr(train, "make_optimizer", lambda *a: optimizers.append(make(*a)) or optimizers[-1])

    def look(policy, *arguments):
        held.append(sum(value.nbytes for state in optimizers[0].state.values() for value in state.values() if value.dim()))
        assert held[0] == 2 * sum(parameter.nbytes for parameter in policy.trainable())
        return preflight(policy, *arguments)

    monkeypatch.setattr(train, "preflight", look)
    run(train, data, steps=1)
    assert held


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_in_parts_are_those_of_all_at_once(train, policies, monkeypatch, kind):
    policy = policies(kind)
    prompts = [policy.encode(q) for q in QUESTIONS]
    whole = train.encode_images(policy, prompts)
    seen, real = [], policy.full.get_image_features
    monkeypatch.setattr(policy.full, "get_image_features", lambda pixels, *a, **k: seen.append(len(pixels)) or real(pixels, *a, **k), raising=False)
    few = dataclasses.replace(policy, patches=20)
    parts = train.encode_images(few, prompts)
    largest = max(len(prompt.pixel_values) for prompt in prompts if prompt.pictures)
    assert len(seen) > 1 and max(seen) <= max(20, largest)
    assert [len(each) for each in parts] == [prompt.pictures for prompt in prompts]
    for one, other in zip(chain(*chain(*whole)), chain(*chain(*parts))):
        torch.testing.assert_close(one, other)


def test_heads_are_repeated_where_no_kernel_shares_them(train, policies, monkeypatch):
    """On an old card, even where all prompts are equally long, and what a prompt leaves behind is the same."""
    policy, attention, grouped = policies("qwen2_5_vl"), torch.nn.functional.scaled_dot_product_attention, []
    prompts = [policy.encode(QUESTIONS[1])] * 2
    images = train.encode_images(policy, prompts)

    def record(query, key, *arguments, **more):
        grouped.append(bool(more.get("enable_gqa")) or query.shape[1] != key.shape[1])
        return attention(query, key, *arguments, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with torch.no_grad():
        usual = train.encode_prompts(policy, prompts, images)
        assert any(grouped)
        grouped.clear()
        monkeypatch.setattr(train, "on_old_card", lambda policy: True)
        repeated = train.encode_prompts(policy, prompts, images)
    assert grouped and not any(grouped)
    for one, other in zip(usual.tensors(), repeated.tensors()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_capture_that_runs_out_of_memory_goes_on_without_a_graph(train, monkeypatch, capsys):
    """As torch does it: ending the capture fails in its turn, and its stream stays the current one."""
    current = ["usual"]

    class Graph:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            current[0] = "capture"

        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    for name, stand_in in {"CUDAGraph": Graph, "graph": Graph, "current_stream": lambda: current[0],
                           "set_stream": lambda stream: current.__setitem__(0, stream)}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert train.captured(step, torch.device("cuda")) is step and current == ["usual"]
    assert "without a CUDA graph" in capsys.readouterr().out


def on_a_card_of(monkeypatch, free, total=16e9):
    """What `plan` asks a card; the fractions that it sets."""
    set_to = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(total)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    return set_to


def test_the_plan_leaves_a_rest_below_the_ceiling(train, policies, monkeypatch):
    """A card's free memory is the ceiling, of which a twentieth is not planned with."""
    policy = policies("nf4")
    on_cpu = train.fit_memory(policy, train.Config(**STEP | {"micro_batch_tokens": None, "cache_gb": None, "memory_gb": 8.0, "checkpoint": True}), {}, 100)
    set_to = on_a_card_of(monkeypatch, 8e9)
    monkeypatch.setattr(train.Policy, "device", property(lambda policy: torch.device("cuda")))
    config = train.fit_memory(policy, train.Config(**STEP | {"micro_batch_tokens": None, "cache_gb": None, "checkpoint": True}), {}, 100)
    assert set_to == [0.5] and config.memory_gb == 8.0 and config.cache_gb == on_cpu.cache_gb
    held = train.weight_bytes(policy)
    used = sum(parameter.nbytes for parameter in policy.model.parameters()) + 3 * sum(p.nbytes for p in policy.trainable()) + 6 * train.CHUNK_BYTES
    assert config.cache_gb <= 0.95 * 8.0 - (used + held[1]) / 1e9


def test_scales_of_packed_weights_count(train, policies):
    policy = policies("nf4")
    states = [module.weight.quant_state for module in policy.full.modules() if train.is_packed(module)]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    lying = sum(parameter.nbytes for parameter in policy.model.parameters())
    assert train.weight_bytes(policy)[0] - lying == pytest.approx(scales, rel=0.05)


def test_a_run_without_a_card_says_so_first(train, prepare, data, monkeypatch, capsys):
    study = prepare.load_study(data)
    monkeypatch.setattr(prepare, "load_study", lambda folder: study | {"preset": "3b"})
    monkeypatch.setattr(prepare, "deal_out", lambda *_: print("begins"))
    with pytest.raises(KeyError):  # nothing was done
        train.main(train.Config(data=str(data), **RUN))
    said, begins = capsys.readouterr().out.split("begins")
    assert "no card that it can use" in said


def test_memory_is_given_out_in_segments_that_grow(train):
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


# Runs


def grade_by_hash(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "grade", hashed_grade)


def run(train, data, **changes):
    """Train, and what is left of it: bytes of the adapter, log rows without their times, samples."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        results = train.main(train.Config(data=str(data), **STEP | RUN | changes))
    folder = data / "policies" / results[0]["policy"]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in row.items() if key not in ("rollout_s", "update_s", "peak_gb")} for row in rows]
    return (folder / "adapter_model.safetensors").read_bytes(), timeless, (folder / "rollouts.jsonl").read_text(), out.getvalue()


@pytest.fixture(scope="session")
def uninterrupted(train, prepare, study_folder, tmp_path_factory):
    """Four steps in one go: their study, and what `run` returns."""
    folder = shutil.copytree(study_folder, tmp_path_factory.mktemp("uninterrupted") / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        grade_by_hash(prepare, patch)
        return folder, run(train, folder, kl=0.02)


def test_the_plan_says_what_is_done_and_does_nothing(train, prepare, data, capsys):
    settings = dict(**STEP, steps=2, seeds=[0, 1], workers=1, conditions=["standard"])
    assert train.main(train.Config(data=str(data), plan=True, **settings)) == [] and not (data / "policies").exists()
    amount, time = capsys.readouterr().out.splitlines()
    train.main(train.Config(data=str(data), **settings))
    rows = [row for seed in (0, 1) for row in prepare.read_jsonl(data / "policies" / f"standard-s{seed}" / "train.jsonl")]
    done = round(sum(row["completion_tokens"] / row["completion_length"] for row in rows))
    assert amount == f"2 runs x 2 steps x 4 prompts x 4 completions: {done} completions of at most 12 tokens"
    assert re.fullmatch(r"about \d+\.\d minutes with 1 workers, each of which takes \d\.\d GB", time)
    told, steps = capsys.readouterr().out.split("\n", 1)
    assert told == amount and re.search(r"^about \d+\.\d minutes with 1 workers", steps, re.M)  # the real run says both, too


def test_grounding_that_weighs_nothing_is_standard_training(train, data, monkeypatch):
    monkeypatch.setattr(train.prepare, "grade", hashed_grade)
    train.main(train.Config(data=str(data), **STEP, steps=2, seeds=[0], workers=1, conditions=["standard", "grounded"], corruption=["blank"],
                            grounding_weight=0.0))
    train.main(train.Config(data=str(data), **STEP, steps=2, seeds=[0], workers=1, conditions=["grounded"], corruption=["removed"],
                            grounding_weight=0.5))
    standard, without, looking = ((data / "policies" / run / "adapter_model.safetensors").read_bytes()
                                  for run in ("standard-s0", "grounded-blank-s0", "grounded-removed-s0"))
    assert standard == without != looking


def test_two_runs_are_byte_identical(train, prepare, data, uninterrupted, monkeypatch):
    grade_by_hash(prepare, monkeypatch)
    adapter, rows, samples, _ = uninterrupted[1]
    assert run(train, data, kl=0.02)[:3] == (adapter, rows, samples)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["grad_norm"] > 0 for row in rows)
    assert len(samples.splitlines()) == 4 * STEP["prompts_per_step"]
    assert run(train, data, seeds=[1], kl=0.02, steps=1)[2] != "".join(samples.splitlines(True)[:STEP["prompts_per_step"]])


NAME = "mixed-blank+removed-s0"


def interrupt(train, monkeypatch, step, act):
    """From now on `act(real_step)` runs in place of that step."""
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *arguments: act(lambda: real(*arguments)) if arguments[3] == step else real(*arguments))


def end_behind_the_rows(train, monkeypatch, step):
    """From now on that step ends at once when its rows are written."""
    real = train.log_step

    def end(folder, row, *rest):
        real(folder, row, *rest)
        if row["step"] == step:
            with open(folder / "train.jsonl", "a") as file:
                file.write('{"step": 4, "rew')
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "log_step", end)


def at_once(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("when, save_every, kept", [
    ("before its rows", 1, 2), ("between its rows and its checkpoint", 2, 2), ("between its rows and its checkpoint", 4, 0)])
def test_a_run_continues_bit_for_bit(train, prepare, data, uninterrupted, monkeypatch, when, save_every, kept):
    """Ended at once in step 3, with rows of that step already written and the last line cut short: the steps since the checkpoint are made again."""
    grade_by_hash(prepare, monkeypatch)
    folder = data / "policies" / NAME
    with monkeypatch.context() as patch:
        if when == "before its rows":
            interrupt(train, patch, 3, at_once)
        else:
            end_behind_the_rows(train, patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(train, data, kl=0.02, save_every=save_every)
    assert not (folder / "config.json").exists() and (folder / "checkpoint.safetensors").exists() == bool(kept)
    adapter, rows, samples, out = run(train, data, kl=0.02, save_every=save_every)
    assert (f"continues after step {kept}" in out) == bool(kept)
    assert (adapter, rows, samples) == uninterrupted[1][:3]
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "rollouts.jsonl", "train.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_after_the_step_a_second_one_at_once(train, prepare, data, uninterrupted, monkeypatch, number, times):
    """Between two checkpoints: one signal costs nothing, the second the steps since the last checkpoint. Handlers are as before."""
    grade_by_hash(prepare, monkeypatch)
    folder, before = data / "policies" / NAME, signal.getsignal(number)

    def end(step):
        for _ in range(times):
            os.kill(os.getpid(), number)
        return step()

    with monkeypatch.context() as patch:
        interrupt(train, patch, 3, end)
        with pytest.raises(KeyboardInterrupt):
            run(train, data, kl=0.02, save_every=2)
    assert signal.getsignal(number) is before
    assert len((folder / "train.jsonl").read_text().splitlines()) == (3 if times == 1 else 2)
    adapter, rows, samples, out = run(train, data, kl=0.02, save_every=2)
    assert f"continues after step {3 if times == 1 else 2}" in out
    assert (adapter, rows, samples) == uninterrupted[1][:3]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def garbled(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def zeroed_behind_the_header(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096] + bytes(4096))


def one_bit_flipped(path):
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("damage", [cut_short, emptied, garbled, zeroed_behind_the_header, one_bit_flipped])
def test_a_damaged_checkpoint_is_said_in_one_sentence(train, prepare, data, monkeypatch, damage):
    """It is moved into place whole, so no kill damages it; a disk may. Without the folder the run begins again."""
    grade_by_hash(prepare, monkeypatch)
    folder = data / "policies" / NAME
    with monkeypatch.context() as patch:
        interrupt(train, patch, 3, at_once)
        with pytest.raises(KeyboardInterrupt):
            run(train, data, kl=0.02)
    damage(folder / "checkpoint.safetensors")
    with pytest.raises(prepare.UserError, match=r"checkpoint\.safetensors is damaged.*: delete .*" + NAME.replace("+", ".")) as error:
        run(train, data, kl=0.02)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_replaced_and_nothing_of_a_killed_one_stays(train, policies, tmp_path):
    policy = policies("qwen2_5_vl")
    optimizer = train.make_optimizer(policy, train.Config(learning_rate=1e-3))
    for step in (9, 10):
        (tmp_path / ".checkpoint.safetensors.part").write_bytes(b"killed")
        train.save_checkpoint(tmp_path, policy, optimizer, step, {"made_from": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert train.resume(tmp_path, policy, optimizer, {"made_from": {}}, train.Config(steps=10)) == 10


@pytest.mark.parametrize("what, bad", [("reward", math.nan), ("reward", -math.inf), ("gradient", math.nan), ("gradient", math.inf)])
def test_a_step_that_is_not_finite_is_skipped_and_counted(train, prepare, data, monkeypatch, what, bad):
    """Step 2 changes no weight and is called skipped; three in a row stop the run."""
    grade_by_hash(prepare, monkeypatch)
    steps, paid, norm, now, weights = [2], train.reward, torch.nn.utils.clip_grad_norm_, [0], {}

    def watch(policy, optimizer, questions, step, config):
        now[0] = step
        row = real(policy, optimizer, questions, step, config)
        weights[step] = state_hashes(policy.model)
        return row

    def reward(grade, text):
        return bad if what == "reward" and now[0] in steps else paid(grade, text)

    def clipped(parameters, most):
        if what == "gradient" and now[0] in steps:
            parameters[0].grad[0, 0] = bad
        return norm(parameters, most)

    real = train.train_step
    monkeypatch.setattr(train, "train_step", watch)
    monkeypatch.setattr(train, "reward", reward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    _, rows, samples, out = run(train, data)
    assert [row["skipped"] for row in rows] == [False, True, False, False] and out.count("skipped: a reward or gradient is not finite") == 1
    assert weights[1] == weights[2] != weights[3] and "NaN" not in samples and "Infinity" not in samples
    assert all(math.isfinite(row[key]) for row in rows for key in ("reward", "correct", "well_formed", "completion_length", "entropy"))
    assert rows[1]["loss"] is None and rows[1]["grad_norm"] is None
    shutil.rmtree(data / "policies")
    steps += [3, 4]
    for _ in range(2):  # and the same command does not go on after them
        with pytest.raises(prepare.UserError, match=f"{NAME.replace('+', '.')} skipped three steps in a row, because a reward or a gradient is not finite: "):
            run(train, data, save_every=3)


def test_a_policy_whose_logits_are_not_finite_stops_the_run(train, prepare, data, monkeypatch):
    grade_by_hash(prepare, monkeypatch)
    with pytest.raises(prepare.UserError, match="has logits that are not finite at step 2: .*lower --learning_rate"):
        run(train, data, learning_rate=1e30)
    (rows,) = [prepare.read_jsonl(path) for path in data.glob("policies/*/train.jsonl")]
    assert [row["step"] for row in rows] == [1]


@pytest.mark.parametrize("options, says", [
    (dict(seeds=[2**64]), "--seeds 18446744073709551616 is not between"), (dict(seeds=[1, 1]), "--seeds has 1 twice"),
    (dict(corruption=["blank", "blank"]), "--corruption has blank twice"), (dict(memory_gb=math.inf), "--memory_gb inf is"),
    (dict(cache_gb=math.inf), "--cache_gb inf is"), (dict(conditions=["standard", "hallucination"], corruption=["blnk"]), "blnk.parquet is missing")])
def test_what_cannot_work_is_said_before_any_run_begins(train, prepare, data, monkeypatch, options, says):
    monkeypatch.setattr(train, "train_run", None)
    with pytest.raises(prepare.UserError, match=says):
        run(train, data, **options)


def test_a_finished_run_is_kept_and_a_longer_one_refused(train, prepare, uninterrupted):
    done = uninterrupted[0]
    adapter = done / "policies" / "mixed-blank+removed-s0" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert "is finished: kept" in run(train, done, kl=0.02)[3]
    assert adapter.stat().st_mtime_ns == before
    for changes in ({"kl": 0.02, "steps": 5}, {"kl": 0.03}, {"kl": 0.02, "learning_rate": 1e-3}, {"kl": 0.02, "mixed_fraction": 0.4}):
        with pytest.raises(prepare.UserError, match="other settings"):
            run(train, done, **changes)


def test_settings_may_not_change_on_the_way(train, prepare, data, monkeypatch):
    grade_by_hash(prepare, monkeypatch)
    with monkeypatch.context() as patch:
        interrupt(train, patch, 3, at_once)
        with pytest.raises(KeyboardInterrupt):
            run(train, data)
    with pytest.raises(prepare.UserError, match=r"learning_rate was 0\.01, is 0\.02"):
        run(train, data, learning_rate=0.02)
    with pytest.raises(prepare.UserError, match="already made 2 steps, not 1"):
        run(train, data, steps=1)
    assert len(run(train, data, steps=2)[1]) == 2  # how long to train is no setting of a step


def test_steps_show_what_they_do(train, prepare, data, monkeypatch):
    """The preflight before step 1 and the line of a step say what one needs to judge a run; equal groups are counted."""
    grade_by_hash(prepare, monkeypatch)
    _, rows, _, out = run(train, data, steps=1, conditions=["standard"])
    for words in ("preflight: the largest step takes ", "standard-s0    1/1  reward", "grad_norm", "GB"):
        assert words in out
    assert set(rows[0]) == {
        "step", "reward", "reward_std", "correct", "well_formed", "frac_reward_zero_std", "completion_length", "clipped_ratio", "entropy", "kl",
        "grounding", "clip_ratio", "loss", "grad_norm", "skipped", "completion_tokens"}
    monkeypatch.setattr(prepare, "grade", lambda text, question, *_: prepare.Grade(correct=False, well_formed=True, answer=None))
    adapter, rows, samples, out = run(train, data, steps=2, conditions=["standard"], seeds=[1], group_size=8)
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0] and [row["grad_norm"] for row in rows] == [0.0, 0.0]
    assert all(row["reward"] == pytest.approx(0.1) and row["correct"] == 0 and row["well_formed"] == 1 for row in rows)
    weights = safetensors.torch.load(adapter)  # not even by rounding errors, of which Adam would make whole steps
    assert len(weights) == 56 and not any(value.any() for name, value in weights.items() if "lora_B" in name)


def test_share_of_equal_groups(train, prepare, policies, monkeypatch):
    """Two of four groups have nothing to compare: half."""
    seen = iter(range(1000))
    monkeypatch.setattr(prepare, "grade", lambda text, q, *_: prepare.Grade(
        correct=q["id"] in ("one", "two") and next(seen) % 2 == 0, well_formed=True, answer=None))
    batch, row, _ = train.roll_out(policies("qwen2_5_vl"), QUESTIONS, 1, 0, train.Config(group_size=3, max_new_tokens=3, cache_gb=1.0))
    assert row["frac_reward_zero_std"] == 0.5
    assert [bool(group.any()) for group in batch.advantages.view(4, 3)] == [True, False, True, False]


def test_rewards_are_of_the_text_up_to_its_end(train, prepare, policies, monkeypatch):
    """0.9 for a correct answer and 0.1 for its form, each completion graded against its own question."""
    policy, seen = policies("qwen2_5_vl"), []
    texts = ["one", "two words", "<think>a</think>\\boxed{2}", ""]
    rows = [policy.tokenizer(text)["input_ids"] + [policy.tokenizer.eos_token_id] for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + policy.tokenizer("junk")["input_ids"][:1] * (lengths.max() - len(row)) for row in rows])
    done = train.Completions(tokens, torch.zeros(tokens.shape), torch.ones(tokens.shape), lengths, torch.ones(4, dtype=torch.bool))
    verdicts = iter([(False, False), (False, True), (True, False), (True, True)])

    def grade(text, question, reward, think_opened):
        assert reward and not think_opened  # the box alone; this template opens no reasoning
        seen.append((text, question["id"]))
        correct, well_formed = next(verdicts)
        return prepare.Grade(correct=correct, well_formed=well_formed, answer=None)

    monkeypatch.setattr(prepare, "grade", grade)
    read, grades = train.grade_completions(policy, QUESTIONS[:2], done)
    assert seen == [*zip(texts, ["one", "one", "large", "large"])] and len(read) == 4
    assert [train.reward(grade, "") for grade in grades] == pytest.approx([0.0, 0.1, 0.9, 1.0])
    asked = []
    monkeypatch.setattr(prepare, "grade", lambda text, question, *how: asked.append(how) or prepare.Grade(True, True, None))
    monkeypatch.setattr(prepare, "opens_think", lambda tokenizer: tokenizer is policy.tokenizer)
    train.grade_completions(policy, QUESTIONS[:2], done, box_only=False)
    assert asked == [(False, True)] * 4  # by the benchmark's rule, under a template that opens the reasoning


def test_preflight_leaves_nothing(train, policies, capsys):
    policy = policies("qwen2_5_vl")
    longest = QUESTIONS[1] | {"prompt_tokens": len(policy.encode(QUESTIONS[1]).input_ids)}
    before = state_hashes(policy.model)
    config = train.Config(prompts_per_step=3, group_size=4, max_new_tokens=8, micro_batch_tokens=150, cache_gb=1.0, kl=0.1, loss="grpo")
    assert train.preflight(policy, longest, True, config) == config
    assert all(parameter.grad is None for parameter in policy.model.parameters()) and state_hashes(policy.model) == before
    assert "in micro-batches of 150 tokens and with 1.00 GB to sample in" in capsys.readouterr().out


def test_preflight_is_a_step_of_the_longest_prompt_and_of_completions_that_never_end(train, policies, often_ending, monkeypatch):
    seen, real = [], train.accumulate_gradients
    monkeypatch.setattr(train, "accumulate_gradients", lambda policy, batch, config: seen.append(batch) or real(policy, batch, config))
    longest = QUESTIONS[1] | {"prompt_tokens": 60}
    train.preflight(often_ending, longest, False, train.Config(prompts_per_step=3, group_size=4, max_new_tokens=8, micro_batch_tokens=150, cache_gb=1.0))
    (batch,) = seen
    assert batch.completions.lengths.tolist() == [8] * 12 and len(batch.prompts) == 3 and batch.advantages.unique().numel() == 12
    assert all(prompt.input_ids == often_ending.encode(QUESTIONS[1]).input_ids for prompt in batch.prompts)


def test_preflight_cuts_a_step_that_memory_does_not_hold(train, prepare, policies, monkeypatch, capsys):
    """By half each time, until it goes through; where one row at a time is too much, one sentence."""
    policy, real, seen, holds = policies("qwen2_5_vl"), train.accumulate_gradients, [], 300
    longest = QUESTIONS[1] | {"prompt_tokens": len(policy.encode(QUESTIONS[1]).input_ids)}

    def learn(policy, batch, config):
        seen.append((config.micro_batch_tokens, config.cache_gb))
        sums = real(policy, batch, config)
        if config.micro_batch_tokens > holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it.")
        return sums

    monkeypatch.setattr(train, "accumulate_gradients", learn)
    config = train.Config(prompts_per_step=2, group_size=2, max_new_tokens=4, micro_batch_tokens=1000, cache_gb=1.0)
    fit = train.preflight(policy, longest, False, config)
    assert seen == [(1000, 1.0), (500, 0.5), (250, 0.25)] and fit == dataclasses.replace(config, micro_batch_tokens=250, cache_gb=0.25)
    assert "in micro-batches of 250 tokens" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    holds = 0
    with pytest.raises(prepare.UserError, match=r"does not fit into memory \(CUDA out of memory. Tried to allocate 2 GiB.\): lower --group_size"):
        train.preflight(policy, longest, False, config)


def test_a_run_in_a_given_memory(train, prepare, data, monkeypatch):
    """The sizes follow from it and are said; the run is the same up to rounding, and continues with another memory."""
    grade_by_hash(prepare, monkeypatch)
    _, rows, samples, out = run(train, data, steps=1, conditions=["standard"], memory_gb=0.5, micro_batch_tokens=None, cache_gb=None)
    assert "preflight: the largest step takes" in out
    again = run(train, data, steps=1, conditions=["standard"])
    assert "is finished: kept" in again[3] and again[2] == samples
    with pytest.raises(prepare.UserError, match="0.2 GB of memory are too little: 0.4 GB are held all the time, and one question takes up to 0.0"):
        run(train, data, steps=1, conditions=["standard"], seeds=[1], memory_gb=0.2, micro_batch_tokens=None, cache_gb=None)


# Conditions


def questions_of(train, data, condition, seed=0, **changes):
    return train.Questions(json.loads((data / "study.json").read_text()), condition, seed, train.Config(data=str(data), **changes))


def shown(question):
    return question["problem"], [(image.size, image.tobytes()) for image in question["images"]]


@pytest.fixture(scope="session")
def tables(prepare, study_folder):
    """Name -> id -> what the question shows, read from the files by itself."""
    names = {"clean": "questions/shapes.parquet", **{n: f"corrupted/shapes/{n}.parquet" for n in ("blank", "misleading", "removed")}}
    return {name: {row["id"]: shown(row) for row in prepare.read_questions(study_folder / path, "")} for name, path in names.items()}


def inputs_of(tables, questions, steps, count=8):
    """(id, the table that it came from) over some steps."""
    rows = [q for step in range(steps) for q in questions.at(step, count)]
    return [(q["id"], next(name for name, table in tables.items() if table[q["id"]] == shown(q))) for q in rows]


def test_conditions_differ_in_what_they_show_and_in_nothing_else(train, study_folder, tables):
    several = ["blank", "misleading", "removed"]
    made = {condition: inputs_of(tables, questions_of(train, study_folder, condition, corruption=several), 30)
            for condition in train.CONDITIONS}
    assert {name for _, name in made["standard"]} == {"clean"}
    assert {name for _, name in made["hallucination"]} == set(several)
    assert {name for _, name in made["mixed"]} == {"clean", *several}
    order = [name for name, _ in made["standard"]]
    assert [[name for name, _ in rows] for rows in made.values()] == [order] * len(train.CONDITIONS)
    grounded = questions_of(train, study_folder, "grounded", corruption=several)
    against = [q for step in range(30) for q in grounded.at(step, 8, damaged=True)]  # the same questions, each of them damaged
    assert made["grounded"] == made["standard"] and [q["id"] for q in against] == order
    assert {next(name for name, table in tables.items() if table[q["id"]] == shown(q)) for q in against} == set(several)
    assert all(name.startswith("shapes/train-") for name in order)
    for start in range(0, 240, 20):  # every epoch asks each of the 20 questions once, in an order of its own
        assert len(set(order[start:start + 20])) == 20
    assert order[:20] != order[20:40]
    damaged = sum(name != "clean" for _, name in made["mixed"])
    assert abs(damaged - 120) < 4 * math.sqrt(240 / 4)
    assert all(sum(name == other for _, name in made["hallucination"]) > 50 for other in several)
    assert [name for name, _ in inputs_of(tables, questions_of(train, study_folder, "standard", seed=1), 3)] != order[:24]
    few = inputs_of(tables, questions_of(train, study_folder, "mixed", mixed_fraction=0.1), 30)
    assert abs(sum(name == "blank" for _, name in few) - 24) < 4 * math.sqrt(240 * 0.09)


def test_a_step_is_the_same_wherever_the_run_began(train, study_folder, tables):
    """What step 7 asks is a function of seed and step, not of steps 1 to 6."""
    one, two = (questions_of(train, study_folder, "mixed", corruption=["blank", "misleading"]) for _ in range(2))
    for step in range(6):
        one.at(step, 8)
    assert list(map(shown, one.at(6, 8))) == list(map(shown, two.at(6, 8)))


def test_a_question_asked_twice_in_a_step_is_damaged_or_not_each_time_anew(train, study_folder):
    """200 of 20 questions in one step: half are damaged, and most questions are asked both ways."""
    questions = questions_of(train, study_folder, "mixed", corruption=["removed"])
    asked = [(q["id"], not q["images"]) for q in questions.at(0, 200)]
    assert abs(sum(damaged for _, damaged in asked) - 100) < 4 * math.sqrt(200 / 4)
    assert len(set(asked)) > 30
    alone = [(q["id"], not q["images"]) for q in questions.at(0, 20)]
    assert asked[:20] == alone


@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 12), st.integers(0, 8))
@settings(max_examples=50)
def test_schedule_is_epochs_cut_in_steps(train, n, seed, count, step):
    whole = [row for s in range(step + 1) for row in train.schedule(n, seed, s, count)]
    for start in range(0, len(whole) - n + 1, n):
        assert sorted(whole[start:start + n]) == list(range(n))
    assert set(whole) <= set(range(n))


def test_longest_question_is_the_one_of_most_tokens(train, policies, study_folder):
    questions = questions_of(train, study_folder, "standard")
    lengths = [len(policies("nf4").encode(question).input_ids) for question in questions.tables["clean"]]
    assert len(policies("nf4").encode(questions.longest()).input_ids) == max(lengths) > min(lengths)


# Bad input


@pytest.mark.parametrize("changes, says", [
    ({"group_size": 1}, "group_size 1"),
    ({"conditions": ["standart"]}, "standart is unknown"),
    ({"loss": "ppo"}, "ppo is unknown"),
    ({"mixed_fraction": 0.0}, "mixed_fraction 0.0"),
    ({"mixed_fraction": 1.0}, "mixed_fraction 1.0"),
    ({"steps": 0}, "steps 0"), ({"save_every": 0}, "save_every 0"),
    ({"micro_batch_tokens": -1}, "micro_batch_tokens -1"),
    ({"updates_per_batch": 0}, "updates_per_batch 0"),
    ({"learning_rate": 0.0}, "learning_rate 0.0"),
    ({"max_grad_norm": math.nan}, "max_grad_norm nan"),
    ({"conditions": ["hallucination"], "corruption": ["clean"]}, "clean damages nothing"),
    ({"conditions": ["hallucination"], "corruption": ["noise"]}, r"noise\.parquet is missing: choose from blank, misleading, removed, or run 02_corrupt\.py --corruptions noise"),
    ({"conditions": ["hallucination"], "corruption": ["nonsense"]}, r"nonsense\.parquet is missing"),
])
def test_settings_that_cannot_work(train, prepare, study_folder, changes, says):
    with pytest.raises(prepare.UserError, match=says) as error:
        run(train, study_folder, **changes)
    assert "\n" not in str(error.value)
    assert not (study_folder / "policies").exists()


def test_inputs_that_are_missing_or_stale(train, prepare, data, tmp_path):
    with pytest.raises(prepare.UserError, match=r"study\.json is missing: run 01_prepare\.py"):
        run(train, tmp_path / "nowhere")
    blank = data / "corrupted" / "shapes" / "blank.parquet"
    clean = data / "questions" / "shapes.parquet"
    rows = list(prepare.read_questions(clean, ""))
    prepare.write_questions(blank, rows, {"questions/shapes.parquet": "0" * 64, "seed": 0})
    with pytest.raises(prepare.UserError, match=r"blank\.parquet was made from another .*: run 02_corrupt\.py again"):
        run(train, data, conditions=["hallucination"])
    prepare.write_questions(clean, rows[::-1], {})
    for condition in ("standard", "mixed"):
        with pytest.raises(prepare.UserError, match=r"run 01_prepare\.py again"):
            run(train, data, conditions=[condition])
    clean.unlink()
    with pytest.raises(prepare.UserError, match=r"shapes\.parquet is missing: run 01_prepare\.py"):
        run(train, data, conditions=["standard"])
