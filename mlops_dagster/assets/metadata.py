"""What a person sees of a stage in the Dagster UI: schemas, tables and pictures."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes


def column_schema(table: "pa.Table") -> dg.TableSchema:
    """A table's columns and types as Dagster shows them."""
    return dg.TableSchema(columns=[dg.TableColumn(f.name, str(f.type)) for f in table.schema])


def table(rows: Iterable[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows (all with the same keys, plain values) as a table in the UI."""
    records = [dg.TableRecord({k: _plain(v) for k, v in row.items()}) for row in rows]
    kinds = {bool: "bool", int: "int", float: "float"}
    first = records[0].data if records else {}
    columns = [dg.TableColumn(name, kinds.get(type(value), "string")) for name, value in first.items()]
    return dg.MetadataValue.table(records, dg.TableSchema(columns))


def _plain(value: Any) -> str | int | float | bool:
    return round(value, 6) if isinstance(value, float) else value if isinstance(value, bool | int | str) else str(value)


def picture(draw: Callable[["Axes"], None], title: str, inches: tuple[float, float] = (5, 4)) -> dg.MarkdownMetadataValue:
    """A plot inside the UI: `draw` paints one Matplotlib axes; the PNG travels inside the Markdown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png.getvalue()).decode()})")
