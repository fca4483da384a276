"""Doors to other people's models: each converts names, layouts and scalings once, and is gone.

Inside, there is one layout and one clock; nothing but these files knows any other.
"""
