"""GPT-2 in PyTorch: exact, lean, and short enough to read in an evening."""

from minigpt2.config import ConfigError, GPT2Config
from minigpt2.generate import KVCache
from minigpt2.model import GPT2, BlockStack
from minigpt2.ops.allocator import tune_allocator
from minigpt2.weights import WeightsError

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "BlockStack",
    "ConfigError",
    "GPT2Config",
    "KVCache",
    "WeightsError",
    "__version__",
    "tune_allocator",
]
