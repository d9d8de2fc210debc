"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gto  # noqa: E402, F401  first: thread settings that torch reads when it is imported
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
