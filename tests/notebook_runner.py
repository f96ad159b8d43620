"""Execute a notebook without Jupyter, as ``jupyter nbconvert --execute`` does, for tests and for stored outputs.

    python tests/notebook_runner.py examples/text_to_image.ipynb              # execute
    python tests/notebook_runner.py examples/text_to_image.ipynb --output X   # and write it with outputs to X

Cells run in one namespace, in the folder of the notebook. What they print and their last value are stored: pictures
(PIL's, and ``IPython.display.Image`` of a file), and the type of other values. Magic commands are not supported.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class FileImage:
    """The part of ``IPython.display.Image`` that the notebooks use; IPython need not be installed."""

    def __init__(self, filename: str | Path) -> None:
        self.data, self.format = Path(filename).read_bytes(), Path(filename).suffix.removeprefix(".")


def outputs_of(value: Any, printed: str, count: int) -> list[dict[str, Any]]:
    """Return the outputs of a cell in the format of notebooks (nbformat 4)."""
    outputs: list[dict[str, Any]] = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        shown = {"text/plain": [f"<{type(value).__name__}>"]}
        if isinstance(value, FileImage):
            shown[f"image/{value.format}"] = base64.b64encode(value.data).decode()
        elif hasattr(value, "_repr_png_"):
            shown["image/png"] = base64.b64encode(value._repr_png_()).decode()
        outputs.append({"data": shown, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> tuple[Any, str]:
    """Execute a cell; return the value of a last line that is an expression, and what was printed."""
    tree, last, printed = ast.parse(source, name), None, io.StringIO()
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        last = ast.Expression(tree.body.pop().value)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, name, "exec"), namespace)
            value = eval(compile(last, name, "eval"), namespace) if last else None
    except Exception as error:
        error.add_note(f"in cell {name}, after printing:\n{printed.getvalue()}")
        raise
    return value, printed.getvalue()


def execute(notebook: dict[str, Any]) -> None:
    """Execute the code cells of a notebook and store their outputs in it."""
    display = types.ModuleType("IPython.display")
    display.Image = FileImage
    sys.modules["IPython.display"] = display  # found before its package, which need not exist
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for count, cell in enumerate(code, start=1):
        value, printed = run_cell("".join(cell["source"]), cell["id"], namespace)
        cell.update(execution_count=count, outputs=outputs_of(value, printed, count))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, help="file to write; may be the notebook itself")
    options = parser.parse_args()
    output = options.output and options.output.resolve()
    notebook = json.loads(options.notebook.read_text(encoding="utf-8"))
    sys.path[0] = str(ROOT)
    os.chdir(options.notebook.parent)
    execute(notebook)
    if output:
        output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
