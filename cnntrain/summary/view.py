"""An anatomy as a table for people: one row per layer, or per group of layers; and one row per network."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from cnntrain.summary.layer_table import Convention, ModelSummary, Row

_BAR = 12  # characters
_BLOCKS = " ▏▎▍▌▋▊▉█"
_MANY = 45  # rows: more are folded unless a depth is asked for


def fold(rows: Sequence[Row], depth: int | None) -> list[Row]:
    """Rows whose names agree in their first `depth` parts, as one: sums, and the last one's output and field.

    `None` leaves the rows as they are. Totals don't change.
    """
    if depth is None:
        return list(rows)
    groups: list[list[Row]] = []
    for row in rows:
        if groups and _stem(groups[-1][0], depth) == _stem(row, depth):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_merge(group, depth) for group in groups]


def _stem(row: Row, depth: int) -> str:
    return ".".join(row.name.split("#")[0].split(".")[:depth])


def _merge(group: list[Row], depth: int) -> Row:
    if len(group) == 1:
        return group[0]
    last = next((row for row in reversed(group) if row.ran), group[-1])
    return replace(
        last,
        name=_stem(last, depth),
        kind=f"{len(group)} layers",
        notation="",
        parameters=sum(row.parameters for row in group),
        trainable=sum(row.trainable for row in group),
        statistics=sum(row.statistics for row in group),
        folded=sum(row.folded for row in group),
        multiply_adds=sum(row.multiply_adds for row in group),
        elements=sum(row.elements for row in group),
        activations_kib=sum(row.activations_kib for row in group),
    )


def fitting_depth(rows: Sequence[Row], most: int = _MANY) -> int | None:
    """The largest depth that folds to at most `most` rows; None where nothing needs folding."""
    if len(rows) <= most:
        return None
    deepest = max(row.name.count(".") + 1 for row in rows)
    return next((d for d in range(deepest, 0, -1) if len(fold(rows, d)) <= most), 1)


def layer_table(anatomy: ModelSummary, depth: int | None = None, convention: Convention = "torch") -> Table:
    """The table of `anatomy`, folded to `depth` name parts; totals below; shares of the multiply-adds."""
    rows = fold(anatomy.rows, depth)
    total = max(anatomy.multiply_adds, 1)
    table = Table(
        title=_title(anatomy), caption=caption(anatomy, convention), show_footer=True, pad_edge=False
    )
    table.add_column("layer", "total", no_wrap=True)
    table.add_column("kind")
    table.add_column("C K P S D G")
    table.add_column("output", _times(anatomy.output_shape), justify="right", no_wrap=True)
    table.add_column("parameters", f"{anatomy.parameters(convention):,}", justify="right", no_wrap=True)
    table.add_column("multiply-adds", f"{anatomy.multiply_adds:,}", justify="right", no_wrap=True)
    table.add_column("KiB", f"{anatomy.activations_kib:,.1f}", justify="right", no_wrap=True)
    table.add_column("field", _times(anatomy.receptive_field), justify="right", no_wrap=True)
    table.add_column("jump", justify="right")
    table.add_column("start", justify="right")
    table.add_column("share", justify="left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            row.kind,
            row.notation,
            _times(row.output_shape),
            f"{row.count(convention):,}" if row.count(convention) else "",
            f"{row.multiply_adds:,}" if row.multiply_adds else "",
            f"{row.activations_kib:,.1f}" if row.activations_kib else "",
            field_text(row),
            _numbers(row.jump),
            _numbers(row.start),
            bar(row.multiply_adds / total),
        )
    return table


def parameter_lines(anatomy: ModelSummary, convention: Convention = "torch") -> list[str]:
    """Return lines with total, trainable and non-trainable parameters; Keras counts running statistics as the latter.

    With folded BatchNorm only the total is shown, because a folded network is not trained.
    """
    total = anatomy.parameters(convention)
    lines = [f"Total parameters: {total:,}"]
    if convention != "folded":
        lines.append(f"Trainable parameters: {anatomy.trainable:,}")
        lines.append(f"Non-trainable parameters: {total - anatomy.trainable:,}")
    return lines


def comparison_table(anatomies: Sequence[ModelSummary], convention: Convention = "torch") -> Table:
    """One row per network."""
    table = Table(pad_edge=False, caption=f"{_CONVENTIONS[convention]}\n{_DEPTH}")
    columns = list(compare(anatomies, convention)[0]) if anatomies else []
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for row in compare(anatomies, convention):
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def compare(anatomies: Sequence[ModelSummary], convention: Convention = "torch") -> list[dict[str, object]]:
    """One row per network: input, depth, parameters, multiply-adds, memory, receptive field."""
    return [
        {
            "network": anatomy.name,
            "input": _times(anatomy.input_shape),
            "output": _times(anatomy.output_shape),
            "depth": anatomy.depth,
            "parameters": anatomy.parameters(convention),
            "multiply_adds": anatomy.multiply_adds,
            "activations_kib": round(anatomy.activations_kib, 1),
            "receptive_field": _times(anatomy.receptive_field),
        }
        for anatomy in anatomies
    ]


_CONVENTIONS: dict[Convention, str] = {
    "torch": "parameters as torch counts them",
    "keras": "parameters as Keras counts them: with BatchNorm's running mean and variance",
    "folded": "parameters after BatchNorm is folded into the convolutions",
}


_DEPTH = (
    "depth: convolutions and dense layers on the longest path; a depthwise convolution directly followed by a 1x1 "
    "convolution counts as one"
)


def caption(anatomy: ModelSummary, convention: Convention) -> str:
    """What the numbers mean, and what they leave out."""
    lines = [
        f"one image, float32; multiply-adds without bias; {_CONVENTIONS[convention]}",
        "field: the largest over all paths, norms' statistics aside; 'all' sees the whole image",
    ]
    lines.append(_DEPTH)
    if anatomy.uncounted:
        lines.append("multiply-adds not counted: " + ", ".join(anatomy.uncounted))
    if anatomy.unfollowed:
        lines.append("field not followed beyond: " + ", ".join(anatomy.unfollowed))
    idle = [row.name for row in anatomy.rows if not row.ran]
    if idle:
        lines.append("not run in validation, its parameters counted: " + ", ".join(idle[:6]))
    return "\n".join(lines)


def _title(anatomy: ModelSummary) -> str:
    return f"{anatomy.name} on {_times(anatomy.input_shape)}, depth {anatomy.depth}"


def bar(share: float, width: int = _BAR) -> str:
    """A bar of `share` (0 to 1) of `width` characters, in eighths, with its per cent; empty for nothing."""
    if share <= 0:
        return ""
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return f"{share:5.1%} {'█' * full}{_BLOCKS[rest] if rest else ''}"


def field_text(row: Row) -> str:
    """`67`; `all`; or `all (299)` where a global pool on one path sees everything, and the others 299 px."""
    if row.receptive_field is None or row.local_field is None:
        return "?" if row.ran and row.output_shape else ""
    if row.whole:
        return "all" if row.jump is None else f"all ({_times(row.local_field)})"
    return _times(row.local_field)


def _times(shape: Sequence[int] | None) -> str:
    if not shape:
        return ""
    if len(shape) == 2 and shape[0] == shape[1]:
        return str(shape[0])
    return "x".join(map(str, shape))


def _numbers(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    shown = [f"{value:g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else "x".join(shown)


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print to a terminal as wide as it is, and to a file or a pipe without cutting columns."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200)
    console.print(table)
