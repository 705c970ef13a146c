"""What training workers show their driver. A module of its own, so that its actor starts without torch."""

from __future__ import annotations


class Board:
    """What the driver shows while workers work: the latest figures, and a reason to give up."""

    def __init__(self) -> None:
        self.step, self.figures, self.error = 0, dict[str, float](), ""

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step."""
        self.step, self.figures = step, figures

    def fail(self, error: str) -> None:
        """The user's config cannot be trained; starting again will not help."""
        self.error = error

    def read(self) -> tuple[int, dict[str, float], str]:
        """Step, figures, error."""
        return self.step, self.figures, self.error
