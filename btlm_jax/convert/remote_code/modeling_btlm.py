"""BTLM for Hugging Face transformers: GPT-2's blocks with ALiBi, SwiGLU and maximal update parametrization.

Axes: B batch, T queries, S keys, N heads, H head dim, D model dim, V vocabulary.
Nothing here is a buffer: transformers 5 builds models without memory, and leaves what no file holds uninitialized.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .attention_btlm import alibi_slopes, eager_attention, sdpa_attention
from .configuration_btlm import BTLMConfig

logger = logging.get_logger(__name__)

# The name that outputs have for the keys and values so far: transformers 5.24 changed it. Arguments have either here.
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class BTLMAttention(nn.Module):
    """Causal attention with ALiBi over all keys so far."""

    def __init__(self, config: BTLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.writes_residual = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD, *, queries_T, mask_BNTS, slopes_BN, past_key_values, implementation):
        """Return the output [B, T, D] and, from "eager" only, the weights [B, N, T, S]."""
        B, T, D = x_BTD.shape
        heads = (B, T, self.config.n_head, self.config.head_dim)
        q_BNTH, k_BNSH, v_BNSH = (part.view(heads).transpose(1, 2) for part in self.c_attn(x_BTD).split(D, dim=2))
        if past_key_values is not None:
            # Of transformers 4, a static cache must be told where they belong; transformers 5 knows.
            told = {"cache_position": queries_T}
            k_BNSH, v_BNSH = past_key_values.update(k_BNSH, v_BNSH, self.layer_idx, cache_kwargs=told)
        S = k_BNSH.shape[2]
        if mask_BNTS.shape[3] < S:  # a static cache has room for keys that are yet to come: all are later
            mask_BNTS = F.pad(mask_BNTS, (0, S - mask_BNTS.shape[3]), value=mask_BNTS.dtype == torch.bool)
        settings = {
            "queries_T": queries_T,
            "mask_BNTS": mask_BNTS,
            "slopes_BN": slopes_BN,
            "scale": self.config.attention_scale,
            "dropout": self.config.attn_pdrop if self.training else 0.0,
        }
        if implementation == "eager":
            output_BNTH, weights_BNTS = eager_attention(q_BNTH, k_BNSH, v_BNSH, **settings)
        else:
            output_BNTH, weights_BNTS = sdpa_attention(q_BNTH, k_BNSH, v_BNSH, **settings), None
        output_BTD = self.c_proj(output_BNTH.transpose(1, 2).reshape(B, T, D))
        return self.resid_dropout(output_BTD), weights_BNTS


class BTLMMLP(nn.Module):
    """SwiGLU: c_proj(c_fc(x) * silu(c_fc2(x)))."""

    def __init__(self, config: BTLMConfig):
        super().__init__()
        self.c_fc = Conv1D(config.inner_dim, config.n_embd)
        self.c_fc2 = Conv1D(config.inner_dim, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.inner_dim)
        self.c_proj.writes_residual = True
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD):
        """Return [B, T, D]."""
        return self.dropout(self.c_proj(self.c_fc(x_BTD) * F.silu(self.c_fc2(x_BTD))))


class BTLMBlock(GradientCheckpointingLayer):
    """Attention and MLP, each on a LayerNorm of the residual, each added to it."""

    def __init__(self, config: BTLMConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = BTLMAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = BTLMMLP(config)

    def forward(self, x_BTD, *, queries_T, mask_BNTS, slopes_BN, past_key_values, implementation):
        """Return the residual [B, T, D] and attention's weights or None."""
        output_BTD, weights_BNTS = self.attn(
            self.ln_1(x_BTD),
            queries_T=queries_T,
            mask_BNTS=mask_BNTS,
            slopes_BN=slopes_BN,
            past_key_values=past_key_values,
            implementation=implementation,
        )
        x_BTD = x_BTD + output_BTD
        return x_BTD + self.mlp(self.ln_2(x_BTD)), weights_BNTS


