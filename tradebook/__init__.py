"""From an idea on order-book data to a loop that trades it, and an answer to every why"""

__version__ = "0.1.0"

from pathlib import Path

from .base.caching import use_own_cache

use_own_cache(Path(__file__).parent)  # before anything imports numba
