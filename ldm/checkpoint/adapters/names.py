"""The names of a LoRA file: which module of which network a tensor changes, and what it is of the change.

kohya                lora_unet_down_blocks_0_attentions_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha
diffusers            unet.down_blocks.0.attentions.0....to_q.lora_A.weight, .lora_B.weight
diffusers, before    unet.down_blocks.0....attn1.processor.to_q_lora.down.weight
PEFT                 base_model.model.down_blocks.0....to_q.lora_A.weight
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from ldm.checkpoint import layouts
from ldm.checkpoint.container import CheckpointError

Role = Literal["down", "up", "mid", "alpha"]


class Place(NamedTuple):
    """part: "unet" or "clip".  module: its name in the file, without prefix.  role: what of the change it is."""

    part: str
    module: str
    role: Role


# What is no plain LoRA, by the ends of its tensors' names.
_OTHER_KINDS = (
    (r"\.hada_", "a LoHa (LyCORIS)"),
    (r"\.lokr_", "a LoKr (LyCORIS)"),
    (r"\.(oft_|boft_|oft_blocks)", "an OFT (LyCORIS)"),
    (r"\.(a1|a2|b1|b2)\.weight$|\.glora", "a GLoRA (LyCORIS)"),
    (r"\.on_input$", "an IA3 (LyCORIS)"),
    (r"\.(diff|diff_b)$", "weights' full differences (LyCORIS full)"),
    (r"\.(w_norm|b_norm)$", "trained norms (LyCORIS)"),
    (r"\.(dora_scale|lora_magnitude_vector)", "a DoRA"),
    (r"\.lora_B\.(\w+\.)?bias$|\.lora_up\.bias$", "a LoRA with biases"),
    (r"\.lora_embedding_[AB]", "a LoRA of the token embedding"),
    (r"^(lora_te2_|text_encoder_2\.)", "a LoRA of SDXL"),
    (r"^(lora_te3_|lora_transformer|transformer\.|lora_unet_(double|single|joint)_blocks)", "a LoRA of SD3 or Flux"),
    (r"^lora_prior", "a LoRA of another model"),
)

_ROLES: dict[str, Role] = {"lora_down": "down", "lora_A": "down", "down": "down", "lora_mid": "mid"}
_ROLES |= {"lora_up": "up", "lora_B": "up", "up": "up"}

_ENDS = (
    re.compile(r"(?P<module>.+)\.(?P<role>lora_down|lora_up|lora_mid|lora_A|lora_B)(\.(?!weight)[\w-]+)?\.weight"),
    re.compile(r"(?P<module>.+)\.processor\.(?P<leaf>to_\w+?)_lora\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<leaf>to_\w+?)_lora\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<module>.+?)(\.lora_linear_layer|\.lora)\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<role>alpha)"),
)

_FRONTS = (
    ("base_model.model.", None),
    ("lora_unet_", "unet"),
    ("lora_te_", "clip"),
    ("lora_te1_", "clip"),
    ("unet.", "unet"),
    ("text_encoder.", "clip"),
    ("diffusion_model.", "unet"),
)

# A text encoder's projections in diffusers' first files -> ours.
_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def place(name: str) -> Place | None:
    """Where a stored tensor belongs; None for a name of no LoRA that is known."""
    found = next((match for end in _ENDS if (match := end.fullmatch(name))), None)
    if found is None:
        return None
    module, part = found["module"], None
    for front, network in _FRONTS:
        if module.startswith(front):
            module, part = module.removeprefix(front), part or network
    part = part or ("clip" if "text_model" in module else "unet")
    if leaf := found.groupdict().get("leaf"):
        module += "." + (_TEXT_LEAVES[leaf] if part == "clip" and leaf in _TEXT_LEAVES else leaf)
    return Place(part, module, _ROLES.get(found["role"], "alpha"))


def refuse_other_kinds(path: object, names: Iterable[str]) -> None:
    """Raises CheckpointError when a file is another kind of adapter, or of another model, than SD1.5's LoRA."""
    names = list(names)
    for pattern, what in _OTHER_KINDS:
        if hits := [name for name in names if re.search(pattern, name)]:
            raise CheckpointError(
                f"{path}: {what}, which is not read here ({hits[0]}): get a plain LoRA of SD1.5, or a model that it "
                "was merged into"
            )


def module_table(part: str, weights: Iterable[str]) -> Mapping[str, str]:
    """Every way in which files write a module's name -> ours, for the modules of one network.

    weights: our names of its tensors.
    """
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    table: dict[str, str] = {}
    for module in modules:
        ways = [module, module.removesuffix(".0") if module.endswith("to_out.0") else module]
        if part == "clip":
            ways.append(module.removeprefix("text_model."))
        table |= dict.fromkeys(ways, module) | {way.replace(".", "_"): module for way in ways}
    if part == "unet":
        singles = layouts.to_single(part, (f"{module}.weight" for module in modules), unet_depth(modules))
        prefix = layouts.SINGLE_PREFIXES["unet"]
        for weight, single in singles.items():
            way = single.removeprefix(prefix).removesuffix(".weight")
            table |= {way: weight.removesuffix(".weight"), way.replace(".", "_"): weight.removesuffix(".weight")}
    return table


def unet_depth(modules: Iterable[str]) -> layouts.Depth:
    """The depth of a U-Net that our names tell."""
    names = {f"{module}." for module in modules}

    def count(pattern: str) -> int:
        found = 0
        while any(name.startswith(pattern.format(found)) for name in names):
            found += 1
        return found

    levels = count("down_blocks.{}.")
    attention = tuple(count(f"down_blocks.{level}.attentions.{{}}.") > 0 for level in range(levels))
    return layouts.Depth(levels, count("down_blocks.0.resnets.{}."), attention)
