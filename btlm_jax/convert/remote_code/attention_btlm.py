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


def alibi_mask(queries_T, mask_BS, slopes_N, *, dtype):
    """Return [B, N, T, S]: -slope * (i - j), and the lowest number where key j is later than query i or masked.

    The lowest number and not -inf: a row without any key is uniform instead of NaN.
    """
    keys_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    distance_TS = queries_T[:, None] - keys_S[None, :]
    bias_NTS = -slopes_N[:, None, None] * distance_TS
    is_seen_BTS = (distance_TS >= 0)[None] & mask_BS[:, None, :]
    return bias_NTS[None].to(dtype).masked_fill(~is_seen_BTS[:, None], torch.finfo(dtype).min)


def eager_attention(q_BNTH, k_BNSH, v_BNSH, *, queries_T, mask_BS, slopes_N, scale, dropout):
    """Return the outputs [B, N, T, H] and the weights [B, N, T, S]; bias and softmax in float32."""
    scores_BNTS = torch.matmul(q_BNTH, k_BNSH.transpose(2, 3)).float() * scale
    scores_BNTS = scores_BNTS + alibi_mask(queries_T, mask_BS, slopes_N, dtype=torch.float32)
    weights_BNTS = F.dropout(scores_BNTS.softmax(dim=3).to(v_BNSH.dtype), p=dropout)
    return torch.matmul(weights_BNTS, v_BNSH), weights_BNTS


def chunked_attention(q_BNTH, k_BNSH, v_BNSH, *, queries_T, mask_BS, slopes_N, scale, dropout):
    """Return [B, N, T, H]; a mask exists for one chunk of queries at a time, and is made again for gradients."""

    def attend(q_BNCH, queries_C, num_seen: int):
        return F.scaled_dot_product_attention(
            q_BNCH,
            k_BNSH[:, :, :num_seen],
            v_BNSH[:, :, :num_seen],
            attn_mask=alibi_mask(queries_C, mask_BS[:, :num_seen], slopes_N, dtype=q_BNCH.dtype),
            dropout_p=dropout,
            scale=scale,
        )

    num_unseen, chunk = q_BNTH.shape[2], max(1, QUERY_CHUNK // mask_BS.shape[0])
    outputs = []
    for q_BNCH, queries_C in zip(q_BNTH.split(chunk, dim=2), queries_T.split(chunk), strict=True):
        num_unseen -= q_BNCH.shape[2]  # the queries of later chunks: so many keys at the end, at least, are later too
        arguments = (q_BNCH, queries_C, k_BNSH.shape[2] - num_unseen)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(attend, *arguments, use_reentrant=False))
        else:
            outputs.append(attend(*arguments))
    return torch.cat(outputs, dim=2)


def folded_attention(q_BNTH, k_BNSH, v_BNSH, *, mask_BS, slopes_N, scale, dropout):
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
    slopes_N = slopes_N / scale
    high_N = slopes_N.to(dtype).float()
    slopes_N6 = torch.cat([high_N[:, None] * place_3, (slopes_N - high_N)[:, None] * place_3], dim=1)
    q_NE = torch.cat([slopes_N6, slopes_N.new_tensor([[MASKED, 0.0]]).expand(N, 2)], dim=1)
    masked_BS1 = torch.where(mask_BS, 0.0, -MASKED)[:, :, None]
    digits_BS6 = digits_S3.repeat(1, 2).float().expand(mask_BS.shape[0], T, 6)
    k_BSE = torch.cat([digits_BS6, masked_BS1, torch.zeros_like(masked_BS1)], dim=2)
    output_BNTE = F.scaled_dot_product_attention(
        torch.cat([q_BNTH, q_NE.to(dtype)[None, :, None].expand(B, N, T, 8)], dim=3),
        torch.cat([k_BNSH, k_BSE.to(dtype)[:, None].expand(B, N, T, 8)], dim=3),
        F.pad(v_BNSH, (0, 8)),  # the fast kernels want one head dim for all
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
    )
    return output_BNTE[..., :H]


def sdpa_attention(q_BNTH, k_BNSH, v_BNSH, *, queries_T, mask_BS, slopes_N, scale, dropout):
    """Return the outputs [B, N, T, H] by PyTorch's kernels: folded if T == S and q.k is summed in a wider type.

    float32 has no wider type and would lose 3 digits at 8,192 keys.
    """
    is_half = q_BNTH.dtype in (torch.bfloat16, torch.float16) and q_BNTH.device.type in ("cpu", "cuda")
    settings = {"mask_BS": mask_BS, "slopes_N": slopes_N, "scale": scale, "dropout": dropout}
    if is_half and 1 < q_BNTH.shape[2] == k_BNSH.shape[2]:
        return folded_attention(q_BNTH, k_BNSH, v_BNSH, **settings)
    return chunked_attention(q_BNTH, k_BNSH, v_BNSH, queries_T=queries_T, **settings)
