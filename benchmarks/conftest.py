"""Puts this folder's modules on the path: benchmarks are run from the repository and are no part of the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
