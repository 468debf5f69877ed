"The run cells of a notebook, executed here with stand-ins for what earlier stages left."

import ast
import json
from pathlib import Path

from fac_synthesis.run.parameters import resolve_parameters
from fac_synthesis.run.stages import Run, seed_everything

NBS = Path(__file__).resolve().parent.parent / "nbs"
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def run_cells(stage: str, stand_ins: dict, **given) -> Run:
    """The run of a notebook whose run cells were executed; `given` are parameters, as on a command line.

    Of the cells of examples only imports and definitions are executed. What a run cell ends with is displayed
    in a notebook; here it is evaluated and dropped.
    """
    names = {"__name__": "__main__", "In": [""], "display": str}
    cells = json.loads((NBS / f"{stage}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    seed_everything(0)
    for source in sources:
        names["In"].append(source)
        if "eval: false" in source:
            if "run" not in names:
                names["run"] = Run(stage, resolve_parameters(stage, "mini", given), names)
                names |= stand_ins
            exec(compile(source, stage, "exec"), names)
            continue
        tree = ast.parse(source)
        if "#| export" not in source:
            tree.body = [node for node in tree.body if isinstance(node, KEPT)]
        exec(compile(tree, stage, "exec"), names)
    return names["run"]
