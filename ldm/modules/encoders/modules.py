"""Condition stages under the names used in configs (``ldm.modules.encoders.modules.<class>``)."""

from ldm.modules.encoders.base import ConditionStageBase as AbstractEncoder
from ldm.modules.encoders.bert import BERTEmbedder, TransformerEmbedder
from ldm.modules.encoders.clip_embedders import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.image import Encoder4, Encoder4_vae, Encoder256
from ldm.modules.encoders.labels import ClassEmbedder, SpatialRescaler
from ldm.modules.encoders.perceiver import MLP_layers, PerceiverDecoder, PerceiverEncoder
from ldm.modules.encoders.stable_diffusion import FrozenCLIPEmbedder, FrozenCLIPImageEmbedder, FrozenOpenCLIPEmbedder

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "ClassEmbedder",
    "Encoder4",
    "Encoder4_vae",
    "Encoder256",
    "FrozenCLIPEmbedder",
    "FrozenCLIPImageEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "MLP_layers",
    "PerceiverDecoder",
    "PerceiverEncoder",
    "SpatialRescaler",
    "TransformerEmbedder",
]
