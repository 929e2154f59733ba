"""Engines that bring a method of their own: what they take for a setting of tokprune.

Each module says of one engine which methods and models it has, and how a method becomes options in
its words. None of the engines is imported.
"""
