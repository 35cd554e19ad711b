"""Pages of reference that are written from the code: `make reference`."""

MARK = "<!-- Written by `make reference` from the code (tools/reference): change that, not this page. -->"
