"""Everything that knows verl: nothing else in this project imports it.

Contract: made for the verl release that `versions.py` names; every part that verl starts by itself refuses
another one. Importing this package imports neither verl nor Ray.
"""
