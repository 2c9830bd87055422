"""A block of one's own, through the commands: --blocks FILE.py:NAME, and a changed network written by ldm inspect."""

from pathlib import Path

import pytest
import torch
from ldm_tools import cli, own_code
from safetensors.torch import load_file
from tiny_model import write_tiny_model

import ldm
from ldm import checkpoint
from ldm.probe import surgery
from ldm.traversal.store import load_latents
from ldm.unet import UNetBlocks

MINE = """
from torch import nn
from ldm.blocks import Attention, BasicTransformerBlock
from ldm.unet import UNetBlocks

class Twice(BasicTransformerBlock):
    def __init__(self, width, heads, context_width, eps):
        super().__init__(width, heads, context_width, eps)
        self.norm_more, self.attn_more = nn.LayerNorm(width, eps), Attention(width, heads)

    def forward(self, x, context):
        return super().forward(x + self.attn_more(self.norm_more(x)), context)

blocks = UNetBlocks(transformer_block=Twice)
"""


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:blocks"


@pytest.fixture
def model(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "model.safetensors")


def generate(weights: Path, out: Path, *options: str) -> torch.Tensor:
    """The latent of two steps of the command."""
    base = ["generate", "--weights", str(weights), "--prompt", "a lung", "--steps", "2", "--guidance", "1"]
    assert cli.main([*base, "--out", str(out), *options]) == 0
    return load_latents(out / "latents.safetensors").latents["image"]


def test_a_standard_network_takes_the_block_in_and_computes_what_it_did(tmp_path, mine, model):
    plain, taken_in = generate(model, tmp_path / "a"), generate(model, tmp_path / "b", "--blocks", mine)
    # New branches end in zeros. The weights are copies now: at other addresses products may add up in another order.
    torch.testing.assert_close(taken_in, plain, rtol=0, atol=1e-5)


def test_what_was_saved_with_the_block_goes_on_with_it_and_not_without(tmp_path, mine, model, capsys):
    sd = ldm.load(model)
    blocks = own_code.load(mine, "--blocks", UNetBlocks)
    unet, _ = surgery.rebuild(sd.unet, blocks=blocks)
    with torch.no_grad():
        for block in unet.modules():
            if isinstance(block, blocks.transformer_block):
                block.attn_more.to_out[0].weight.normal_()
    saved = tmp_path / "own.safetensors"
    checkpoint.save(saved, {"clip": sd.clip, "vae": sd.vae, "unet": unet})

    assert not torch.equal(generate(saved, tmp_path / "a", "--blocks", mine), generate(model, tmp_path / "b"))
    assert cli.main(["inspect", str(saved), "--no-hash", "--blocks", mine]) == 0
    assert ", 0 missing, 0 unexpected" in capsys.readouterr().out
    for command in (["inspect", str(saved)], ["generate", "--weights", str(saved), "--prompt", "a", "--out", "x"]):
        assert cli.main(command) == 2
        assert "transformer_block=Twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mine.py", "expected FILE.py:NAME"),
        ("nowhere.py:blocks", "there is no file nowhere.py"),
        ("{mine}s", "has no 'blockss'; did you mean 'blocks'?"),
        ("{mine}:Twice", "expected FILE.py:NAME"),
        ("{folder}/mine.py:Twice", "is of type type, expected UNetBlocks"),
        ("{folder}/broken.py:blocks", "failed with ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_does_not_have_it_is_refused(tmp_path, mine, text, complaint):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="--blocks") as caught:
        own_code.load(text.format(mine=mine, folder=tmp_path), "--blocks", UNetBlocks)
    assert complaint in str(caught.value)


def test_inspect_writes_the_changed_network(tmp_path, model, capsys):
    out = tmp_path / "changed.safetensors"
    change = ["--no-hash", "--change", "transformer_depth=2", "--change", "heads=1"]
    assert cli.main(["inspect", str(model), *change, "--out", str(out)]) == 0
    assert "heads 2 -> 1: every attention's weights are carried over" in capsys.readouterr().out
    changed = ldm.load(out).unet
    assert (changed.config.transformer_depth, changed.config.heads) == (2, 1)
    before, after = load_file(model), load_file(out)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert cli.main(["inspect", str(model), "--out", str(out)]) == 2
    assert "expected --change FIELD=VALUE" in capsys.readouterr().err
