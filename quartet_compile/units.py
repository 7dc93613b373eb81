"""Numbers as people read them."""

from __future__ import annotations


def bytes_text(n: int) -> str:
    """4608 -> "4.5 KiB"."""
    return f"{n} B" if n < 1024 else f"{n / 1024:.1f} KiB" if n < 1024**2 else f"{n / 1024**2:.1f} MiB"


def count_text(n: int) -> str:
    """23200000 -> "23.2 M"."""
    steps = min(4, (len(str(n)) - 1) // 3)
    return f"{n / 1000**steps:.3g}{('', ' K', ' M', ' G', ' T')[steps]}"
