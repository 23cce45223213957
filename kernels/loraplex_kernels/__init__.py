"""The device side of Loraplex: every op with a torch reference, faster forms where one exists.

Nothing here knows of requests, sequences or servers. An op takes the arena (one flat buffer of
bytes), the adapter tables that say where each adapter's weights lie in it, and the segments that
say which rows of the batch belong to which adapter.
"""
