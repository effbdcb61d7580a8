"""The outcome of tracing."""

from __future__ import annotations

from dataclasses import dataclass

from slimcli.network.structure.record import Record


@dataclass
class Traced:
    """A model that was traced: what was found, and which norm follows which producer.

    Attributes:
        train_path_differs: In train mode (norms aside) it ran other operators.
        keeps_state: It keeps something between runs.
        consumers_in_eval: How many of the record's consumers the run in eval mode found.
    """

    record: Record
    norm_after: dict[str, str]
    notes: tuple[str, ...]
    train_path_differs: bool
    consumers_in_eval: int
    keeps_state: bool
