"""LoRA files and embeddings: merged weights compute what diffusers and peft compute beside them."""

import json
import math

import adapter_files
import pytest
import torch
from adapter_files import diffusers_old, diffusers_peft, kohya, pair, peft_unet, targets, weight_shapes
from ldm_tools.cli import main
from networks import SMALL, small
from reference import FORWARD, Golden, bell, noise
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

import ldm
from ldm.checkpoint import CheckpointError, convert, identify, load_parts, save, sha256
from ldm.checkpoint.adapters import adapted, read_embedding, read_lora
from ldm.tokenizer import Tokenizer

GOLDEN = Golden("adapters")
IDS = torch.tensor([[49406, 320, 7590, 536, 49407] + [49407] * 72])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small reference networks in one file."""
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    save(path, {part: small(part) for part in ("clip", "vae", "unet")})
    return path


def put(path, tensors, **metadata):
    save_file({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, path, metadata)
    return path


@torch.no_grad()
def outputs(loaded):
    eps = loaded.unet(noise("unet.x", (1, 4, 16, 16)), 437, noise("unet.context", (1, 77, 64)))
    return {"eps": eps, "context": loaded.clip(IDS)[:, :8]}


def assert_is(loaded, case):
    ours = outputs(loaded)
    for name in ("eps", "context"):
        if f"{case}.{name}" in GOLDEN.names():
            assert GOLDEN.error(f"{case}.{name}", ours[name]) < FORWARD, name


def metadata_of_diffusers():
    """A LoRA of rank 4 and alpha 3, of to_k 2, which the file's metadata tells."""
    tensors = {}
    for name, shape in targets("unet", adapter_files.ATTENTION).items():
        down, up = pair(name, shape, 4)
        tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = down, up
    told = {"unet.r": 4, "unet.lora_alpha": 3, "unet.alpha_pattern": {"to_k": 2}, "unet.use_rslora": False}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(told)}


def peft_folder(path, case):
    """As PEFT wrote it, its adapter_config.json to the byte."""
    path.mkdir()
    put(path / "adapter_model.safetensors", peft_unet(4, {"to_v": 2} if case == "peft_patterns" else None))
    (path / "adapter_config.json").write_bytes(GOLDEN[f"{case}.config"].tobytes())
    return path


CASES = {
    "kohya_linear_alpha": (lambda p: put(p / "a.safetensors", kohya(3.0, convolutions=False)), 1.0),
    "kohya_no_alpha": (lambda p: put(p / "a.safetensors", kohya(None, convolutions=False, rank=4)), 0.5),
    "kohya_conv": (lambda p: put(p / "a.safetensors", kohya(3.0)), 1.0),
    "diffusers_peft": (lambda p: put(p / "a.safetensors", diffusers_peft()), 1.0),
    "diffusers_old": (lambda p: put(p / "a.safetensors", diffusers_old()), 0.7),
    "diffusers_metadata": (
        lambda p: put(p / "a.safetensors", metadata_of_diffusers()[0], **metadata_of_diffusers()[1]),
        1.0,
    ),
    "peft": (lambda p: peft_folder(p / "a", "peft"), 1.0),
    "peft_rslora": (lambda p: peft_folder(p / "a", "peft_rslora"), 1.0),
    "peft_patterns": (lambda p: peft_folder(p / "a", "peft_patterns"), 1.0),
}


def test_without_adapters_the_networks_are_the_references(base):
    assert_is(load_parts(base), "base")


@pytest.mark.parametrize("case", CASES)
def test_a_merged_lora_computes_what_the_librarys_does(base, tmp_path, case):
    write, weight = CASES[case]
    assert_is(load_parts(base, loras=[(write(tmp_path), weight)]), case)


