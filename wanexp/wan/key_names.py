"""How the tensors of a Wan transformer are named on disk, and how to get back to the native names.

Three things vary: a prefix in front of every name, the native or the diffusers vocabulary, and the companion
tensors of fp8 files (scales). All of it is told from the names themselves, never from the name of a file.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")

# Other parts of an all-in-one file; they stand beside `model.diffusion_model.` and are not the transformer's.
FOREIGN_PREFIXES = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "vae.",
    "model_ema.",
)

SCALED_FP8_MARKER = "scaled_fp8"
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
# Scales of activations and notes of the tool that quantised: not needed to get the weights back.
# `norm_added_q` is a left-over in published diffusers checkpoints that diffusers itself ignores.
_IGNORED = re.compile(r".*(\.scale_input|\.input_scale|\.comfy_quant|\.norm_added_q\.weight)$")

# Native module -> diffusers module, outside the blocks. norm3 and norm2 swap names: diffusers counts the
# affine cross-attention norm as the second, the native code as the third (the two others have no parameters).
_OUTER = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{native}": f"attn1.{other}" for native, other in _ATTENTION.items()},
    **{f"cross_attn.{native}": f"attn2.{other}" for native, other in (_ATTENTION | _IMAGE_ATTENTION).items()},
}
_OUTER_BACK = {other: native for native, other in _OUTER.items()}
_BLOCK_BACK = {other: native for native, other in _BLOCK.items()}

_NAME = re.compile(
    r"(?P<block>blocks\.[0-9]+\.)?(?P<module>.+?)(?P<leaf>\.weight|\.bias|\.scale_weight|\.weight_scale)?"
)

# What looks like a Wan transformer but is more than one, or less: (kind, pieces of tensor names).
_UNSUPPORTED = (
    ("a LoRA", ("lora_", "lokr_", "hada_w", ".lora.")),
    ("a VACE model", ("vace_blocks.", "vace_patch_embedding.")),
    ("a speech-to-video (S2V) model", ("casual_audio_encoder.", "audio_injector.", "trainable_cond_mask.")),
    ("an Animate model", ("face_adapter.", "motion_encoder.", "pose_patch_embedding.")),
    ("a HuMo model", ("audio_proj.",)),
    ("a camera-control model", ("control_adapter.",)),
    ("a Fun-Control model", ("ref_conv.",)),
)


@dataclass(frozen=True)
class Naming:
    """The vocabulary of one checkpoint: the prefix of each name, and native or diffusers names behind it."""

    prefix: str
    diffusers: bool

    def __str__(self) -> str:
        words = "diffusers" if self.diffusers else "native"
        return f"{words} behind {self.prefix!r}" if self.prefix else words

    def to_native(self, stored_name: str) -> str:
        """Native name of a stored tensor; a name of neither vocabulary comes back as it is."""
        name = stored_name.removeprefix(self.prefix)
        return diffusers_to_native(name) if self.diffusers else name

    def is_ignored(self, stored_name: str) -> bool:
        """True for tensors that a transformer's file may hold and that are no weights of the transformer."""
        if self.prefix and stored_name.startswith(FOREIGN_PREFIXES):
            return True
        return bool(_IGNORED.fullmatch(stored_name)) or is_marker(stored_name, self.prefix)


def is_marker(stored_name: str, prefix: str) -> bool:
    """True for the tensor that marks a scaled fp8 file, behind the prefix or without it."""
    return stored_name.removeprefix(prefix) == SCALED_FP8_MARKER


def scaled_weight_of(native_name: str) -> str | None:
    """`blocks.0.ffn.0.weight` for `blocks.0.ffn.0.scale_weight` or `.weight_scale`; else None."""
    for suffix in SCALE_SUFFIXES:
        if native_name.endswith(suffix):
            return native_name.removesuffix(suffix) + ".weight"
    return None


def native_to_diffusers(name: str) -> str:
    """Diffusers name of a native tensor name; an unknown name comes back as it is."""
    return _rename(name, _OUTER, _BLOCK)


def diffusers_to_native(name: str) -> str:
    """Native name of a diffusers tensor name; an unknown name comes back as it is."""
    return _rename(name, _OUTER_BACK, _BLOCK_BACK)


def recognise(names: Collection[str]) -> Naming | None:
    """The naming that explains most of `names`; None (not a Wan transformer) if none explains half."""
    best, best_score, best_share = None, 0, 0.0
    for prefix in PREFIXES:
        own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        # Without a prefix every name is "own".
        others = sum(not name.startswith((prefix, *FOREIGN_PREFIXES)) for name in names)
        for diffusers, outer, block in ((False, _OUTER, _BLOCK), (True, _OUTER_BACK, _BLOCK_BACK)):
            score = sum(_is_known(name, outer, block) for name in own)
            if score > best_score:
                best, best_score = Naming(prefix, diffusers), score
                best_share = score / (len(own) + others)
    return best if best_share >= 0.5 else None


def unsupported_kind(names: Collection[str]) -> tuple[str, str] | None:
    """(what it is, the tensor that shows it) for models and adapters that are not a plain Wan transformer."""
    for kind, pieces in _UNSUPPORTED:
        for name in names:
            if not name.startswith(FOREIGN_PREFIXES) and any(piece in name for piece in pieces):
                return kind, name
    return None


def _split(name: str) -> tuple[str, str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        return "", name, ""
    return match["block"] or "", match["module"], match["leaf"] or ""


def _rename(name: str, outer: dict[str, str], block: dict[str, str]) -> str:
    index, module, leaf = _split(name)
    renamed = (block if index else outer).get(module)
    return name if renamed is None else index + renamed + leaf


def _is_known(name: str, outer: dict[str, str], block: dict[str, str]) -> bool:
    index, module, _ = _split(name)
    return module in (block if index else outer)
