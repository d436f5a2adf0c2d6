"""Causal attention with ALiBi for PyTorch: by the definition, in chunks of queries, and without any mask.

Axes: B batch, T queries, C a chunk of queries, S keys, N heads, H head dim, E extra dims.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

QUERY_CHUNK = 1024  # queries, over all rows of the batch, whose float mask [., N, C, S] exists at once
MASKED = 30_000.0  # a masked key scores -MASKED**2 * scale; representable in float16


def alibi_slopes(num_heads: int, *, factor: float) -> list[float]:
    """Return each head's slope over factor: arXiv:2108.12409, section 3, and its code for other than powers of 2."""

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(power) + geometric(2 * power)[0::2][: num_heads - power]
    return [slope / factor for slope in slopes]


def alibi_mask(queries_T, mask_BNTS, slopes_BN, *, dtype):
    """Return [B, N, T, S]: -slope * (i - j), and the lowest number where key j is later than query i or masked.

    mask_BNTS is boolean, or numbers to add; slopes and mask may have 1 in the place of B, N or T. The lowest number and
    not -inf: a row without any key is uniform instead of NaN.
    """
    keys_S = torch.arange(mask_BNTS.shape[3], device=mask_BNTS.device)
    distance_TS = queries_T[:, None] - keys_S[None, :]
    bias_BNTS = -slopes_BN[:, :, None, None] * distance_TS
    lowest = torch.finfo(dtype).min
    if mask_BNTS.dtype == torch.bool:
        return bias_BNTS.to(dtype).masked_fill(~((distance_TS >= 0) & mask_BNTS), lowest)
    bias_BNTS = (bias_BNTS + mask_BNTS).clamp(min=lowest).to(dtype)
    return bias_BNTS.masked_fill(distance_TS < 0, lowest)


def eager_attention(q_BNTH, k_BNSH, v_BNSH, *, queries_T, mask_BNTS, slopes_BN, scale, dropout):
    """Return the outputs [B, N, T, H] and the weights [B, N, T, S]; bias and softmax in float32."""
    scores_BNTS = torch.matmul(q_BNTH, k_BNSH.transpose(2, 3)).float() * scale
    scores_BNTS = scores_BNTS + alibi_mask(queries_T, mask_BNTS, slopes_BN, dtype=torch.float32)
    weights_BNTS = F.dropout(scores_BNTS.softmax(dim=3).to(v_BNSH.dtype), p=dropout)
    return torch.matmul(weights_BNTS, v_BNSH), weights_BNTS


def chunked_attention(q_BNTH, k_BNSH, v_BNSH, *, queries_T, mask_BNTS, slopes_BN, scale, dropout):
    """Return [B, N, T, H]; a mask exists for one chunk of queries at a time, and is made again for gradients."""

    def attend(q_BNCH, queries_C, mask_BNCS, num_seen: int):
        return F.scaled_dot_product_attention(
            q_BNCH,
            k_BNSH[:, :, :num_seen],
            v_BNSH[:, :, :num_seen],
            attn_mask=alibi_mask(queries_C, mask_BNCS[..., :num_seen], slopes_BN, dtype=q_BNCH.dtype),
            dropout_p=dropout,
            scale=scale,
        )

    rows = max(mask_BNTS.shape[0], slopes_BN.shape[0])
    num_unseen, chunk = q_BNTH.shape[2], max(1, QUERY_CHUNK // rows)
    queries_chunks = queries_T.split(chunk)
    is_shared = mask_BNTS.shape[2] == 1  # one mask of keys for all queries
    masks = [mask_BNTS] * len(queries_chunks) if is_shared else mask_BNTS.split(chunk, dim=2)
    outputs = []
    for q_BNCH, queries_C, mask_BNCS in zip(q_BNTH.split(chunk, dim=2), queries_chunks, masks, strict=True):
        num_unseen -= q_BNCH.shape[2]  # the queries of later chunks: so many keys at the end, at least, are later too
        arguments = (q_BNCH, queries_C, mask_BNCS, k_BNSH.shape[2] - num_unseen)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(attend, *arguments, use_reentrant=False))
        else:
            outputs.append(attend(*arguments))
    return torch.cat(outputs, dim=2)


def folded_attention(q_BNTH, k_BNSH, v_BNSH, *, mask_BS, slopes_BN, scale, dropout):
    """Return [B, N, T, H] of T queries over the same T keys, by the kernels for plain causal attention.

    -slope * (i - j) is slope * j plus what a whole row shares, which softmax does not see; q.k gets slope * j from
    extra dims. There slope / scale is split into two numbers and j into three digits, so that bfloat16 and float16
    hold all of it; the products are summed in float32. Against a float mask: as exact, and no mask is made or kept.
    """
    B, N, T, H = q_BNTH.shape
    dtype, device = q_BNTH.dtype, q_BNTH.device
    place_3 = torch.tensor([256.0, 256.0, 1.0], device=device)  # the first digit's other 256 is in the digit itself
    j_S = torch.arange(T, device=device)
    digits_S3 = torch.stack([j_S // 65536 * 256, j_S // 256 % 256, j_S % 256], dim=1)
    slopes_BN = slopes_BN / scale
    high_BN = slopes_BN.to(dtype).float()
    slopes_BN6 = torch.cat([high_BN[..., None] * place_3, (slopes_BN - high_BN)[..., None] * place_3], dim=2)
    masking = slopes_BN.new_tensor([MASKED, 0.0]).expand(*slopes_BN.shape, 2)
    q_BNE = torch.cat([slopes_BN6, masking], dim=2)
    masked_BS1 = torch.where(mask_BS, 0.0, -MASKED)[:, :, None]
    digits_BS6 = digits_S3.repeat(1, 2).float().expand(mask_BS.shape[0], T, 6)
    k_BSE = torch.cat([digits_BS6, masked_BS1, torch.zeros_like(masked_BS1)], dim=2)
    output_BNTE = F.scaled_dot_product_attention(
        torch.cat([q_BNTH, q_BNE.to(dtype)[:, :, None].expand(B, N, T, 8)], dim=3),
        torch.cat([k_BNSH, k_BSE.to(dtype)[:, None].expand(B, N, T, 8)], dim=3),
        F.pad(v_BNSH, (0, 8)),  # the fast kernels want one head dim for all
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
    )
    return output_BNTE[..., :H]


def sdpa_attention(q_BNTH, k_BNSH, v_BNSH, *, queries_T, mask_BNTS, slopes_BN, scale, dropout):
    """Return the outputs [B, N, T, H] by PyTorch's kernels: folded if T == S and q.k is summed in a wider type.

    float32 has no wider type and would lose 3 digits at 8,192 keys.
    """
    is_half = q_BNTH.dtype in (torch.bfloat16, torch.float16) and q_BNTH.device.type in ("cpu", "cuda")
    settings = {"slopes_BN": slopes_BN, "scale": scale, "dropout": dropout}
    is_of_keys = mask_BNTS.dtype == torch.bool and mask_BNTS.shape[1:3] == (1, 1)
    if is_half and is_of_keys and 1 < q_BNTH.shape[2] == k_BNSH.shape[2]:
        return folded_attention(q_BNTH, k_BNSH, v_BNSH, mask_BS=mask_BNTS[:, 0, 0], **settings)
    return chunked_attention(q_BNTH, k_BNSH, v_BNSH, queries_T=queries_T, mask_BNTS=mask_BNTS, **settings)
