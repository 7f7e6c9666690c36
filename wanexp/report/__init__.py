"""A sweep as one page that answers first: cells, figures, tables, and the comparison with an older sweep."""
