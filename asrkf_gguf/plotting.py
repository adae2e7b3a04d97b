"""What all pictures need: matplotlib, which is not installed with the package, and colours."""

from __future__ import annotations

from typing import Any


def require_pyplot(who: str = "plots need") -> Any:
    """matplotlib.pyplot, which draws into files; ValueError says what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"{who} matplotlib: pip install 'asrkf-gguf[bench]' or pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def colours(n: int) -> list[Any]:
    """n of them, none twice."""
    import matplotlib

    few: Any = matplotlib.colormaps["tab20"]
    few = [*few.colors[::2], *few.colors[1::2]]  # the strong ones first
    return few[:n] if n <= len(few) else [matplotlib.colormaps["turbo"](i / (n - 1)) for i in range(n)]
