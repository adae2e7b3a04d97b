"""The bench: what a pool costs in perplexity, KL divergence, needles and seconds, at how many bytes on the device.

    sides     a way to keep the cache: policy, pool, cache type; and a context of it
    measure   texts read as if they were generated, each prediction compared with the reference's
    records   CSV rows and arrays, with commit, machine, model, command and configuration
    quality, needles    what `asrkf bench quality`, `cuts` and `needles` do
    looks     missed attention and second looks (scripts/bench)
    speed, process      each side in a process of its own, upstream's with the unpatched library (scripts/bench)
    tables, plots       README's tables and pictures, of the committed rows
    command   the command line

Every side reads the same real texts. The reference is upstream's full cache in F16; what it predicts is kept in the cache
folder and reused, and so is every finished measurement: a run that was interrupted goes on where it stopped.
"""

from .command import add_arguments, main
from .records import describe

__all__ = ["add_arguments", "describe", "main"]
