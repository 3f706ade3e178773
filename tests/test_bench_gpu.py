# SPDX-License-Identifier: MIT
"""The bench for cards runs at toy size on a CPU; and at the real shapes the plan for memory is checked without a card.

There tensors are counted on the meta device, where they have sizes and no content: the truth is what the stage's own functions hold at a
time, operation by operation, and what one gets by hand from the published shapes.
"""
import importlib
import subprocess
from types import SimpleNamespace

import pytest
import torch
import transformers

bench = importlib.import_module("bench_gpu")
# name -> layers, hidden, intermediate, vocabulary, numbers a token that keys and values have in a layer
SHAPES = {"3b": (36, 2048, 11008, 151936, 2 * 2 * 128), "7b": (28, 3584, 18944, 152064, 2 * 4 * 128)}
GB = 1e9


@pytest.mark.slow
@pytest.mark.parametrize("model", ["2b", "3b", "qwen3-4b"])
def test_every_measurement_runs_at_toy_size(model):
    lines = bench.main(["--small", "--device", "cpu", "--models", model])
    by = {line["measure"]: line for line in lines}
    assert [*by] == [*bench.STAGES] and not any("failed" in line for line in lines)
    assert all(line["model"] == model and line["card"] == "none" and line["bitsandbytes"] for line in lines)
    assert by["load"]["packed_matrices"] == 14 and by["exact"]["matrices"] == 28
    assert by["exact"]["largest_relative_error"] < 1e-4 and by["exact"]["cosine"] == pytest.approx(1, abs=1e-6)
    parts = [by["step"][name] for name in ("prefill_s", "decode_s", "update_s", "other_s")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(by["step"]["step_s"], abs=0.003)
    assert by["decode"]["rows"] == 4 and min(by["decode"][name] for name in ("tokens_per_s", "generate_tokens_per_s", "times_bound")) > 0
    assert [*by["growth"]["group"]] == [2, 4] and [*by["growth"]["new"]] == [4, 8]
    assert ("skipped" in by["trl"]) == (model != "3b")
    (row,) = by["planned"]["budgets"].values()
    assert row["rollout_gb"] <= 1 and row["update_gb"] <= 1


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


@pytest.mark.parametrize("model, billions", [("2b", 2.209), ("3b", 3.755), ("7b", 8.292), ("qwen3-4b", 4.438)])
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
        config.memory_gb = ((base + held) / GB + beside) / 0.95  # a twentieth is left for gaps
        planned = train.fit_memory(policy, config, {}, 1124)
        assert planned.cache_gb == pytest.approx(beside, rel=1e-6) and planned.micro_batch_tokens == int(beside * GB // token)
        assert train.rollout_batches(policy, [1124] * 256, 8, 512, planned.cache_gb)[0].stop == int(beside * GB // question)
        given = train.fit_memory(policy, train.Config(**vars(config) | {"cache_gb": 0.5, "micro_batch_tokens": 99}), {}, 1124)
        assert (given.cache_gb, given.micro_batch_tokens) == (0.5, 99)
    config.memory_gb = (base + held + max(question, (1124 + 512) * token, 4 * 1124 * 50 * 1280)) / GB / 0.95 - 0.001
    with pytest.raises(prepare.UserError, match="GB of memory are too little: .* lower --group_size"):
        train.fit_memory(policy, config, {}, 1124)
    config.memory_gb, preset = None, {"cache_gb": 2.0, "micro_batch_tokens": 8192}
    planned = train.fit_memory(policy, config, preset, 1124)
    assert (planned.cache_gb, planned.micro_batch_tokens, planned.memory_gb) == (2.0, 8192, None)


@pytest.mark.parametrize("model, budget", [
    ("2b", 8), ("3b", 8), ("7b", 12), *[pytest.param(*more, marks=pytest.mark.slow) for more in (("2b", 16), ("3b", 24), ("7b", 24))]])
def test_a_step_holds_no_more_than_its_budget_and_uses_most_of_it(model, budget):
    """A rollout batch and an update of the planned sizes at the real shapes: packed weights, dequantized ones, gradients and Adam included."""
    (line,) = bench.main(["--stages", "planned", "--models", model, "--budgets", str(budget)])
    (row,) = line["budgets"].values()
    assert row["rollout_gb"] <= 0.95 * budget and row["update_gb"] <= 0.95 * budget
    assert max(row["rollout_gb"], row["update_gb"]) > 0.7 * budget


def test_a_budget_that_holds_no_question_says_so():
    (line,) = bench.main(["--stages", "planned", "--models", "7b", "--budgets", "8"])
    assert "8.0 GB of memory are too little" in line["budgets"][8.0]["too_little"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["2b", "3b", "7b", "qwen3-4b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_patch_takes_what_the_plan_says(train, model, dtype):
    """At the real widths; two layers of the vision tower, for the memory of one is used again for the next."""
    config = bench.configuration(model)
    config.text_config.num_hidden_layers, config.text_config.vocab_size, config.vision_config.depth = 1, 1000, 2
    config.text_config.layer_types = ["full_attention"]
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if hasattr(config.vision_config, name):
            setattr(config.vision_config, name, [0, 1])
    full = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    train.as_product(full.model.visual.patch_embed.proj)
    patches, weight = 256, full.model.visual.patch_embed.proj.weight
    fused = lambda query, *_, **__: torch.empty_like(query)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), bench.Held(SimpleNamespace(model=full)) as held:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
        full.get_image_features(torch.zeros(patches, weight[0].numel()), torch.tensor([[1, 16, 16]]), return_dict=True)
    said = (32 + 9 * dtype.itemsize) * len(weight)
    assert 0.7 * said < held.most / patches <= said


def test_a_machine_without_nvidia_smi_is_measured_too(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert bench.where("cuda")["card"] == "a card"


def test_no_room_for_the_copy_costs_its_own_figures_alone(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench, "copies_per_s", no_room)
    (line,) = bench.main(["--small", "--device", "cpu", "--stages", "decode"])
    assert line["tokens_per_s"] > 0 and "failed" not in line
