"""The configuration of a BTLM model, for Hugging Face transformers."""

import math

from transformers import PretrainedConfig

# What modeling_btlm.py computes; the published code has more forms, which no BTLM model uses.
_COMPUTED = {
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


class BTLMConfig(PretrainedConfig):
    """Hold what a BTLM config.json says; a key that is left out has the published code's value (mostly GPT-2's).

    Because those are GPT-2's, a model made from scratch has to name `activation_function="swiglu"` and
    `position_embedding_type="alibi"`, the only ones that are computed here.

    Args:
      vocab_size: rows of the token embedding, which is also the output layer.
      n_positions: longest length trained on; nothing depends on it, since ALiBi has no table of positions.
      n_embd: model dim.
      n_layer: number of blocks.
      n_head: number of attention heads; divides n_embd.
      n_inner: hidden dim of the MLP; None for 4 n_embd.
      activation_function: "swiglu": c_proj(c_fc(x) * silu(c_fc2(x))).
      resid_pdrop, embd_pdrop, attn_pdrop: dropout of each block's two outputs, the embeddings, the attention weights.
      layer_norm_epsilon: added to the variance in every LayerNorm.
      initializer_range: standard deviation of the embedding at initialization; matrices: see `matrix_init_std`.
      scale_attn_weights, scale_attn_by_inverse_layer_idx, reorder_and_upcast_attn, add_cross_attention: forms of GPT-2
        that BTLM does not use; only the default is computed.
      use_cache: return keys and values for decoding.
      bos_token_id, eos_token_id, pad_token_id: special tokens; the end of a document is eos_token_id.
      tie_word_embeddings: the output layer is the token embedding; only True is computed.
      position_embedding_type: "alibi" (Press et al., arXiv:2108.12409).
      mup_embeddings_scale: multiplies the token embeddings.
      mup_output_alpha: logits are multiplied by mup_output_alpha * mup_width_scale.
      mup_width_scale: base width / width; also scales the matrices' initialization.
      mup_scale_qk_dot_by_d: attention scores are q.k / head dim; otherwise q.k / sqrt(head dim).
      alibi_scaling: None, or {"type": "linear", "factor": f}: divide ALiBi's slopes by f to reach f times the trained
        length (position interpolation, arXiv:2310.13017); or {"type": "linear", "train_seq_len": t}: divide them by
        keys / t in a call with more than t keys, padding not counted.
    """

    model_type = "btlm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size=50257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        n_inner=None,
        activation_function="gelu_new",
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        use_cache=True,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=None,
        tie_word_embeddings=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        position_embedding_type="learned",
        mup_embeddings_scale=1.0,
        mup_output_alpha=1.0,
        mup_width_scale=1.0,
        mup_scale_qk_dot_by_d=False,
        alibi_scaling=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.scale_attn_weights = scale_attn_weights
        self.use_cache = use_cache
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.reorder_and_upcast_attn = reorder_and_upcast_attn
        self.position_embedding_type = position_embedding_type
        self.mup_embeddings_scale = mup_embeddings_scale
        self.mup_output_alpha = mup_output_alpha
        self.mup_width_scale = mup_width_scale
        self.mup_scale_qk_dot_by_d = mup_scale_qk_dot_by_d
        self.alibi_scaling = alibi_scaling
        super().__init__(**kwargs)
        # After the base class: transformers 4 sets these itself, transformers 5 does not know them.
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.add_cross_attention = add_cross_attention

    @property
    def head_dim(self) -> int:
        """The dim of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """The hidden dim of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def attention_scale(self) -> float:
        """What q.k is multiplied with."""
        return 1 / self.head_dim if self.mup_scale_qk_dot_by_d else 1 / math.sqrt(self.head_dim)

    @property
    def output_scale(self) -> float:
        """What the logits are multiplied with."""
        return self.mup_output_alpha * self.mup_width_scale

    @property
    def matrix_init_std(self) -> float:
        """The standard deviation of a matrix at initialization; matrices that write to the residual have less."""
        return self.initializer_range * math.sqrt(self.mup_width_scale)

    @property
    def alibi_factor(self) -> float:
        """What ALiBi's slopes are always divided by; ValueError if alibi_scaling is not as above."""
        return self._alibi_scaling[0]

    @property
    def alibi_train_len(self) -> int:
        """The keys beyond which ALiBi's slopes are divided by keys / this, or 0; ValueError as `alibi_factor`."""
        return self._alibi_scaling[1]

    @property
    def _alibi_scaling(self):
        scaling = self.alibi_scaling
        if scaling is None:
            return 1.0, 0
        if isinstance(scaling, dict) and len(scaling) == 2 and scaling.get("type") == "linear":
            factor, train_len = scaling.get("factor"), scaling.get("train_seq_len")
            if type(factor) in (int, float) and 0 < factor < math.inf:
                return float(factor), 0
            if type(train_len) is int and train_len > 0:
                return 1.0, train_len
        raise ValueError(
            f"alibi_scaling={scaling!r} is not supported; give None, a fixed factor above 0, such as "
            '{"type": "linear", "factor": 4.0}, or the trained length, such as '
            '{"type": "linear", "train_seq_len": 8192}'
        )

    def check_computed(self) -> None:
        """Raise ValueError if the configuration asks for what modeling_btlm.py does not compute."""
        for key, computed in _COMPUTED.items():
            if getattr(self, key) != computed:
                raise ValueError(f"{key}={getattr(self, key)!r} is not supported; BTLM models have {key}={computed!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        _ = self.alibi_factor
