"""Which records form which batch, and what is drawn for each.

Both are the same however many ranks share the records, and after a resume. Nothing here keeps a state. The
order of an epoch is a function of the seed and the epoch, what is drawn for a record a function of the seed
and its place, so that update s of a run sees the same on one process and on many.
"""

import torch


def seed_of(*numbers):
    """Several integers -> one seed below 2^63, different for different integers as far as a hash can be."""
    seed = 0
    for n in numbers:
        seed = (seed ^ (n + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        seed ^= seed >> 31
    return seed >> 1


class BatchSampler:
    """Which records form which batch: an endless stream of shuffles, one per epoch, cut into global batches.

    Yields lists of (epoch, index), a micro-batch of this rank each, from update `start` on. Update s
    of the run always sees the same records, however many ranks and micro-batches share them and
    wherever a run was resumed.
    """

    def __init__(self, count, batch_size, accumulation, rank, world, seed, start, stop):
        self.count = count
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world = world
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self):
        return (self.stop - self.start) * self.accumulation

    def __iter__(self):
        share = self.batch_size * self.accumulation  # of one rank in one update
        epoch, shuffle = -1, []

        for step in range(self.start, self.stop):
            for a in range(self.accumulation):
                # The global batch holds the ranks' shares one after the other, and a share its micro-batches.
                first = step * share * self.world + self.rank * share + a * self.batch_size

                batch = []
                for n in range(first, first + self.batch_size):
                    if n // self.count != epoch:
                        epoch = n // self.count
                        g = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                        shuffle = torch.randperm(self.count, generator=g).tolist()
                    batch.append((epoch, shuffle[n % self.count]))
                yield batch
