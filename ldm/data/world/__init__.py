"""The embedded world: a procedural counterpart of 3dshapes whose images and texts are computed from their factors."""

from ldm.data.world.dataset import PALETTE, SIZES, World3D, compose, world_maps
from ldm.data.world.vocabulary import world_vocabulary

__all__ = ["PALETTE", "SIZES", "World3D", "compose", "world_maps", "world_vocabulary"]
