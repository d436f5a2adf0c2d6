"""The PyTorch model that exported directories carry: against the published code's outputs, as transformers uses it."""

import ast
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from btlm_jax.convert.remote_code import attention_btlm
from btlm_jax.convert.to_hf import hf_config
from btlm_jax.hub.published import read_published_config, tensor_shapes

ORACLES = Path(__file__).parents[1] / "golden" / "oracles"
REMOTE_CODE = Path(attention_btlm.__file__).parent
TOLERANCE = 2e-5
NAMES = ("tiny", "tiny_sp", "tiny_pi_fix")


def make_directory(directory: Path, name: str) -> Path:
    """Make an exported directory of an oracle."""
    directory.mkdir()
    for path in (ORACLES / name / "config.json", ORACLES / name / "model.safetensors", *REMOTE_CODE.glob("*_btlm.py")):
        shutil.copyfile(path, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The exported directory of every oracle, which no test may change."""
    return {name: make_directory(tmp_path_factory.mktemp("exported") / name, name) for name in NAMES}


@pytest.fixture
def tiny(directories):
    return load(directories["tiny"])


def load(directory: Path, *, attention: str = "sdpa"):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, attn_implementation=attention)


def array(name: str, kind: str) -> torch.Tensor:
    values = torch.from_numpy(np.load(ORACLES / name / f"{kind}.npy"))
    return values if values.is_floating_point() else values.long()


def greedy(model, ids_BT, **settings):
    return model.generate(ids_BT, max_new_tokens=24, do_sample=False, pad_token_id=0, **settings)


def largest_difference(a, b) -> float:
    return (a.float() - b.float()).abs().max().item()


@pytest.fixture
def sdpa_masks(monkeypatch):
    """The attention masks that PyTorch's kernel is given."""
    masks, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, **settings):
        masks.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    return masks


# Outputs


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss_equal_the_published_code(directories, name, attention):
    ids_BT = array(name, "input_ids")
    with torch.no_grad():
        output = load(directories[name], attention=attention)(ids_BT, labels=ids_BT)
    assert largest_difference(output.logits, array(name, "logits")) < TOLERANCE
    assert output.loss.item() == pytest.approx(array(name, "nll").mean().item(), abs=TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_equals_the_published_code(directories, attention):
    ids_BT = array("tiny", "input_ids")
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :30] = 0
    with torch.no_grad():
        logits_BTV = load(directories["tiny"], attention=attention)(ids_BT, attention_mask=mask_BT).logits
    assert largest_difference(logits_BTV[0], array("tiny", "logits")[0]) < TOLERANCE
    assert largest_difference(logits_BTV[1, 30:], array("tiny", "logits_leftpad30")) < TOLERANCE
    assert logits_BTV.isfinite().all()


def test_bfloat16_is_close_to_float32(directories):
    for name in ("tiny", "tiny_pi_fix"):
        model = load(directories[name]).to(torch.bfloat16)
        with torch.no_grad():
            logits_BTV = model(array(name, "input_ids")).logits
        assert logits_BTV.dtype == torch.bfloat16
        assert largest_difference(logits_BTV, array(name, "logits")) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_are_float32_in_every_dtype(tiny, dtype, monkeypatch):
    seen = []
    module = sys.modules[type(tiny).__module__]
    attention = module.sdpa_attention
    monkeypatch.setattr(module, "sdpa_attention", lambda *a, **s: seen.append(s["slopes_BN"]) or attention(*a, **s))
    tiny.to(dtype)(array("tiny", "input_ids"))
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [[0.25, 0.0625, 0.015625, 0.00390625]]
    assert not list(tiny.buffers())


def test_slopes_of_other_than_powers_of_two():
    slopes = attention_btlm.alibi_slopes(6, factor=2.0)
    # 4 heads' slopes 2^-2, 2^-4, 2^-6, 2^-8, then every other one of 8 heads' 2^-1, 2^-2, 2^-3, ...; all over 2
    assert slopes == [0.125, 0.03125, 0.0078125, 0.001953125, 0.25, 0.0625]


