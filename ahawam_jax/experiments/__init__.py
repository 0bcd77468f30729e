"""Studies: variants as frozen records, results as JSON lines, pages made from them."""
