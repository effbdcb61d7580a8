"""Events as one line of plain text each: what log.txt and a terminal without a bar show."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]


def line_of(event: Event) -> str:
    """The event in one line, or an empty string where a person need not read it.

    >>> line_of({"event": "best", "epoch": 3, "metric": "acc", "value": 0.913})
    'best acc 0.913 in epoch 3'
    """
    writer = _WRITERS.get(event["event"])
    return writer(event) if writer else ""


def numbers(values: dict[str, Any] | None) -> str:
    """Names and values with four digits.

    >>> numbers({"loss": 1.53123, "acc": 0.44})
    'loss 1.531 acc 0.44'
    """
    pairs = (values or {}).items()
    return " ".join(f"{name} {_number(value)}" for name, value in pairs)


def _number(value: Any) -> str:
    return "nan" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def large(count: float, unit: str = "") -> str:
    """Counts as a person says them.

    >>> large(126_600_000, "MACs"), large(850_000), large(999_990, "B"), large(912, "MACs")
    ('126.6 MMACs', '850.0 k', '1.0 MB', '912 MACs')
    """
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit * 0.99995:  # 999,960 is 1.0 M, not 1000.0 k
            return f"{count / limit:.1f} {prefix}{unit}"
    return f"{count:.0f} {unit}".rstrip()


def seconds(value: float) -> str:
    """Times in words a person uses.

    >>> seconds(4.2), seconds(125), seconds(5400)
    ('4.2 s', '2 min 5 s', '1 h 30 min')
    """
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    >>> counted(1, "target"), counted(3, "target")
    ('1 target', '3 targets')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _run_start(event: Event) -> str:
    word = "resumed" if event.get("resumed") else "run"
    return (
        f"slim {event['version']} · {word} {event['folder']} · seed {event['seed']} "
        f"· {event['device']}"
    )


def _stage_start(event: Event) -> str:
    return (
        f"stage {event['stage']}: {event['algorithm']}, {event['epochs']} epochs "
        f"x {event['steps_per_epoch']} steps"
    )


def _prepared(event: Event) -> str:
    parts = [f"model {large(event['params'])} params · {large(event['macs'], 'MACs')}"]
    if event["targets"]:
        parts.append(counted(len(event["targets"]), "target"))
    if event.get("goal"):
        goal = event["goal"]
        parts.append(f"goal {goal['name']} <= {large(goal['target'])}")
    return " · ".join(parts)


def _epoch_end(event: Event) -> str:
    parts = [
        f"epoch {event['epoch']}/{event['epochs']}"
        + (f" train {numbers(event['train'])}" if event["train"] else ""),
        f"val {numbers(event['val'])}",
    ]
    if event.get("status"):
        parts.append(numbers(event["status"]))
    parts.append(f"lr {_number(event['lr'])}")
    parts.append(seconds(event["seconds"]))
    return " | ".join(parts)


def _cut(event: Event) -> str:
    return f"epoch {event['epoch']}: cut {event['group']} ({event['before']} -> {event['after']})"


def _verified(event: Event) -> str:
    verdict = "agree" if event["ok"] else "DIFFER"
    largest = event["max_abs"]  # None: no number can be given, as where shapes differ
    difference = "not a number" if largest is None else f"{largest:.1e}"
    return (
        f"{event['from']} and {event['to']} {verdict}: max difference {difference} "
        f"(limit {event['limit']:.1e})"
    )


def _run_end(event: Event) -> str:
    if event["status"] == "finished":
        return f"done in {seconds(event['seconds'])} · {event['folder']}"
    return f"{event['status']} after {seconds(event['seconds'])} · {event['folder']}"


_WRITERS = {
    "run_start": _run_start,
    "stage_start": _stage_start,
    "prepared": _prepared,
    "notice": lambda event: f"{event['level']}: {event['text']}",
    "baseline": lambda event: (
        f"baseline {numbers(event['metrics'])} · {large(event['macs'], 'MACs')} "
        f"· {large(event['params'])} params"
    ),
    "cut": _cut,
    "epoch_end": _epoch_end,
    "best": lambda event: (
        f"best {event['metric']} {_number(event['value'])} in epoch {event['epoch']}"
    ),
    "interrupted": lambda event: f"{event['signal']}: saved {event['path']}",
    "verified": _verified,
    "artifact": lambda event: f"{event['path']} {large(event['bytes'], 'B')}",
    "run_end": _run_end,
}