def test_inputs_embeds_hidden_states_weights_and_kept_logits(tiny):
    ids_BT = array("tiny", "input_ids")
    with torch.no_grad():
        output = tiny(
            inputs_embeds=tiny.get_input_embeddings()(ids_BT), output_hidden_states=True, output_attentions=True
        )
        last_B2V = tiny(ids_BT, logits_to_keep=2).logits
        chosen_B2V = tiny(ids_BT, logits_to_keep=torch.tensor([0, 50])).logits
        as_tuple = tiny(ids_BT, return_dict=False, use_cache=False)
    expected_BTV = array("tiny", "logits")
    assert largest_difference(output.logits, expected_BTV) < TOLERANCE
    assert largest_difference(last_B2V, expected_BTV[:, -2:]) < TOLERANCE
    assert largest_difference(chosen_B2V, expected_BTV[:, [0, 50]]) < TOLERANCE
    assert isinstance(as_tuple, tuple) and largest_difference(as_tuple[0], expected_BTV) < TOLERANCE
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 100, 64)] * 3
    assert largest_difference(tiny.lm_head(output.hidden_states[2]) * 0.222, expected_BTV) < TOLERANCE
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 100, 100)] * 2
    assert largest_difference(output.attentions[1].sum(3), torch.ones(2, 4, 100)) < 1e-6
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        tiny()


@pytest.mark.parametrize("shape", [(2, 20), (2, 3, 100, 100), (2, 1, 99, 100), (2, 1, 100, 99), (2, 100, 100)])
def test_a_mask_that_does_not_cover_the_keys_is_refused(tiny, shape):
    with pytest.raises(ValueError, match="attention_mask of shape"):
        tiny(array("tiny", "input_ids"), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_four_axes_say_which_keys_a_query_sees(directories, attention):
    """Two documents in a row, kept apart: each as if it were alone; as booleans, as numbers, per head, in a cache."""
    model, ids_1T = load(directories["tiny"], attention=attention).eval(), array("tiny", "input_ids")[:1]
    document_T = torch.arange(100) >= 37
    seen_11TS = (document_T[:, None] == document_T[None])[None, None]  # later keys are never seen
    with torch.no_grad():
        expected = torch.cat([model(ids_1T[:, :37]).logits, model(ids_1T[:, 37:]).logits], dim=1)
        added = torch.zeros(seen_11TS.shape).masked_fill(~seen_11TS, torch.finfo(torch.float32).min)
        for mask in (seen_11TS, seen_11TS.expand(1, 4, -1, -1), added):
            assert largest_difference(model(ids_1T, attention_mask=mask).logits, expected) < TOLERANCE
        first = model(ids_1T[:, :60], attention_mask=seen_11TS[:, :, :60, :60], use_cache=True)
        rest = model(
            ids_1T[:, 60:],
            attention_mask=seen_11TS[:, :, 60:],
            past_key_values=first.past_key_values,
            cache_position=torch.arange(60, 100),
            position_ids=torch.arange(60, 100)[None],
        )
        assert largest_difference(rest.logits, expected[:, 60:]) < TOLERANCE
    half = load(directories["tiny"], attention=attention).eval().to(torch.bfloat16)
    with torch.no_grad():
        assert largest_difference(half(ids_1T, attention_mask=seen_11TS).logits.float(), expected) < 0.05


def test_arguments_of_other_models_are_taken_and_what_they_cannot_say_is_refused(tiny, caplog):
    ids_BT = array("tiny", "input_ids")
    T = ids_BT.shape[1]
    with torch.no_grad():
        expected = tiny(ids_BT).logits
        given = {"position_ids": torch.arange(T)[None], "cache_position": torch.arange(T), "is_causal": True}
        assert torch.equal(tiny(ids_BT, token_type_ids=torch.zeros_like(ids_BT), **given).logits, expected)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[0, :5] = 0
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)  # as generate makes them
        tiny(ids_BT, attention_mask=mask_BT, position_ids=position_BT)
    restarted = torch.arange(T)[None] % 50
    with pytest.raises(ValueError, match="position_ids that do not count up by one are not supported"):
        tiny(ids_BT, position_ids=restarted)
    with pytest.raises(ValueError, match="token_type_ids other than 0"):
        tiny(ids_BT, token_type_ids=torch.ones_like(ids_BT))


