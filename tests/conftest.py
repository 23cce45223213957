"""Before anything imports triton: kernels run in its interpreter, on CPU tensors."""

import os

os.environ["TRITON_INTERPRET"] = "1"
