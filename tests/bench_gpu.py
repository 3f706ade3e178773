# SPDX-License-Identifier: MIT
"""Memory and speed of stage 3 on a graphics card, on models of the real shapes: one JSON line for each measurement.

Neither depends on what the weights are. So a model is built here from its published configuration, with random weights that are made and
packed to NF4 on the card one matrix at a time: no download, and a host with little memory suffices. End-of-sequence is never sampled, so
that each completion has all its tokens, and rewards alternate, so that no group is skipped. Each measurement builds its own model; one that
runs out of memory says so in its line, and the others go on. Memory is that of tensors: the driver's own, some 0.5 GB, comes on top.

    load    seconds, and memory of the loaded policy
    step    seconds of a step: looking and prefill, decoding, update; peak memory of the rollout and of the update
    decode  tokens a second, against the same without a captured graph, and against model.generate with its default cache; and as a multiple
            of the time in which the card copies as many bytes as a token needs of weights and cache
    growth  seconds of a step over the group's size, and over new tokens
    exact   on two layers, whose keys have biases as large as a Qwen2's: the largest relative error of a matrix's gradient against plain
            forwards over whole sequences in fp32
    trl     seconds and peak memory of a step of TRL's GRPOTrainer on the same model (tests/requirements.txt; Qwen2.5-VL only)
    planned not measured but counted, on any machine: what stage 3 plans in each of `--budgets`, and the most bytes that tensors of a step of
            those sizes hold at a time, on the meta device (where they have sizes and no content); prints the rows of a table

    python tests/bench_gpu.py --models 3b --stages load step decode --image_tokens 256 1024 2048
    python tests/bench_gpu.py --models 7b --memory_gb 14 --stages step
    python tests/bench_gpu.py --stages planned --models 2b 3b 7b --budgets 8 12 16 24
    python tests/bench_gpu.py --small       # all of it at toy size, also on a CPU
"""
import argparse
import contextlib
import copy
import gc
import importlib
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
bench = importlib.import_module("bench_trl")
prepare, train = bench.prepare, bench.train

import bitsandbytes as bnb
import torch
import transformers as hf
from accelerate import init_empty_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

QWEN25_TEXT = dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                   vocab_size=151936, rms_norm_eps=1e-6,
                   rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
QWEN25_VISION = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=2048, patch_size=14, window_size=112,
                     fullatt_block_indexes=[7, 15, 23, 31])
MODELS = {  # name -> configuration class, text, vision, whether lm_head is the embedding
    "2b": (hf.Qwen2VLConfig, QWEN25_TEXT | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
           dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4, patch_size=14), True),
    "3b": (hf.Qwen2_5_VLConfig, QWEN25_TEXT, QWEN25_VISION, True),
    "7b": (hf.Qwen2_5_VLConfig, QWEN25_TEXT | dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                                                   num_key_value_heads=4, vocab_size=152064),
           QWEN25_VISION | dict(out_hidden_size=3584), False),
    "qwen3-4b": (hf.Qwen3VLConfig, dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}),
        dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, out_hidden_size=2560, patch_size=16,
             num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]), True),
}
SMALL_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
                  rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
SMALL_VISION = dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=64)
SMALL = {hf.Qwen2VLConfig: (SMALL_TEXT, dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2)),
         hf.Qwen2_5_VLConfig: (SMALL_TEXT, SMALL_VISION | dict(fullatt_block_indexes=[1], window_size=56)),
         hf.Qwen3VLConfig: (SMALL_TEXT | dict(head_dim=16, rope_parameters=SMALL_TEXT["rope_parameters"] | {"mrope_interleaved": True}),
                            SMALL_VISION | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]))}
GRIDS = {16: (4, 4), 256: (16, 16), 1024: (32, 32), 2048: (64, 32)}  # image tokens -> columns and rows


