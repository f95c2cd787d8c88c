"""A real model's first layers as a model: for what its weights show without all of their depth."""

import dataclasses

from lepton_jax.checkpoints.load import Loaded
from lepton_jax.models.build import Model, abstract_model


def model_of_first(model: Model, layers: int) -> Model:
    """The model of so many of its layers, without values."""
    config = dataclasses.replace(
        model.config,
        num_layers=layers,
        layer_windows=model.config.layer_windows[:layers],
        layer_ropes=model.config.layer_ropes[:layers],
    )
    return abstract_model(config, model.dtype, model.activation_dtype)


def first_layers(loaded: Loaded, layers: int) -> Loaded:
    """That model with its values."""
    model = model_of_first(loaded.model, layers)
    leaves = dict(zip(loaded.model.specs, loaded.leaves, strict=True))
    kept = tuple(leaves[path] for path in model.specs)
    size = sum(leaf.nbytes for leaf in kept)
    return dataclasses.replace(loaded, config=model.config, model=model, leaves=kept, bytes=size)
