"""Hugging Face models over several ranks are the same models, and what would be dropped raises."""

import copy
import functools
from unittest import mock

import pytest
import torch
import transformers
from budgets import assert_within_budget
from torch import nn

from nxd_cp import CPContext, allreduce_grads
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.integrations import hf, hf_positions
from nxd_cp.integrations.hf_masks import check_mask
from nxd_cp.sharding import IGNORE_INDEX, shard

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
WINDOW = 24
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3, alternate windows": (
        transformers.Qwen3Config,
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
        | {"use_sliding_window": True},
    ),
    "mistral, window": (transformers.MistralConfig, {"sliding_window": WINDOW}),
    "gemma2, soft-capping": (
        transformers.Gemma2Config,
        {"sliding_window": WINDOW, "attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 16},
    ),
    "gpt-oss, sinks": (
        transformers.GptOssConfig,
        {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}
TEXT = load_text()
FIRST_STEP, LATER_STEPS = 1e-6, 1e-5


def _initial_model(name):
    config_class, extra = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**SIZES, **extra)
    config._experts_implementation = "eager"  # the grouped product has no fp64
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


EAGER = {name: _initial_model(name) for name in MODELS}  # here: threads share the global generator


def _ring_model(name, cp):
    model = copy.deepcopy(EAGER[name])
    model.set_attn_implementation(hf.NAME)
    hf.attach(model, cp)
    return model


def _batch(seed, *, num_tokens=64, num_rows=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES["vocab_size"], (num_rows, num_tokens), generator=generator)
    labels = ids.clone()
    labels[:, : num_tokens // 3] = IGNORE_INDEX  # unevenly over the ranks
    return {"input_ids": ids, "labels": labels}


def _step(model, cp, batch):
    loss = model(**hf.shard_batch(batch, cp), use_cache=False).loss
    loss.backward()
    allreduce_grads(model.parameters(), cp)
    return float(cp.all_reduce(loss.detach()))


def _on_one_device(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), _gradients(model)


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_eager_attention_on_one_device(name, num_ranks):
    batch = _batch(1)
    truth_loss, truth = _on_one_device(copy.deepcopy(EAGER[name]).double(), batch)
    _, baseline = _on_one_device(copy.deepcopy(EAGER[name]), batch)

    def work(cp):
        model = _ring_model(name, cp)
        return _step(model, cp, batch), _gradients(model)

    for loss, gradients in CPContext.local(num_ranks).run(work):
        assert loss == pytest.approx(truth_loss, rel=FIRST_STEP)
        for parameter, gradient in gradients.items():
            assert_within_budget(parameter, gradient, truth[parameter], baseline[parameter])


def test_a_dropped_window_is_caught():
    batch = _batch(1)
    truth_loss, _ = _on_one_device(copy.deepcopy(EAGER["mistral, window"]).double(), batch)

    def work(cp):
        model = _ring_model("mistral, window", cp)
        model.config.sliding_window = None
        return _step(model, cp, batch)

    assert CPContext.local(2).run(work)[0] != pytest.approx(truth_loss, rel=FIRST_STEP)


def _train(name, num_ranks, num_steps, **kwargs):
    def work(cp):
        model = _ring_model(name, cp)
        if kwargs.get("checkpointing"):
            model.activation_checkpointing_enable()
        model.train()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5)
        losses = []
        for step in range(num_steps):
            optimiser.zero_grad()
            losses.append(_step(model, cp, sample_batch(TEXT, 128, step, seed=0)))
            optimiser.step()
        return losses

    return CPContext.local(num_ranks).run(work)[0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral, window"])
def test_50_steps_of_training_are_those_of_one_rank(name):
    one = _train(name, 1, 50)
    assert one[-1] < one[0], "the model learns"
    for num_ranks in (2, 4):
        first, *later = _train(name, num_ranks, 50)
        assert first == pytest.approx(one[0], rel=FIRST_STEP)
        assert later == pytest.approx(one[1:], rel=LATER_STEPS)


def test_checkpointed_training_gives_the_same_losses():
    assert _train("llama", 2, 3, checkpointing=True) == _train("llama", 2, 3)


def test_packed_documents_are_separate_documents():
    batch = _batch(2, num_rows=1)
    lengths = [23, 5, 36]
    batch["segment_ids"] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = batch["input_ids"].split(lengths, 1)
    with torch.no_grad():
        models = copy.deepcopy(EAGER["llama"]).double(), EAGER["llama"]
        truth, baseline = (
            torch.cat([model(ids, use_cache=False).logits for ids in documents], 1)
            for model in models
        )

    def work(cp):
        with torch.no_grad():
            model = _ring_model("llama", cp)
            local = hf.shard_batch(batch, cp)
            logits = model(**local, use_cache=False).logits
            return logits, shard(truth, cp), shard(baseline, cp)

    for logits, expected, of_one_device in CPContext.local(2).run(work):
        assert_within_budget("logits", logits, expected, of_one_device)


def test_micro_batches_accumulate_to_the_gradient_of_the_whole_batch():
    batch = _batch(3, num_rows=4)
    count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    _, truth = _on_one_device(copy.deepcopy(EAGER["llama"]).double(), batch)
    _, baseline = _on_one_device(copy.deepcopy(EAGER["llama"]), batch)

    def work(cp):
        model = _ring_model("llama", cp)
        for rows in (slice(0, 1), slice(1, 4)):
            micro = {key: value[rows] for key, value in batch.items()}
            local = hf.shard_batch(micro, cp, num_items_in_batch=count)
            model(**local, use_cache=False).loss.backward()
        allreduce_grads(model.parameters(), cp)
        return _gradients(model)

    for parameter, gradient in CPContext.local(2).run(work)[0].items():
        assert_within_budget(parameter, gradient, truth[parameter], baseline[parameter])


def test_a_factor_for_averaging_optimisers_scales_the_loss():
    def work(cp):
        model, batch = _ring_model("llama", cp), _batch(1)
        with torch.no_grad():
            plain = model(**hf.shard_batch(batch, cp)).loss
            scaled = model(**hf.shard_batch(batch, cp, grad_average_over=cp.size)).loss
        return float(plain * cp.size), float(scaled)

    for expected, got in CPContext.local(2).run(work):
        assert got == pytest.approx(expected, rel=1e-6)


# What would be dropped raises


def _logits(cp, name="llama", **changes):
    model = _ring_model(name, cp)
    batch = {**hf.shard_batch({"input_ids": _batch(1)["input_ids"]}, cp), "use_cache": False}
    batch |= changes
    return model(**{key: value for key, value in batch.items() if value is not None}).logits


CHANGES = {
    "padding": ({"attention_mask": torch.tensor([[1] * 31 + [0]] * 2)}, "got padding"),
    "a mask tensor": ({"attention_mask": torch.zeros(2, 1, 32, 32)}, "expected none, got a tensor"),
    "local positions": ({"position_ids": torch.arange(32)[None]}, "hf.shard_batch"),
    "no positions": ({"position_ids": None}, "hf.shard_batch"),
    "no mask, so that jumps look packed": ({"attention_mask": None}, "packed or chunked"),
    "a cache": ({"use_cache": True, "past_key_values": True}, "use_cache=False"),
    "weights": ({"output_attentions": True}, "output_attentions"),
    "lengths of FlashAttention": ({"cu_seq_lens_q": torch.tensor([0, 64])}, "cu_seq_lens_q"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_ring_attention_would_drop_raises(change):
    changes, message = CHANGES[change]
    if "past_key_values" in changes:
        cache = transformers.DynamicCache()
        cache.update(torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 8, 16), 0)
        changes = changes | {"past_key_values": cache}
    with pytest.raises(ValueError, match=message):
        CPContext.local(2).run(functools.partial(_logits, **changes))


def _shift_before_last_layer(model):
    """Make every forward of `model` add 1 to its position ids, in place, before the last layer."""

    def shift(layer, args, kwargs):
        kwargs["position_ids"] += 1

    model.model.layers[-1].register_forward_pre_hook(shift, with_kwargs=True)


def test_positions_are_read_once_per_forward():
    def work(cp):
        model, batch = _ring_model("llama", cp), hf.shard_batch(_batch(1), cp)
        for _ in range(3):
            model(**batch, use_cache=False)

    positions = hf_positions.slot_positions
    with mock.patch.object(hf_positions, "slot_positions", side_effect=positions) as read:
        CPContext.local(2).run(work)
    assert read.call_count == 2 * 3, "ranks x forwards; the model has 2 layers"


def test_positions_that_change_between_layers_are_caught():
    def work(cp):
        model, batch = _ring_model("llama", cp), hf.shard_batch(_batch(1), cp)
        _shift_before_last_layer(model)
        model(**batch, use_cache=False)

    with pytest.raises(ValueError, match="expected the global positions"):
        CPContext.local(2).run(work)


def test_positions_that_change_between_forwards_behind_torchs_back_are_caught():
    def work(cp):
        model, batch = _ring_model("llama", cp), hf.shard_batch(_batch(1), cp)
        model(**batch, use_cache=False)
        version = batch["position_ids"]._version
        batch["position_ids"].numpy()[:] += 1
        assert batch["position_ids"]._version == version
        model(**batch, use_cache=False)

    with pytest.raises(ValueError, match="expected the global positions"):
        CPContext.local(2).run(work)


def test_positions_without_a_version_are_read_by_every_layer():
    def work(cp):
        with torch.inference_mode():
            model, batch = _ring_model("llama", cp), hf.shard_batch(_batch(1), cp)
            _shift_before_last_layer(model)
            model(**batch, use_cache=False)

    with pytest.raises(ValueError, match="expected the global positions"):
        CPContext.local(2).run(work)


def _mask(function, length=16, **kwargs):
    return check_mask(q_length=length, kv_length=length, mask_function=function, **kwargs)


def test_masks_that_are_not_causal_windowed_or_full_raise():
    from transformers import masking_utils as masks

    assert _mask(masks.causal_mask_function) is None
    assert _mask(masks.sliding_window_causal_mask_function(4)) is None
    with pytest.raises(ValueError, match="packed or chunked"):
        _mask(masks.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)))
    blocks = torch.tensor([[0] * 8 + [-1] * 8])
    prefix = masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(blocks))
    with pytest.raises(ValueError, match="tokens see later ones"):
        _mask(prefix)
    with pytest.raises(ValueError, match="own mask function"):
        _mask(masks.causal_mask_function, use_vmap=True)


