"""Backbones by name: timm's, and those that a module of your own registers with timm."""

import difflib
import importlib
import os

import timm

# Environment variable: modules to import before a backbone is looked up by name, with commas between.
MODULES = "KIT_BACKBONES"


def check_backbone(name: str) -> None:
    """Raise ValueError unless `timm.create_model` knows this backbone; modules in KIT_BACKBONES are imported first."""
    import_own_backbones()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm {timm.__version__} has no backbone {name!r}; near: {', '.join(near) or 'nothing'}. If it is your own, "
            f"set {MODULES} to the module that registers it with timm"
        )


def import_own_backbones() -> None:
    """Import the modules that KIT_BACKBONES names. Raises ValueError for one that cannot be imported.

    A module registers its networks with timm's `register_model`, and YOLOs in `kitlib.models.yolo.ARCHITECTURES`. Only the
    environment, which new processes inherit, chooses what is imported: recipes and bundles contain nothing but names.
    """
    for module in filter(None, map(str.strip, os.environ.get(MODULES, "").split(","))):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"{MODULES} names {module!r}, which cannot be imported: {error}; put its folder on PYTHONPATH"
            ) from error