class BTLMPreTrainedModel(PreTrainedModel):
    """What transformers must know about BTLM models: names, abilities, initialization."""

    config_class = BTLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["BTLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Buffers that the published code once saved; slopes are computed here, in float32 whatever the model's dtype.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$", r"relative_pe\.slopes$"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # every forward reads it from the config

    def _chosen(self, **choice) -> bool:
        """Return the one named value, or the config's where it is None."""
        [(key, value)] = choice.items()
        return getattr(self.config, key) if value is None else value

    def _init_weights(self, module):
        """Initialize a leaf by the published rule; transformers 5 does not call this for containers."""
        config = self.config
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, (nn.Linear, Conv1D)):
            depth = math.sqrt(2 * config.n_layer) if getattr(module, "writes_residual", False) else 1.0
            nn.init.normal_(module.weight, std=config.matrix_init_std / depth)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class BTLMModel(BTLMPreTrainedModel):
    """The network without its output layer."""

    def __init__(self, config: BTLMConfig):
        config.check_computed()
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([BTLMBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """Return the token embedding."""
        return self.wte

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.wte = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        cache_position=None,
        position_ids=None,
        token_type_ids=None,
        **kwargs,
    ):
        """Return the final LayerNorm's output [B, T, D].

        Args:
          input_ids: [B, T]; or else inputs_embeds [B, T, D], as `wte` gives them.
          attention_mask: None; [B, past + T], 0 for keys not to see; or [B, 1 or N, T, past + T], boolean (whether a
            query sees a key) or numbers to add to the scores. Later keys are never seen.
          past_key_values, or cache: a transformers Cache; use_cache: whether to return one.
          cache_position: [T], the queries' places among the keys; None for those after the cache's.
          position_ids: [B, T]; ALiBi has distances alone, so they must count up by one where the mask is 1.
          token_type_ids: [B, T], all 0: BTLM has no segments.
          kwargs: what other models of transformers take; a name that is given a value is warned of once.
          output_attentions: also return each block's weights, which "sdpa" computes as "eager" does.
          output_hidden_states: also return the embeddings and each block's output, the last one normalized.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        past_key_values = cache if past_key_values is None else past_key_values
        _check_positions(position_ids, attention_mask, token_type_ids, past_key_values)
        _warn_of_unused(kwargs)
        x_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        x_BTD = self.drop(x_BTD * self.config.mup_embeddings_scale)
        if past_key_values is None and self._chosen(use_cache=use_cache):
            if not (self.gradient_checkpointing and self.training):
                past_key_values = DynamicCache()
        wants_hidden = self._chosen(output_hidden_states=output_hidden_states)
        wants_weights = self._chosen(output_attentions=output_attentions)
        settings = self._attention_settings(x_BTD, attention_mask, past_key_values, cache_position)
        if wants_weights:
            settings["implementation"] = "eager"
        hidden_states, attentions = [], []
        for block in self.h:
            if wants_hidden:
                hidden_states.append(x_BTD)
            x_BTD, weights_BNTS = block(x_BTD, past_key_values=past_key_values, **settings)
            attentions.append(weights_BNTS)
        x_BTD = self.ln_f(x_BTD)
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            hidden_states=(*hidden_states, x_BTD) if wants_hidden else None,
            attentions=tuple(attentions) if wants_weights else None,
            **{CACHE_FIELD: past_key_values},
        )
        return output if self._chosen(return_dict=return_dict) else output.to_tuple()

    def _attention_settings(self, x_BTD, attention_mask, past_key_values, cache_position) -> dict:
        """Return what all blocks' attention shares, made once."""
        implementation = self.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(f'attn_implementation={implementation!r} is not supported; use "sdpa" or "eager"')
        B, T, _ = x_BTD.shape
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        # A new tensor: a static cache counts its keys in place, block by block.
        queries_T = torch.arange(T, device=x_BTD.device) + num_past if cache_position is None else cache_position
        slopes = alibi_slopes(self.config.n_head, factor=self.config.alibi_factor)
        slopes_BN = torch.tensor([slopes], dtype=torch.float32, device=x_BTD.device)
        mask_BNTS = self._mask(attention_mask, x_BTD, num_past)
        if self.config.alibi_train_len:
            slopes_BN = slopes_BN / self._dynamic_factor(mask_BNTS, queries_T)[:, None]
        return {
            "queries_T": queries_T,
            "mask_BNTS": mask_BNTS,
            "slopes_BN": slopes_BN,
            "implementation": implementation,
        }

    def _mask(self, attention_mask, x_BTD, num_past):
        """Return [B, N, T, S], or 1 in place of B, N or T: which keys are seen, or what is added to the scores."""
        if attention_mask is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x_BTD.device)  # attention continues it with True
        B, T, _ = x_BTD.shape
        shape, is_too_short = tuple(attention_mask.shape), False
        if isinstance(num_past, int):
            is_too_short = shape[-1] < num_past + T
        if len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, self.config.n_head) and shape[2] == T:
            if not is_too_short:
                is_number = attention_mask.is_floating_point()
                return attention_mask.to(x_BTD.device, torch.float32 if is_number else torch.bool)
        elif len(shape) == 2 and not is_too_short:
            return attention_mask.to(x_BTD.device, torch.bool)[:, None, None]
        raise ValueError(
            f"attention_mask of shape {shape} is not [batch, keys] or [batch, 1 or heads, {T}, keys] with all of the "
            f"{num_past} + {T} keys so far"
        )

    def _dynamic_factor(self, mask_BNTS, queries_T):
        """Return what each row's slopes are divided by, [B]: its keys so far, without padding, over the trained."""
        keys_S = torch.arange(mask_BNTS.shape[3], device=mask_BNTS.device)
        num_keys = queries_T[-1] + 1
        if mask_BNTS.shape[3] == 1:  # no mask was given
            num_keys_B = num_keys[None]
        else:
            is_key_BNTS = (
                mask_BNTS if mask_BNTS.dtype == torch.bool else mask_BNTS > torch.finfo(mask_BNTS.dtype).min / 2
            )
            num_keys_B = (is_key_BNTS.any(dim=2).any(dim=1) & (keys_S < num_keys)).sum(dim=1)
        return (num_keys_B.float() / self.config.alibi_train_len).clamp(min=1.0)


