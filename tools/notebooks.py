"""Runs the notebooks from the top, each in an empty folder of its own. A cell that fails, or a command in one, ends it.

python tools/notebooks.py                    # all of them: `make notebooks`
python tools/notebooks.py --write compare    # this one, and what it showed is kept in its file
"""

import argparse
import json
import os
import re
import sys
import time
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 900  # of one cell
# In IPython a command that fails lets its cell go on.
STRICT = """
def strict(command, run=get_ipython().system):
    run(command)
    assert get_ipython().user_ns["_exit_code"] == 0, command
get_ipython().system = strict
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(path: Path, folder: Path) -> Any:
    """The notebook with what its cells show now.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    del notebook.cells[0]
    return notebook


def tidied(notebook: Any, folder: Path) -> Any:
    """Without what tells of the machine and the moment, so that the same outputs are the same file."""
    count = 0
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = count = count + 1
        # What libraries warn of is of this environment.
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if output.output_type == "stream":
                output.text = plain(output.text, folder)
            elif "data" in output:
                # What has a picture or text needs no HTML beside it, which is the same with colours.
                output.data = {kind: value for kind, value in output.data.items() if kind != "text/html"}
                output.data |= {"text/plain": plain(output.data["text/plain"], folder)}
                if "image/png" in output.data:
                    output.data["image/png"] = small(output.data["image/png"])
                output.metadata = {}
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def plain(text: str, folder: Path) -> str:
    """What is left to read: no colours, of a line that was written over its last state, and paths from the notebook's folder."""
    lines = [line.split("\r")[-1].rstrip() for line in ESCAPES.sub("", text).replace("\r\n", "\n").split("\n")]
    return "\n".join(lines).replace(f"{folder}/", "").replace(str(folder), ".")


def small(picture: str) -> str:
    """The same picture with so few colours that it may stand in a repository."""
    content = BytesIO()
    Image.open(BytesIO(b64decode(picture))).convert("RGB").quantize(32).save(content, "png", optimize=True)
    return b64encode(content.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, by their names without .ipynb; all of them if none is named")
    parser.add_argument("--write", action="store_true", help="keep what they showed in their files")
    asked = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for `!gatewise`
    for name in asked.names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path, began = FOLDER / f"{name}.ipynb", time.monotonic()
        with TemporaryDirectory() as folder:
            notebook = tidied(run(path, Path(folder)), Path(folder))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if asked.write:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
