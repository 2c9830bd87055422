"""Mistakes on the way from a prompt to its context."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import attend
from ldm.clip import MLP, CLIPTextEncoder, SelfAttention
from ldm.tokenizer import Tokenizer
from ldm_tools.traps.conventions import Conventions, replaced


def pad_token_zero(recipe: Conventions) -> Conventions:
    """Prompts padded with token 0, "!", as open_clip's tokenizer does; SD1.5 pads with the end token 49407."""

    def tokens(tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(prompts)
        after_the_first_end = (ids == tokenizer.end).cumsum(1) > 1
        return ids.masked_fill(after_the_first_end, 0)

    return replace(recipe, tokens=tokens)


def penultimate_layer(recipe: Conventions) -> Conventions:
    """The hidden state before the last layer, normalised: that is SD2's choice."""
    return replace(recipe, context=lambda clip, ids: clip.text_model.final_layer_norm(clip.hidden_states(ids)[-2]))


def no_final_norm(recipe: Conventions) -> Conventions:
    """The last hidden state without the final layer norm."""
    return replace(recipe, context=lambda clip, ids: clip.hidden_states(ids)[-1])


def pooled(recipe: Conventions) -> Conventions:
    """The embedding of the end token alone, at every position: CLIP's pooled output, meant for comparing."""

    def context(clip: CLIPTextEncoder, ids: Tensor) -> Tensor:
        states = clip(ids)
        ends = (ids == ids.max()).int().argmax(1)
        return states[torch.arange(len(ids)), ends][:, None].expand_as(states)

    return replace(recipe, context=context)


class _ErfMLP(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        assert isinstance(mlp, MLP)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))


def exact_gelu_in_clip(recipe: Conventions) -> Conventions:
    """The exact GELU in CLIP: OpenAI's weights were trained with x sigmoid(1.702 x)."""
    return replace(recipe, clip=replaced(recipe.clip, MLP, _ErfMLP))


class _SeesAhead(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        assert isinstance(attention, SelfAttention)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention
        return a.out_proj(attend(a.q_proj(x), a.k_proj(x), a.v_proj(x), a.heads, causal=False))


def no_causal_mask(recipe: Conventions) -> Conventions:
    """CLIP's tokens see those after them."""
    return replace(recipe, clip=replaced(recipe.clip, SelfAttention, _SeesAhead))


def no_positions(recipe: Conventions) -> Conventions:
    """Token embeddings without the learned vectors of their positions."""
    clip = copy.deepcopy(recipe.clip)
    clip.text_model.embeddings.position_embedding.weight.data.zero_()
    return replace(recipe, clip=clip)
