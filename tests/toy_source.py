"A small made-up source of tokens, which the tests of token stream, evaluation and pretraining share."

from types import SimpleNamespace

import torch
import torch.nn.functional as F

TEXTS = [" ".join(str((7 * w + 3 * t) % 50) for t in range(4 + w % 5)) for w in range(60)]


class ToySource:
    """Word directions plus half of the previous word's; reads out the current word.

    With `special` each text has a first token of enormous norm.
    """

    d_model, layer, source = 16, 2, "toy"
    directions_VD = F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), dim=1)

    def residuals(self, texts, batch_tokens=64, special=False):
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i].split()))
        n_texts = batch_tokens // 8
        for begin in range(0, len(by_length), n_texts):
            parts = [self.one(i, texts[i], special) for i in by_length[begin : begin + n_texts]]
            yield SimpleNamespace(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def one(self, i, text, special=False):
        ids = torch.tensor([0] * special + [int(word) for word in text.split()])
        own, user = self.directions_VD[ids], torch.arange(len(ids)) >= special
        previous = F.pad(own * user[:, None], (0, 0, 1, 0))[:-1]
        return dict(
            x_ND=torch.where(user[:, None], 5 * own + 2.5 * previous + 1, 90.0),
            text_N=torch.full_like(ids, i),
            position_N=torch.arange(len(ids)) - int(special),
            token_N=ids,
            user_N=user,
        )

    def edited_losses(self, texts, edits, special=False):
        parts = [self.one(i, text, special) for i, text in enumerate(texts)]
        x, ids = torch.cat([part["x_ND"] for part in parts]), torch.cat([part["token_N"] for part in parts])
        losses, first = {}, None
        for name, edit in edits.items():
            log_p = (3 * ((edit(x) if edit else x) - 1) @ self.directions_VD.T).log_softmax(1)
            first = log_p if first is None else first
            kl = F.kl_div(log_p, first, reduction="batchmean", log_target=True)
            losses[name] = (F.nll_loss(log_p, ids).item(), kl.item())
        return losses


def all_tokens(source=None, **options) -> torch.Tensor:
    "The residuals of all TEXTS."
    return torch.cat([r.x_ND for r in (source or ToySource()).residuals(TEXTS, **options)])


def rows(x: torch.Tensor) -> list:
    "The rows of a matrix, sorted: the same for the same tokens in any order."
    return sorted(map(tuple, x.tolist()))
