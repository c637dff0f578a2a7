"""The LaCT layer, and what it carries from one call to the next."""

from lact_kernels.layers.cache import LaCTCache
from lact_kernels.layers.lact import LaCTLayer

__all__ = ["LaCTCache", "LaCTLayer"]
