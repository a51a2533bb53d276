"""What the user reads is ours."""

from __future__ import annotations

from .heavy import importing


def quiet() -> None:
    """Keep the libraries' own bars and notices out of what the user reads."""
    with importing():
        import diffusers
        import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