def configuration(name: str, small: bool = False, layers: int | None = None):
    kind, text, vision, tied = MODELS[name]
    if small:
        text, vision = text | SMALL[kind][0], vision | SMALL[kind][1]
    if layers:
        text = text | {"num_hidden_layers": layers}
    token = lambda name: TOKENIZER.convert_tokens_to_ids(f"<|{name}|>")
    return kind(text_config=text | {"tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied,
                image_token_id=token("image_pad"), video_token_id=token("video_pad"), vision_start_token_id=token("vision_start"),
                vision_end_token_id=token("vision_end"))


TOKENIZER = prepare.make_tokenizer(0)  # the kit's: the model's other ids are banned, and cost as much as if they were not


def build(options, layers: int | None = None, dtype: torch.dtype | None = None):
    """The model with random weights as stage 3 has it: NF4 in the language model's layers, an adapter on them, the rest in `dtype`."""
    gc.collect()  # a policy from before is a ring of references
    config, device = configuration(options.model, options.small, layers), torch.device(options.device)
    dtype, generator = dtype or train.compute_dtype(device), None
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(0)
    make = lambda like: torch.empty(like.shape, dtype=dtype, device=device)
    with init_empty_weights(include_buffers=False):
        full = hf.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in [*full.named_modules()]:
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        for key, parameter in [*module.named_parameters(recurse=False)]:
            random = parameter.dim() > 1
            weight = make(parameter).normal_(0, 0.02, generator=generator) if random else make(parameter).fill_(float(key == "weight"))
            setattr(module, key, torch.nn.Parameter(weight, requires_grad=False))
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name:
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, compute_dtype=dtype, device="meta")
            if device.type == "meta":  # where `to` does not pack
                values, state = bnb.functional.quantize_4bit(module.weight.data, compress_statistics=True, quant_type="nf4")
                packed.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_state=state, bnb_quantized=True, module=packed)
            else:
                packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=packed).to(device)
            packed.bias = module.bias
            full.set_submodule(name, packed)
            module.weight = None
    full.tie_weights()
    full.to(device).is_loaded_in_4bit = True  # PEFT looks for it
    patch, (columns, rows) = config.vision_config.patch_size, GRIDS[options.image_tokens]
    side = 2 * patch  # of an image token
    size = {"shortest_edge": side**2, "longest_edge": side**2 * columns * rows}
    processor = prepare.Qwen2VLImageProcessorPil(patch_size=patch, size=size)
    bench.SHAPES["now"] = ((side * columns, side * rows), options.image_tokens + 100, options.new)
    policy = train.make_policy(full, TOKENIZER, processor, lora_rank=options.rank)
    policy.eos = torch.tensor([-1], device=device)
    return policy


def settle(options):
    """A policy, questions, and the sizes that stage 3 would choose on this card."""
    policy = build(options)
    questions = bench.make_questions("now", options.prompts, policy)
    preset = train.PRESETS["7b" if options.model == "7b" else "3b"]
    config = train.Config(**{key: value for key, value in preset.items() if key not in ("micro_batch_tokens", "cache_gb")} | {
        "prompts_per_step": options.prompts, "group_size": options.group, "max_new_tokens": options.new, "lora_rank": options.rank,
        "memory_gb": options.memory_gb})
    config = train.fit_memory(policy, config, preset, max(len(policy.encode(question).input_ids) for question in questions))
    turn = itertools.count()
    prepare.grade = lambda text, question, *_: prepare.Grade(next(turn) % 2 == 1, True, None)  # every group has both rewards
    return policy, questions, config


