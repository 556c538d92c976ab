"""Private functions of the libraries below Parley, one module a library.

Each is listed with the reason it is needed and the public alternative, if there is one;
tests/library_compat calls every one of them, so that a release that changes one fails there first.
"""
