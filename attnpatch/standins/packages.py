"""Which packages and modules have a stand-in."""

from __future__ import annotations

# The distribution of each package, with the release whose functions are offered.
PACKAGES = {
    "flash_attn": ("flash-attn", "2.8.3"),
    "xformers": ("xformers", "0.0.33"),
    "sageattention": ("sageattention", "2.2.0"),
}
# Their modules. A package of several modules is named before these.
MODULES = (
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.flash_attn_interface",
    "xformers",
    "xformers.ops",
    "xformers.ops.fmha",
    "xformers.ops.fmha.attn_bias",
    "sageattention",
    "sageattention.core",
)
# Why a package has no stand-in.
NOT_OFFERED = {
    "flash_attn_interface": (
        "its functions return a pair or one tensor, depending on the release of flash-attn 3, so no stand-in fits every "
        "script; most scripts use flash_attn, which has one, if they do not find it"
    ),
}
