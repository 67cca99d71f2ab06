"""Text generated over a split cache is what Transformers generates on one device."""

import copy
import threading

import pytest
import torch
import transformers

from nxd_cp import CPContext
from nxd_cp.integrations import hf
from nxd_cp.integrations.hf_generation import generate

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # so that the likeliest tokens stand out and differ
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral, window": transformers.MistralConfig(**SIZES, sliding_window=9),
}
NEW = 12


def _initial_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


MODELS = {name: _initial_model(config) for name, config in CONFIGS.items()}


def _prompt(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def _on_one_device(name, prompt):
    """Greedy tokens, each from the whole sequence so far, without any cache."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(NEW):
            column = MODELS[name](ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, column[:, None]], 1)
    return ids[0, len(prompt) :].tolist()


def _ring_model(name, cp):
    model = copy.deepcopy(MODELS[name])
    model.set_attn_implementation(hf.NAME)
    hf.attach(model, cp)
    return model


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_one_device(name, num_ranks, layout):
    prompts = _prompt(29, 7, 16)
    expected = [_on_one_device(name, prompt) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 8, "not one token over and over"
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])

    def work(cp):
        model = _ring_model(name, cp)
        return generate(model, ids, cp, max_new_tokens=NEW, lengths=lengths).tolist()

    for tokens in CPContext.local(num_ranks, layout=layout).run(work):
        assert tokens == expected


def test_wrong_lengths_are_caught():
    """The comparison above can fail: padding that is taken for prompt changes the tokens."""
    (prompt,) = _prompt(7)
    ids = torch.nn.functional.pad(prompt, (0, 9))[None]
    cp = CPContext.local(1)
    tokens = cp.run(lambda cp: generate(_ring_model("llama", cp), ids, cp, max_new_tokens=NEW))
    assert tokens[0][0].tolist() != _on_one_device("llama", prompt)


def test_drawn_tokens_are_equal_on_all_ranks_and_repeat():
    (prompt,) = _prompt(20)

    def work(cp):
        draws = torch.Generator().manual_seed(5 if cp.rank == 0 else 6)
        options = {"max_new_tokens": NEW, "temperature": 1.0, "generator": draws}
        return generate(_ring_model("llama", cp), prompt[None], cp, **options).tolist()

    runs = [CPContext.local(2).run(work) for _ in range(2)]
    assert runs[0][0] == runs[0][1]
    assert runs[0] == runs[1]


def test_an_end_token_ends_the_sequence():
    (prompt,) = _prompt(20)
    expected = _on_one_device("llama", prompt)
    end = expected[3]
    seen = []

    def work(cp):
        return generate(
            _ring_model("llama", cp),
            prompt[None],
            cp,
            max_new_tokens=NEW,
            eos_token_id=end,
            on_token=seen.append if cp.rank == 0 else None,
        )

    tokens = CPContext.local(2).run(work)[0][0].tolist()
    assert tokens == expected[: expected.index(end) + 1]
    assert [int(column[0]) for column in seen] == tokens


def test_bad_arguments_raise_and_the_model_trains_on():
    (prompt,) = _prompt(16)
    ids = prompt[None]

    def work(cp):
        model = _ring_model("llama", cp)
        with pytest.raises(ValueError, match="lengths: expected 1 numbers from 1 to 16, got"):
            generate(model, ids, cp, max_new_tokens=1, lengths=torch.tensor([17]))
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate(model, ids, cp, max_new_tokens=0)
        for temperature in (-1.0, float("nan"), "hot", True):
            with pytest.raises(ValueError, match="temperature: expected a number of at least 0"):
                generate(model, ids, cp, max_new_tokens=1, temperature=temperature)
        with pytest.raises(ValueError, match=r"call model\.eval"):
            generate(model.train(), ids, cp, max_new_tokens=1)
        with pytest.raises(ValueError, match="attached to"):
            generate(model, ids, CPContext.local(1).contexts[0], max_new_tokens=1)
        generate(model.eval(), ids, cp, max_new_tokens=1)
        batch = hf.shard_batch({"input_ids": ids, "labels": ids}, cp)
        return float(cp.all_reduce(model(**batch, use_cache=False).loss.detach()))

    with torch.no_grad():
        expected = float(MODELS["llama"](ids, labels=ids).loss)
    assert CPContext.local(2).run(work) == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_new_tokens": NEW + 1}, "tokens = 12 on rank 0 and 2, 13 on rank 1"),
        ({"eos_token_id": 5}, "end = None on rank 0 and 2, 5 on rank 1"),
        ({"lengths": torch.tensor([19])}, "lengths = None on rank 0 and 2, (1,) (crc"),
        ({"input_ids": torch.ones(1, 20).long()}, "prompts = (1, 20) (crc"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, got nan"),
    ],
)
def test_what_one_rank_asks_differently_raises_on_all(change, text):
    (prompt,) = _prompt(20)

    def work(cp):
        given = {"input_ids": prompt[None], "max_new_tokens": NEW}
        given |= change if cp.rank == 1 else {}
        with pytest.raises(ValueError, match="expected") as caught:
            generate(_ring_model("llama", cp), cp=cp, **given)
        return str(caught.value)

    for said in CPContext.local(3, timeout_s=20).run(work):
        assert text in said


def test_logits_from_which_one_rank_cannot_draw_raise_on_all(monkeypatch):
    (prompt,) = _prompt(20)
    right = torch.multinomial

    def draw(weights, *arguments, **options):
        if threading.current_thread().name == "cp-rank-0":
            raise RuntimeError("planted")
        return right(weights, *arguments, **options)

    def work(cp):
        with pytest.raises((RuntimeError, ValueError), match="planted") as caught:
            generate(_ring_model("llama", cp), prompt[None], cp, max_new_tokens=2, temperature=1.0)
        return str(caught.value)

    monkeypatch.setattr(torch, "multinomial", draw)
    first, *others = CPContext.local(3, timeout_s=20).run(work)
    assert first == "planted"
    assert all("rank 0 refuses: planted" in text for text in others)
