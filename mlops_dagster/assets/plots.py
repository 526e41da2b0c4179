"""The pictures of an evaluation: ROC, calibration and confusion matrix, or residuals and predictions against labels."""

from typing import TYPE_CHECKING, Any

import dagster as dg

from mlops_dagster.assets.metadata import picture
from mlops_dagster.core.metrics import Task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from matplotlib.axes import Axes


def plots(
    task: Task, label: "np.ndarray", prediction: "np.ndarray", score: "np.ndarray | None"
) -> dict[str, dg.MarkdownMetadataValue]:
    """Pictures by name for the metadata of an evaluation; arrays have shape [rows]."""
    if task == "regression":
        return {
            "predicted_against_actual": picture(lambda axes: _scatter(axes, label, prediction), "Predicted against actual"),
            "residuals": picture(lambda axes: _residuals(axes, label - prediction), "Residuals"),
        }
    found = {"confusion_matrix": picture(lambda axes: _confusion(axes, label, prediction), "Confusion matrix")}
    if score is not None and len(set(label)) == 2:
        found["roc_curve"] = picture(lambda axes: _roc(axes, label, score), "ROC curve")
        found["calibration"] = picture(lambda axes: _calibration(axes, label, score), "Calibration")
    return found


def distributions(rows: "pa.Table", names: list[str], most: int = 20) -> dg.MarkdownMetadataValue:
    """Histograms of numeric columns (up to `most`) side by side, as one picture."""
    import base64
    import io

    import numpy as np
    import pyarrow as pa
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [n for n in names if pa.types.is_floating(t := rows.schema.field(n).type) or pa.types.is_integer(t)][:most]
    columns, lines = 4, max(1, -(-len(shown) // 4))
    figure = Figure(figsize=(12, 2.2 * lines), dpi=70, layout="constrained")
    FigureCanvasAgg(figure)
    for position, name in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, position)
        values = rows[name].cast(pa.float64()).to_numpy()
        axes.hist(values[np.isfinite(values)], bins=40)
        axes.set_title(name, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return dg.MetadataValue.md(f"![feature distributions](data:image/png;base64,{base64.b64encode(png.getvalue()).decode()})")


def _roc(axes: "Axes", label: Any, score: Any) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    wrong, right, _ = roc_curve(label, score)
    axes.plot(wrong, right, label=f"AUC {roc_auc_score(label, score):.3f}")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend()


def _calibration(axes: "Axes", label: Any, score: Any) -> None:
    from sklearn.calibration import calibration_curve

    observed, predicted = calibration_curve(label, score, n_bins=10, strategy="quantile")
    axes.plot(predicted, observed, marker="o")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed share")


def _confusion(axes: "Axes", label: Any, prediction: Any) -> None:
    from sklearn.metrics import ConfusionMatrixDisplay

    ConfusionMatrixDisplay.from_predictions(label, prediction, ax=axes, colorbar=False, normalize="true", values_format=".2f")


def _scatter(axes: "Axes", label: Any, prediction: Any) -> None:
    axes.hexbin(label, prediction, gridsize=60, bins="log", mincnt=1)
    ends = [min(label.min(), prediction.min()), max(label.max(), prediction.max())]
    axes.plot(ends, ends, linestyle=":", color="grey")
    axes.set_xlabel("actual")
    axes.set_ylabel("predicted")


def _residuals(axes: "Axes", residual: Any) -> None:
    axes.hist(residual, bins=80)
    axes.set_xlabel("actual minus predicted")
    axes.set_ylabel("rows")
