"""Arrow's compute functions, typed loosely: they are made at import, so that no type checker can see them."""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
