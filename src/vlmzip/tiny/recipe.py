"""The settings of the embedded models' training; what a task weighs stands with the task."""

from __future__ import annotations

from dataclasses import dataclass

from .questions import KINDS

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Steps, batches, rates (Muon's and AdamW's) and what is taught when."""

    tower_images: int = 30_000
    tower_steps: int = 1_800
    tower_batch: int = 24
    tower_rates: tuple[float, float] = (3e-3, 2e-3)  # Muon's and AdamW's
    region_steps: int = 1_000
    region_rates: tuple[float, float] = (2e-3, 1e-3)
    lesson_images: int = 12_000
    alignment_steps: int = 600
    alignment_batch: int = 32
    alignment_rate: float = 2e-3
    imitation_steps: int = 1_000  # tiny-siglip's projector, of tiny-llava's
    imitation_batch: int = 24
    imitation_rate: float = 3e-3
    # Steps on a few kinds alone: looking an object up, then comparing places. The rest are on all.
    lesson_courses: tuple[tuple[int, tuple[str, ...]], ...] = (
        (1_000, ("colour", "shape", "existence")),
        (4_200, ("existence", "position", "relation")),
    )
    lesson_steps: int = 7_600
    lesson_batch: int = 6
    lesson_dialogues: float = 0.3  # share of steps on dialogues; the others have questions side by side
    lesson_distance: float = 0.05  # least distance of image tokens, in positions; after the courses
    lesson_rates: tuple[float, float] = (3e-3, 2e-3)
    sign_steps: int = 1_400  # at the end, on all kinds, but with more signs and questions about them
    sign_kinds: tuple[str, ...] = (*KINDS, *["reading"] * 4, *["relation"] * 2)
    check_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for courses that leave no step on all kinds, or a distance outside 0..1."""
        courses = sum(steps for steps, _ in self.lesson_courses)
        if courses >= self.lesson_steps:
            raise ValueError(
                f"lesson_courses take {courses} steps and lesson_steps are {self.lesson_steps}; leave "
                "some for all kinds"
            )
        if not 0 < self.lesson_distance <= 1:
            raise ValueError(f"lesson_distance must be above 0 and at most 1, got {self.lesson_distance}")
