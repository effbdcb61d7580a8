"""Every error a user can meet, each with an exit code, a short code and a fix.

This file knows no command, no model and no torch: it is imported by everything, at every start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where, expected, received, fix.

    Attributes:
        code: Short stable code such as ``E-RECIPE-UNKNOWN-KEY`` (``slim explain CODE`` tells more).
        what: One sentence that says what is wrong.
        where: ``file:line:column`` or another place the user can open; empty if there is none.
        expected: What would have been right.
        received: What was found instead.
        fix: What to type or change.
        excerpt: Lines of the user's file with a caret below the place, ready to print.
    """

    code: str
    what: str
    where: str = ""
    expected: str = ""
    received: str = ""
    fix: str = ""
    excerpt: str = ""

    def __str__(self) -> str:
        """The problem as a person reads it.

        >>> print(Problem("E-X", "unknown key config.epocs", "r.yaml:3:3", fix="epoch"))
        r.yaml:3:3  unknown key config.epocs
            fix: epoch
        """
        head = f"{self.where}  {self.what}" if self.where else self.what
        if self.expected or self.received:
            parts = [f"expected {self.expected}"] if self.expected else []
            parts += [f"received {self.received}"] if self.received else []
            head += ": " + ", ".join(parts)
        lines = [head]
        lines += [f"    {line}" for line in self.excerpt.splitlines()]
        lines += [f"    fix: {self.fix}"] if self.fix else []
        return "\n".join(lines)


class SlimError(Exception):
    """An error that is told in one message, without our traceback.

    Args:
        problem: The first (often only) thing that is wrong.
        more: Further problems found in the same pass.
        user_frames: Lines of the user's own code on the way to the error, innermost last.
    """

    exit_code: int = 1

    def __init__(self, problem: Problem, *more: Problem, user_frames: tuple[str, ...] = ()) -> None:
        self.problems = (problem, *more)
        self.user_frames = user_frames
        super().__init__("\n".join(str(each) for each in self.problems))

    def at(self, where: str) -> SlimError:
        """The same error with a place for every problem that has none."""
        placed = [replace(each, where=each.where or where) for each in self.problems]
        return type(self)(*placed, user_frames=self.user_frames)


class RunError(SlimError):
    """Something failed while running: a hook raised, the loss became nan, the disk is full."""

    exit_code = 1


class AnotherFailed(RunError):
    """Another process of the run failed, or was killed, and took this one with it.

    Attributes:
        exit_code: That of the other process, where it is known.
        is_told: The other process says itself what failed.
        note: What is known of it, in one line.
    """

    is_told: bool = False
    note: str = ""


class RecipeError(SlimError):
    """The recipe or the command line is wrong; nothing was started."""

    exit_code = 2


class HookError(SlimError):
    """A hook cannot be imported or has the wrong form; nothing was trained."""

    exit_code = 3


class GoalError(SlimError):
    """The goal was missed or cannot be met; what was made is kept."""

    exit_code = 4


class MissingError(SlimError):
    """This machine lacks something: a GPU, TensorRT, a package."""

    exit_code = 5


class VerificationError(SlimError):
    """An artifact does not agree with the one it was made from."""

    exit_code = 6


class Interrupted(SlimError):
    """Ctrl-C; the run is saved and can be resumed."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM; the run is saved and can be resumed."""

    exit_code = 143
