"""Hugging Face checkpoints in, merged and new ones out; none of it needs PyTorch."""

from circflax.interop._adapted import Adapted, export_adapted, load_adapted
from circflax.interop._checkpoint import LoadReport, find_checkpoint, load_model
from circflax.interop._export import export_merged
from circflax.interop._llama2c import convert_llama2c
from circflax.interop._outline import Outline, outline_model
from circflax.interop._save import save_model
from circflax.interop._tensors import CheckpointError

__all__ = [
    "Adapted",
    "CheckpointError",
    "LoadReport",
    "Outline",
    "convert_llama2c",
    "export_adapted",
    "export_merged",
    "find_checkpoint",
    "load_adapted",
    "load_model",
    "outline_model",
    "save_model",
]
