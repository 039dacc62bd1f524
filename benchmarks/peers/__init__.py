"""Other runtimes on the same networks and blocks: one file each, none of them required.

`python -m benchmarks.peers` (`mnv2 bench --peers`) checks and times those that are installed.
"""
