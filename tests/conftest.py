"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gto  # noqa: E402, F401  first: thread settings that torch reads when it is imported
import torch  # noqa: E402

ON_DEMAND = {"exercise": "an exercise for students: it fails until somebody has done it, see its file's docstring",
             "soak": "takes long"}


def pytest_configure(config):
    for mark, meaning in ON_DEMAND.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}; deselected unless -m names it")


def pytest_collection_modifyitems(config, items):
    unnamed = ON_DEMAND.keys() - set(re.findall(r"\w+", config.option.markexpr))
    left_out = [item for item in items if any(map(item.get_closest_marker, unnamed))]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def mend_loop_bounds():
    """Triton 3.6's interpreter calls int() on one-element arrays, which numpy refuses since 2.4."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return
    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    mend_loop_bounds()
