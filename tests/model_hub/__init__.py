"""Model families by the names on the model hub, each as a tiny random checkpoint of its real architecture.

``results.json`` is what became of each in vLLM, written by `make families-all`; docs/families.md is made from it.
"""
