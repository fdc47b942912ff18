"""Run the tutorials, each in a new kernel, and save them with their outputs: make tutorials [ARGS="01 03"]."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILM = HERE / "nasa_film.mp4"  # of the first tutorial
SECONDS = 1800  # limit for one cell, also on a busy machine
DPI = 84  # resolution of pictures; with BITS per color channel, a tutorial stays well below its limit of two megabytes
BITS = 6


def digest(notebook: dict[str, Any]) -> str:
    """Return the hash of the code cells. A test compares it with the hash that is stored with the outputs."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def smaller(picture: str) -> str:
    """Return a base64 PNG with fewer colors and without metadata."""
    from PIL import Image

    levels = [round(round(level / 255 * (2**BITS - 1)) * 255 / (2**BITS - 1)) for level in range(256)]
    with Image.open(io.BytesIO(base64.b64decode(picture))) as full:
        reduced = full.convert("RGB").point(levels * 3)
    buffer = io.BytesIO()
    reduced.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tidy(notebook: Any) -> None:
    """Remove everything from a notebook that depends on the time and place of the run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "captum_staa": {"sources": digest(notebook)},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"cell {cell.id} warns: {output.text}")
            if picture := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = smaller(picture)


def run(path: Path) -> None:
    """Execute a notebook and save it atomically."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FILM, folder)
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute()
    tidy(notebook)
    nbformat.validate(notebook)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(prefixes: list[str]) -> None:
    """Run every tutorial whose name starts with one of ``prefixes``, or all tutorials."""
    with tempfile.TemporaryDirectory() as settings:
        (Path(settings) / "matplotlibrc").write_text(f"figure.dpi: {DPI}\n", encoding="utf-8")
        os.environ.update(
            MATPLOTLIBRC=settings,
            MPLBACKEND="module://matplotlib_inline.backend_inline",
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            TQDM_DISABLE="1",  # a bar appears only on a slow machine
            IPYTHONDIR=settings,  # without startup files of the user
            PYTHONWARNINGS="ignore:IProgress not found",  # of tqdm, in a kernel without a notebook
            PYTHONPATH=os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        )
        for path in sorted(HERE.glob("*.ipynb")):
            if not prefixes or path.name.startswith(tuple(prefixes)):
                print(path.name, flush=True)
                run(path)
                print(f"  {path.stat().st_size / 1024:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
