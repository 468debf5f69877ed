"The stream of tokens and its shuffle buffer, on a small made-up source."

from functools import partial

import pytest
import torch
from toy_source import TEXTS, ToySource, all_tokens, rows

from fac_synthesis.run.parameters import UserError
from fac_synthesis.sae.token_stream import BEGINNING, Harvest, Position, ShuffleBuffer, stored, within_norm

torch.set_num_threads(1)


def harvest(source=None, **changes) -> Harvest:
    return Harvest(source or ToySource(), TEXTS, **dict(seed=0, batch_tokens=64, window_texts=16) | changes)


def stream(begin=BEGINNING, epochs=1, **changes):
    return harvest(**changes).stream(begin, epochs)


def counted() -> tuple[ToySource, list]:
    "A source, and a list that grows with each of its calls."
    source, calls = ToySource(), []

    def residuals(texts, batch_tokens):
        calls.append(1)
        return ToySource.residuals(source, texts, batch_tokens)

    source.residuals = residuals
    return source, calls


def assert_same_stream(got, want, change=lambda x: x):
    for (x, position), (y, other) in zip(got, want, strict=True):
        assert torch.equal(x, change(y)) and position == other


def test_stream_covers_every_text_once_per_epoch_and_reshuffles():
    epochs = {e: torch.cat([x for x, p in stream(epochs=2) if p.epoch == e]) for e in (0, 1)}
    assert rows(epochs[0]) == rows(all_tokens()) == rows(epochs[1])
    assert not torch.equal(epochs[0], epochs[1])


def test_stream_continues_from_any_position():
    whole = list(stream(epochs=2))
    for i, (_, position) in enumerate(whole):
        assert_same_stream(stream(position, epochs=2), whole[i + 1 :])


@pytest.mark.parametrize("keep_gb", [3e-6, 1.0])
def test_remembered_windows_give_the_same_bytes(keep_gb):
    source, calls = counted()
    remembering = harvest(source, keep_gb=keep_gb)
    assert_same_stream(list(remembering.stream(epochs=3)), list(stream(epochs=3)))
    assert len(calls) == 4 if keep_gb == 1.0 else 4 < len(calls) <= 12
    assert keep_gb == 1.0 or sum(x.nbytes for xs in remembering.kept.values() for x in xs) <= 3000


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_deal_every_text_once(shards):
    dealt = torch.cat([x for s in range(shards) for x, _ in stream(shard=s, shards=shards)])
    assert rows(dealt) == rows(torch.cat([x for x, _ in stream()]))
    with pytest.raises(UserError, match="give 4 windows of 16, too few for 5 shards"):
        stream(shards=5)


def test_stored_windows_are_read_back_and_survive_a_kill(tmp_path):
    source, calls = counted()
    store = tmp_path / "store"
    broken = harvest(source, store=store).stream(epochs=2)
    for _ in range(6):
        next(broken)
    (store / "window-000099.part").write_bytes(b"half")
    got, want = list(harvest(source, store=store).stream(epochs=2)), list(stream(epochs=2))
    assert len(calls) == 4 and len(list(store.glob("*.safetensors"))) == 4
    assert_same_stream(got, want, change=lambda x: x.bfloat16().float())


def test_shards_store_their_windows_under_different_names(tmp_path):
    for shard in (0, 1):
        list(stream(shard=shard, shards=2, store=tmp_path / "store"))
    names = sorted(file.stem for file in (tmp_path / "store").iterdir())
    assert names == [f"window-{number:06d}" for number in range(4)]


def test_a_stored_file_is_not_computed_again(tmp_path):
    file, cpu = tmp_path / "store" / "window.safetensors", torch.device("cpu")
    first = list(stored(file, (x for x, _ in stream()), cpu))

    def never():
        raise AssertionError("the file is there")
        yield

    for a, b in zip(first, stored(file, never(), cpu), strict=True):
        assert torch.equal(a, b)


def test_outliers_are_masked_by_option_only():
    x = torch.tensor([[1.0, 0], [0, 1.1], [0.9, 0], [0, 30.0]])
    assert within_norm(x, 10).tolist() == [True, True, True, False] and within_norm(x, 0).all()


@pytest.mark.parametrize("n", [7, 64, 100])
def test_buffer_draws_each_token_once(n):
    buffer = ShuffleBuffer(stream, size=256, batch_tokens=64, seed=0)
    drawn, fills = [buffer.draw(n)], set()
    while len(drawn[-1]):
        drawn.append(buffer.draw(n))
        fills.add(buffer.x_SD.data_ptr())
        assert sorted(torch.cat([buffer.waiting, buffer.free]).tolist()) == list(range(256))
    streamed = torch.cat([x for x, _ in stream()])
    assert rows(torch.cat(drawn)) == rows(streamed) and not torch.equal(torch.cat(drawn), streamed)
    assert len(fills) == 1, "the buffer is refilled in place"


endless = partial(stream, epochs=None)


def test_buffer_order_depends_on_the_seed_only():
    first, again, other = (ShuffleBuffer(endless, 256, 64, seed).draw(100) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_buffer_state_restores_the_sequence():
    first, second = (ShuffleBuffer(endless, 256, 64, seed=0) for _ in range(2))
    for _ in range(5):
        first.draw(60)
    state = first.state()
    second.restore({name: part.clone() if torch.is_tensor(part) else part for name, part in state.items()})
    for _ in range(20):
        assert torch.equal(first.draw(60), second.draw(60))


def test_a_bfloat16_buffer_rounds_and_nothing_else():
    half, whole = (ShuffleBuffer(endless, 256, 64, 0, dtype).draw(100) for dtype in ("bfloat16", "float32"))
    assert torch.equal(half, whole.bfloat16().float()) and not torch.equal(half, whole)


def test_a_batch_larger_than_announced_is_refused():
    def big(begin):
        yield torch.zeros(300, 4), Position()

    with pytest.raises(UserError, match="raise batch_tokens"):
        ShuffleBuffer(big, 256, 64, 0).draw(8)
