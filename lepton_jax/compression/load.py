"""A model with a recipe that needs no calibration: each weight is compressed as it is read.

Recipes with calibration: `lepton_jax/jobs/compress_model.py`. Reading itself:
`lepton_jax/checkpoints/load.py`.
"""

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.presets import compressor, scheme_of_each
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import ModelSection


def load_compressed(section: ModelSection, recipe: Recipe, **options) -> Loaded:
    """The model that a section names; `options` are `progress` and `devices` of `checkpoints.load`.

    Raises ValueError where the recipe needs calibration, doesn't fit the model, or has options that
    change nothing.
    """
    recipe.require_no_calibration(section.path)
    dtypes, compress, schemes = checkpoints.dtypes_here(section.dtype), None, {}
    if recipe.rules:
        specs = checkpoints.describe(section.path, **dtypes).specs
        compress, schemes = compressor(recipe.rules, specs), scheme_of_each(recipe.rules, specs)
    recipe.require_use(schemes)
    return checkpoints.load(section.path, **dtypes, compress=compress, **options)
