"""A file that is called like the module it was made from, whatever runs it underneath.

The user's own predict function and metric work on it unchanged: same arguments in, same structure
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimcli.artifacts import nested
from slimcli.errors import Problem, RunError


class FileModel(nn.Module):
    """A module without parameters; a subclass says how flat tensors are run.

    Args:
        path: The file.
        input_names: Its inputs.
        output_names: Its outputs.
        structure: Arguments and results of the original module; without it inputs are taken by
            position or by name, and outputs come as one tensor or a tuple.
    """

    def __init__(
        self,
        path: Path,
        input_names: Sequence[str],
        output_names: Sequence[str],
        structure: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.path = path
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.structure = dict(structure)

    def run_flat(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in the order of ``output_names`` for inputs in that of ``input_names``."""
        raise NotImplementedError

    def expected_inputs(self) -> list[str]:
        """Name, type and shape of each input, for messages."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in the structure of the original module, on the device of the first input.

        Raises:
            RunError: The arguments are not those the file was made for, or it cannot run them.
        """
        tensors = self._tensors(args, kwargs)
        device = tensors[0].device if tensors else torch.device("cpu")
        outputs = [each.to(device) for each in self.run_flat(tensors)]
        if self.structure:
            return nested.rebuild(self.structure["result"], outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        if not self.structure:
            bound = nested.bind_names(self.input_names, args, kwargs)
            if set(bound) != set(self.input_names):
                raise self.failed(f"it has the inputs {', '.join(self.input_names)}", bound)
            return [torch.as_tensor(bound[name]) for name in self.input_names]
        bound = nested.bind_names(self.structure["parameters"], args, kwargs)
        spec, tensors = nested.describe(bound)
        if not _same_call(spec, self.structure["arguments"]):
            raise self.failed("it was made for a call with other arguments", bound)
        # An input the exporter found unused is not in the file.
        order = {name: index for index, name in enumerate(self.structure["inputs"])}
        return [tensors[order[name]][1] for name in self.input_names]

    def failed(self, what: str, received: Mapping[str, Any]) -> RunError:
        """The error of a call this file cannot take: what it expects and what it got."""
        got = [
            f"{path}: {tuple(leaf.shape)}" if nested.is_tensor(leaf) else f"{path}: {leaf!r:.30}"
            for path, leaf in nested.leaves(received)
        ]
        return RunError(
            Problem(
                "E-FILE-RUN",
                f"{self.path.name} cannot run this batch: {what}",
                str(self.path),
                ", ".join(self.expected_inputs()),
                ", ".join(got),
            )
        )


def _same_call(ours: nested.Spec, theirs: nested.Spec) -> bool:
    """Whether two calls have the same arguments."""
    if ours["kind"] != theirs["kind"]:
        return False
    if "items" in ours:
        left, right = dict(ours["items"]), dict(theirs["items"])
        return list(left) == list(right) and all(_same_call(left[k], right[k]) for k in left)
    return ours["kind"] == "tensor" or bool(ours["value"] == theirs["value"])
