"""The embedded world: a procedural twin of 3dshapes, images and attributes computed from their factors."""

from ldm.data.world.dataset import PALETTE, SIZES, World3D, compose, world_maps

__all__ = ["PALETTE", "SIZES", "World3D", "compose", "world_maps"]
