"""slim: make a trained PyTorch network smaller, and prove that it still works.

The public API, loaded when it is used; importing this imports no torch::

    slimcli.ResRepSolver(model, config).run()      # a class for each algorithm of the registry
    slimcli.load_deploy(run_folder)                # the compressed model of a finished run
    slimcli.attach(model, algorithm, config, example)   # for people who own their loop
    slimcli.Example(batch, predict)                # a real batch, and how your model is run on it
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads a part of the public API at its first use."""
    if name in ("attach", "load_deploy"):
        from slimcli import api

        return getattr(api, name)
    if name == "Example":
        from slimcli.network.example import Example

        return Example
    if name.endswith("Solver"):
        from slimcli.compressor import registry

        for info in registry().values():
            if info.solver == name:
                from slimcli import api

                return api.solver_class(info.name)
    raise AttributeError(f"module 'slimcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    from slimcli.compressor import registry

    solvers = [info.solver for info in registry().values()]
    return [*globals(), "Example", "attach", "load_deploy", *solvers]