def seconds_of(device: torch.device, run, *arguments, **more):
    """What a call returns, and how long the device takes for it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = run(*arguments, **more)
    wait()
    return result, time.perf_counter() - start


def gb(field: str) -> float:
    return round(bench.memory_mb(field) / 1e3, 3)


def load(options) -> dict:
    bench.forget_peak()
    policy, seconds = seconds_of(torch.device(options.device), build, options)
    packed = [module for module in policy.full.modules() if train.is_packed(module)]
    return {"seconds": round(seconds, 1), "peak_gb": gb("VmHWM"), "held_gb": gb("VmRSS"), "packed_matrices": len(packed)}


def step(options) -> dict:
    """Medians over `--rounds` steps after one that warms up."""
    policy, questions, config = settle(options)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0)
    rows, real = [], {name: getattr(train, name) for name in ("encode_images", "encode_prompts", "generate")}
    for number in range(options.rounds + 1):
        row = dict.fromkeys((*real, "update"), 0.0)

        def timed(name, *arguments):
            result, seconds = seconds_of(policy.device, real[name], *arguments)
            row[name] += seconds
            return result

        bench.forget_peak()
        with mock.patch.multiple(train, **{name: partial(timed, name) for name in real}):
            (batch, _, _), row["rollout"] = seconds_of(policy.device, train.roll_out, policy, questions, number, 0, config)
        row["rollout_gb"] = gb("VmHWM")
        bench.forget_peak()
        log, row["update"] = seconds_of(policy.device, train.update, policy, optimizer, batch, config)
        assert not log["skipped"] and batch.completions.lengths.eq(options.new).all()
        rows.append(row | {"update_gb": gb("VmHWM")})
    mid = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    return {"step_s": round(mid["rollout"] + mid["update"], 3), "prefill_s": round(mid["encode_images"] + mid["encode_prompts"], 3),
            "decode_s": round(mid["generate"], 3), "update_s": round(mid["update"], 3),
            "other_s": round(mid["rollout"] - sum(mid[name] for name in real), 3), "rollout_gb": mid["rollout_gb"],
            "update_gb": mid["update_gb"], "memory_gb": config.memory_gb and round(config.memory_gb, 2),
            "micro_batch_tokens": config.micro_batch_tokens, "dequantized": policy.dequantize}


def copies_per_s(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)  # more than caches hold
    target = torch.empty_like(source)
    return max(2 * len(source) / seconds_of(device, target.copy_, source)[1] for _ in range(5))


def bytes_per_token(policy, prompts, options) -> int:
    """What decoding a token for all rows has to read: weights as they lie, adapter, head, prompts once a group, half of the completions."""
    weights = sum(module.weight.quant_state.shape.numel() * policy.dtype.itemsize if policy.dequantize else module.weight.nbytes
                  for module in policy.full.modules() if train.is_packed(module))
    cached, *_ = train.token_bytes(policy)
    weights += sum(parameter.nbytes for parameter in policy.model.parameters() if parameter.requires_grad)
    return (weights + policy.full.lm_head.weight.nbytes + cached * sum(len(prompt.input_ids) for prompt in prompts)
            + cached * len(prompts) * options.group * options.new // 2)


def generate_s(policy, prompts, group: int, new: int) -> float:
    """Seconds of model.generate of transformers: every prompt `group` times, drawn as ours. The second call counts."""
    ids = torch.tensor([prompt.input_ids for prompt in prompts], device=policy.device)
    run = partial(
        policy.model.generate, input_ids=ids, attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == policy.full.config.image_token_id).int(),
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]).to(policy.device),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]).to(policy.device), num_return_sequences=group,
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, suppress_tokens=policy.banned.tolist(), min_new_tokens=new, max_new_tokens=new,
        pad_token_id=policy.tokenizer.pad_token_id)
    with torch.no_grad():
        out, seconds = [seconds_of(policy.device, run) for _ in range(2)][1]
    assert out.shape == (len(prompts) * group, ids.shape[1] + new)
    return seconds


def decode(options) -> dict:
    """Prefill is left out: ours is timed without it, and of generate's time that of one token is taken off."""
    policy, questions, config = settle(options)
    prompts = [policy.encode(question) for question in questions]
    length = min(len(prompt.input_ids) for prompt in prompts)
    prompts = [replace(prompt, input_ids=prompt.input_ids[:length]) for prompt in prompts]  # of one length: no padding on either side
    rows = options.prompts * options.group
    draws = torch.rand(rows, options.new, dtype=torch.float64, device=policy.device)
    with torch.no_grad(), train.dequantized(policy):
        prefix = train.encode_prompts(policy, prompts, train.encode_images(policy, prompts))
        ours, eager = ([seconds_of(policy.device, train.generate, policy, prefix, options.new, draws, *stretch)[1] for _ in range(2)][1]
                       for stretch in ((), (1,)))
    del prefix
    tokens, size = rows * options.new, bytes_per_token(policy, prompts, options)
    line = {"rows": rows, "tokens_per_s": round(tokens / ours), "without_graph_tokens_per_s": round(tokens / eager),
            "dequantized": policy.dequantize, "gb_per_token": round(size / 1e9, 4)}
    allow_all(policy.device)
    try:
        bandwidth = copies_per_s(policy.device)
        line |= {"copy_gb_per_s": round(bandwidth / 1e9, 1), "times_bound": round(ours * bandwidth / options.new / size, 2)}
        theirs = generate_s(policy, prompts, options.group, options.new) - generate_s(policy, prompts, options.group, 1)
    except torch.OutOfMemoryError:  # generate keeps a prompt for each completion
        return line | {"generate_tokens_per_s": "out of memory"}
    return line | {"generate_tokens_per_s": round(tokens / theirs), "ratio": round(theirs / ours, 2)}


