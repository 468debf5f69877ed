"""Made-up scores by threshold (the values of Figure 6) and by samples per feature, for the tests of the tables and of the claims."""

import numpy as np
import pandas as pd

SEEDS = (42, 43, 44)


def curve(x, values, spread=0.02, **counts):
    """`values` per x in percent; seeds differ by `spread` in another order at every x."""
    return pd.DataFrame(
        [
            {
                x: k,
                **{c: v[i] for c, v in counts.items()},
                "seed": s,
                "auprc": (value + spread * ((i + j) % 3)) / 100,
                "des": value / np.log10(counts["n_samples"][i]) if counts["n_samples"][i] > 1 else np.nan,
            }
            for i, (k, value) in enumerate(values.items())
            for j, s in enumerate(SEEDS)
        ]
    )


DELTAS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)


def make_by_delta(
    values=(49.12, 46.85, 44.20, 45.47, 45.98, 43.23),
    missing=(214, 182, 108, 110, 112, 60),
    n_samples=(200, 170, 100, 100, 100, 50),
    **kw,
):
    return curve("delta", dict(zip(DELTAS, values)), missing=missing, n_samples=n_samples, **kw)


def make_by_samples(values=(60.0, 62.0, 63.0, 63.5, 63.9), n_samples=(20, 40, 60, 80, 100), **kw):
    return curve("samples_per_feature", dict(zip(range(1, 6), values)), n_samples=n_samples, **kw)
