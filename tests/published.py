"""Where tests look for the published data sets; they skip, and say so, where it is absent."""

import os
from pathlib import Path

DATA = Path(os.environ.get("HOTLORA_DATA", Path(__file__).parents[2] / "shared" / "data"))
ABSENT = f"not in {DATA} (HOTLORA_DATA names another folder)"