def allow_all(device: torch.device):
    """Others may take the whole card."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


def growth(options) -> dict:
    """One quantity at a time; the exponents are fitted on logarithms: 1 means in proportion."""
    result = {}
    for axis, values in {"group": options.groups, "new": options.news}.items():
        result[axis] = {value: step(argparse.Namespace(**vars(options) | {axis: value}))["step_s"] for value in values}
        logs = torch.tensor([*result[axis].items()]).double().log()
        centred = logs - logs.mean(0)
        result[f"{axis}_exponent"] = round(float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum()), 2)
    return result


def gradient(policy) -> dict:
    found = {name: p.grad.float() for name, p in policy.model.named_parameters() if p.requires_grad}
    policy.model.zero_grad(set_to_none=True)
    return found


def plain_gradient(policy, batch, config) -> dict:
    """The same loss, dapo's on fresh completions, from one forward over each whole sequence, positions and pictures transformers' own."""
    group, total = config.group_size, int(batch.completions.lengths.sum())
    for i, tokens in enumerate(batch.completions.tokens):
        prompt = batch.prompts[i // group]
        ids = torch.cat([torch.tensor(prompt.input_ids, device=policy.device), tokens])[None]
        logits = policy.full(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == policy.full.config.image_token_id).int(),
            pixel_values=prompt.pixel_values.to(policy.device), image_grid_thw=prompt.image_grid_thw.to(policy.device),
            use_cache=False).logits
        logits = logits[0, len(prompt.input_ids) - 1:-1].float().index_fill(-1, policy.banned, -torch.inf)
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])
        (-batch.advantages[i] * logprobs.sum() / total).backward()
    return gradient(policy)


def spread_keys(policy, size: float = 100.0):
    """Biases of the keys with which scores of attention reach hundreds; a Qwen3 has none."""
    for name, parameter in policy.full.named_parameters():
        if "language_model" in name and "k_proj" in name and name.endswith("bias"):
            parameter.data.normal_(0, size)


def exact(options) -> dict:
    """The same packed weights in both: those of the second policy are computed with in fp32."""
    policy, truth = (build(options, layers=2, dtype=dtype) for dtype in (None, torch.float32))
    spread_keys(policy)
    for one, other in zip(policy.full.modules(), truth.full.modules()):
        if train.is_packed(one):
            other.weight.data, other.weight.quant_state = one.weight.data, copy.copy(one.weight.quant_state)
            other.weight.quant_state.dtype = torch.float32
        for (name, a), b in zip(one.named_parameters(recurse=False), other.parameters(recurse=False)):
            if not (train.is_packed(one) and name == "weight"):  # the bias of a packed matrix is plain
                b.data = a.data.float()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zero at first, and half the gradient with it
            parameter.data.normal_(0, 0.02)
    truth.model.load_state_dict({name: p.float() for name, p in policy.model.named_parameters() if p.requires_grad}, strict=False)
    questions = bench.make_questions("now", 2, policy)
    config = train.Config(prompts_per_step=2, group_size=4, max_new_tokens=min(options.new, 128), micro_batch_tokens=4096, cache_gb=2.0,
                          checkpoint=True, clip_low=1e9, clip_high=1e9)
    batch = train.roll_out(policy, questions, 0, 0, config)[0]
    batch.advantages = torch.linspace(-1, 1, 8, device=policy.device)
    train.accumulate_gradients(policy, batch, config)
    found, plain = gradient(policy), plain_gradient(policy, batch, config)  # plain: what 16 bits cost by themselves
    torch.set_float32_matmul_precision("highest")
    right = plain_gradient(truth, batch, config)
    worst = lambda one: max(((one[name] - right[name]).norm() / right[name].norm()).item() for name in right)
    whole = lambda one: torch.cat([value.flatten() for value in one.values()]).double()
    return {"dtype": str(policy.dtype), "largest_relative_error": worst(found), "of_a_plain_forward_in_it": worst(plain),
            "cosine": torch.cosine_similarity(whole(found), whole(right), dim=0).item(), "matrices": len(right)}


def trl(options) -> dict:
    """The second of two steps, in micro-batches of one group, with checkpointed layers as ours."""
    if MODELS[options.model][0] is not hf.Qwen2_5_VLConfig:
        return {"skipped": "this script has TRL's processor for Qwen2.5-VL alone"}
    policy, questions, config = settle(options)
    del policy.full.model.visual.patch_embed.proj.forward  # as transformers has it
    allow_all(policy.device)
    watch = bench.Watch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = bench.trl_trainer(policy, questions, "now", config, options.group, 2, Path(folder), watch)
        bench.forget_peak()
        trainer.train()
    return {"step_s": round(watch.seconds[-1], 3), "peak_gb": gb("VmHWM"), "trl": importlib.metadata.version("trl")}


class Held(TorchDispatchMode):
    """The most bytes that tensors made here hold at a time. Truth values are true, and all rows stay: meta tensors have no content."""
    def __init__(self, policy):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in [*policy.model.parameters(), *policy.model.buffers()]}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function):
            return 1
        out = torch.arange(len(args[0]), device="meta")[:, None] if "nonzero" in str(function) else function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, key)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)


class Fused(torch.autograd.Function):
    """Attention as a card's kernel holds it: queries, keys, values and the result, no scores."""
    @staticmethod
    def forward(ctx, *qkv):
        ctx.save_for_backward(*qkv, out := torch.empty_like(qkv[0]))
        return out

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def counted(policy, config, length: int) -> tuple[int, int]:
    """Bytes beyond the weights at the peak of a rollout batch and of an update of the planned sizes; the update's with gradients."""
    group, new, own = config.group_size, config.max_new_tokens, train.CompletionCache
    prompt = SimpleNamespace(input_ids=[5] * length, image_grid_thw=None)
    batch = train.rollout_batches(policy, [length] * 99, group, new, config.cache_gb)[0].stop
    prompts, rows = config.micro_batch_tokens // length, max(1, config.micro_batch_tokens // (length + new))
    layout = lambda owner, prompts: train.GroupLayout(torch.arange(len(owner)).view(prompts, -1), torch.arange(len(owner)), True)
    with contextlib.ExitStack() as stack:
        for where, name, stand_in in (
                (torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: Fused.apply(q, k, v)),
                (train.GroupLayout, "of", layout),
                (train, "CompletionCache", lambda places, at: own(new, at))):  # room for all tokens, of which three are drawn
            stack.enter_context(mock.patch.object(where, name, stand_in))
        with Held(policy) as sampling, torch.no_grad(), train.dequantized(policy):
            cache = train.encode_prompts(policy, [prompt] * batch, [[]] * batch)
            train.generate(policy, cache, 3, torch.empty(batch * group, 3, dtype=torch.float64, device="meta"))
        del cache
        with Held(policy) as learning, train.dequantized(policy):
            graph = train.encode_prompts(policy, [prompt] * prompts, [[]] * prompts, config.checkpoint)
            leaves = graph.as_leaves()
            for _ in range(2):
                tokens = torch.zeros(rows, new, dtype=torch.long, device="meta")
                train.score_tokens(policy, leaves, torch.zeros(rows, dtype=torch.long, device="meta"), tokens, config.checkpoint).sum().backward()
            train.backward_through(graph.tensors(), leaves.tensors())
    policy.model.zero_grad(set_to_none=True)
    return sampling.most, learning.most


