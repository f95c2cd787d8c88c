"""Each notebook installs from the checkout, and runs from top to bottom in a kernel of its own."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def installed(path, names, monkeypatch):
    """What the first cell of a notebook gives pip where lepton_jax isn't there."""
    given = []

    class Shell:
        def run_line_magic(self, magic, line):
            assert magic == "pip"
            given.append(line.format(**names))

    cells = nbformat.read(path, as_version=4).cells
    source = next(cell.source for cell in cells if cell.cell_type == "code")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lepton_jax" else find(name)
    )
    names |= {"get_ipython": Shell}
    exec(TransformerManager().transform_cell(source), names)
    return given


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_first_cell_installs_the_checkout_or_says_where_it_looked(path, tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    line, *_ = installed(path, {}, monkeypatch)
    assert line == f'install -q --upgrade-strategy only-if-needed "{NOTEBOOKS.parent}"'
    monkeypatch.chdir(tmp_path)  # as in Colab, which doesn't begin in the notebook's folder
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.parent} has no .*: set CHECKOUT"):
        installed(path, {}, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, smollm2_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))  # of the kernel: nothing to install
    notebook = nbformat.read(path, as_version=4)
    stored = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(stored), "commit notebooks without outputs"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1))
