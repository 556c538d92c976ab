"""The data doctor: what a data set holds, what is wrong with its rows, and which setting cures it.

`diagnose` reads the rows once and returns a Diagnosis; checks of single rows are entries of ROW_CHECKS.
"""
