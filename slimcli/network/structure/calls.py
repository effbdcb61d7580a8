"""Which module is running, and whose outputs go where."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from slimcli.network.structure.memory import memory_of
from slimcli.network.structure.tensor_map import TensorMap


@dataclass
class Calls:
    """The modules that are running, and what is needed to find pairs of a conv and a norm.

    Attributes:
        given: Tensors that each of them was called with; emptied as one is written.
        outputs: Tensor -> (key of its producer, number of the call).
        uses: Number of the call -> how often its output was used.
        norms: Number of the call -> path of the norm that used it.
        keys: Number of the call -> key of the producer.
        norm_inputs: Path of a norm -> keys of the producers it read ("" for anything else).
    """

    stack: list[tuple[str, nn.Module]] = field(default_factory=list)
    given: list[list[weakref.ref[Tensor]]] = field(default_factory=list)
    outputs: TensorMap[tuple[str, int]] = field(default_factory=TensorMap)
    uses: dict[int, int] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    norm_inputs: dict[str, set[str]] = field(default_factory=dict)
    mixing_entered: int = 0

    def top(self) -> tuple[str, nn.Module | None]:
        """Path and module of the innermost running module."""
        return self.stack[-1] if self.stack else ("", None)

    def enter(self, path: str, module: nn.Module, tensors: Iterable[Tensor]) -> None:
        """A module starts to run, called with these."""
        self.stack.append((path, module))
        self.given.append([weakref.ref(each) for each in tensors])

    def leave(self) -> str:
        """The innermost one is done; its path."""
        self.given.pop()
        return self.stack.pop()[0]

    def note_write(self, tensor: Tensor) -> None:
        """A tensor is written: a module that it was given to does not read what it was given."""
        if self.given and self.is_given(tensor):
            self.given[-1].clear()

    def is_given(self, tensor: Tensor) -> bool:
        """Was the innermost module called with this tensor, and has nobody written it since?"""
        memory = memory_of(tensor)
        living = [reference() for reference in self.given[-1]]
        return any(each is not None and memory_of(each) == memory for each in living)

    def produced(self, tensor: Tensor, key: str) -> None:
        """Remembers the output of a mixing op."""
        number = len(self.keys)
        self.keys[number] = key
        self.uses[number] = 0
        self.outputs[tensor] = (key, number)

    def used(self, tensor: Tensor) -> None:
        """Counts a use of a tensor if it is the output of a mixing op."""
        found = self.outputs.get(tensor)
        if found is not None:
            self.uses[found[1]] += 1

    def normed(self, tensor: Tensor, path: str) -> None:
        """A norm module read this tensor."""
        found = self.outputs.get(tensor)
        self.norm_inputs.setdefault(path, set()).add(found[0] if found else "")
        if found is not None:
            self.norms[found[1]] = path

    def norm_after(self) -> dict[str, str]:
        """Producer key -> the one norm that alone reads all it ever puts out."""
        found: dict[str, set[str]] = {}
        for number, key in self.keys.items():
            path = self.norms.get(number, "") if self.uses[number] == 1 else ""
            found.setdefault(key, set()).add(path)
        pairs = {key: next(iter(paths)) for key, paths in found.items() if len(paths) == 1}
        return {
            key: norm for key, norm in pairs.items() if norm and self.norm_inputs[norm] == {key}
        }
