"""Values of another kind than expected, in every file beside the weights: a line of ours, never a traceback."""

import json
from itertools import product

import pytest
import torch
from reference import GOLDEN
from safetensors.torch import save_file
from tiny_checkpoints import FORMAT, TINY, part, single

from ldm.checkpoint import identify, layouts
from ldm.checkpoint.adapters import read_embedding, read_lora
from ldm.checkpoint.config_json import require_agreement, settings_in
from ldm.checkpoint.foreign import refuse_other_classes
from ldm.checkpoint.scheduler_json import read_scheduler, to_json
from ldm.checkpoint.vocabulary import read_vocabulary
from ldm.config import SD15_DIFFUSION

ODD = ([], {"a": 1}, "é\n", -1, 0.5, True, None, [[1]], 10**40)
PUBLISHED = json.loads((GOLDEN / "diffusers_configs.json").read_text())


def says_so(function, *arguments):
    """Calls it: it may do, or say in one line why not."""
    said = "fine"
    try:
        function(*arguments)
    except ValueError as error:  # CheckpointError is one
        said = str(error).replace("é\n", "")
    assert said
    assert "\n" not in said


@pytest.mark.parametrize("network", ["clip", "vae", "unet"])
def test_config_json(tmp_path, network):
    fields, file = PUBLISHED[layouts.FOLDERS[network]], tmp_path / "config.json"
    for name, odd in product((*fields, "text_config", "mid_block_type", "_class_name", "architectures"), ODD):
        file.write_text(json.dumps(fields | {name: odd}))
        says_so(settings_in, file, network)
        says_so(refuse_other_classes, file, fields | {name: odd})
        says_so(require_agreement, file, getattr(TINY, network))
    for whole in ([], 1, "x", None):
        file.write_text(json.dumps(whole))
        says_so(settings_in, file, network)


def test_scheduler_config_json(tmp_path):
    fields, path = json.loads(to_json(SD15_DIFFUSION)), tmp_path / "scheduler_config.json"
    for name, odd in product((*fields, "use_karras_sigmas", "thresholding"), ODD):
        path.write_text(json.dumps(fields | {name: odd}))
        says_so(read_scheduler, path)


@pytest.mark.parametrize(
    "file", ["vocab.json", "added_tokens.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_the_files_of_a_tokenizer(tmp_path, file):
    names = ("model", "added_tokens", "added_tokens_decoder", "pad_token", "<cat>")
    for name, odd in product(names, ODD):
        (tmp_path / file).write_text(json.dumps({name: odd}))
        says_so(read_vocabulary, tmp_path)
    for name, odd in product(("vocab", "merges", "type", "end_of_word_suffix"), ODD):
        (tmp_path / file).write_text(json.dumps({"model": {"type": "BPE", name: odd}, "added_tokens": [odd]}))
        says_so(read_vocabulary, tmp_path)
    (tmp_path / file).unlink()


@pytest.mark.parametrize("key", ["ldm.config", "ldm.diffusion", "ldm.added_words", "modelspec.prediction_type"])
def test_metadata(tmp_path, key):
    path = tmp_path / "a.safetensors"
    for odd in (*map(json.dumps, ODD[:5]), "{", json.dumps({"unet": 1}), json.dumps({"unet": {"heads": "x"}})):
        save_file(single(), path, metadata=FORMAT | {key: odd})
        says_so(identify, path)


def test_an_index(tmp_path):
    save_file(part("unet"), tmp_path / "model-00001-of-00001.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    for odd in ODD:
        for content in (odd, {"weight_map": odd}, {"weight_map": {"conv_in.weight": odd}}):
            path.write_text(json.dumps(content))
            says_so(identify, path)


def test_peft_settings(tmp_path):
    name = "base_model.model.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    fields = ("lora_alpha", "alpha_pattern", "use_rslora", "peft_type", "bias")
    for field, odd in product(fields, ODD):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, field: odd}))
        says_so(read_lora, tmp_path)
    plain = {key.replace("base_model.model.", "unet."): tensor for key, tensor in tensors.items()}
    for odd in ODD:
        for told in (odd, {"unet.lora_alpha": odd}, {"unet.alpha_pattern": odd}, {"unet": odd}):
            path = tmp_path / "a.safetensors"
            save_file(plain, path, metadata={"lora_adapter_metadata": json.dumps(told)})
            says_so(read_lora, path)


SHAPES = ((), (1,), (0, 4), (2, 3, 1, 1), (1, 2, 3, 4, 5))


def test_shapes_of_adapters_and_of_single_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    stem = "lora_unet_mid_block_attentions_0_proj_in."
    for down, up, alpha in product(SHAPES, SHAPES, ((), (0,), (2,))):
        tensors = {"lora_down.weight": torch.ones(down), "lora_up.weight": torch.ones(up), "alpha": torch.ones(alpha)}
        save_file({stem + end: tensor for end, tensor in tensors.items()}, path)
        says_so(read_lora, path)
    keys = ("emb_params", "<cat>", "decoder.conv_in.weight", "model.diffusion_model.out.2.weight")
    for key, shape, dtype in product(keys, SHAPES, (torch.float32, torch.float8_e4m3fn, torch.uint16)):
        save_file({key: torch.ones(shape).to(dtype), f"{key}.scale_weight": torch.ones(2)}, path)
        says_so(read_embedding, path)
        says_so(identify, path)