def test_a_model_without_context_or_interface_is_named():
    model = copy.deepcopy(EAGER["llama"])
    with pytest.raises(ValueError, match="attn_implementation='nxd_ring', got 'eager'"):
        hf.attach(model, None)
    model.set_attn_implementation(hf.NAME)
    with pytest.raises(ValueError, match=r"call nxd_cp\.integrations\.hf\.attach"):
        model(_batch(1)["input_ids"])
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="is_causal attribute"):
        hf.attach(model, None)


def test_padding_in_a_batch_raises_and_nothing_is_sent_but_the_refusal():
    batch = _batch(1) | {"attention_mask": torch.tensor([[1] * 60 + [0] * 4] * 2)}

    def work(cp):
        with pytest.raises(ValueError, match="got padding"):
            hf.shard_batch(batch, cp)
        return set(cp.transport.counters.messages)

    assert CPContext.local(2).run(work) == [{"agreement"}] * 2


def test_padding_in_the_batch_of_one_rank_alone_raises_on_all():
    def work(cp):
        real = 60 if cp.rank == 1 else 64
        batch = _batch(1) | {"attention_mask": torch.tensor([[1] * real + [0] * (64 - real)] * 2)}
        with pytest.raises(ValueError, match="expected") as caught:
            hf.shard_batch(batch, cp)
        return str(caught.value)

    for rank, text in enumerate(CPContext.local(2, timeout_s=20).run(work)):
        assert "got padding" in text
        assert ("rank 1 refuses: " in text) == (rank != 1)


def test_local_positions_are_wrong_on_some_ranks_only_and_raise_on_all():
    """Positions from 0 on are right on the first rank of a contiguous layout."""
    ids = _batch(1)["input_ids"][:, :32]

    def work(cp):
        with pytest.raises(ValueError, match="position_ids: expected the global") as caught:
            _ring_model("llama", cp)(ids, position_ids=torch.arange(32)[None], use_cache=False)
        return str(caught.value)

    first, second = CPContext.local(2, layout="contiguous", timeout_s=20).run(work)
    assert "rank 1 refuses: " in first
    assert "rank 1 refuses: " not in second


def test_dropout_raises():
    def work(cp):
        model = _ring_model("llama", cp).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model(**hf.shard_batch(_batch(1), cp), use_cache=False)

    with pytest.raises(ValueError, match="dropout"):
        CPContext.local(2).run(work)
