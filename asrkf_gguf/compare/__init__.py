"""`asrkf compare`: what a pool gains and costs on this machine, with one's own model and text, beside upstream's caches.

    sides      which caches are compared
    passages   what every side reads: a passage of the text, with facts hidden in it
    run        sides in turns, round by round: each opens, reads, decodes and answers
    progress   how long it takes, the bar, and Control-C
    report     the figures, made of what the run saw
    reading    what they come to, in a sentence or two
    tables     the report for a terminal, and as CSV
    page       the report as a page with plots
    command    the command line

How predictions are compared and facts are hidden is the bench's. `kv_policy="full"` is upstream's cache, bit for bit, so no second build
is needed.
"""

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
