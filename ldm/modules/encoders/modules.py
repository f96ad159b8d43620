"""The conditioning encoders under the names that configs know (``ldm.modules.encoders.modules.<class>``)."""

from ldm.modules.encoders.clip_embedders import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder

__all__ = ["FrozenCLIPTextEmbedder", "FrozenClipImageEmbedder"]
