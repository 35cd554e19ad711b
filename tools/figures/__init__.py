"""The drawings of docs/how-it-works.md, made by code from layouts and result files: `make pictures`."""
