"""The conditioning encoders under the names that configs know (``ldm.modules.encoders.modules.<class>``)."""

from ldm.modules.encoders.clip_embedders import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.image import Encoder4, Encoder4_vae, Encoder256

__all__ = ["Encoder4", "Encoder4_vae", "Encoder256", "FrozenCLIPTextEmbedder", "FrozenClipImageEmbedder"]
