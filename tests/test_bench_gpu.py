# SPDX-License-Identifier: MIT
"""The bench for cards runs at toy size on a CPU; and at the real shapes the plan for memory is checked without a card.

There tensors are counted on the meta device, where they have sizes and no content: the truth is what the stage's own functions hold at a
time, operation by operation, and what one gets by hand from the published shapes.
"""
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

bench = importlib.import_module("bench_gpu")
# name -> layers, hidden, intermediate, vocabulary, numbers a token that keys and values have in a layer
SHAPES = {"3b": (36, 2048, 11008, 151936, 2 * 2 * 128), "7b": (28, 3584, 18944, 152064, 2 * 4 * 128)}
GB = 1e9


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("model", ["3b", "qwen3-4b"])
def test_every_measurement_runs_at_toy_size(model):
    lines = bench.main(["--small", "--device", "cpu", "--models", model])
    by = {line["measure"]: line for line in lines}
    assert [*by] == [*bench.STAGES] and not any("failed" in line for line in lines)
    assert all(line["model"] == model and line["card"] == "none" and line["bitsandbytes"] for line in lines)
    assert by["load"]["packed_matrices"] == 14 and by["exact"]["matrices"] == 28
    assert by["exact"]["largest_relative_error"] < 1e-5 and by["exact"]["cosine"] == pytest.approx(1, abs=1e-6)
    parts = [by["step"][name] for name in ("prefill_s", "decode_s", "update_s", "other_s")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(by["step"]["step_s"], abs=0.003)
    assert by["decode"]["rows"] == 4 and min(by["decode"][name] for name in ("tokens_per_s", "generate_tokens_per_s", "times_bound")) > 0
    assert [*by["growth"]["group"]] == [2, 4] and [*by["growth"]["new"]] == [4, 8]
    assert ("skipped" in by["trl"]) == (model == "qwen3-4b")


def test_what_does_not_fit_says_so_and_the_others_go_on(capsys):
    lines = bench.main(["--small", "--device", "cpu", "--stages", "step", "load", "--memory_gb", "0.1"])
    assert "0.1 GB of memory are too little" in lines[0]["failed"] and lines[1]["packed_matrices"] == 14


@pytest.fixture(scope="module")
def on_meta():
    """Model -> a policy of its real shape without content, in bf16; what NF4 packs is plain there."""
    made = {}

    def get(name):
        if name not in made:
            with torch.device("meta"):
                full = transformers.AutoModelForImageTextToText.from_config(bench.configuration(name), dtype=torch.bfloat16)
            policy = bench.train.make_policy(full, bench.TOKENIZER, None, lora_rank=32)
            for parameter in policy.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
            made[name] = policy
            policy.eos, policy.dequantize = torch.tensor([-1], device="meta"), False
        return made[name]

    return get


@pytest.mark.parametrize("model, billions", [("3b", 3.755), ("7b", 8.292), ("qwen3-4b", 4.438)])
def test_the_models_have_as_many_parameters_as_the_published_ones(on_meta, model, billions):
    assert sum(p.numel() for p in on_meta(model).full.parameters() if not p.requires_grad) / 1e9 == pytest.approx(billions, abs=0.001)


def by_hand(model, longest, group, new):
    """Bytes: what is held all the time, of a question while sampling, of a token in a pass."""
    layers, hidden, intermediate, vocabulary, kv = SHAPES[model]
    cached = 2 * layers * kv
    adapter = 32 * layers * (4 * hidden + 2 * (hidden + kv // 2) + 3 * (hidden + intermediate))
    question = longest * cached + max(longest * 16 * intermediate, group * (new * cached + 28 * vocabulary))
    return 16 * adapter + 6 * 2**26, question, 4 * cached + 2 * 2 * layers * hidden + 30 * intermediate


@pytest.mark.parametrize("model, cached, adapter", [("3b", 36864, 59_867_136), ("7b", 57344, 80_740_352)])
def test_the_plan_is_what_one_computes_by_hand(train, prepare, on_meta, model, cached, adapter):
    policy, base = on_meta(model), sum(p.nbytes for p in on_meta(model).full.parameters() if not p.requires_grad)
    assert train.token_bytes(policy)[0] == cached and sum(p.numel() for p in policy.model.parameters() if p.requires_grad) == adapter
    config = train.Config(group_size=8, max_new_tokens=512, checkpoint=True)
    held, question, token = by_hand(model, 1124, 8, 512)
    for beside in (4.0, 40.0):
        config.memory_gb = (base + held) / GB + beside
        planned = train.plan(policy, config, {}, 1124)
        assert planned.cache_gb == pytest.approx(beside, rel=1e-6) and planned.micro_batch_tokens == int(beside * GB // token)
        assert train.rollout_batches(policy, [1124] * 256, 8, 512, planned.cache_gb)[0].stop == int(beside * GB // question)
        given = train.plan(policy, train.Config(**vars(config) | {"cache_gb": 0.5, "micro_batch_tokens": 99}), {}, 1124)
        assert (given.cache_gb, given.micro_batch_tokens) == (0.5, 99)
    config.memory_gb = (base + held + max(question, (1124 + 512) * token)) / GB - 0.001
    with pytest.raises(prepare.UserError, match="GB of memory are too little: .* lower --group_size"):
        train.plan(policy, config, {}, 1124)
    config.memory_gb, preset = None, {"cache_gb": 2.0, "micro_batch_tokens": 8192}
    planned = train.plan(policy, config, preset, 1124)
    assert (planned.cache_gb, planned.micro_batch_tokens, planned.memory_gb) == (2.0, 8192, None)


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


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("beside", [3.0, 10.0])
def test_a_step_holds_no_more_than_planned(train, on_meta, monkeypatch, model, beside):
    """A wave and a pass of the planned sizes at the real shapes, and half of it is used."""
    policy, length, new, group = on_meta(model), 1124, 512, 8
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: Fused.apply(q, k, v))
    rows = lambda n, prompts: torch.arange(n).view(prompts, -1)
    monkeypatch.setattr(train.GroupLayout, "of", lambda owner, prompts: train.GroupLayout(rows(len(owner), prompts), rows(len(owner), 1)[0], True))
    base = sum(p.nbytes for p in policy.full.parameters() if not p.requires_grad)
    adapter = [p for p in policy.model.parameters() if p.requires_grad]
    memory_gb = (base + by_hand(model, length, group, new)[0]) / GB + beside
    config = train.plan(policy, train.Config(group_size=group, max_new_tokens=new, checkpoint=True, memory_gb=memory_gb), {}, length)
    policy.dequantize, own = False, train.CompletionCache
    monkeypatch.setattr(train, "CompletionCache", lambda places, at: own(new, at))  # room for all tokens, of which three are drawn
    prompt = SimpleNamespace(input_ids=[5] * length, image_grid_thw=None)
    wave = train.rollout_batches(policy, [length] * 99, group, new, config.cache_gb)[0].stop
    with Held(policy) as sampling, torch.no_grad():
        prefix = train.encode_prompts(policy, [prompt] * wave, [[]] * wave)
        train.generate(policy, prefix, 3, torch.empty(wave * group, 3, dtype=torch.float64, device="meta"))
    assert 0.5 * beside * GB < sampling.most <= beside * GB
    prompts, rows = config.micro_batch_tokens // length, config.micro_batch_tokens // (length + new)
    with Held(policy) as learning:
        graph = train.encode_prompts(policy, [prompt] * prompts, [[]] * prompts, True)
        leaves = graph.as_leaves()
        for _ in range(2):
            tokens = torch.zeros(rows, new, dtype=torch.long, device="meta")
            train.score_tokens(policy, leaves, torch.zeros(rows, dtype=torch.long, device="meta"), tokens, True).sum().backward()
        train.backward_through(graph.tensors(), leaves.tensors())
    held = learning.most - sum(p.grad.nbytes for p in adapter)
    policy.model.zero_grad(set_to_none=True)
    assert 0.3 * beside * GB < held <= beside * GB