def test_a_merged_file_is_the_merged_model(base, tmp_path):
    lora = CASES["kohya_conv"][0](tmp_path)
    convert(base, tmp_path / "merged.safetensors", layout="single", loras=[(lora, 1.0)])
    merged, loaded = load_parts(tmp_path / "merged.safetensors"), load_parts(base, loras=[(lora, 1.0)])
    assert_is(merged, "kohya_conv")
    for key, tensor in loaded.unet.state_dict().items():
        assert torch.equal(tensor, merged.unet.state_dict()[key])


def test_two_loras_add_up_and_weights_of_opposite_sign_cancel(base, tmp_path):
    lora = CASES["kohya_linear_alpha"][0](tmp_path)
    twice = load_parts(base, loras=[(lora, 0.5), (lora, 0.5)]).unet.state_dict()
    once = load_parts(base, loras=[(lora, 1.0)]).unet.state_dict()
    none = load_parts(base, loras=[(lora, 1.0), (lora, -1.0)]).unet.state_dict()
    for key, tensor in small("unet").state_dict().items():
        torch.testing.assert_close(twice[key], once[key], rtol=0, atol=2e-6)
        torch.testing.assert_close(none[key], tensor, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "other",
    [
        lambda: kohya(3.0, convolutions=False, compvis=True),
        lambda: {name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for name, t in linear().items()},
        lambda: {name.replace("lora_te_text_model_", "lora_te_"): t for name, t in linear().items()},
    ],
    ids=["CompVis modules", "lora_A in kohya's names", "text encoder without text_model"],
)
def test_other_names_for_the_same_modules_are_the_same_change(base, tmp_path, other):
    expected = load_parts(base, loras=[(put(tmp_path / "a.safetensors", linear()), 1.0)])
    loaded = load_parts(base, loras=[(put(tmp_path / "b.safetensors", other()), 1.0)])
    for network in ("unet", "clip"):
        ours, theirs = (getattr(one, network).state_dict() for one in (loaded, expected))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def linear():
    return kohya(3.0, convolutions=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_is_done_in_float32_and_rounded_once(base, tmp_path, dtype):
    lora = put(tmp_path / "a.safetensors", linear())
    exact = load_parts(base, loras=[(lora, 1.0)]).unet.state_dict()
    convert(base, tmp_path / "half.safetensors", layout="single", dtype=dtype)
    half = load_parts(tmp_path / "half.safetensors", loras=[(lora, 1.0)], dtype=torch.float32).unet.state_dict()
    for key, tensor in load_parts(base, loras=[(lora, 1.0)], dtype=dtype).unet.state_dict().items():
        assert torch.equal(tensor, exact[key].to(dtype))
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    down, up = pair(key.removesuffix(".weight"), tuple(exact[key].shape), 4)
    stored = small("unet").state_dict()[key].to(dtype).float()
    assert torch.equal(half[key], stored + 1.0 * (3.0 / 4 * (up @ down).reshape(stored.shape)))


def test_a_convolution_that_keeps_its_kernel_in_the_middle(base, tmp_path):
    name, shape = "mid_block.resnets.0.conv1", weight_shapes("unet")["mid_block.resnets.0.conv1"]
    generator = torch.Generator().manual_seed(0)
    down, mid = (torch.randn(size, generator=generator) for size in ((3, shape[1], 1, 1), (3, 3, 3, 3)))
    up = torch.randn(shape[0], 3, 1, 1, generator=generator)
    stored = f"lora_unet_{name.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    path = put(tmp_path / "a.safetensors", {f"{stored}.{end}": tensor for end, tensor in tensors.items()})
    changed = load_parts(base, loras=[(path, 2.0)]).unet
    x = torch.randn(1, shape[1], 5, 5, generator=generator)
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid, padding=1)
    change = torch.nn.functional.conv2d(through, up) * 2.0 * 1.5 / 3
    expected = small("unet").get_submodule(name)(x) + change
    torch.testing.assert_close(changed.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-4)


def test_alpha_of_nothing_is_the_rank(base, tmp_path):
    zero = {name: torch.zeros(()) if name.endswith(".alpha") else t for name, t in linear().items()}
    none = {name: t for name, t in linear().items() if not name.endswith(".alpha")}
    for name, tensors in (("a", zero), ("b", none)):
        lora = read_lora(put(tmp_path / f"{name}.safetensors", tensors))
        assert {change.scale for part in lora.changes.values() for change in part.values()} == {1.0}


