"""Looks up backbones by name: timm's, and those registered by the modules in the environment variable KIT_BACKBONES."""

import difflib
import importlib
import os
from collections.abc import Mapping
from typing import Any

import timm

# Environment variable: comma-separated modules to import before a backbone is looked up by name.
MODULES = "KIT_BACKBONES"
# Arguments of timm's networks that a recipe may set: dropout and the like, and variants of the architecture. Others, such as
# `checkpoint_path`, would read files or change what the kit sets itself.
OPTIONS = (
    *("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"),
    *("patch_drop_rate", "output_stride", "init_values", "window_size", "dynamic_img_size", "class_token", "qk_norm"),
    "reg_tokens",
)


def check_backbone(name: str) -> None:
    """Raise ValueError unless timm has a backbone of this name. Imports the modules listed in KIT_BACKBONES first."""
    import_own_backbones()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm {timm.__version__} has no backbone {name!r}; similar names: {', '.join(near) or 'none'}. If it is a "
            f"custom backbone, set {MODULES} to the module that registers it"
        )


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` as a dict of arguments for a timm network. Raises ValueError if an option is not in OPTIONS."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"remove {', '.join(unknown)} from `backbone_options`; valid options: {', '.join(OPTIONS)}")
    return dict(options)


def import_own_backbones() -> None:
    """Import the modules listed in the environment variable KIT_BACKBONES. Raises ValueError if one cannot be imported.

    Such a module registers networks with timm's `register_model`, or adds YOLOs to `kitlib.models.yolo.ARCHITECTURES`.
    Recipes and bundles contain only names of backbones, so they cannot cause an import. New processes inherit the variable.
    """
    for module in filter(None, map(str.strip, os.environ.get(MODULES, "").split(","))):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"{MODULES} lists {module!r}, which cannot be imported: {error}; put the module's folder on PYTHONPATH"
            ) from error
