"""The log that every part shares: event documents in one MongoDB collection, and how they are read and written.

Imports point one way: `appender` and `projector` import this package, it imports neither.
"""

from __future__ import annotations

__version__ = "0.1.0"
