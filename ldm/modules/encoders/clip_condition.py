"""Condition stage of models that are trained on CLIP's embeddings of images and sampled from texts.

Dimensions: B batch, D width of the joint space, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.options import require_choice, require_count
from ldm.modules.encoders.base import TextStage
from ldm.modules.encoders.clip_embedders import FrozenCLIPTextEmbedder
from ldm.util import ConfigError, UserError, instantiate_from_config
