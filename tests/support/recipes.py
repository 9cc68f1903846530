"""A recipe's script as a module, though `recipes/` is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes"


def load_recipe(folder: str, script: str) -> ModuleType:
    """Run `recipes/<folder>/<script>` anew, without its main."""
    path = RECIPES / folder / script
    spec = importlib.util.spec_from_file_location(f"recipe_{folder}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
