"""Lets every test import the helpers of this folder, and runs torch on one thread: sums keep their order."""

import torch

torch.set_num_threads(1)
