"""Training the text encoder the way CLIP's was: captions and images that belong together are pulled together.

Letters: B batch, L = 77 tokens, D context width, E width of the shared space.

The image tower is a small convolutional network over the frozen autoencoder's latents and is thrown away afterwards.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.clip import CLIPTextEncoder
from ldm.tokenizer import Tokenizer


class CaptionTokens:
    """The token ids of all phrasings, tokenised once; one phrasing of each image is drawn per step."""

    def __init__(self, captions: Sequence[tuple[str, ...]], tokenizer: Tokenizer) -> None:
        distinct = sorted({text for phrasings in captions for text in phrasings})
        number = {text: i for i, text in enumerate(distinct)}
        self.texts = distinct
        tokenizer.say_cut(distinct)
        self.ids = tokenizer(distinct)  # (captions, 77)
        self.choices = [np.array([number[text] for text in phrasings]) for phrasings in captions]

    def draw(self, images: np.ndarray, seed: int, step: int) -> Tensor:
        """The caption number of each image of a step, (B,) int64."""
        rng = np.random.default_rng([seed, step, 1])
        return torch.from_numpy(np.array([rng.choice(self.choices[i]) for i in images]))


class ContrastiveModel(nn.Module):
    """The two towers and the temperature: `clip` is the encoder to keep."""

    def __init__(self, clip: CLIPTextEncoder, latent_shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, height, breadth = latent_shape
        self.clip = clip
        self.text_projection = nn.Linear(clip.config.width, width, bias=False)
        layers: list[nn.Module] = []
        for c_in, c_out in ((channels, width), (width, width), (width, width)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.image_tower = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(width * (height // 8) * (breadth // 8), width)
        )
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def forward(self, latents: Tensor, ids: Tensor) -> Tensor:
        """latents: (B, 4, h, w), ids: (C, 77) -> (B, C) logits: scaled cosine of each image and each caption.

        As in CLIP the caption is read off at its end token, the first one of the padding.
        """
        hidden = self.clip(ids)
        end = (ids == ids[0, -1]).int().argmax(dim=1)
        texts = F.normalize(self.text_projection(hidden[torch.arange(len(ids), device=ids.device), end]), dim=-1)
        images = F.normalize(self.image_tower(latents), dim=-1)
        return self.log_scale.clamp(max=np.log(100.0)).exp() * images @ texts.T


def contrastive_loss(model: ContrastiveModel, latents: Tensor, captions: Tensor, tokens: CaptionTokens) -> Tensor:
    """Cross entropy both ways: which caption belongs to this image, which image to this caption.

    A caption that a batch holds several times needs no special care: its copies have equal logits, so the loss is the
    same as if every matching pair were a target  [compare Yang et al. 2022, "UniCL", eq. 3-5].

    Args:    latents: (B, 4, h, w), where the model is.  captions: (B,) caption numbers.
    """
    present, place = captions.unique(return_inverse=True)
    ids = tokens.ids[present].to(latents.device)
    logits = model(latents, ids)[:, place.to(latents.device)]  # (B, B): image i, caption of image j
    own = torch.arange(len(logits), device=latents.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def initialise(clip: CLIPTextEncoder) -> None:
    """CLIP's initialisation: small embeddings, projections scaled by width and depth. [Radford et al. 2021, code]"""
    width, layers = clip.config.width, clip.config.layers
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=0.01)
    for name, p in clip.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            nn.init.normal_(p, std=width**-0.5)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            nn.init.normal_(p, std=width**-0.5 * (2 * layers) ** -0.5)
        elif name.endswith("fc1.weight"):
            nn.init.normal_(p, std=(2 * width) ** -0.5)
        elif name.endswith(("proj.bias", "fc1.bias", "fc2.bias")):
            nn.init.zeros_(p)
