"""``report.html``: the whole analysis in one file that opens from disk."""