def _check_positions(position_ids, attention_mask, token_type_ids, past_key_values) -> None:
    """Check, where their values can be read, that positions and segments say nothing that is not computed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if token_type_ids is not None and not token_type_ids.is_meta and token_type_ids.any():
        raise ValueError("token_type_ids other than 0 are not supported: BTLM has no segments")
    if position_ids is None or position_ids.is_meta or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return
    is_wrong_BT = position_ids.diff(dim=1) != 1
    if attention_mask is not None:
        # A static cache's mask is as wide as the cache.
        begin = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        end = begin + position_ids.shape[1]
        if attention_mask.ndim != 2 or attention_mask.shape[1] < end:
            return  # a mask [., T, S] says itself which keys a query sees
        is_seen_BT = attention_mask[:, begin:end].bool().to(position_ids.device)
        is_wrong_BT = is_wrong_BT & is_seen_BT[:, 1:] & is_seen_BT[:, :-1]
    if is_wrong_BT.any():
        raise ValueError(
            "position_ids that do not count up by one are not supported: ALiBi has distances alone; to keep documents "
            "of one row apart, give an attention_mask [batch, 1, queries, keys]"
        )


def _warn_of_unused(kwargs: dict) -> None:
    names = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    if names and not torch.compiler.is_compiling():
        logger.warning_once(f"BTLM does not use {', '.join(names)}")


class BTLMLMHeadModel(BTLMPreTrainedModel, GenerationMixin):
    """The network with its output layer, which is the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    accepts_loss_kwargs = True  # the Trainer's num_items_in_batch

    def __init__(self, config: BTLMConfig):
        super().__init__(config)
        self.transformer = BTLMModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_input_embeddings(self):
        """Return the token embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.transformer.wte = value

    def get_output_embeddings(self):
        """Return the output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        """Replace the output layer."""
        self.lm_head = new_embeddings

    @staticmethod
    def create_masks_for_generate(attention_mask, past_key_values=None, cache=None, **_):
        """Keep generate's mask [B, keys so far] as [B, S] of a static cache: transformers' has no place for ALiBi."""
        if attention_mask is None or attention_mask.ndim != 2:
            return attention_mask
        static = cache if past_key_values is None else past_key_values
        return F.pad(attention_mask, (0, static.layers[0].max_cache_len - attention_mask.shape[1]), value=1)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        cache=None,
        cache_position=None,
        position_ids=None,
        token_type_ids=None,
        **kwargs,
    ):
        """Return logits [B, T, V], and the mean loss of labels [B, T] (-100: none), each predicted by the one before.

        Args:
          logits_to_keep: how many positions at the end have logits, or which ones (a tensor); 0 for all.
          num_items_in_batch: what the sum of losses is divided by, instead of their number.
          The rest: as BTLMModel's.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept]) * self.config.output_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE_FIELD: output[CACHE_FIELD] if CACHE_FIELD in output else None},
        )
        return output if self._chosen(return_dict=return_dict) else output.to_tuple()


class BTLMForSequenceClassification(BTLMPreTrainedModel):
    """The network with a linear layer on the last token of each sequence that is not padding."""

    def __init__(self, config: BTLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = BTLMModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """Return the token embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.transformer.wte = value

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, return_dict=None, **kwargs):
        """Return logits [B, labels], and the loss of labels [B] or [B, labels] (by config.problem_type).

        The last token is that of attention_mask [B, T]; without it, the one before trailing config.pad_token_id.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        x_BTD = output.last_hidden_state
        B, T, _ = x_BTD.shape
        if attention_mask is not None and attention_mask.ndim == 2:
            is_token_BT = attention_mask.bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_token_BT = input_ids != self.config.pad_token_id
        else:
            is_token_BT = torch.ones(B, T, dtype=torch.bool, device=x_BTD.device)
        last_B = (torch.arange(T, device=x_BTD.device) * is_token_BT.to(x_BTD.device)).argmax(dim=1)
        logits_BC = self.score(x_BTD[torch.arange(B, device=x_BTD.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BC, labels=labels, pooled_logits=logits_BC, config=self.config)
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits_BC, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return output if self._chosen(return_dict=return_dict) else output.to_tuple()
