"""Attention that can be differentiated twice: plain products and a softmax in place of torch's fused kernels."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Dropout = Callable[[Tensor, float], Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dropout: Dropout,
) -> Tensor:
    """`softmax(Q K^T scale + mask) V`, as `torch.nn.functional.scaled_dot_product_attention` defines it: zero where all is masked.

    Args:
        query: `[..., L, E]`. key: `[..., S, E]`. value: `[..., S, V]`.
        attn_mask: added to the scores, or bool with false where there is no attention; broadcasts to `[..., L, S]`.
        dropout_p: probability that an attention weight is dropped.
        is_causal: position i attends to positions up to i only.
        scale: of the scores; `1 / sqrt(E)` when None.
        enable_gqa: heads (third axis from the end) of key and value are repeated to be as many as query's.
        dropout: drops the weights.

    Returns:
        `[..., L, V]`.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = torch.softmax(scores, -1) if attn_mask is None else _safe_softmax(scores)
    return (dropout(weights, dropout_p) if dropout_p > 0 else weights) @ value


def _safe_softmax(scores: Tensor) -> Tensor:
    """Zero for a row without any score, and so are its derivatives: those of a softmax of nothing would be nan."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def multi_head_attention(dropout: Dropout) -> Callable[..., Any]:
    """`torch.nn.functional.multi_head_attention_forward` that takes its attention and its dropout from here.

    torch's function calls both by names of its own module. This is the same code with other globals; torch is not changed.
    """

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs, dropout=dropout)

    def dropped(weights: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return dropout(weights, p) if training and p > 0 else weights

    names = {
        **vars(F),
        "scaled_dot_product_attention": scaled_dot_product_attention,
        "dropout": dropped,
        "has_torch_function": lambda arguments: False,  # it would call whoever intercepts it, which is us, for ever
    }
    original = F.multi_head_attention_forward
    return types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