def planned(options) -> dict:
    """A step of 1,124 prompt tokens; memory of weights, gradients and Adam included."""
    options = argparse.Namespace(**vars(options) | {"device": "meta"})
    policy, length, rows = build(options, dtype=torch.bfloat16), options.image_tokens + 100, {}
    lying = train.weight_bytes(policy)[0] + 2 * sum(parameter.nbytes for parameter in policy.trainable())
    for budget in options.budgets:
        config = train.Config(group_size=options.group, max_new_tokens=options.new, checkpoint=True, memory_gb=budget)
        try:
            config = train.fit_memory(policy, config, {}, length)
        except prepare.UserError as error:
            rows[budget] = {"too_little": str(error)}
            print(f"| {options.model} | {budget:g} | too little | | | | | |")
            continue
        sampling, learning = (round((lying + most) / 1e9, 2) for most in counted(policy, config, length))
        batch = train.rollout_batches(policy, [length] * 99, options.group, options.new, config.cache_gb)[0].stop
        rows[budget] = {"weights_and_adam_gb": round(lying / 1e9, 2), "dequantized": policy.dequantize, "prompts_at_a_time": batch,
                        "micro_batch_tokens": config.micro_batch_tokens, "rollout_gb": sampling, "update_gb": learning}
        plain = "yes" if policy.dequantize else "no"
        print(f"| {options.model} | {budget:g} | {lying / 1e9:.2f} | {plain} | {batch} | {sampling} | {config.micro_batch_tokens:,} | {learning} |",
              flush=True)
    return {"budgets": rows}


