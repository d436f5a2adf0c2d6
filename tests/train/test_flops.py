"""FLOPs by hand and as PyTorch counts them, peaks by name and by stopwatch."""

import itertools
import types

import jax
import pytest
from support.tiny import config_dict, tiny_config

from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import train_config_from
from btlm_jax.train.flops import compiler_options, flops_per_token, peak_flops


def device(kind: str):
    return types.SimpleNamespace(device_kind=kind, platform="gpu")


@pytest.mark.parametrize("seq_len", [2048, 8192])
def test_flops_of_btlm_3b_by_hand(seq_len):
    # Of each layer: q, k, v, out of 2560 x 2560; up, gate, down of 2560 x 6826.
    per_layer = 4 * 6_553_600 + 3 * 17_474_560
    matrices = 32 * per_layer + 50_257 * 2560
    # Scores and weighted values: 2 x (2 x 2560) FLOP for each of T / 2 keys, thrice with backward.
    attention = 32 * 3 * (2 * 2 * 2560 * seq_len / 2)
    model = train_config_from(config_dict("btlm_3b_8k")).model
    assert flops_per_token(model, seq_len=seq_len) == 6 * matrices + attention


def test_flops_are_those_that_pytorch_counts_in_the_published_model():
    torch, counter = pytest.importorskip("torch"), pytest.importorskip("torch.utils.flop_counter")
    pytest.importorskip("transformers")
    from btlm_jax.convert.remote_code.modeling_btlm import BTLMConfig, BTLMLMHeadModel

    model, (B, T) = tiny_config().model, (3, 28)
    published = BTLMConfig(
        vocab_size=model.vocab_size,
        n_embd=model.d_model,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.d_ff,
        activation_function="swiglu",
        position_embedding_type="alibi",
        attn_implementation="eager",
    )
    with counter.FlopCounterMode(display=False) as counted:
        BTLMLMHeadModel(published)(torch.zeros((B, T), dtype=torch.long)).logits.sum().backward()
    by_operation = {str(operation): flops for operation, flops in counted.get_flop_counts()["Global"].items()}
    attention = by_operation.pop("aten.bmm")
    # Eager attention computes the scores of all T x T pairs; the convention counts the causal half.
    assert B * T * flops_per_token(model, seq_len=T) == sum(by_operation.values()) + attention / 2


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_peak_of_known_devices(kind, flops):
    peak = peak_flops(device(kind))
    assert peak.flops == flops
    assert "data sheet" in peak.source


def test_peak_of_a_cpu_is_measured_and_shared_by_its_simulated_devices(monkeypatch):
    # A stopwatch on which every matmul of 1,280 x 1,280 takes one second.
    monkeypatch.setattr("btlm_jax.train.flops.time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    peak = peak_flops(jax.devices()[3])
    assert peak.flops == 2 * 1280**3 / 8
    assert "measured" in peak.source and "8 simulated" in peak.source


def test_measured_peak_is_possible_and_needs_no_mesh_of_its_own_device():
    with jax.set_mesh(make_mesh(devices=jax.devices(), tensor=2)):
        peak = peak_flops(jax.devices()[3])
    # All devices together: between a slow core and the fastest server there is.
    assert 1e9 < peak.flops * jax.device_count() < 1e14


def test_options_of_gpus_are_known_to_xla_and_give_way_to_xla_flags(monkeypatch):
    """The names and kinds of values; a jaxlib without CUDA knows them too."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = compiler_options(device("NVIDIA H100 80GB HBM3"))
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
    deterministic, scheduler = "xla_gpu_exclude_nondeterministic_ops", "xla_gpu_enable_latency_hiding_scheduler"
    assert options[deterministic] is True and options[scheduler] is True
    monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 --{deterministic}=false")
    assert compiler_options(device("A100")) == {k: v for k, v in options.items() if k != deterministic}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_deterministic_ops=false --{scheduler}=false")
    assert compiler_options(device("A100")).keys() == options.keys() - {deterministic, scheduler}
