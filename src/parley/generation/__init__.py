"""Old name of `parley.inference`, read for one version."""
