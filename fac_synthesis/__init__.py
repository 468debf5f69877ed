"""Feature Activation Coverage: measure what a data set activates in a model, and fill what it lacks."""

__version__ = "0.1.0"


def _export_in_a_notebook():
    "In a kernel of this project, notebooks that were edited are exported before anything of them is imported."
    import os
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    in_a_clone = (root / "settings.ini").exists() and (root / "nbs").is_dir()
    # the runner has exported already, before it started this kernel
    if sys.modules.get("ipykernel") and in_a_clone and not os.environ.get("FAC_RESOLVED"):
        from .run.export import export_edited

        export_edited()


_export_in_a_notebook()