STAGES = {function.__name__: function for function in (load, step, decode, growth, exact, trl, planned)}


def where(device: str) -> dict:
    """Card, driver and versions, for every line."""
    line = {"card": "none", **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        line |= {"card": torch.cuda.get_device_name(), "driver": "unknown"}
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):  # a container may lack nvidia-smi
            line["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    return line


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["3b"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--image_tokens", nargs="+", type=int, choices=GRIDS)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--groups", nargs="+", type=int)
    parser.add_argument("--news", nargs="+", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--memory_gb", type=float, help="[what is free on the card]")
    parser.add_argument("--budgets", nargs="+", type=float, help="GB, for planned")
    parser.add_argument("--small", action="store_true", help="toy models and sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    usual = {"image_tokens": [1024], "prompts": 8, "group": 8, "new": 512, "rank": 32, "groups": [4, 8, 16, 32], "news": [128, 256, 512],
             "rounds": 2, "budgets": [8, 12, 16, 24]}
    toy = {"image_tokens": [16], "prompts": 2, "group": 2, "new": 8, "rank": 4, "groups": [2, 4], "news": [4, 8], "rounds": 1,
           "budgets": [1]}
    options = parser.parse_args(arguments)
    prepare.fix_arithmetic(torch.get_num_threads())  # products as in the stages, for both sides
    vars(options).update({name: value for name, value in (toy if options.small else usual).items() if getattr(options, name) is None})
    warnings.filterwarnings("ignore")
    lines, grade = [], prepare.grade
    for model, tokens, stage in itertools.product(options.models, options.image_tokens, options.stages):
        one = argparse.Namespace(**vars(options) | {"model": model, "image_tokens": tokens})
        sizes = {name: getattr(one, name) for name in ("model", "image_tokens", "prompts", "group", "new")}
        try:
            found = STAGES[stage](one)
        except (torch.OutOfMemoryError, prepare.UserError, ModuleNotFoundError) as error:
            found = {"failed": str(error).splitlines()[0]}
        prepare.grade = grade
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        lines.append({"measure": stage, **sizes, **found, **where(options.device)})
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
