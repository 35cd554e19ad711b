"""The table and the plot of docs/accuracy.md."""