def test_a_lora_is_described(tmp_path):
    lora = read_lora(put(tmp_path / "a.safetensors", kohya(3.0)))
    unet, clip = (
        len(targets("unet", (*adapter_files.LINEAR, *adapter_files.CONVOLUTIONS))),
        len(targets("clip", adapter_files.LINEAR)),
    )
    assert lora.describe() == (
        f"LoRA in kohya names, {unet} weights of the U-Net and {clip} weights of the text encoder, rank 2 to 4, "
        "scale 0.75 to 1.5"
    )


DOWN = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
UP = DOWN.replace("down.w", "up.w")
ONE = torch.zeros(1)
HALF = {DOWN: torch.zeros(4, 128, 1, 1)}
WHOLE = HALF | {UP: torch.zeros(128, 4, 1, 1)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_a.hada_w1_a": ONE}, r"a LoHa \(LyCORIS\), which is not read here"),
        ({"lora_unet_a.lokr_w1": ONE}, r"a LoKr \(LyCORIS\)"),
        ({"lora_unet_a.oft_blocks": ONE}, r"an OFT \(LyCORIS\)"),
        ({"lora_unet_a.a1.weight": ONE}, r"a GLoRA \(LyCORIS\)"),
        ({"lora_unet_a.on_input": ONE}, r"an IA3 \(LyCORIS\)"),
        ({"lora_unet_a.diff": ONE}, "weights' full differences"),
        (WHOLE | {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": ONE}, "a DoRA"),
        ({"base_model.model.a.lora_magnitude_vector": ONE}, "a DoRA"),
        ({"lora_te2_text_model_a.lora_up.weight": ONE}, "a LoRA of SDXL"),
        ({"transformer.single_transformer_blocks.0.lora_A.weight": ONE}, "a LoRA of SD3 or Flux"),
        (HALF, "half of a pair, lora_unet_mid_block"),
        (WHOLE | {"something.else": ONE}, r"1 tensors are no part of a LoRA \(something.else\)"),
        ({"fc.weight": ONE}, "no part of a LoRA .*, it is no LoRA"),
        ({f"base_model.model.a.lora_{half}.weight": ONE for half in "AB"}, "no adapter_config.json beside it"),
        (WHOLE | {DOWN.replace("lora_down.weight", "alpha"): torch.zeros(3)}, "expected one number"),
        (WHOLE | {DOWN.replace("lora_down.weight", "alpha"): torch.tensor(math.nan)}, "is nan"),
        ({DOWN: torch.zeros(4, 64, 1, 1), UP: torch.zeros(128, 4, 1, 1)}, "it is for another model"),
        ({DOWN: torch.zeros(4, 128, 1, 1), UP: torch.zeros(128, 3, 1, 1)}, "it is for another model"),
        ({name.replace("mid_block", "mid_blocks"): t for name, t in WHOLE.items()}, "1 of 1 of its modules are none"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_by_name(base, tmp_path, tensors, message):
    path = put(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        adapted(identify(base), [(path, 1.0)])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("peft_type", "LOHA"), ("bias", "all"), ("modules_to_save", ["conv_in"]), ("lora_bias", True)],
)
def test_settings_of_peft_that_compute_something_else_are_refused(tmp_path, field, value):
    folder = peft_folder(tmp_path / "a", "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=f"{field} is "):
        read_lora(folder)


def test_a_folder_without_weights_and_a_network_that_is_not_there(base, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"none of .* in this folder \(adapter_model.bin is a pickle"):
        read_lora(tmp_path / "a")
    save(tmp_path / "unet.safetensors", {"unet": small("unet")})
    with pytest.raises(CheckpointError, match=r"changes the text encoder, which .* does not have"):
        adapted(identify(tmp_path / "unet.safetensors"), [(put(tmp_path / "b.safetensors", linear()), 1.0)])


# ---------------------------------------------------------------------------------------------------------- embeddings


VECTORS = torch.from_numpy(bell("embedding/cat", (3, 64), 0.5, 0.0))


@pytest.mark.parametrize("form", ["A1111", "diffusers"])
def test_an_embeddings_word_gives_the_librarys_context(base, tmp_path, form):
    key = {"A1111": "emb_params", "diffusers": "<cat>"}[form]
    path = put(tmp_path / "<cat>.safetensors", {key: VECTORS})
    loaded = load_parts(base, embeddings=[path])
    ids = Tokenizer(vocabulary=loaded.vocabulary)(["a photo of <cat> on grass"])
    assert ids[0].tolist() == GOLDEN["embedding.ids"].tolist()
    assert GOLDEN.error("embedding.context", loaded.clip(ids)[:, :12].detach()) < FORWARD
    Tokenizer(vocabulary=loaded.vocabulary).require_rows(loaded.config.clip.vocabulary)


def test_several_words_and_a_converted_model_keep_their_rows(base, tmp_path):
    one = put(tmp_path / "<one>.safetensors", {"emb_params": VECTORS})
    two = put(tmp_path / "two.safetensors", {"<two>": VECTORS[0], "<three>": VECTORS[1:]})
    convert(base, tmp_path / "b.safetensors", layout="single", embeddings=[one, two])
    loaded = load_parts(tmp_path / "b.safetensors")
    assert loaded.vocabulary.added["<one>"] == (49408, 49409, 49410)
    assert {len(ids) for ids in loaded.vocabulary.added.values()} == {3, 1, 2}
    assert loaded.config.clip.vocabulary == 49408 + 6
    table = loaded.clip.text_model.embeddings.token_embedding.weight
    assert torch.equal(table[49408:49411], VECTORS)
    assert torch.equal(table[list(loaded.vocabulary.added["<three>"])], VECTORS[1:])


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("a.safetensors", {"emb_params": torch.zeros(1, 768)}, "its vectors have 768 numbers, .* takes 64"),
        ("a.safetensors", {"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 64)}, "an embedding for SDXL"),
        ("a.safetensors", {"emb_params": torch.zeros(1, 2, 64)}, r"has shape \(1, 2, 64\), expected vectors"),
        ("a.safetensors", {"lora.weight": torch.zeros(1, 64)}, "no embedding"),
        ("a.pt", {"emb_params": VECTORS}, "a .pt file is a pickle"),
    ],
)  # fmt: skip
def test_what_is_no_embedding_of_this_model_is_refused(base, tmp_path, name, tensors, message):
    path = put(tmp_path / name, tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        adapted(identify(base), embeddings=[path])
    assert str(path) in str(error.value)


def test_a_word_is_added_once(base, tmp_path):
    path = put(tmp_path / "<cat>.safetensors", {"emb_params": VECTORS})
    assert [e.word for e in read_embedding(path)] == ["<cat>"]
    with pytest.raises(CheckpointError, match="the word '<cat>' is there already"):
        adapted(identify(base), embeddings=[path, path])


def test_the_file_with_the_vectors_says_where_they_come_from():
    assert "peft 0.21.2" in GOLDEN.meta["made_by"]
    assert SMALL.unet.context_width == 64


# ------------------------------------------------------------------------------------------------------------ commands


def test_convert_merges_and_inspect_describes(base, tmp_path, capsys):
    lora = put(tmp_path / "a.safetensors", linear())
    word = put(tmp_path / "<cat>.safetensors", {"emb_params": VECTORS})
    adapters = ["--lora", f"{lora}:0.5", "--lora", str(lora), "--embedding", str(word)]
    assert main(["convert", str(base), str(tmp_path / "b.safetensors"), "--layout", "single", *adapters]) == 0
    merged = load_parts(base, loras=[(lora, 0.5), (lora, 1.0)], embeddings=[word])
    written = load_parts(tmp_path / "b.safetensors")
    for network in ("unet", "clip"):
        ours, theirs = (getattr(one, network).state_dict() for one in (written, merged))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert written.vocabulary.added == {"<cat>": (49408, 49409, 49410)}
    capsys.readouterr()
    assert main(["inspect", str(base), "--no-hash", *adapters]) == 0
    printed = capsys.readouterr().out
    assert f"{lora}: LoRA in kohya names" in printed
    assert "at weight 0.5" in printed
    assert "the word '<cat>', 3 tokens" in printed


@pytest.mark.parametrize("text", ["a.safetensors:much", "a.safetensors:", "a.safetensors:nan"])
def test_a_weight_that_is_no_number_is_refused(base, text, capsys):
    assert main(["inspect", str(base), "--no-hash", "--lora", text]) == 2
    assert "--lora: got" in capsys.readouterr().err


def test_a_model_knows_what_was_merged_into_it(base, tmp_path):
    lora = put(tmp_path / "a.safetensors", linear())
    word = put(tmp_path / "<cat>.safetensors", {"emb_params": VECTORS})
    plain = ldm.load(base, backend="torch")
    assert plain.weights_sha256() == sha256(base)
    changed = ldm.load(base, backend="torch", loras=[(lora, 0.5)], embeddings=[word])
    assert changed.adapters == (f"{sha256(lora)}  a.safetensors:0.5", f"{sha256(word)}  <cat>.safetensors")
    other = ldm.load(base, backend="torch", loras=[(lora, 0.6)], embeddings=[word])
    assert len({sd.weights_sha256() for sd in (plain, changed, other)}) == 3
    context = changed.encode_prompts(["a photo of <cat> on grass"])
    assert GOLDEN.error("embedding.ids", changed.tokenizer(["a photo of <cat> on grass"])[0]) == 0
    assert not torch.equal(context, other.encode_prompts(["a photo of <cat> on grass"]))


def test_a_row_without_a_word_is_refused_when_the_model_is_loaded(base, tmp_path):
    clip = {**small("clip").state_dict()}
    table = "text_model.embeddings.token_embedding.weight"
    clip[table] = torch.cat([clip[table], torch.zeros(1, 64)])
    put(tmp_path / "clip.safetensors", clip)
    with pytest.raises(ValueError, match=r"clip.safetensors: the text encoder has 49409 rows, and 1 of them \(49408\)"):
        ldm.load(tmp_path / "clip.safetensors", base=base, backend="torch")


def test_commands_take_adapters(tmp_path):
    weights = write_tiny_model(tmp_path / "tiny.safetensors")
    word = put(tmp_path / "<cat>.safetensors", {"emb_params": torch.ones(2, 16)})
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = put(
        tmp_path / "a.safetensors",
        {f"unet.{name}.lora_A.weight": torch.ones(1, 16), f"unet.{name}.lora_B.weight": torch.ones(16, 1)},
    )
    common = ["--weights", str(weights), "--steps", "2", "--guidance", "1"]
    images = {}
    for case, adapters in {
        "plain": [],
        "lora": ["--lora", str(lora)],
        "half": ["--lora", f"{lora}:0.5"],
        "both": ["--lora", str(lora), "--embedding", str(word)],
    }.items():
        out = tmp_path / case
        assert main(["generate", "--prompt", "a <cat>", "--out", str(out), *common, *adapters]) == 0
        images[case] = load_file(out / "latents.safetensors")
        record = json.loads((out / "run.json").read_text())
        assert (
            record["weights_sha256"]
            == ldm.load(
                weights,
                backend="torch",
                loras=[(lora, 0.5 if case == "half" else 1.0)] if "--lora" in adapters else [],
                embeddings=[word] if case == "both" else [],
            ).weights_sha256()
        )
    flat = {case: torch.cat([t.flatten() for t in tensors.values()]) for case, tensors in images.items()}
    assert len({tuple(values.tolist()) for values in flat.values()}) == 4
