"""Backbones by name: timm's, and custom ones that a module named in KIT_BACKBONES registers with timm."""

import difflib
import importlib
import os

import timm

# Environment variable: comma-separated modules to import before a backbone is looked up by name.
MODULES = "KIT_BACKBONES"


def check_backbone(name: str) -> None:
    """Raise ValueError unless timm has a backbone of this name; imports the modules in KIT_BACKBONES first."""
    import_own_backbones()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm {timm.__version__} has no backbone {name!r}; similar names: {', '.join(near) or 'none'}. If it is a "
            f"custom backbone, set {MODULES} to the module that registers it with timm"
        )


def import_own_backbones() -> None:
    """Import the modules that KIT_BACKBONES names. Raises ValueError for a module that cannot be imported.

    A module registers its networks with timm's `register_model`, and YOLOs in `kitlib.models.yolo.ARCHITECTURES`. Only the
    environment variable, which new processes inherit, decides what is imported: recipes and bundles contain names alone.
    """
    for module in filter(None, map(str.strip, os.environ.get(MODULES, "").split(","))):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"{MODULES} names {module!r}, which cannot be imported: {error}; put its folder on PYTHONPATH"
            ) from error
