"""The order of records: one stream however it is shared, another for every epoch and seed."""

from crystal.runtime.sampling import BatchSampler, seed_of


def test_order_is_one_stream_however_it_is_shared():
    """Four updates of eight records are one stream, read rank by rank and micro-batch by micro-batch.

    Not only the same sets: for 1 rank x 8, 2 x 2 x 2 accumulated, 2 x 4, 4 x 1 x 2, and resumed at 2.
    """

    def stream(batch_size, accumulation, world, seed=5, start=0):
        ranks = [
            list(BatchSampler(10, batch_size, accumulation, rank, world, seed, start, 4))
            for rank in range(world)
        ]
        found = []
        for update in range(4 - start):
            for batches in ranks:
                for batch in batches[update * accumulation : (update + 1) * accumulation]:
                    assert len(batch) == batch_size
                    found += batch
        return found

    whole = stream(8, 1, 1)
    assert stream(2, 2, 2) == stream(4, 1, 2) == stream(1, 2, 4) == whole
    assert stream(8, 1, 1, start=2) == whole[16:]
    epochs = [whole[n : n + 10] for n in (0, 10, 20)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number} and sorted(i for _, i in epoch) == list(range(10))
    # Another one in every epoch, with every seed, and none is the file's.
    orders = [[i for _, i in epoch] for epoch in [*epochs, stream(8, 1, 1, seed=6)[:10]]] + [list(range(10))]
    assert len({tuple(order) for order in orders}) == 5


def test_seeds_differ():
    assert len({seed_of(a, b, c) for a in range(20) for b in range(20) for c in range(20)}) == 8000
    assert all(0 <= seed_of(a, 7) < 2**63 for a in range(100))
