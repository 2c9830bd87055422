"""The text encoder of CLIP ViT-L/14: token ids to the U-Net's context. [Radford et al. 2021]

SD1.5 takes the last hidden state after the final layer norm, of all L = 77 tokens, padding included: neither the pooled
embedding nor the layer before (which is SD2's). Letters: B batch, D = 768 width.
"""

import torch
from torch import Tensor, nn

from ldm.blocks import attend
from ldm.config import CLIPConfig


class Embeddings(nn.Module):
    """A learned vector for each token, plus a learned vector for each position."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Causal multi-head self-attention: a token sees itself and those before."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers with quick GELU between them."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(quick_gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each normalised first and added."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.layers)])


class TextTransformer(nn.Module):
    """Embeddings, layers, final norm. A module of its own because the files' keys start with `text_model.`"""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.norm_eps)


class CLIPTextEncoder(nn.Module):
    """Token ids to context: `clip(ids)`."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """The residual stream: the embeddings, then after each layer; layers + 1 tensors (B, L, D)."""
        if ids.ndim != 2 or ids.shape[1] > self.config.tokens or ids.dtype != torch.int64:
            raise ValueError(
                f"ids: shape {tuple(ids.shape)} of {ids.dtype}, expected (B, L) of int64 with L <= {self.config.tokens}"
            )
        states = [self.text_model.embeddings(ids)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def forward(self, ids: Tensor) -> Tensor:
        """The context of a prompt: ids (B, L) int64, L <= 77 -> (B, L, D); ValueError where they do not fit."""
        return self.text_model.final_layer_norm(self.hidden_states(ids)[-1])