def test_classification_looks_at_the_last_token_that_is_not_padding(tmp_path):
    settings = {"num_labels": 3, "pad_token_id": 7, "trust_remote_code": True}
    torch.manual_seed(0)
    directory = make_directory(tmp_path / "m", "tiny")
    config = hf_config(read_published_config(directory / "config.json"), dtype="float32")  # as exports name the class
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForSequenceClassification.from_pretrained(directory, **settings).eval()
    ids_BT = array("tiny", "input_ids").clone()
    ids_BT[ids_BT == 7] = 8
    with torch.no_grad():
        hidden_BTD = model.transformer(ids_BT).last_hidden_state
        expected = hidden_BTD[[0, 1], [59, 99]] @ model.score.weight.T
        ids_BT[0, 60:] = 7
        assert largest_difference(model(ids_BT).logits, expected) < TOLERANCE
        left_BT = ids_BT.clone()
        left_BT[0] = torch.cat([ids_BT[0, 60:], ids_BT[0, :60]])
        masked = model(left_BT, attention_mask=(left_BT != 7).long())
        assert largest_difference(masked.logits, expected) < TOLERANCE
    labels = torch.tensor([2, 0])
    output = model(ids_BT, labels=labels)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_attention_is_chosen_by_name(tiny, directories):
    ids_BT = array("tiny", "input_ids")
    tiny.set_attn_implementation("eager")
    assert tiny.config._attn_implementation == "eager"
    with torch.no_grad():
        assert largest_difference(tiny(ids_BT).logits, array("tiny", "logits")) < TOLERANCE
    with pytest.raises((ValueError, ImportError)):
        load(directories["tiny"], attention="flex_attention")
    tiny.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' is not supported"):
        tiny(ids_BT)


# Decoding


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuations_equal_the_published_code(directories, name, cache):
    expected_BT = array(name, "greedy")
    made_BT = greedy(load(directories[name]), expected_BT[:, :16], cache_implementation=cache)
    assert made_BT.tolist() == expected_BT.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=lambda settings: next(iter(settings), "dynamic"),
)
def test_left_padded_rows_continue_as_alone(tiny, settings):
    ids_BT = array("tiny", "greedy")[:, :16]
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :7] = 0
    made_BT = greedy(tiny, ids_BT * mask_BT, attention_mask=mask_BT, **settings)
    for row, prompt in enumerate((ids_BT[:1], ids_BT[1:, 7:])):
        assert made_BT[row, 16:].tolist() == greedy(tiny, prompt, **settings)[0, prompt.shape[1] :].tolist()


def test_beams_are_the_same_without_a_cache(tiny):
    ids_BT = array("tiny", "greedy")[:, :16]
    assert torch.equal(greedy(tiny, ids_BT, num_beams=3), greedy(tiny, ids_BT, num_beams=3, use_cache=False))


def test_sampling_draws_and_top_1_is_greedy(tiny):
    expected_BT = array("tiny", "greedy")
    settings = {"max_new_tokens": 24, "do_sample": True, "pad_token_id": 0}
    top_BT = tiny.generate(expected_BT[:, :16], top_k=1, **settings)
    transformers.set_seed(5)
    drawn_BT = tiny.generate(expected_BT[:, :16], **settings)
    transformers.set_seed(5)
    assert torch.equal(drawn_BT, tiny.generate(expected_BT[:, :16], cache_implementation="static", **settings))
    assert torch.equal(top_BT, expected_BT) and not torch.equal(drawn_BT, expected_BT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.bfloat16, 2e-2)])
def test_pieces_through_a_cache_equal_the_whole(tiny, dtype, tolerance):
    ids_BT = array("tiny", "input_ids")
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :30] = 0
    tiny.to(dtype)
    cache, pieces = DynamicCache(), []
    with torch.no_grad():
        for start, stop in ((0, 40), (40, 41), (41, 100)):
            pieces.append(tiny(ids_BT[:, start:stop], attention_mask=mask_BT[:, :stop], past_key_values=cache).logits)
    logits_BTV = torch.cat(pieces, dim=1)
    assert largest_difference(logits_BTV[0], array("tiny", "logits")[0]) < tolerance
    assert largest_difference(logits_BTV[1, 30:], array("tiny", "logits_leftpad30")) < tolerance


def test_decoding_goes_past_n_positions(tiny):
    tiny.config.n_positions = 20
    expected_BT = array("tiny", "greedy")
    assert torch.equal(greedy(tiny, expected_BT[:, :16]), expected_BT)


# Attention without large masks


