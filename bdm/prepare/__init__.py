"""Raw pictures -> prepared shards, once, so that training reads moments and text features instead of
computing them.
"""
