"""For Hugging Face `transformers`: attention for its models, and LaCT language models.

Importing this package registers the attention "lact_window_attn". It needs transformers, an optional extra:
`pip install "lact-kernels[transformers]"`.
"""

try:
    from transformers import AttentionInterface  # noqa: F401
    from transformers.masking_utils import AttentionMaskInterface  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lact_kernels.compat.transformers needs transformers 4.57 or newer:"
        ' pip install "lact-kernels[transformers]"'
    ) from error

from lact_kernels.compat.transformers.attention import lact_window_attn_forward
from lact_kernels.compat.transformers.causal_lm import LaCTForCausalLM, LaCTModel
from lact_kernels.compat.transformers.config import LaCTSWIGLUConfig

__all__ = ["LaCTForCausalLM", "LaCTModel", "LaCTSWIGLUConfig", "lact_window_attn_forward"]