def random_attention(*, T: int, dtype, num_heads: int = 4, head_dim: int = 80, seed: int = 0):
    """Return q, k, v [1, N, T, H] and the settings of BTLM's scores: 1 / head dim, slopes down to 2^-8."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, num_heads, T, head_dim, generator=generator).to(dtype) for _ in range(3))
    slopes_N = torch.tensor(attention_btlm.alibi_slopes(32, factor=1.0)[:: 32 // num_heads])
    mask_BS = torch.ones(1, T, dtype=torch.bool)
    settings = {"mask_BS": mask_BS, "slopes_BN": slopes_N[None], "scale": 1 / head_dim}
    return (3 * q, k, v), settings | {"dropout": 0.0}


def exact_attention(q, k, v, *, queries_T, mask_BS, slopes_BN, scale):
    """Return the outputs of some queries by the definition, in float64."""
    distance_TS = (queries_T[:, None] - torch.arange(k.shape[2])[None]).double()
    scores_BNTS = q.double()[:, :, queries_T] @ k.double().transpose(2, 3) * scale
    scores_BNTS = scores_BNTS - slopes_BN.double()[:, :, None, None] * distance_TS
    is_seen_BNTS = (distance_TS >= 0) & mask_BS[:, None, None]
    return scores_BNTS.masked_fill(~is_seen_BNTS, -torch.inf).softmax(3) @ v.double()


def attention_error(attention, qkv, settings, queries_T) -> float:
    exact_BNTH = exact_attention(*qkv, queries_T=queries_T, **{k: v for k, v in settings.items() if k != "dropout"})
    return (attention(*qkv, **settings)[:, :, queries_T].double() - exact_BNTH).abs().max().item()


def chunked(*qkv, mask_BS, **settings):
    queries_T = torch.arange(qkv[0].shape[2])
    return attention_btlm.chunked_attention(*qkv, queries_T=queries_T, mask_BNTS=mask_BS[:, None, None], **settings)


def test_chunked_attention_is_exact_in_float32():
    qkv, settings = random_attention(T=2500, dtype=torch.float32)
    settings["mask_BS"] = torch.arange(2500)[None] >= 9
    queries_T = torch.tensor([9, 1023, 1024, 2047, 2048, 2499])
    assert attention_error(chunked, qkv, settings, queries_T) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_attention_is_as_exact_as_a_mask(dtype, backend):
    qkv, settings = random_attention(T=4096 if backend == SDPBackend.FLASH_ATTENTION else 1500, dtype=dtype)
    T = qkv[0].shape[2]
    settings["mask_BS"] = (torch.arange(T)[None] >= 300) | (torch.arange(T)[None] == 5)
    queries_T = torch.tensor([5, 299, 300, 700, *range(T - 30, T)])
    with sdpa_kernel(backend):
        folded = attention_error(attention_btlm.folded_attention, qkv, settings, queries_T)
    assert folded < 1.3 * attention_error(chunked, qkv, settings, queries_T)


@pytest.mark.slow
def test_folded_attention_counts_beyond_65536():
    qkv, settings = random_attention(T=66_000, dtype=torch.bfloat16, num_heads=1, head_dim=8)
    settings["slopes_BN"] = torch.tensor([[2.0**-8]])
    queries_T = torch.tensor([65_535, 65_536, 65_537, 65_999])
    assert attention_error(attention_btlm.folded_attention, qkv, settings, queries_T) < 1e-2


def small_model(directory: Path, **changes):
    """Return a randomly initialized model of one block, 2 heads and the given changes."""
    settings = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_inner": 12, "vocab_size": 20, **changes}
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True, **settings)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_stay_small_at_8192_tokens(directories, sdpa_masks, batch):
    model = small_model(directories["tiny"])
    mask_BT = torch.ones(batch, 8192, dtype=torch.long)
    mask_BT[0, :4000] = 0
    with torch.no_grad():
        logits_BTV = model(torch.arange(8192).expand(batch, 8192) % 20, attention_mask=mask_BT).logits
    assert logits_BTV.isfinite().all()
    assert len(sdpa_masks) == 8 * batch and max(mask.numel() for mask in sdpa_masks) == 2 * 1024 * 8192


@pytest.mark.slow
def test_half_precision_makes_no_masks_until_it_decodes(directories, sdpa_masks):
    model = small_model(directories["tiny"]).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.arange(2000)[None] % 20).past_key_values
        assert sdpa_masks == [None]
        model(torch.tensor([[3]]), past_key_values=cache)
    assert sdpa_masks[1].shape == (1, 2, 1, 2001)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_masks_are_kept_for_gradients(directories, dtype):
    model, saved_sizes = small_model(directories["tiny"]).to(dtype).train(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved_sizes.append(tensor.numel()) or tensor, lambda t: t
    ):
        loss = model(ids := torch.arange(2000)[None] % 20, labels=ids, use_cache=False).loss
    loss.backward()
    assert max(saved_sizes) <= 2000 * 24 and model.transformer.wte.weight.grad.isfinite().all()


# Training


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids := array("tiny", "input_ids"), labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny, reentrant):
    tiny.train()
    plain = gradients(tiny)
    tiny.gradient_checkpointing_enable({"use_reentrant": reentrant})
    output = tiny(ids := array("tiny", "input_ids"), labels=ids)
    assert output.past_key_values is None
    assert output.loss.item() == pytest.approx(array("tiny", "nll").mean().item(), abs=TOLERANCE)
    checkpointed = gradients(tiny)
    assert len(plain) == 2 * 14 + 3
    for name, gradient in plain.items():
        assert largest_difference(gradient, checkpointed[name]) <= 1e-6, name


def test_gradients_are_the_same_from_every_attention(directories):
    eager, sdpa = (gradients(load(directories["tiny"], attention=name)) for name in ("eager", "sdpa"))
    half = gradients(load(directories["tiny"]).to(torch.bfloat16))
    for name, gradient in eager.items():
        assert largest_difference(gradient, sdpa[name]) < 1e-5, name
        assert (gradient - half[name].float()).norm() < 0.03 * gradient.norm(), name


def test_labels_of_minus_100_and_num_items_in_batch(tiny):
    ids_BT = array("tiny", "input_ids")
    labels_BT = ids_BT.clone()
    labels_BT[1] = -100
    losses_BT = array("tiny", "nll")
    with torch.no_grad():
        assert tiny(ids_BT, labels=labels_BT).loss.item() == pytest.approx(losses_BT[0].mean().item(), abs=TOLERANCE)
        divided = tiny(ids_BT, labels=labels_BT, num_items_in_batch=50).loss.item()
    assert divided == pytest.approx(losses_BT[0].sum().item() / 50, abs=10 * TOLERANCE)


@pytest.mark.slow
def test_dropout_is_used_in_training_only(directories):
    ids_BT = torch.arange(60)[None] % 20
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        for attention in ("sdpa", "eager"):
            model = small_model(directories["tiny_sp"], initializer_range=1.0, **{name: 0.5})
            model.set_attn_implementation(attention)
            first, second = (model.train()(ids_BT).logits for _ in range(2))
            assert not torch.equal(first, second), (name, attention)
            first, second = (model.eval()(ids_BT).logits for _ in range(2))
            assert torch.equal(first, second)


def test_initialization_follows_the_published_rule(directories):
    model = small_model(
        directories["tiny"],
        **{"n_layer": 3, "n_embd": 96, "n_head": 6, "n_inner": 200, "vocab_size": 700},
        **{"initializer_range": 0.073, "mup_width_scale": 0.25},
    )
    model.init_weights()  # again, now that the output layer is tied
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.073 if "wte" in name else 0.073 * 0.5
            std = std / 6**0.5 if "c_proj" in name else std
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_lora_finds_its_targets_by_the_model_type(tiny):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny, peft.LoraConfig(r=3, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}
    assert {tuple(name.split(".")[5:7]) for name in trained} == {tuple(name.split(".")) for name in expected}
    output = model(input_ids=(ids := array("tiny", "input_ids")), labels=ids)
    assert largest_difference(output.logits, array("tiny", "logits")) < TOLERANCE
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in trained and "lora_B" in n)


# Files


def test_state_has_the_published_names_and_shapes(tiny, directories):
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.state_dict().items()}
    published = tensor_shapes(read_published_config(directories["tiny"] / "config.json"))
    assert shapes == published | {"lm_head.weight": (512, 64)}
    assert tiny.lm_head.weight is tiny.transformer.wte.weight


def test_tensors_of_other_writers_are_tolerated_and_missing_ones_named(directories, tmp_path):
    directory = make_directory(tmp_path / "foreign", "tiny")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["transformer.relative_pe.slopes"] = torch.full((4, 1), 9.0)
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model, loaded = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not any(loaded.values()), loaded
    with torch.no_grad():
        assert largest_difference(model(array("tiny", "input_ids")).logits, array("tiny", "logits")) < TOLERANCE
    del tensors["transformer.h.1.mlp.c_fc2.weight"], tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model, loaded = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert set(loaded["missing_keys"]) == {"transformer.h.1.mlp.c_fc2.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading_again_changes_no_bit(directories, name, tmp_path):
    model = load(directories[name])
    model.save_pretrained(tmp_path)
    for path in REMOTE_CODE.glob("*_btlm.py"):
        assert (tmp_path / path.name).read_text() == path.read_text()
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (directories[name], tmp_path))
    assert again["auto_map"] == first["auto_map"]
    assert read_published_config(tmp_path / "config.json") == read_published_config(directories[name] / "config.json")
    state = load(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_model_without_its_output_layer_loads_too(directories):
    model = AutoModel.from_pretrained(directories["tiny"], trust_remote_code=True)
    with torch.no_grad():
        hidden_BTD = model(array("tiny", "input_ids")).last_hidden_state
    assert type(model).__name__ == "BTLMModel"
    assert largest_difference(hidden_BTD @ model.wte.weight.T * 0.222, array("tiny", "logits")) < TOLERANCE


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_maps(directories, device_map):
    model = AutoModelForCausalLM.from_pretrained(directories["tiny"], trust_remote_code=True, device_map=device_map)
    assert torch.equal(greedy(model, array("tiny", "greedy")[:, :16]), array("tiny", "greedy"))


def test_resizing_the_vocabulary_keeps_the_tie(tiny):
    tiny.resize_token_embeddings(520, mean_resizing=False)
    assert tiny.lm_head.weight is tiny.transformer.wte.weight and tiny.config.vocab_size == 520
    ids_BT = array("tiny", "input_ids")
    with torch.no_grad():
        logits_BTV = tiny(ids_BT, labels=ids_BT).logits
    assert logits_BTV.shape == (2, 100, 520)
    assert largest_difference(logits_BTV[:, :, :512], array("tiny", "logits")) < TOLERANCE


# Settings


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu_new"},
        {"position_embedding_type": "learned"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_head": 5},
        {"alibi_scaling": {"type": "linear", "train_seq_len": 0}},
        {"alibi_scaling": {"type": "linear", "factor": 2.0, "train_seq_len": 8192}},
        {"alibi_scaling": {"type": "dynamic", "factor": 2.0}},
        {"alibi_scaling": {"type": "linear", "factor": "4"}},
        {"alibi_scaling": {"type": "linear", "factor": 0.0}},
        {"alibi_scaling": 4.0},
    ],
    ids=lambda change: "-".join(map(str, *change.items())).replace(" ", ""),
)
def test_what_is_not_computed_is_refused(directories, tmp_path, change):
    directory = make_directory(tmp_path / "changed", "tiny")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load(directory)


@pytest.mark.parametrize("key", ["activation_function", "position_embedding_type"])
def test_a_key_left_out_has_the_published_value_which_is_refused(directories, tmp_path, key):
    directory = make_directory(tmp_path / "changed", "tiny")
    config = json.loads((directory / "config.json").read_text())
    del config[key]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key):
        load(directory)


def test_n_inner_left_out_is_4_n_embd(directories):
    model = small_model(directories["tiny"], n_inner=None)
    assert tuple(model.transformer.h[0].mlp.c_fc2.weight.shape) == (8, 32)


def test_alibi_scaling_can_be_set_on_a_loaded_model(tiny):
    with torch.no_grad():
        before_BTV = tiny(ids_BT := array("tiny", "input_ids")).logits
        tiny.config.alibi_scaling = {"type": "linear", "factor": 4}
        assert largest_difference(tiny(ids_BT).logits, before_BTV) > 0.01
        tiny.config.alibi_scaling = {"type": "linear", "factor": 1}
        assert torch.equal(tiny(ids_BT).logits, before_BTV)
    tiny.config.alibi_scaling = "linear"
    with pytest.raises(ValueError, match="alibi_scaling='linear' is not supported"):
        tiny(ids_BT)


def test_files_need_nothing_but_torch_and_transformers(directories):
    for path in REMOTE_CODE.glob("*_btlm.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"math", "torch"}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in ("torch", "transformers")
    published = {"BTLMConfig", "BTLMModel", "BTLMLMHeadModel", "BTLMPreTrainedModel"}
    for name in published - {"BTLMConfig"}:
        assert get_class_from_dynamic_module(f"modeling_btlm.{name}", str(directories["tiny"])).__name__ == name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # PyTorch's own use of it
def test_torch_compile_equals_eager(tiny):
    compiled = torch.compile(tiny, fullgraph=True)
    for length in (60, 77):
        ids_BT = array("tiny", "input_ids")[:, :length]
        with torch.no_grad():
            assert largest_difference(compiled(ids_BT).logits, tiny(ids_BT).logits) < 1e-5
