"""Importing this makes the garbage collector pass over all that exists now: libraries, a million objects that all stay.

The command line does the same. Without it, each small run of a test walks through them: two fifths of its time.
"""

import gc

gc.collect()
gc.freeze()
