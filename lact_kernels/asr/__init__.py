"""Speech recognition with LaCT layers: a CTC model, its data and training, transcription and streaming.

Importing this package registers the model with transformers' Auto classes, so that its pipelines can load
it. The command line is `lact-asr`.
"""

try:
    import soundfile  # noqa: F401
    import torchaudio  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lact_kernels.asr needs {error.name}: pip install 'lact-kernels[asr]'", name=error.name
    ) from error

from lact_kernels.asr.config import LaCTASRConfig
from lact_kernels.asr.model import LaCTForCTC
from lact_kernels.asr.pretrained import Recogniser, load_recogniser, save_recogniser
from lact_kernels.asr.streaming import FrameStream

__all__ = [
    "FrameStream",
    "LaCTASRConfig",
    "LaCTForCTC",
    "Recogniser",
    "load_recogniser",
    "save_recogniser",
]
