"""A causal language model from a folder gives the same logits and perplexity on 1, 2 and 4 ranks.

Without an argument the folder holds a small random model with grouped key/value heads, so that the
test itself is tested. For a real one (any Transformers folder with a tokenizer):

    pytest tests/test_pretrained.py --pretrained PATH_TO_MODEL
"""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from nxd_cp import CPContext
from nxd_cp.demo.data import load_text
from nxd_cp.integrations import hf
from nxd_cp.sharding import shard

LOGITS = 1e-4  # absolute, fp32
NUM_TOKENS = {"given": 4096, "small": 256}


def _save_small_model(folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """(folder, number of tokens)."""
    given = request.config.getoption("--pretrained")
    if given is not None:
        return given, NUM_TOKENS["given"]
    folder = tmp_path_factory.mktemp("small_model")
    _save_small_model(folder)
    return folder, NUM_TOKENS["small"]


@pytest.fixture(scope="module")
def tokens(case):
    """int64 [1, S] of real text."""
    folder, num_tokens = case
    ids = AutoTokenizer.from_pretrained(folder)(load_text().decode()[: 8 * num_tokens]).input_ids
    assert len(ids) >= num_tokens
    return torch.tensor(ids[:num_tokens])[None]


@pytest.fixture(scope="module")
def one_device(case, tokens):
    """Logits [1, S, V] and the mean loss of Transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(case[0], dtype=torch.float32)
    assert model.config.num_key_value_heads < model.config.num_attention_heads, "grouped heads"
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    return logits, float(F.cross_entropy(logits[0, :-1], tokens[0, 1:]))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_logits_and_perplexity_are_those_of_one_device(case, tokens, one_device, num_ranks):
    truth, truth_loss = one_device
    weights = AutoModelForCausalLM.from_pretrained(
        case[0], dtype=torch.float32, attn_implementation=hf.NAME
    )

    def work(cp):
        model = copy.deepcopy(weights, {id(p): p for p in weights.parameters()})
        hf.attach(model, cp)
        batch = hf.shard_batch({"input_ids": tokens, "labels": tokens}, cp)
        with torch.no_grad():
            out = model(**batch, use_cache=False)
        off = (out.logits - shard(truth, cp)).abs().max()
        return float(off), float(cp.all_reduce(out.loss))

    for off, loss in CPContext.local(num_ranks, timeout_s=600).run(work):
        print(f"{num_ranks} ranks: logits off by {off:.1e}, perplexity {math.exp(loss):.6f}")
        assert off <= LOGITS
        assert abs(loss - truth_loss) <= 2 * LOGITS, "each log-probability is at most that far off"


def test_local_positions_would_be_caught(case, tokens, one_device):
    """The same comparison without global positions fails, so it can fail."""
    model = AutoModelForCausalLM.from_pretrained(case[0], dtype=torch.float32)
    half = tokens.shape[1] // 2
    with torch.no_grad():
        logits = model(tokens[:, half:], use_cache=False).logits
    assert float((logits - one_device[0][:, half:]).abs().max()) > LOGITS
