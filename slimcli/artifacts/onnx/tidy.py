"""Makes an exported graph readable: names from modules, nothing of this machine inside.

Exporters write source paths, fx nodes and names like ``node_conv2d_31`` into the file. TensorRT and
every viewer report by node name, so a name should say which layer it is.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping

import onnx

ROOT = "model"  # attribute of FlatModel that holds the user's model
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
OUTPUT_OF_KEY = "slim.output_of"  # the norm whose output a conv has, where the two were fused


def tidy(model: onnx.ModelProto, modules: Iterable[str]) -> None:
    """Renames initializers and nodes after modules and removes what only the exporter needs.

    Args:
        model: The model, changed in place.
        modules: Module paths of the user's model.
    """
    remove_unused_initializers(model)
    known = set(modules)
    rename_values(model, _short_names(model))
    rename_nodes(model, lambda node: module_of(node, known))
    for node in nodes(model.graph):
        last = scope_of(node, known)
        node.doc_string = ""
        del node.metadata_props[:]
        if last and last != node.name.rpartition("/")[0]:
            node.metadata_props.add(key=OUTPUT_OF_KEY, value=last)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    graph.doc_string = ""
    del graph.metadata_props[:]


def note_outputs(model: onnx.ModelProto, norms: Mapping[str, str]) -> None:
    """Notes at the nodes of a layer that they compute what the norm behind it did.

    Args:
        model: A tidy model, changed in place.
        norms: Path of a layer -> path of the norm that was folded into it.
    """
    for node in nodes(model.graph):
        layer = node.name.rpartition("/")[0]
        if layer in norms:
            del node.metadata_props[:]
            node.metadata_props.add(key=OUTPUT_OF_KEY, value=norms[layer])


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those inside If and Loop bodies included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)
            for each in attribute.graphs:
                yield from nodes(each)


def remove_unused_initializers(model: onnx.ModelProto) -> None:
    """Drops stored tensors that no node reads and no output is."""
    used = {name for node in nodes(model.graph) for name in node.input}
    used |= {output.name for output in model.graph.output}
    kept = [each for each in model.graph.initializer if each.name in used]
    if len(kept) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)


def rename_values(model: onnx.ModelProto, new: dict[str, str]) -> None:
    """Renames values everywhere they occur."""
    for node in nodes(model.graph):
        for index, name in enumerate(node.input):
            node.input[index] = new.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = new.get(name, name)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = new.get(value.name, value.name)


def rename_nodes(model: onnx.ModelProto, module: Callable[[onnx.NodeProto], str]) -> None:
    """Names every node ``<module path>/<operator>``, with a number where that is taken."""
    taken: set[str] = set()
    for node in nodes(model.graph):
        path = module(node)
        name = f"{path}/{node.op_type}" if path else node.op_type
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        node.name = unique


def _short_names(model: onnx.ModelProto) -> dict[str, str]:
    """Initializer names without the name of our wrapper, where nothing else is called so."""
    graph = model.graph
    others = {each.name for each in (*graph.input, *graph.output)}
    others |= {name for node in nodes(graph) for name in node.output}
    short: dict[str, str] = {}
    for each in graph.initializer:
        name = each.name.removeprefix(f"{ROOT}.")
        if name != each.name and name not in others:
            short[each.name] = name
    return short


def module_of(node: onnx.NodeProto, known: set[str]) -> str:
    """Path of the module a node comes from; empty if it is the model's own forward.

    A node that reads the weight of a module belongs to that module, even if the exporter fused a
    norm into it and recorded the norm's scope.
    """
    inputs: list[str] = list(node.input[1:])
    for name in inputs:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in known:
            return owner
    if any(each.key == SCOPES_KEY for each in node.metadata_props):
        return scope_of(node, known)
    parts: list[str] = node.name.strip("/").split(
        "/"
    )  # TorchScript: /model/layer1/layer1.0/conv1/Conv
    inside = [part for part in parts[:-1] if part != ROOT]
    return next((each for each in (inside[-1:] or [""]) if each in known), _joined(inside, known))


def scope_of(node: onnx.NodeProto, known: set[str]) -> str:
    """Path of the module whose call the dynamo exporter made a node from; empty if unknown."""
    for prop in node.metadata_props:
        if prop.key == SCOPES_KEY:
            scopes = [each.removeprefix(f"{ROOT}.") for each in ast.literal_eval(prop.value)]
            return next((each for each in reversed(scopes) if each in known), "")
    return ""


def _joined(parts: list[str], known: set[str]) -> str:
    """The longest module path that the parts of a TorchScript scope spell."""
    for count in range(len(parts), 0, -1):
        path = ".".join(parts[:count])
        if path in known:
            return path
    return ""
